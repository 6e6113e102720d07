// What moves on the pages: pieces that the server has rendered, put where they belong. Without this script the pages
// are the same, and are loaded again by hand.

const said = document.getElementById("said");
const stale = document.getElementById("stale");

const say = (root) => {
  const words = root.querySelector("[data-say]")?.dataset.say;
  if (words && said.textContent !== words) said.textContent = words;
};

const follow = (address) => {
  const shown = new Map();
  const source = new EventSource(address);
  source.addEventListener("pieces", (event) => {
    const { job, pieces } = JSON.parse(event.data);
    const home = document.querySelector(`[data-job="${CSS.escape(job)}"]`);
    for (const [name, html] of Object.entries(pieces)) {
      const place = home?.querySelector(`[data-piece="${CSS.escape(name)}"]`);
      if (!place || shown.get(place) === html) continue;
      shown.set(place, html);
      replace(place, html);
    }
  });
  source.addEventListener("end", () => source.close());
  source.addEventListener("open", () => { stale.hidden = true; });
  source.addEventListener("error", () => { stale.hidden = source.readyState !== EventSource.CLOSED; });
  addEventListener("pagehide", () => source.close());
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
};

// Bars keep their element, so that they glide; opened parts stay open; focus is not lost to a piece that went away.
const replace = (place, html) => {
  const fresh = document.createElement("template");
  fresh.innerHTML = html;
  const bars = place.querySelectorAll("progress");
  fresh.content.querySelectorAll("progress").forEach((bar, index) => {
    if (!bars[index]) return;
    bars[index].value = bar.value;
    bar.replaceWith(bars[index]);
  });
  const open = [...place.querySelectorAll("details")].map((part) => part.open);
  fresh.content.querySelectorAll("details").forEach((part, index) => { part.open ||= open[index] ?? false; });
  const had = place.contains(document.activeElement);
  const at = had ? [...place.querySelectorAll("a, button, summary")].indexOf(document.activeElement) : -1;
  place.replaceChildren(fresh.content);
  if (had) (place.querySelectorAll("a, button, summary")[at] ?? document.getElementById("main")).focus();
  say(place);
};

const planAsTyped = (form) => {
  const plan = document.getElementById("plan");
  const target = form.elements.target_memory;
  const slider = document.getElementById("slider");
  let timer = 0;
  let asking = null;

  const ask = async () => {
    asking?.abort();
    asking = new AbortController();
    plan.classList.add("waits");
    try {
      const body = new URLSearchParams(new FormData(form));
      const answer = await fetch(form.dataset.plan, { method: "POST", body, signal: asking.signal, redirect: "error" });
      if (!answer.ok) { stale.hidden = false; return; }
      plan.innerHTML = await answer.text();
      showFaults();
      showRange();
      say(plan);
    } catch (error) {
      if (error.name === "AbortError") return;
      stale.hidden = false;
    }
    plan.classList.remove("waits");
  };

  const showFaults = () => {
    for (const slot of form.querySelectorAll("[data-slot]")) {
      const fault = plan.querySelector(`[data-fault="${CSS.escape(slot.dataset.slot)}"]`);
      // An empty field that was not filled in yet is no mistake.
      const isAsked = slot.dataset.slot !== "target_memory" || target.value.trim() !== "";
      slot.textContent = isAsked ? fault?.textContent ?? "" : "";
      const field = form.querySelector(`[aria-describedby~="${CSS.escape(slot.id)}"]`);
      if (slot.textContent) field?.setAttribute("aria-invalid", "true");
      else field?.removeAttribute("aria-invalid");
    }
  };

  const showRange = () => {
    const { smallest, before } = plan.firstElementChild?.dataset ?? {};
    if (!smallest) return;
    slider.hidden = false;
    slider.min = smallest;
    slider.max = before;
    slider.step = Math.max(1, Math.ceil((before - smallest) / 400));
    const bytes = bytesOf(target.value);
    if (document.activeElement !== slider) slider.value = bytes ?? before;
    slider.setAttribute("aria-valuetext", wordsOf(Number(slider.value)));
  };

  slider.addEventListener("input", () => {
    const bytes = Number(slider.value);
    target.value = bytes <= Number(slider.min) ? slider.min : wordsOf(bytes);
    slider.setAttribute("aria-valuetext", target.value);
  });
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(ask, 300);
  });
  document.getElementById("show").hidden = true;
  showRange();
};

const UNITS = { "": 1, B: 1, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, KIB: 2 ** 10, MIB: 2 ** 20, GIB: 2 ** 30, TIB: 2 ** 40 };

const bytesOf = (text) => {
  const match = /^\s*([\d.]+)\s*([a-z]*)\s*$/i.exec(text);
  const unit = UNITS[match?.[2].toUpperCase()];
  return match && unit ? Number(match[1]) * unit : null;
};

const wordsOf = (bytes) => {
  const unit = ["TB", "GB", "MB", "KB"].find((name) => bytes >= UNITS[name]) ?? "B";
  const count = bytes / UNITS[unit];
  return `${count.toFixed(count < 10 ? 3 : count < 100 ? 2 : 1)} ${unit}`;
};

if (document.body.dataset.live) follow(document.body.dataset.live);
const draft = document.getElementById("draft");
if (draft) planAsTyped(draft);

// Says what lies under the pointer on a heat map; everything else on the page works without it.
const data = JSON.parse(document.getElementById("report").textContent);
const fate = { x: "dropped", m: "merged into another expert", k: "kept" };

function told(map, block, expert) {
  const row = data.page.experts.find((r) => r.block === block);
  if (!row || expert >= row.fate.length) return "";
  const source = data.blocks.find((r) => r.index === block);
  const tokens = source.expert_tokens ? `, ${source.expert_tokens[expert].toLocaleString("en")} calibration tokens` : "";
  const bits = row.bits[expert] === null ? "" : `, ${row.bits[expert].toFixed(2)} bits per weight`;
  const into = Object.entries(source.merged || {}).find(([, group]) => group.includes(expert));
  const where = row.fate[expert] === "m" && into ? `merged into expert ${into[0]}` : fate[row.fate[expert]];
  return `Block ${block}, expert ${expert}: ${where}${bits}${tokens}`;
}

for (const map of document.querySelectorAll(".map")) {
  const image = map.querySelector("img");
  const blocks = JSON.parse(map.dataset.blocks);
  const hint = map.parentElement.querySelector(".hint");
  image.addEventListener("pointermove", (event) => {
    const box = image.getBoundingClientRect();
    const expert = Math.floor(((event.clientX - box.left) / box.width) * Number(map.dataset.width));
    const row = Math.floor(((event.clientY - box.top) / box.height) * blocks.length);
    if (blocks[row] !== undefined) hint.textContent = told(map, blocks[row], expert);
  });
}

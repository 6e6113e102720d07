const report = JSON.parse(document.getElementById("report").textContent);
for (const map of document.querySelectorAll("[data-heat]")) {
  const rows = map.dataset.heat === "usage" ? report.blocks.filter((row) => row.expert_tokens) : report.blocks;
  map.addEventListener("mousemove", (event) => {
    const row = rows[Math.min(rows.length - 1, Math.floor((event.offsetY / map.clientHeight) * map.dataset.rows))];
    const expert = Math.floor((event.offsetX / map.clientWidth) * map.dataset.columns);
    if (!row || expert >= (row.experts_before || 0)) return;
    const into = Object.entries(row.merged || {}).find(([, group]) => group.includes(expert));
    const gone = row.action === "drop" || row.moe_layer === "drop";
    const kept = !gone && (!row.experts_kept || row.experts_kept.includes(expert));
    const fate = kept ? "kept" : !gone && into ? `folded into expert ${into[0]}` : "gone";
    const tokens = row.expert_tokens ? `, ${row.expert_tokens[expert]} calibration tokens` : "";
    map.closest("figure").querySelector("output").textContent = `block ${row.index}, expert ${expert}: ${fate}${tokens}`;
  });
}

// The attentions: heat maps on canvases, two colors away from nothing; frames and dots drawn over them.
const DEVIATION = "deviation";
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const theme = () => isDark() ? { none: "#1a1f28", more: "#ff9d4d", less: "#5aa2ff", line: "#e6e9ef" }
  : { none: "#ffffff", more: "#c2410c", less: "#1d4fbf", line: "#1b2230" };
function blend(share) {  // from -1 to 1
  const { none, more, less } = theme(), end = rgb(share < 0 ? less : more), start = rgb(none), by = Math.min(Math.abs(share), 1) ** .7;
  return start.map((from, k) => Math.round(from + (end[k] - from) * by));
}
const unpack = ({ bytes, limit }) => Float32Array.from(atob(bytes), (c) => (c.charCodeAt(0) << 24 >> 24) * limit / 127);
const warehouse = () => data.warehouses[+$("warehouse").value];

// The values shown and where their colors end: the mean, the deviation, a class's mean, or that less the mean.
function values() {
  const { maps } = warehouse(), [key, less] = $("what").value.split("-"), shown = unpack(maps[key]);
  if (less || !(key in data.classes)) return [shown, maps[key].limit];
  const mean = unpack(maps.mean);
  return [shown.map((value, k) => value + mean[k]), maps.mean.limit];
}
function drawHeat() {
  const { cells, layers } = warehouse(), [shown, most] = values(), rows = shown.length / cells;
  const top = most.toPrecision(2), { line } = theme();
  const swatch = (share) => `<i style="display:inline-block;width:18px;height:10px;background:rgb(${blend(share)})"></i>`;
  $("scale").innerHTML = `${swatch(-1)}${swatch(-.5)}${swatch(0)}${swatch(.5)}${swatch(1)} from -${top} to ${top}`;
  const high = Math.max(Math.min(760 / rows, 14), 1.2), labels = 170;
  let frames = "", at = 0;
  for (const layer of layers) {
    if (at) frames += `<line x1="0" x2="${cells}" y1="${at}" y2="${at}" stroke="${line}" stroke-opacity=".35"/>`;
    frames += `<rect x="${layer.start}" y="${at}" width="${layer.owned}" height="${layer.mixtures}" fill="none" stroke="${line}" stroke-width="1.5"/>`;
    if (rows <= 260) layer.anchors.forEach((cell, k) => {
      if (cell < cells) frames += `<path d="M${cell + .5} ${at + k + .5}h0" stroke="${line}" stroke-width="3.5" stroke-linecap="round"/>`;
    });
    at += layer.mixtures;
  }
  frames = frames.replaceAll("/>", ' vector-effect="non-scaling-stroke"/>');
  let names = "";
  for (const layer of layers) names += `<div style="height:${layer.mixtures * high}px;display:flex;align-items:center;justify-content:end;overflow:hidden;font-size:${Math.min(12, Math.max(layer.mixtures * high, 7))}px;line-height:1">${escape(layer.name)}</div>`;
  $("heat").innerHTML = `<div style="display:flex;gap:8px"><div style="width:${labels}px;flex:none;color:var(--soft)">${names}</div>
    <div id="map" style="position:relative;flex:1;max-width:${cells * 36}px;height:${rows * high}px">
    <canvas width="${cells}" height="${rows}" style="width:100%;height:100%"></canvas>
    <svg viewBox="0 0 ${cells} ${rows}" preserveAspectRatio="none" style="position:absolute;inset:0;width:100%;height:100%;overflow:visible">${frames}</svg></div></div>`;
  const map = $("map"), context = map.querySelector("canvas").getContext("2d"), picture = context.createImageData(cells, rows);
  shown.forEach((value, k) => picture.data.set([...blend(value / most), 255], 4 * k));
  context.putImageData(picture, 0, 0);
  map.onpointerleave = () => tip();
  map.onpointermove = (event) => {
    const box = map.getBoundingClientRect();
    const cell = Math.floor((event.clientX - box.left) / box.width * cells), row = Math.floor((event.clientY - box.top) / box.height * rows);
    if (cell < 0 || row < 0 || cell >= cells || row >= rows) return tip();
    let first = 0;
    const layer = layers.find((each) => row < first + each.mixtures || (first += each.mixtures, false));
    const owner = layers.find((each) => cell >= each.start && cell < each.start + each.owned), mixture = row - first;
    const lines = [["cell", `${cell}, of ${owner?.name ?? "nobody"}`], ["shown", shown[row * cells + cell].toPrecision(2)],
      ["anchored to", !layer.anchors.length ? "nothing" : layer.anchors[mixture] < cells ? `cell ${layer.anchors[mixture]}` : "the zero cell"], ["moved", layer.shift[mixture].toFixed(2)]];
    tip(event, `<b>${escape(layer.name)}, mixture ${mixture}</b><table>${lines.map(([a, b]) => `<tr><td>${a}</td><td>${escape(b)}</td></tr>`).join("")}</table>`);
  };
}

// A table whose cells are colored by their values, from 0 to `most`.
function heatTable(tops, rows, most, text) {
  const shade = (value) => { const c = blend(value / most); return `background:rgb(${c});color:${c[0] * .3 + c[1] * .6 + c[2] * .1 > 130 ? "#111" : "#fff"}`; };
  const head = tops.map((name) => `<th style="writing-mode:vertical-rl;transform:rotate(180deg);cursor:default;border:0">${escape(name)}</th>`).join("");
  return `<table style="width:auto;font-size:12px"><thead><tr><th style="border:0"></th>${head}</tr></thead><tbody>${rows.map(([name, cells]) =>
    `<tr><td>${escape(name)}</td>${cells.map((value) => `<td style="${shade(value)};text-align:center;padding:3px 6px" title="${value}">${text(value)}</td>`).join("")}</tr>`).join("")}</tbody></table>`;
}
function drawSharing() {
  const { layers, cells } = warehouse();
  $("sharing").innerHTML = heatTable([...layers.map((layer) => layer.name), "zero cell"], [...layers.map((layer) => [layer.name, layer.drawn]), ["all cells alike", [...layers.map((layer) => layer.owned / cells), 0]]], 1, (v) => Math.round(100 * v));
}
function drawUsage() {
  const { usage, layers } = warehouse(), W = 620, H = 260, top = Math.max(...usage, 1.5), y = scale(0, top, H - 34, 10), x = scale(0, usage.length, 40, W - 10);
  let out = "";
  for (const at of ticks(0, top, 4)) out += `<line class="grid" x1="40" x2="${W - 10}" y1="${y(at)}" y2="${y(at)}"/><text x="34" y="${y(at) + 4}" text-anchor="end">${at}</text>`;
  usage.forEach((value, cell) => {
    const owner = layers.findIndex((each) => cell >= each.start && cell < each.start + each.owned);
    out += `<rect x="${x(cell)}" y="${y(value)}" width="${Math.max(x(1) - x(0) - .6, .6)}" height="${y(0) - y(value)}" fill="rgb(${blend(owner % 2 ? .55 : .9)})"><title>cell ${cell}, of ${escape(layers[owner]?.name ?? "nobody")}: ${value.toFixed(2)}</title></rect>`;
  });
  out += `<line stroke="var(--soft)" stroke-dasharray="4 4" x1="40" x2="${W - 10}" y1="${y(1)}" y2="${y(1)}"/><text x="${W / 2}" y="${H - 8}" text-anchor="middle">cell; shades tell neighbouring owners apart</text>`;
  $("usage").innerHTML = `<svg class="plot" viewBox="0 0 ${W} ${H}" role="img" aria-label="How much each cell is used">${out}</svg>`;
}
function drawClasses() {
  const most = Math.max(...data.distances.flatMap(([, values]) => values), 1e-9);
  const rows = data.names.map((name, k) => [name, data.distances.map(([, values]) => values[k])]);
  $("classes").innerHTML = heatTable(data.distances.map(([name]) => name), rows, most, (v) => v.toFixed(2).replace(/^0/, ""));
}
function draw() { drawHeat(); drawSharing(); drawUsage(); drawClasses(); }

$("warehouse").innerHTML = data.warehouses.map((each, k) => `<option value="${k}">${escape(each.name)}</option>`).join("");
$("what").innerHTML = [["mean", "the mean over all images"], [DEVIATION, "the deviation over images"],
  ...data.classes.map((name, k) => [String(k), `class ${name}`]), ...data.classes.map((name, k) => [`${k}-mean`, `class ${name}, less the mean`])]
  .map(([key, text]) => `<option value="${key}">${escape(text)}</option>`).join("");
$("warehouse").onchange = $("what").onchange = draw;
redrawn.push(draw);
draw();

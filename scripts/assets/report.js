// The report: accuracy against cost, and learning curves. A budget n has a color, a backbone a shape and a dash.
const W = 620, H = 400, M = { left: 52, right: 20, top: 16, bottom: 46 };
const HUES = [[-2, "#8b5cf6"], [-1, "#3b82f6"], [0, "#12a594"], [1, "#7ba31c"], [2, "#ee8a1d"]];  // by log2(n)
const AXES = {
  backbone_params: "parameters of the backbone alone", params: "parameters", macs: "multiply-adds per image",
  hours: "device-hours of training", images_per_second: "images per second of training",
};
const SHAPES = [
  (r) => `<circle r="${r}"/>`,
  (r) => `<rect x="${-.9 * r}" y="${-.9 * r}" width="${1.8 * r}" height="${1.8 * r}"/>`,
  (r) => `<path d="M0 ${-1.2 * r}L${1.2 * r} ${.9 * r}H${-1.2 * r}Z"/>`,
  (r) => `<path d="M0 ${-1.35 * r}L${1.35 * r} 0L0 ${1.35 * r}L${-1.35 * r} 0Z"/>`,
  (r) => `<path d="M0 ${1.2 * r}L${1.2 * r} ${-.9 * r}H${-1.2 * r}Z"/>`,
  (r) => `<path d="M${-1.3 * r} ${-.5 * r}H${-.5 * r}V${-1.3 * r}H${.5 * r}V${-.5 * r}H${1.3 * r}V${.5 * r}H${.5 * r}V${1.3 * r}H${-.5 * r}V${.5 * r}H${-1.3 * r}Z"/>`,
];
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "12 5", "4 2 1 2"];
const hidden = { n: new Set(), backbone: new Set() };
let tab = Math.max(data.tabs.findIndex((each) => each.rows.some((row) => row.seeds)), 0), xKey = "", yKey = "";

const value = (n) => n === "static" ? 0 : n.includes("/") ? 1 / n.split("/")[1] : +n;
function color(n) {
  if (n === "static") return isDark() ? "#a3adbb" : "#6b7684";
  const at = Math.log2(value(n));
  return HUES.reduce((best, hue) => Math.abs(hue[0] - at) < Math.abs(best[0] - at) ? hue : best)[1];
}
const unique = (key) => [...new Set(data.tabs[tab].rows.map((row) => row[key]))];
const place = (backbone) => unique("backbone").indexOf(backbone);
const mark = (row, r, filled) => `<g fill="${filled ? color(row.n) : "var(--card)"}" stroke="${filled ? "var(--card)" : color(row.n)}"
  stroke-width="${filled ? 1.2 : 1.8}">${SHAPES[place(row.backbone) % SHAPES.length](r)}</g>`;
const visible = () => data.tabs[tab].rows.filter((row) => !hidden.n.has(row.n) && !hidden.backbone.has(row.backbone));
const numbers = (value, digits = 2) => value === null ? "-" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });

function frame(xs, ys, xLabel, yLabel, log) {
  const pad = (low, high, share) => [low - (high - low || 1) * share, high + (high - low || 1) * share];
  const [x0, x1] = log ? pad(Math.log(Math.min(...xs)), Math.log(Math.max(...xs)), .07).map(Math.exp) : [Math.min(...xs), Math.max(...xs)];
  const [y0, y1] = pad(Math.min(...ys), Math.max(...ys), .07);
  const x = scale(x0, x1, M.left, W - M.right, log), y = scale(y0, y1, H - M.bottom, M.top);
  let out = "";
  for (const at of ticks(y0, y1, 6)) out += `<line class="grid" x1="${M.left}" x2="${W - M.right}" y1="${y(at)}" y2="${y(at)}"/>
    <text x="${M.left - 8}" y="${y(at) + 4}" text-anchor="end">${+at.toPrecision(6)}</text>`;
  for (const at of ticks(x0, x1, 7, log).filter((at) => log || Number.isInteger(at))) out += `<line class="grid" y1="${M.top}" y2="${H - M.bottom}" x1="${x(at)}" x2="${x(at)}"/>
    <text x="${x(at)}" y="${H - M.bottom + 18}" text-anchor="middle">${short(at)}</text>`;
  out += `<line class="axis" x1="${M.left}" x2="${W - M.right}" y1="${H - M.bottom}" y2="${H - M.bottom}"/>
    <text x="${(M.left + W - M.right) / 2}" y="${H - 8}" text-anchor="middle">${escape(xLabel)}</text>
    <text transform="translate(13 ${(M.top + H - M.bottom) / 2}) rotate(-90)" text-anchor="middle">${escape(yLabel)}</text>`;
  return { x, y, out };
}

// Accuracy against cost: published figures hollow, measured ones filled, each backbone's joined in the order of cost.
function drawCost() {
  const label = data.labels[yKey], points = [];
  for (const row of visible()) {
    if (row[xKey] === null) continue;
    if (row.figures[yKey] != null && !points.some((p) => !p.measured && p.row.name === row.name))
      points.push({ row, at: row.figures[yKey], measured: false });
    if (row.scores[yKey]) points.push({ row, at: row.scores[yKey][0], spread: row.scores[yKey][1], measured: true });
  }
  const box = $("cost");
  if (!points.length) { box.innerHTML = `<p class="empty">No row has both ${escape(label)} and ${escape(AXES[xKey])}.</p>`; return; }
  const ends = points.flatMap((p) => [p.at - (p.spread ?? 0), p.at + (p.spread ?? 0)]);
  let { x, y, out } = frame(points.map((p) => p.row[xKey]), ends, AXES[xKey], `${label} (%)`, true);
  for (const p of points) Object.assign(p, { x: x(p.row[xKey]), y: y(p.at) });
  const labels = [];
  for (const backbone of unique("backbone")) for (const measured of [false, true]) {
    const line = points.filter((p) => p.row.backbone === backbone && p.measured === measured).sort((a, b) => value(a.row.n) - value(b.row.n));
    const budgets = line.filter((p) => p.row.n !== "static" && p.row.state !== "unfinished");
    if (!line.length) continue;
    out += `<polyline fill="none" stroke="var(--soft)" stroke-opacity=".7" stroke-dasharray="${measured ? "" : "3 4"}" points="${budgets.map((p) => `${p.x},${p.y}`).join(" ")}"/>`;
    if (measured && points.some((p) => p.row.backbone === backbone && !p.measured)) continue;  // it has its name
    labels.push(freePlace(line.reduce((a, b) => a.x > b.x ? a : b), backbone, points, labels));
  }
  for (const { x, y, anchor, text } of labels) out += `<text class="halo" x="${x}" y="${y}" text-anchor="${anchor}">${escape(text)}</text>`;
  points.forEach((p, k) => {
    if (p.spread) out += `<line stroke="${color(p.row.n)}" stroke-width="2" x1="${p.x}" x2="${p.x}" y1="${y(p.at - p.spread)}" y2="${y(p.at + p.spread)}"/>`;
    out += `<g class="point" data-k="${k}" transform="translate(${p.x} ${p.y})" opacity="${p.row.state === "unfinished" && p.measured ? .5 : 1}">${mark(p.row, 6, p.measured)}</g>`;
  });
  box.innerHTML = `<svg class="plot" viewBox="0 0 ${W} ${H}" role="img" aria-label="${escape(label)} against ${escape(AXES[xKey])}">${out}</svg>`;
  const plot = box.firstChild;
  plot.onpointerleave = () => tip();
  plot.onpointermove = (event) => {
    const at = inside(plot, event);
    const near = points.reduce((a, b) => Math.hypot(a.x - at.x, a.y - at.y) < Math.hypot(b.x - at.x, b.y - at.y) ? a : b);
    tip(event, Math.hypot(near.x - at.x, near.y - at.y) < 30 ? describe(near.row) : "");
  };
}
// Where a name beside its point covers the fewest points and other names.
function freePlace(point, text, points, labels) {
  const wide = 6.6 * text.length, { x, y } = point;
  const places = [[x + 12, y + 4, "start"], [x, y - 13, "middle"], [x, y + 22, "middle"], [x - 12, y + 4, "end"], [x + 6, y - 13, "end"], [x + 6, y + 22, "end"]].map(([px, py, anchor]) => {
    const left = px - { start: 0, middle: wide / 2, end: wide }[anchor], box = { left, right: left + wide, top: py - 11, bottom: py + 3 };
    const hit = (other) => other.left < box.right && other.right > box.left && other.top < box.bottom && other.bottom > box.top;
    const outside = box.left < M.left || box.right > W || box.top < 0 ? 9 : 0;
    const covered = points.filter((p) => hit({ left: p.x - 6, right: p.x + 6, top: p.y - 6, bottom: p.y + 6 })).length;
    return { x: px, y: py, anchor, text, ...box, cost: outside + covered + 2 * labels.filter(hit).length };
  });
  return places.reduce((best, place) => place.cost < best.cost ? place : best);
}
function inside(plot, event) {
  const box = plot.getBoundingClientRect();
  return { x: (event.clientX - box.left) * W / box.width, y: (event.clientY - box.top) * H / box.height };
}
function describe(row) {
  const lines = Object.keys(row.figures).map((key) => {
    const [mean, spread] = row.scores[key] ?? [null, null];
    return [data.labels[key], (mean === null ? "" : `${numbers(mean)}${spread === null ? "" : ` ± ${numbers(spread)}`}`)
      + (row.figures[key] == null ? "" : ` (published ${numbers(row.figures[key])})`) || "-"];
  });
  if (row.params !== null) lines.push(["parameters", numbers(row.params, 0)]);
  if (row.macs !== null) lines.push(["multiply-adds", numbers(row.macs, 0)]);
  lines.push(["state", `${row.state}, ${row.epochs[0]} of ${row.epochs[1]} epochs${row.seeds ? `, ${row.seeds} seed${row.seeds > 1 ? "s" : ""}` : ""}`]);
  if (row.departures.length) lines.push(["other settings", row.departures.join("; ")]);
  return `<b>${escape(row.name)}</b><table>${lines.map(([a, b]) => `<tr><td>${escape(a)}</td><td>${escape(b)}</td></tr>`).join("")}</table>`;
}

// Learning curves: the mean over seeds, their range as a band.
function drawCurves() {
  const rows = visible().filter((row) => row.curve.length), box = $("curves"), label = data.labels[data.tabs[tab].scores[0]];
  if (!rows.length) { box.innerHTML = `<p class="empty">No run of these has an epoch yet.</p>`; return; }
  const all = rows.flatMap((row) => row.curve);
  const last = Math.max(...all.map((p) => p[0]));
  const low = all.map((p) => p[2]).sort((a, b) => a - b)[Math.floor($("part").value * (all.length - 1))];
  let { x, y, out } = frame([Math.min(1, last - 1), last], [low, ...all.map((p) => p[3])], "epoch", `${label} (%)`, false);
  out += `<clipPath id="clip"><rect x="${M.left}" y="${M.top}" width="${W - M.left - M.right + 3}" height="${H - M.top - M.bottom}"/></clipPath><g clip-path="url(#clip)">`;
  rows.forEach((row, k) => {
    const dash = DASHES[place(row.backbone) % DASHES.length], back = [...row.curve].reverse();
    if (row.seeds > 1) out += `<polygon fill="${color(row.n)}" fill-opacity=".15" points="${row.curve.map((p) => `${x(p[0])},${y(p[3])}`).join(" ")} ${back.map((p) => `${x(p[0])},${y(p[2])}`).join(" ")}"/>`;
    out += row.curve.length === 1 ? `<circle r="3" fill="${color(row.n)}" cx="${x(row.curve[0][0])}" cy="${y(row.curve[0][1])}"/>`
      : `<polyline fill="none" stroke="${color(row.n)}" stroke-width="2" stroke-linejoin="round" stroke-dasharray="${dash}" data-k="${k}" points="${row.curve.map((p) => `${x(p[0])},${y(p[1])}`).join(" ")}"/>`;
  });
  box.innerHTML = `<svg class="plot" viewBox="0 0 ${W} ${H}" role="img" aria-label="Learning curves">${out}</g><line id="cross" class="axis" y1="${M.top}" y2="${H - M.bottom}" opacity="0"/></svg>`;
  const plot = box.firstChild, cross = $("cross");
  plot.onpointerleave = () => { tip(); cross.setAttribute("opacity", 0); };
  plot.onpointermove = (event) => {
    const at = inside(plot, event), epochs = [...new Set(all.map((p) => p[0]))];
    const epoch = epochs.reduce((a, b) => Math.abs(x(a) - at.x) < Math.abs(x(b) - at.x) ? a : b);
    for (const end of ["x1", "x2"]) cross.setAttribute(end, x(epoch));
    cross.setAttribute("opacity", 1);
    const found = rows.map((row) => [row, row.curve.find((p) => p[0] === epoch)]).filter(([, p]) => p).sort((a, b) => b[1][1] - a[1][1]);
    tip(event, `<b>epoch ${epoch}</b><table>${found.slice(0, 16).map(([row, p]) => `<tr><td style="color:${color(row.n)}">&#9632;</td><td>${escape(row.name)}</td><td>${numbers(p[1])}</td></tr>`).join("")}</table>`);
  };
}

function drawLegend() {
  const chip = (kind, key, icon, text) => `<button type="button" data-kind="${kind}" data-key="${escape(key)}" aria-pressed="${!hidden[kind].has(key)}">${icon}${escape(text)}</button>`;
  const budgets = unique("n").sort((a, b) => value(a) - value(b)), backbones = unique("backbone");
  const ball = (n) => `<svg viewBox="-7 -7 14 14"><circle r="6" fill="${color(n)}"/></svg>`;
  const shape = (k) => `<svg viewBox="-7 -7 14 14" fill="var(--soft)">${SHAPES[k % SHAPES.length](5)}</svg>`;
  const filled = `<svg viewBox="-7 -7 14 14" fill="var(--soft)"><circle r="5"/></svg>`, hollow = filled.replace("fill=\"var(--soft)\"", "fill=\"none\" stroke=\"var(--soft)\" stroke-width=\"1.8\"");
  $("legend").innerHTML = `<span>n</span>${budgets.map((n) => chip("n", n, ball(n), n)).join("")}
    <span>backbone</span>${backbones.map((b, k) => chip("backbone", b, shape(k), b)).join("")}
    ${data.tabs[tab].published ? `<span>${filled} measured</span><span>${hollow} published</span>` : ""}`;
  for (const button of $("legend").querySelectorAll("button")) button.onclick = () => {
    const set = hidden[button.dataset.kind], key = button.dataset.key;
    set.has(key) ? set.delete(key) : set.add(key);
    draw();
  };
}

function draw() { drawLegend(); drawCost(); drawCurves(); }
function choose(number) {
  tab = number;
  const { rows, scores } = data.tabs[tab];
  const keys = Object.keys(AXES).filter((key) => rows.some((row) => row[key] !== null));
  xKey = keys.includes(xKey) ? xKey : keys[0] ?? "params";
  yKey = scores.includes(yKey) ? yKey : scores[0];
  const options = (all, chosen, names) => all.map((key) => `<option value="${key}"${key === chosen ? " selected" : ""}>${escape(names[key])}</option>`).join("");
  $("x").innerHTML = options(keys, xKey, AXES);
  $("y").innerHTML = options(scores, yKey, data.labels);
  [...$("tabs").children].forEach((button, k) => button.setAttribute("aria-selected", k === tab));
  document.querySelectorAll("[data-tab]").forEach((part) => { part.hidden = +part.dataset.tab !== tab; });
  draw();
}
$("tabs").innerHTML = data.tabs.map((each) => `<button type="button" role="tab">${escape(each.title)}</button>`).join("");
[...$("tabs").children].forEach((button, k) => { button.onclick = () => choose(k); });
$("x").onchange = (event) => { xKey = event.target.value; draw(); };
$("part").onchange = drawCurves;
$("y").onchange = (event) => { yKey = event.target.value; draw(); };
redrawn.push(draw);
choose(tab);

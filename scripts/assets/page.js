"use strict";
// What all pages have: light and dark, tables that sort, a tip beside the pointer, axes.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const escape = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const redrawn = [];  // what to draw again when the theme changes
$("theme").onclick = () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  redrawn.forEach((draw) => draw());
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redrawn.forEach((draw) => draw()));

function tip(event, content) {
  const box = $("tip");
  box.style.opacity = content ? 1 : 0;
  if (!content) return;
  box.innerHTML = content;
  const left = event.clientX + 16, width = box.offsetWidth;
  box.style.left = `${left + width > innerWidth ? Math.max(event.clientX - width - 16, 4) : left}px`;
  box.style.top = `${Math.max(Math.min(event.clientY + 12, innerHeight - box.offsetHeight - 8), 4)}px`;
}

// What a cell sorts by: "11.69 M" and "72.7 ± 0.1" as numbers, "-" last.
function sortValue(text) {
  const found = text.replace(/[,~]/g, "").match(/^[+-]?\d+(\.\d+)?( [kMG](?![a-z]))?/);
  if (!found) return null;
  return parseFloat(found[0]) * ({ k: 1e3, M: 1e6, G: 1e9 }[found[2]?.trim()] ?? 1);
}
function sortTable(head) {
  const place = head.cellIndex, body = head.closest("table").tBodies[0];
  const down = head.ariaSort === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.ariaSort = down ? "descending" : "ascending";
  const words = !head.classList.contains("number");
  const key = (row) => words ? row.cells[place].textContent : sortValue(row.cells[place].textContent);
  [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return (down ? -1 : 1) * (words ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  }).forEach((row) => body.append(row));
}
for (const head of document.querySelectorAll("th")) {
  head.onclick = () => sortTable(head);
  head.onkeydown = (event) => { if (event.key === "Enter") sortTable(head); };
}

// Axes: from values to pixels, and where to write them.
function scale(low, high, from, to, log) {
  const f = log ? Math.log : (x) => x;
  return (value) => from + (f(value) - f(low)) / (f(high) - f(low) || 1) * (to - from);
}
function ticks(low, high, count, log) {
  if (log && high / low > 4) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const m of high / low > 200 ? [1] : [1, 2, 5]) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
    return found;
  }
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * unit >= raw) * unit, found = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) found.push(+(k * step).toPrecision(12));
  return found;
}
function short(value) {
  for (const [size, unit] of [[1e9, " G"], [1e6, " M"], [1e3, " k"]])
    if (value >= size) return `${+(value / size).toPrecision(3)}${unit}`;
  return String(+value.toPrecision(3));
}

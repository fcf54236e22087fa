"use strict";
// Light or dark, and tables that sort by a click on a column's head.
document.getElementById("theme").onclick = () => {
  const style = document.documentElement.style, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  style.colorScheme = style.colorScheme ? (style.colorScheme === "dark" ? "light" : "dark") : (dark ? "light" : "dark");
};
// "11.69 M" and "72.7 ± 0.1" sort as numbers; what is not a number comes last.
function sortValue(text) {
  const found = text.replace(/[,~]/g, "").match(/^[+-]?\d+(\.\d+)?( [kMG](?![a-z]))?/);
  return found && parseFloat(found[0]) * ({ k: 1e3, M: 1e6, G: 1e9 }[found[2]?.trim()] ?? 1);
}
function sortTable(head) {
  const body = head.closest("table").tBodies[0], down = head.ariaSort === "ascending", words = !head.classList.contains("number");
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.ariaSort = down ? "descending" : "ascending";
  const key = (row) => words ? row.cells[head.cellIndex].textContent : sortValue(row.cells[head.cellIndex].textContent);
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
dispatchEvent(new Event("resize"));  // figures were drawn before their neighbours were there

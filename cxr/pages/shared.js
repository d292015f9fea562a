"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);

function text(id, words) { by(id).textContent = words; }

function make(name, words, attributes) {
  const node = document.createElement(name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (words !== undefined) node.textContent = words;
  return node;
}

function svg(name, attributes, words) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (words !== undefined) node.textContent = words;
  return node;
}

// A row of a table; `names` of its columns stand before the cells where the page is narrow.
function line(cells, name = "td", names = []) {
  const row = make("tr");
  cells.forEach((words, i) => row.append(make(name, words, name === "th" ? { scope: "col" } : names[i] ? { "data-name": names[i] } : {})));
  return row;
}

function warn(lines) { for (const words of lines) by("warnings").append(make("li", "Warning: " + words + ".")); }

// A table whose heads sort and whose rows are filtered by words and by a box; a row has `words`, `odd` and a value by each column's key.
function sortable(columns, rows, cell, more) {
  let sorted = null, rising = true;
  for (const row of rows) {
    row.element = make("tr");
    for (const [, key] of columns) row.element.append(cell(row, key));
  }
  const value = (row) => Array.isArray(row[sorted]) ? row[sorted].length : row[sorted] ?? Infinity;
  function show() {
    const words = by("filter").value.toLowerCase(), odd = by("odd").checked;
    const kept = rows.filter((row) => (!odd || row.odd) && row.words.toLowerCase().includes(words));
    if (sorted) kept.sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (rising ? 1 : -1));
    by("rows").replaceChildren(...kept.map((row) => row.element));
    text("count", kept.length + " of " + rows.length + more);
  }
  for (const [title, key] of columns) {
    const head = make("th", undefined, { scope: "col" }), button = make("button", title, { type: "button" });
    button.addEventListener("click", () => {
      rising = sorted === key ? !rising : true; sorted = key;
      for (const other of by("heads").children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      show();
    });
    head.append(button); by("heads").append(head);
  }
  by("filter").addEventListener("input", show);
  by("odd").addEventListener("change", show);
  show();
}

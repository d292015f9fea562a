"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
function made(name, text, parent) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

by("title").textContent = "Evaluation: " + data.title;
by("about").textContent = "Model: " + data.about.model + "; classifier: " + data.about.classifier + "; independent classifier: " + data.about.oracle + ".";
for (const note of data.notes) made("li", note, by("warnings"));

for (const table of data.tables) {
  const box = made("div", undefined, by("tables")), grid = made("table", undefined, box);
  box.className = "wide";
  made("caption", table.title, grid);
  const head = made("tr", undefined, made("thead", undefined, grid)), body = made("tbody", undefined, grid);
  for (const name of table.header) made("th", name, head).scope = "col";
  for (const row of table.rows) {
    const line = made("tr", undefined, body);
    for (const value of row) made("td", value, line);
  }
  if (table.about.length) {
    const list = made("ul", undefined, by("tables"));
    list.className = "hint";
    for (const line of table.about) made("li", line, list);
  }
}

for (const figure of data.figures) {
  const box = made("figure", undefined, by("figures")), picture = made("img", undefined, box);
  box.className = "wide plot";
  picture.src = figure.uri;
  picture.alt = figure.name;
  made("figcaption", figure.name, box);
}
by("plots").hidden = !data.figures.length;
by("images").hidden = !data.cases.length;

const columns = ["image", "failures", ...data.columns], cases = data.cases;
let sorted = null, rising = true;
const value = (one, column) => column === 0 ? one.name : column === 1 ? one.fails.length : one.values[column - 2] ?? Infinity;
for (const one of cases) {
  one.element = made("tr");
  made("td", one.name, one.element);
  made("td", one.fails.join("; "), one.element).className = one.fails.length ? "no" : "";
  for (const number of one.values) made("td", number === null ? "" : number.toFixed(3), one.element);
}
function show() {
  const words = by("filter").value.toLowerCase(), failed = by("failed").checked;
  const kept = cases.filter((one) => (!failed || one.fails.length) && (one.name + " " + one.fails.join(" ")).toLowerCase().includes(words));
  if (sorted !== null) kept.sort((a, b) => (value(a, sorted) < value(b, sorted) ? -1 : value(a, sorted) > value(b, sorted) ? 1 : 0) * (rising ? 1 : -1));
  by("rows").replaceChildren(...kept.map((one) => one.element));
  by("count").textContent = kept.length + " of " + cases.length;
}
columns.forEach((name, column) => {
  const head = made("th", undefined, by("heads")), button = made("button", name, head);
  head.scope = "col"; button.type = "button";
  button.addEventListener("click", () => {
    rising = sorted === column ? !rising : true; sorted = column;
    for (const other of by("heads").children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    show();
  });
});
by("filter").addEventListener("input", show);
by("failed").addEventListener("change", show);
show();

"use strict";
const data = JSON.parse(document.getElementById("data").textContent), rows = data.rows;
const by = (id) => document.getElementById(id);
const columns = [["image", "name"], ["before", "before"], ["after", "after"], ["amount of disease", "dose"], ["SSIM", "ssim"], ["spread", "spread"], ["believe it", "believe"], ["warnings", "warnings"]];
let sorted = null, rising = true;

function cell(row, key) {
  const td = document.createElement("td");
  if (key === "name") {
    const link = document.createElement("a"), picture = document.createElement("img");
    link.href = encodeURIComponent(row.folder) + "/index.html";
    picture.src = encodeURIComponent(row.folder) + "/thumbnail.png";
    picture.alt = ""; picture.loading = "lazy"; picture.width = 192; picture.height = 64;
    link.append(picture, row.name);
    td.append(link);
  } else if (key === "believe") {
    td.textContent = row.believe ? "yes" : "no";
    td.className = row.believe ? "" : "no";
  } else if (key === "warnings") td.textContent = row.warnings.join("; ");
  else td.textContent = row[key] === null ? "" : row[key].toFixed(2);
  return td;
}

for (const row of rows) {
  row.element = document.createElement("tr");
  for (const [, key] of columns) row.element.append(cell(row, key));
}

function show() {
  const words = by("filter").value.toLowerCase(), doubtful = by("doubtful").checked;
  const kept = rows.filter((row) => (!doubtful || row.warnings.length) && (row.name + " " + row.warnings.join(" ")).toLowerCase().includes(words));
  const value = (row) => sorted === "warnings" ? row.warnings.length : row[sorted] ?? Infinity;
  if (sorted) kept.sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (rising ? 1 : -1));
  by("rows").replaceChildren(...kept.map((row) => row.element));
  by("count").textContent = kept.length + " of " + rows.length + (data.unreadable ? "; " + data.unreadable + " more cannot be read" : "");
}

for (const [title, key] of columns) {
  const head = document.createElement("th"), button = document.createElement("button");
  head.scope = "col"; button.type = "button"; button.textContent = title;
  button.addEventListener("click", () => {
    rising = sorted === key ? !rising : true; sorted = key;
    for (const other of by("heads").children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    show();
  });
  head.append(button); by("heads").append(head);
}
by("filter").addEventListener("input", show);
by("doubtful").addEventListener("change", show);
document.addEventListener("keydown", (event) => {
  if (!["ArrowDown", "ArrowUp"].includes(event.key) || event.target.tagName === "INPUT") return;
  const links = [...by("rows").querySelectorAll("a")], at = links.indexOf(document.activeElement);
  const next = links[at + (event.key === "ArrowDown" ? 1 : -1)];
  if (next) { next.focus(); event.preventDefault(); }
});
show();
document.body.dataset.ready = "yes";

const ARROWS = { more: "\u2191 more", less: "\u2193 less", "": "-" };

function table(header, rows, kind) {
  const box = make("div", undefined, { class: "wide" }), whole = make("table", undefined, { class: kind }), head = make("thead"), body = make("tbody");
  head.append(line(header, "th")); body.append(...rows.map((row) => line(row, "td", header)));
  whole.append(head, body); box.append(whole);
  return box;
}

function parts() {
  for (const { title, rows } of data.parts) {
    const cells = rows.map(([name, value, n, better, meaning]) => [name, value, ARROWS[better], n, meaning]);
    by("parts").append(make("h3", title), table(["measure", "value (95% interval)", "better", "images", "what it is"], cells, "measures"));
  }
  for (const { title, header, rows, about } of data.compared) {
    const list = make("ul", undefined, { class: "use" });
    for (const [name, better, meaning] of about) list.append(make("li", name + ": " + meaning + " " + (better ? ARROWS[better] + " is better." : "")));
    by("parts").append(make("h3", title), table(header, rows, "methods"), list);
  }
}

function cell(row, key) {
  if (key === "failed") return make("td", row.failed.join("; "));
  if (key === "name" || key === "class") return make("td", row[key]);
  return make("td", row[key] === null ? "" : row[key].toFixed(3));
}

text("sentence", data.sentence); text("model", data.model); text("versions", data.versions);
warn(data.warnings);
by("lacking").append(...data.lacking.map((words) => make("li", words)));
by("reached").hidden = data.missed.length > 0; by("missedbox").hidden = !data.missed.length;
by("missedbox").append(...(data.missed.length ? [table(["measure", "value (95% interval)", "verdict", "should be", "images", "what it is"], data.missed, "measures")] : []));
for (const row of by("missedbox").querySelectorAll("tbody tr")) if (row.cells[2].textContent === "missed") row.cells[2].className = "missed";
by("images").hidden = !data.images.length;
by("odd").checked = data.images.some((row) => row.odd);
sortable([["image", "name"], ["class", "class"], ["failed", "failed"], ...data.columns], data.images, cell, "");
parts();
document.body.dataset.ready = "yes";

const columns = [["image", "name"], ["of", "disease"], ["before", "before"], ["after", "after"], ["amount of disease", "dose"], ["SSIM", "ssim"], ["spread", "spread"], ["believe it", "believe"], ["model", "made"], ["warnings", "warnings"]];

function cell(row, key) {
  if (key === "warnings") return make("td", row.warnings.join("; "));
  if (key === "believe") return make("td", row.believe ? "yes" : "no", { class: row.believe ? "" : "no" });
  if (key === "disease" || key === "made") return make("td", row[key]);
  if (key !== "name") return make("td", row[key] === null ? "" : row[key].toFixed(2));
  const td = make("td"), folder = encodeURIComponent(row.folder);
  const link = make("a", undefined, { href: folder + "/index.html" });
  link.append(make("img", undefined, { loading: "lazy", alt: "", width: 192, height: 64, src: folder + "/thumbnail.png" }), row.name);
  td.append(link);
  return td;
}

for (const row of data.rows) { row.words = [row.path, row.disease, row.made].join(" ") + " " + row.warnings.join(" "); row.odd = row.warnings.length > 0; }
sortable(columns, data.rows, cell, data.unreadable ? "; " + data.unreadable + " more cannot be read" : "");
document.addEventListener("keydown", (event) => {
  if (!["ArrowDown", "ArrowUp"].includes(event.key) || event.target.tagName === "INPUT") return;
  const links = [...by("rows").querySelectorAll("a")], at = links.indexOf(document.activeElement);
  const next = links[at + (event.key === "ArrowDown" ? 1 : -1)];
  if (next) { next.focus(); event.preventDefault(); }
});
document.body.dataset.ready = "yes";

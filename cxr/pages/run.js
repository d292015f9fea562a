const BETTER = { more: "\u2191 more is better", less: "\u2193 less is better", steady: "steady is good", "": "" };
const WIDE = 320, HIGH = 140, LEFT = 54, RIGHT = 312, TOP = 10, BOTTOM = 116;
const count = (n) => n.toLocaleString("en-US");
const last = data.images.at(-1) ?? 1;
const number = (v) => v === null || v === undefined ? "-" : Number.isInteger(v) ? count(v) : String(Number(v.toPrecision(4)));
const across = (images) => LEFT + (images / last) * (RIGHT - LEFT);

function span(chart, values) {
  const low = Math.min(...values), high = Math.max(...values), least = Math.max(Math.abs(high) * 0.02, 1e-6);
  if (chart.share || (low === 0 && high === 0)) return [0, 1];
  const room = Math.max(0, least - (high - low)) / 2;
  return [low - room, high + room];
}

function pieces(values, down) {
  const found = [[]];
  values.forEach((v, i) => { if (v === null) found.push([]); else found.at(-1).push([across(data.images[i]), down(v)]); });
  return found.filter((points) => points.length);
}

function curve(chart, values) {
  const [low, high] = span(chart, values), down = (v) => BOTTOM - ((v - low) / (high - low)) * (BOTTOM - TOP);
  const words = chart.title + ", over " + count(last) + " images: from " + number(values[0]) + " to " + number(values.at(-1)) + "; lowest " + number(Math.min(...values)) + ", highest " + number(Math.max(...values));
  const plot = svg("svg", { class: "chart", viewBox: "0 0 " + WIDE + " " + HIGH, role: "img", "aria-label": words });
  for (const v of [low, high])
    plot.append(svg("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: down(v), y2: down(v) }), svg("text", { x: LEFT - 5, y: down(v) + 4, "text-anchor": "end" }, String(Number(v.toPrecision(3)))));
  plot.append(svg("text", { x: LEFT, y: HIGH - 6 }, "0"), svg("text", { x: RIGHT, y: HIGH - 6, "text-anchor": "end" }, count(last) + " images"));
  if (data.sheets.length) plot.append(svg("line", { class: "now", y1: TOP, y2: BOTTOM }));
  for (const points of pieces(chart.values, down))
    plot.append(points.length > 1 ? svg("polyline", { class: "a", points: points.map((p) => p.join(",")).join(" ") }) : svg("circle", { class: "dot", cx: points[0][0], cy: points[0][1], r: 3 }));
  return plot;
}

function figure(chart) {
  const box = make("figure"), values = chart.values.filter((v) => v !== null), gaps = chart.values.length - values.length;
  const head = make("p", undefined, { class: "head" }), about = make("figcaption");
  head.append(make("span", chart.title), make("b", number(chart.values.at(-1))));
  box.append(head);
  if (values.length) box.append(curve(chart, values));
  if (BETTER[chart.better]) about.append(make("strong", BETTER[chart.better] + ". "));
  about.append(chart.about + (gaps ? " " + gaps + " of " + chart.values.length + " reports have no number here." : ""));
  box.append(about);
  return box;
}

function groups() {
  for (const group of data.groups) {
    const section = make("section", undefined, { "aria-label": group.heading }), charts = make("div", undefined, { class: "charts" });
    charts.append(...group.charts.map(figure));
    section.append(make("h2", group.heading), charts);
    by("groups").append(section);
  }
}

function tested() {
  by("tested").hidden = !data.tested;
  if (!data.tested) return;
  by("figures").append(line(data.tested.heads, "th"), ...data.tested.rows.map((cells) => line(cells)));
}

function film() {
  const sheets = data.sheets, slider = by("when");
  by("film").hidden = !sheets.length;
  if (!sheets.length) return;
  slider.max = sheets.length - 1;
  const to = (place) => {
    const at = Math.max(0, Math.min(sheets.length - 1, place)), { images, file } = sheets[at];
    slider.value = at;
    slider.setAttribute("aria-valuetext", "after " + count(images) + " images");
    text("seen", count(images));
    by("sheet").src = file; by("sheet").alt = "Sheet of samples after " + count(images) + " images";
    for (const line of document.querySelectorAll(".chart .now")) for (const end of ["x1", "x2"]) line.setAttribute(end, across(images));
    if (sheets[at + 1]) new Image().src = sheets[at + 1].file;
    if (sheets[at - 1]) new Image().src = sheets[at - 1].file;
  };
  slider.addEventListener("input", () => to(Number(slider.value)));
  document.addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT") return;
    if (event.key === "ArrowRight") to(Number(slider.value) + 1);
    if (event.key === "ArrowLeft") to(Number(slider.value) - 1);
  });
  to(sheets.length - 1);
}

function all() {
  if (by("rows").children.length) return;
  const charts = data.groups.flatMap((group) => group.charts);
  by("heads").append(line(["images", ...charts.map((chart) => chart.title)], "th"));
  by("rows").append(...data.images.map((images, i) => line([count(images), ...charts.map((chart) => number(chart.values[i]))])));
}

text("sentence", data.sentence); text("folder", data.folder); text("first", data.first);
by("share").value = data.share; by("more").hidden = data.share === 1; by("nothing").hidden = data.images.length > 0; by("all").hidden = !data.images.length;
warn(data.warnings);
tested(); groups(); film();
by("all").addEventListener("toggle", all);
by("options").append(...data.options.map((cells) => line(cells)));
document.body.dataset.ready = "yes";

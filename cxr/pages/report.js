const state = { frame: data.start, blink: false };
const CHANGED = "the original, changed where the classifier needs it";
const percent = (p) => p.toFixed(2);

function image(source) {
  return new Promise((done) => { const i = new Image(); i.onload = () => done(i); i.src = source; });
}

function draw(canvas, strip, frame) {
  canvas.width = canvas.height = data.size;
  canvas.getContext("2d", { willReadFrequently: true }).drawImage(strip, frame * data.size, 0, data.size, data.size, 0, 0, data.size, data.size);
}

const place = (dose, p) => [40 + dose * 585, 195 - p * 180];

function curve() {
  const plot = by("curve");
  for (const p of [0, 0.5, 1]) {
    const [, y] = place(0, p);
    plot.append(svg("line", { class: "axis", x1: 40, x2: 625, y1: y, y2: y }), svg("text", { x: 8, y: y + 4 }, p));
  }
  plot.append(svg("text", { x: 46, y: 27 }, "probability of " + data.disease));
  const [found] = place(Math.min(data.found, 1), 0);
  plot.append(svg("line", { class: "found", x1: found, x2: found, y1: 15, y2: 195 }), svg("text", data.found < 0.3 ? { x: found + 5, y: 45 } : { x: found - 5, y: 188, "text-anchor": "end" }, "this image"));
  plot.append(svg("text", { x: 40, y: 215 }, "healthy (0)"), svg("text", { x: 625, y: 215, "text-anchor": "end" }, "diseased (1)"));
  for (const [name, values] of [["b", data.drawn_p], ["a ink", data.overlaid_p]])
    plot.append(svg("polyline", { class: name, points: values.map((p, i) => place(data.doses[i], p).join(",")).join(" ") }));
  plot.append(svg("line", { class: "now", id: "now", y1: 10, y2: 200 }));
  text("curvetitle", "Probability of " + data.disease + " along the path, from " + percent(data.overlaid_p[0]) + " to " + percent(data.overlaid_p.at(-1)));
  text("turn", data.turns.length ? "The verdict turns at " + data.turns.map((t) => t.toFixed(2)).join(", ") + "." : "The verdict does not turn.");
}

function show(strips) {
  const f = state.frame;
  text("amount", data.doses[f].toFixed(2));
  text("found", data.found.toFixed(2)); text("disease", data.disease); text("p0", percent(data.original_p)); text("p1", percent(data.drawn_p[f])); text("p2", percent(data.overlaid_p[f]));
  text("what2", CHANGED);
  draw(by("original"), strips.original, 0);
  draw(by("drawn"), strips.drawn, f);
  draw(by("overlaid"), strips.overlaid, f);
  const mode = by("compare").value, context = by("overlaid").getContext("2d");
  by("wipelabel").hidden = mode !== "wipe";
  if (mode === "blink" && state.blink) {
    draw(by("overlaid"), strips.original, 0);
    text("what2", "the original X-ray"); text("p2", percent(data.original_p));
  }
  if (mode === "wipe") {
    const x = Math.round(data.size * by("wipe").value / 100);
    if (x) context.drawImage(strips.original, 0, 0, x, data.size, 0, 0, x, data.size);
    text("what2", "left of the line: original; right: changed where the classifier needs it");
    context.fillStyle = "#e8820c"; context.fillRect(x, 0, 1, data.size);
  }
  const [x] = place(data.doses[f], 0);
  by("now").setAttribute("x1", x); by("now").setAttribute("x2", x);
  by("dose").setAttribute("aria-valuetext", data.doses[f].toFixed(2) + ", probability " + percent(data.overlaid_p[f]));
}

function heat(strips) {
  const n = data.size, map = data.maps[by("map").value], canvas = by("heat");
  draw(canvas, strips.original, 0);
  const context = canvas.getContext("2d", { willReadFrequently: true }), pixels = context.getImageData(0, 0, n, n);
  const helper = document.createElement("canvas");
  helper.width = helper.height = n;
  const pen = helper.getContext("2d", { willReadFrequently: true });
  pen.drawImage(strips.maps[by("map").value], 0, 0);
  const raw = pen.getImageData(0, 0, n, n).data, cut = by("threshold").value / 100, top = by("opacity").value / 100;
  for (let i = 0; i < n * n; i++) {
    const value = map.signed ? (raw[4 * i] - 128) / 127 : raw[4 * i] / 255, strength = Math.abs(value);
    const alpha = strength < cut ? 0 : top * Math.min(1, strength), colour = value < 0 ? [47, 127, 224] : [232, 130, 12];
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = pixels.data[4 * i + c] * (1 - alpha) + colour[c] * alpha;
  }
  context.putImageData(pixels, 0, 0);
  text("cut", by("threshold").value + "%");
  text("about", map.about);
  text("low", map.signed ? map.low : "0"); text("high", map.high);
  by("bar").className = map.signed ? "bar" : "bar plain";
}

async function begin() {
  text("sentence", data.sentence); text("file", data.file); text("made", (data.file ? ", explained with " : "Explained with ") + data.made);
  if (data.banner) { text("banner", data.banner); by("banner").hidden = false; }
  warn(data.warnings);
  by("numbers").append(...data.numbers.map((cells) => line(cells)));
  data.maps.forEach((map, i) => by("map").append(make("option", map.name, { value: i })));
  const strips = { original: await image(data.original), drawn: await image(data.drawn), overlaid: await image(data.overlaid), maps: await Promise.all(data.maps.map((m) => image(m.png))) };
  if (data.spread) draw(by("spread"), await image(data.spread), 0); else by("spreadbox").hidden = true;
  by("dose").max = data.doses.length - 1; by("dose").value = state.frame;
  curve(); show(strips); heat(strips);
  const to = (frame) => { state.frame = Math.max(0, Math.min(data.doses.length - 1, frame)); by("dose").value = state.frame; show(strips); };
  by("dose").addEventListener("input", () => to(Number(by("dose").value)));
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
    if (event.key === "ArrowRight") to(state.frame + 1);
    if (event.key === "ArrowLeft") to(state.frame - 1);
  });
  for (const event of ["input", "change"]) {
    for (const id of ["compare", "wipe"]) by(id).addEventListener(event, () => show(strips));
    for (const id of ["map", "opacity", "threshold"]) by(id).addEventListener(event, () => heat(strips));
  }
  addEventListener("beforeprint", () => { by("compare").value = "side"; show(strips); });
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  setInterval(() => { if (by("compare").value === "blink") { state.blink = !state.blink; show(strips); } }, still ? 2000 : 600);
  document.body.dataset.ready = "yes";
}
begin();

"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
by("title").textContent = data.title;

function node(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const short = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));

function curve(told) {
  const figure = document.createElement("figure"), head = document.createElement("figcaption");
  const last = told.points[told.points.length - 1];
  const way = told.better ? " (" + told.better + " is better)" : "";
  const name = document.createElement("b"), about = document.createElement("span");
  name.textContent = told.title + way + ": " + short(last[1]);
  about.textContent = told.about;
  head.append(name, document.createElement("br"), about);
  const xs = told.points.map((p) => p[0]), ys = told.points.map((p) => p[1]);
  const right = Math.max(...xs), low = Math.min(...ys), high = Math.max(...ys), span = high - low || 1;
  const place = ([x, y]) => [(60 + 250 * x / (right || 1)).toFixed(1), (110 - 90 * (y - low) / span).toFixed(1)];
  const svg = node("svg", { viewBox: "0 0 330 140", role: "img" });
  svg.append(node("title", {}, told.title + ": from " + short(ys[0]) + " to " + short(last[1]) + " over " + short(right) + " images"));
  for (const [value, y] of [[high, 20], [low, 110]]) {
    svg.append(node("line", { x1: 60, y1: y, x2: 310, y2: y, class: "rule" }));
    svg.append(node("text", { x: 54, y: y + 4, "text-anchor": "end" }, short(value)));
  }
  svg.append(node("text", { x: 60, y: 130 }, "0"), node("text", { x: 310, y: 130, "text-anchor": "end" }, short(right) + " images"));
  svg.append(node("polyline", { points: told.points.map((p) => place(p).join(",")).join(" "), class: "line" }));
  const [x, y] = place(last);
  svg.append(node("circle", { cx: x, cy: y, r: 4, class: "dot" }));
  figure.append(svg, head);
  return figure;
}

by("curves").append(...data.curves.map(curve));
by("none").hidden = data.curves.length > 0;

const sheets = data.sheets, slider = by("sheet");
let playing = null;
function show() {
  const sheet = sheets[slider.value];
  by("picture").src = sheet.file;
  by("seen").textContent = sheet.images.toLocaleString("en");
}
function stop() { clearInterval(playing); playing = null; by("play").textContent = "play"; }
if (sheets.length) {
  by("film").hidden = false;
  slider.max = sheets.length - 1;
  slider.value = sheets.length - 1;
  slider.addEventListener("input", () => { stop(); show(); });
  by("play").addEventListener("click", () => {
    if (playing) { stop(); return; }
    by("play").textContent = "stop";
    slider.value = 0; show();
    playing = setInterval(() => { if (+slider.value >= sheets.length - 1) { stop(); return; } slider.value = +slider.value + 1; show(); }, 400);
  });
  show();
}

"use strict";
// Draws every chart from the numbers in the page, shows the values under the pointer or, in a chart that has the focus,
// by the arrow keys, and reloads an unfinished run.
const charts = JSON.parse(document.getElementById("charts").textContent);
const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 3", "8 3 2 3", "2 3"];
const margin = {left: 52, right: 12, top: 8, bottom: 34}, height = 260;

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function ticks(low, high, count) {  // round numbers between low and high
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw), found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(+at.toPrecision(10));
  return found;
}

function decades(low, high) {
  const found = [];
  for (let power = Math.ceil(Math.log10(low) - 1e-9); power <= Math.log10(high) + 1e-9; power++) found.push(10 ** power);
  return found.length > 1 ? found : ticks(low, high, 4);
}

const words = value => value === null || value === undefined ? "–" : String(+(+value).toPrecision(4));
const isPercent = chart => (chart.unit || "").trim() === "%";
const ywords = (chart, y) => isPercent(chart) && Math.abs(y) >= .1 ? String(+y.toFixed(2)) : words(y);  // as in the tables
const xwords = (chart, x) => chart.logx ? x.toLocaleString("en") : words(x);  // a batch is told in full

function scales(chart, width) {
  const xs = chart.series.flatMap(s => s.x);
  const found = chart.series.flatMap(s => [...s.y, ...(s.low || []), ...(s.high || [])])
    .filter(y => y !== null && (!chart.log || y > 0));
  const ys = found.length ? found : [isPercent(chart) ? 100 : 1];  // every row has diverged
  const positive = chart.logx ? xs.filter(x => x > 0) : xs;
  const x0 = chart.logx ? Math.min(...positive) / 1.2 : 0, x1 = Math.max(...positive, chart.xmax || 0) * (chart.logx ? 1.2 : 1) || 1;
  const limit = isPercent(chart) ? 100 : Infinity;  // a band of 2 std may reach beyond
  const least = Math.min(...ys), flat = least === Math.max(...ys) ? 2 : 1;  // one value alone lies in the middle
  const y0 = chart.log ? least / flat : 0, y1 = Math.min(Math.max(...ys, chart.log ? 0 : 1e-9) * (chart.log ? flat : 1.04), limit);
  const f = (log, v) => log ? Math.log10(v) : v;
  const X = v => margin.left + (f(chart.logx, v) - f(chart.logx, x0)) / (f(chart.logx, x1) - f(chart.logx, x0) || 1)
    * (width - margin.left - margin.right);
  const Y = v => height - margin.bottom - (f(chart.log, Math.min(Math.max(v, y0), y1)) - f(chart.log, y0))
    / (f(chart.log, y1) - f(chart.log, y0) || 1) * (height - margin.top - margin.bottom);
  return {X, Y, x0, x1, y0, y1};
}

function path(series, X, Y, values, step) {
  let drawn = "", pen = "M", before = null;
  values.forEach((y, i) => {
    if (y === null) { pen = "M"; return; }
    if (step && before !== null) drawn += `L${X(series.x[i]).toFixed(1)} ${Y(before).toFixed(1)}`;
    drawn += `${pen}${X(series.x[i]).toFixed(1)} ${Y(y).toFixed(1)}`;
    pen = "L"; before = y;
  });
  return drawn;
}

function draw(figure) {
  const chart = charts[figure.dataset.chart], width = Math.max(260, figure.clientWidth);
  figure.replaceChildren();
  const caption = document.createElement("figcaption");
  caption.textContent = chart.title;
  const svg = element("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": chart.title});
  const legend = document.createElement("ul");
  legend.className = "legend";
  legend.setAttribute("aria-live", "polite");
  figure.append(caption, svg, legend);
  if (!chart.series.some(s => s.mark === "cross" || s.y.some(y => y !== null))) {
    element("text", {x: margin.left, y: height / 2}, svg, "no number yet");
    return;
  }
  const {X, Y, x0, x1, y0, y1} = scales(chart, width);
  const most = Math.min(10, width / 70, chart.xname === "epoch" ? x1 : Infinity);  // no tick inside an epoch
  const xticks = chart.logx ? [...new Set(chart.series.flatMap(s => s.x))].sort((a, b) => a - b) : ticks(x0, x1, most);
  for (const y of chart.log ? decades(y0, y1) : ticks(y0, y1, 5)) {
    element("line", {class: "grid", x1: margin.left, x2: width - margin.right, y1: Y(y), y2: Y(y)}, svg);
    element("text", {x: margin.left - 6, y: Y(y) + 4, "text-anchor": "end"}, svg, words(y));
  }
  for (const x of xticks) element("text", {x: X(x), y: height - 16, "text-anchor": "middle"}, svg, xwords(chart, x));
  element("text", {x: width - margin.right, y: height - 4, "text-anchor": "end"}, svg, chart.xname);
  const rows = chart.series.map((series, number) => {
    const group = element("g", {class: `s${number % 7}`}, svg), dash = DASHES[number % 4];
    if (series.low) {
      const there = series.x.map((_, i) => i).filter(i => series.low[i] !== null);
      const up = there.map(i => `${X(series.x[i]).toFixed(1)} ${Y(series.high[i]).toFixed(1)}`);
      const down = there.reverse().map(i => `${X(series.x[i]).toFixed(1)} ${Y(series.low[i]).toFixed(1)}`);
      if (series.mark) up.forEach((top, i) => element("path", {d: `M${top}L${down[down.length - 1 - i]}`, stroke: "currentColor",
        "stroke-width": 1.5}, group));
      else if (up.length) element("path", {d: `M${[...up, ...down].join("L")}Z`, fill: "currentColor", opacity: .18}, group);
    }
    const mark = (x, y, r, parent) => series.mark === "cross"
      ? element("path", {d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8`, stroke: "currentColor", "stroke-width": 2}, parent)
      : element("circle", {cx: x, cy: y, r, stroke: "currentColor", "stroke-width": series.mark ? 1.5 : 0,
        fill: series.mark ? "none" : "currentColor"}, parent);
    if (!series.mark) element("path", {d: path(series, X, Y, series.y, chart.step), fill: "none", stroke: "currentColor",
      "stroke-width": 2, "stroke-dasharray": dash, "stroke-linejoin": "round"}, group);
    if (series.mark === "cross") series.x.forEach(x => mark(X(x), margin.top + 6, 0, group));
    if (series.x.length < 40 && !chart.step) series.y.forEach((y, i) => y === null ||
      mark(X(series.x[i]), Y(y), series.x.length < 3 || chart.logx ? 3.5 : 2, group));
    const item = document.createElement("li"), key = element("svg", {viewBox: "0 0 28 10", class: `s${number % 7}`});
    if (series.mark) mark(14, 5, 3.5, key);
    else element("line", {x1: 0, x2: 28, y1: 5, y2: 5, stroke: "currentColor", "stroke-width": 2.5, "stroke-dasharray": dash}, key);
    const value = document.createElement("b");
    item.append(key, `${series.name} `, value);
    legend.append(item);
    return {series, value};
  });
  const pointer = element("line", {class: "pointer", y1: margin.top, y2: height - margin.bottom, visibility: "hidden"}, svg);
  const at = element("text", {y: margin.top + 10, "text-anchor": "middle"}, svg, "");
  const all = [...new Set(rows.flatMap(r => r.series.x))].sort((a, b) => a - b);
  const numbered = rows.flatMap(r => r.series.x.filter((_, i) => r.series.y[i] !== null));
  const last = numbered.length ? Math.max(...numbered) : all.at(-1);
  const where = document.createElement("li");  // the place on the axis that the numbers beside the names are of
  legend.prepend(where);
  function show(x) {
    where.textContent = `${chart.xname} ${xwords(chart, x)}:`;
    for (const {series, value} of rows) {
      let best = -1;
      series.x.forEach((place, i) => {
        if (series.y[i] === null) return;
        const nearer = chart.logx ? place === x : chart.step ? place <= x : best < 0 || Math.abs(place - x) < Math.abs(series.x[best] - x);
        if (nearer) best = i;
      });
      const place = series.x[best], other = chart.step ? place === series.x.at(-1) && place < x : place !== x;
      value.textContent = best < 0 ? "" : ywords(chart, series.y[best]) + (series.low && series.low[best] !== null
        ? ` ± ${ywords(chart, (series.high[best] - series.low[best]) / 4)}` : "") + (chart.unit || "")
        + (other ? ` (${chart.xname} ${xwords(chart, place)})` : "");  // a curve that has ended, or was not evaluated
    }
  }
  show(last);
  let chosen = all.indexOf(last);
  function point(x) {
    chosen = all.indexOf(x);
    pointer.setAttribute("x1", X(x)); pointer.setAttribute("x2", X(x)); pointer.setAttribute("visibility", "visible");
    at.setAttribute("x", Math.min(Math.max(X(x), margin.left + 30), width - 40)); at.textContent = `${chart.xname} ${xwords(chart, x)}`;
    show(x);
  }
  function leave() {
    chosen = all.indexOf(last);
    pointer.setAttribute("visibility", "hidden"); at.textContent = ""; show(last);
  }
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * width;
    point(all.reduce((a, b) => Math.abs(X(b) - place) < Math.abs(X(a) - place) ? b : a));
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    const to = {ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: 0, End: all.length - 1}[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    point(all[Math.min(Math.max(to, 0), all.length - 1)]);
  });
}

const figures = [...document.querySelectorAll("figure.chart")];
let drawnWidth = 0;
function drawAll() {
  if (document.body.clientWidth === drawnWidth) return;
  drawnWidth = document.body.clientWidth;
  figures.forEach(draw);
}
drawAll();
addEventListener("resize", drawAll);

// The page of an unfinished run reloads itself and stays where it was scrolled to.
const key = `scroll of ${location.pathname}`, seconds = +document.body.dataset.reloadSeconds;
try { scrollTo(0, +sessionStorage.getItem(key) || 0); sessionStorage.removeItem(key); } catch { /* a private window */ }
if (seconds) setTimeout(() => {
  try { sessionStorage.setItem(key, scrollY); } catch { /* it reloads to the top */ }
  location.reload();
}, 1000 * seconds);

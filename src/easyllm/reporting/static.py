"""The CSS and JavaScript of the report page."""

STYLE = """
:root {
  color-scheme: light dark; --page: #f6f7f8; --card: #fff; --text: #1c2427; --muted: #5b676d;
  --line: #d3dadd;
  --accent: #1f6b66; --soft: #e1edec; --bad: #a4262c; --bad-soft: #fbeaea; --second: #b3530b;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #14181a; --card: #1d2326; --text: #e5eaec; --muted: #9ba8ae; --line: #39434a;
  --accent: #78c6bb; --soft: #22383a; --bad: #ff9a96; --bad-soft: #3a2223; --second: #f0a860;
} }
* { box-sizing: border-box; }
body {
  max-width: 72rem; margin: 0 auto; padding: 1rem 1rem 3rem; background: var(--page);
  color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "PingFang SC", "Microsoft YaHei",
    "Noto Sans CJK SC", sans-serif;
}
h1 { font-size: 1.5rem; margin: 0; }
h2, summary { font-size: 1.1rem; font-weight: 600; margin: 1.4rem 0 .5rem; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1rem; }
header p { margin: 0; }
header > :last-child:not(:only-child) { margin-left: auto; }
.state b { padding: .15rem .6rem; margin-right: .3rem; border-radius: 1rem; background: var(--soft);
  color: var(--accent); }
.state.stopped b { background: var(--bad-soft); color: var(--bad); }
progress { display: block; width: 100%; height: .4rem; margin: .6rem 0;
  accent-color: var(--accent); }
.recipe, .note, figcaption, figcaption + ul, .frame { color: var(--muted); font-size: .875rem; }
.recipe { margin: .5rem 0 .8rem; } .recipe span:first-child, figcaption b { color: var(--text); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 0 0 .8rem; }
dl > div, figure, .table, pre { margin: 0; padding: .7rem .9rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .8rem; }
dt { font-size: .875rem; } dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
dd.note { font-size: .8125rem; line-height: 1.3; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: .8rem; }
details .charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
figure { min-width: 0; } figure.wide { grid-column: 1 / -1; }
figure:focus-visible { outline: 2px solid var(--accent); }
figcaption { min-height: 1.5rem; } figcaption small { font-size: .8125rem; float: right; }
.at { color: var(--text); font-variant-numeric: tabular-nums; }
figure ul { display: flex; flex-wrap: wrap; gap: 0 1.1rem; margin: 0 0 .4rem; padding: 0;
  list-style: none; font-variant-numeric: tabular-nums; }
figure li::before { content: ""; display: inline-block; width: 1rem; margin-right: .4rem;
  vertical-align: .25em; border-top: 2.5px solid var(--accent); }
figure li b { color: var(--text); } figure.small li { font-size: .8125rem; }
figure li.raw::before { opacity: .4; } figure li.dots::before { border-color: var(--second); }
figure li:is(.spike, .skipped, .bad)::before, figure li.resumed::before { width: 0; height: .8rem;
  vertical-align: -.1em; border: 0; border-left: 2px solid var(--bad); }
figure li.skipped::before { border-left-style: dotted; }
figure li.resumed::before { border-left: 2px dashed var(--muted); }
.frame { display: grid; grid-template: "y plot" 9.5rem "corner x" 1.6rem / 3.2rem 1fr;
  font-size: .8125rem; font-variant-numeric: tabular-nums; }
.wide .frame { grid-template-rows: 19rem 1.6rem; }
.small .frame { grid-template-rows: 6rem 1.6rem; }
.plot { grid-area: plot; position: relative; touch-action: pan-y; }
.y, .x { grid-area: y; position: relative; } .x { grid-area: x; } .corner { grid-area: corner; }
.y span { position: absolute; right: .5rem; transform: translateY(-50%); }
.x span { position: absolute; white-space: nowrap; top: .3rem; transform: translateX(-50%); }
.corner { padding: .3rem .5rem 0 0; text-align: right; }
svg { display: block; width: 100%; height: 100%; border: solid var(--line);
  border-width: 0 0 1px 1px; }
:where(.plot) path { fill: none; stroke: var(--accent); stroke-width: 1.75; stroke-linecap: round;
  stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--line); stroke-width: 1; opacity: .6; }
path.raw { stroke-width: 1; opacity: .4; }
path.dots { stroke: var(--second); } path.dot { stroke-width: 6; }
path:is(.spike, .skipped, .bad) { stroke: var(--bad); stroke-width: 1; opacity: .7;
  stroke-linecap: butt; }
path.bad { stroke-width: 2.5; opacity: 1; }
path.skipped { stroke-dasharray: 1 3; }
path.resumed { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 5 4; stroke-linecap: butt; }
.plot i { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--text);
  display: none; pointer-events: none; }
.prompt { margin: .8rem 0 .3rem; padding: .4rem .9rem; border-radius: .6rem;
  background: var(--soft); white-space: pre-wrap; }
.table { padding: .2rem .9rem; max-height: 24rem; overflow: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { padding: .35rem 1rem .35rem 0; text-align: start; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tr:last-child > td { border: 0; }
th { font-size: .8125rem; color: var(--muted); }
td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; width: 5rem; }
td + td:not(:last-child) { width: 6rem; } td:last-child { white-space: pre-wrap; }
th, td:not(:last-child) { overflow-wrap: normal; }
summary { cursor: pointer; }
pre { margin: 0; overflow-x: auto; font-size: .875rem; white-space: pre-wrap; }
"""

SCRIPT = """
"use strict";
const first = Number(document.body.dataset.first), last = Number(document.body.dataset.last);
const figures = [...document.querySelectorAll("figure")].map(node => ({
  node, plot: node.querySelector(".plot"), cross: node.querySelector(".plot i"),
  at: node.querySelector(".at"),
  curves: [...node.querySelectorAll("[data-x]")].map(item => ({
    steps: item.dataset.x.split(" ").map(Number), values: item.dataset.y.split(" "),
    label: item.querySelector("b"),
  })),
}));

/** Returns the index of the last point at or before a step, or 0 if there is none. */
function before(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle - 1;
  }
  return low;
}

/** Moves the crosshair of every chart to a step; null hides it and shows the newest values. */
function show(step) {
  for (const { cross, at, curves } of figures) {
    cross.style.display = step === null ? "" : "block";
    cross.style.left = step === null ? "" : 100 * (step - first) / (last - first) + "%";
    at.textContent = step === null ? "" : "at step " + step.toLocaleString("en");
    for (const { steps, values, label } of curves)
      label.textContent = values[step === null ? values.length - 1 : before(steps, step)];
  }
}

for (const { node, plot, curves } of figures) {
  const steps = curves.length ? curves[0].steps : [];
  if (!steps.length) continue;
  let index = steps.length - 1;
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const step = first + (last - first) * (event.clientX - box.left) / box.width;
    index = before(steps, step);
    if (index + 1 < steps.length && steps[index + 1] - step < step - steps[index]) index++;
    show(steps[index]);
  });
  plot.addEventListener("pointerleave", () => show(null));
  node.tabIndex = 0;
  node.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    index = Math.min(Math.max(index + move, 0), steps.length - 1);
    show(steps[index]);
  });
  node.addEventListener("blur", () => show(null));
}

// Expanded sections stay expanded when the page is reloaded.
const opened = {
  get: id => { try { return sessionStorage.getItem("open-" + id); } catch { return null; } },
  set: (id, value) => {
    try { sessionStorage.setItem("open-" + id, value); } catch { /* storage may be forbidden */ }
  } };
for (const node of document.querySelectorAll("details")) {
  node.open = opened.get(node.id) === "true";
  node.addEventListener("toggle", () => opened.set(node.id, node.open));
}

const written = document.querySelector("time"), writtenAt = Date.parse(written.dateTime);
written.textContent = new Date(writtenAt).toLocaleString();
if (document.body.dataset.state === "running") {
  const minutes = Math.floor((Date.now() - writtenAt) / 60000);
  if (minutes >= 5)
    written.after(", " + minutes + " minutes ago: the run may have been interrupted");
  setInterval(() => {
    const busy = document.hidden || document.querySelector("figure:hover, figure:focus") ||
      String(getSelection());
    if (!busy) location.reload();
  }, 15000);
}
"""

/** The engine view: pages of the KV cache, the running batch, prefix hits and tokens per second. */

import { getJSON } from "./api.js";
import { byId, h } from "./dom.js";
import { number, percent, t, translate } from "./i18n.js";

const EVERY_MS = 700,
  KEPT = 86; // a minute
const history = new Map(); // by engine: [{time, generated, rate}]
let timer = 0;

export function startEngineView() {
  stopEngineView();
  void look();
}

export function stopEngineView() {
  clearTimeout(timer);
  timer = 0;
}

async function look() {
  const mine = (timer = setTimeout(() => {}, 0));
  try {
    const { engines } = await getJSON("/easyllm/engine");
    const body = byId("engine-body");
    const known = new Map([...body.children].map(each => [each.dataset.name, each]));
    body.replaceChildren(
      ...engines.map(engine => show(known.get(engine.name) || build(engine), engine)),
    );
  } catch (problem) {
    byId("engine-body").replaceChildren(
      h("p", { class: "hint" }, t(problem.word || "unreachable", problem.values)),
    );
  }
  if (timer === mine) timer = setTimeout(() => void look(), EVERY_MS);
}

function build(engine) {
  const element = h(
    "section",
    { class: "one-engine", dataset: { name: engine.name } },
    h("h3", {}, engine.name),
    h("div", { class: "numbers" }),
    h("h4", { t: "rateChart" }),
    h("canvas", { class: "chart", width: "640", height: "96", role: "img" }),
    h("h4", { t: "pages" }),
    h("canvas", { class: "pages", role: "img" }),
    h("p", { class: "legend hint" }),
    h("h4", { t: "batch" }),
    h("div", { class: "batch" }),
  );
  return translate(element);
}

function show(element, engine) {
  const { pages } = engine,
    points = remember(engine),
    rate = points.at(-1).rate;
  const hit = engine.prompt_tokens ? engine.cached_tokens / engine.prompt_tokens : 0;
  const box = (name, value, note) =>
    h(
      "div",
      {},
      h("span", { class: "name" }, t(name)),
      h("strong", {}, value),
      h("span", { class: "hint" }, note),
    );
  element
    .querySelector(".numbers")
    .replaceChildren(
      box(
        "rate",
        t("perSecond", { n: number(rate, rate < 100 ? 1 : 0) }),
        t("speedShort", { n: number(engine.generated_tokens) }),
      ),
      box(
        "hits",
        percent(hit),
        t("hitsHelp", { n: number(engine.cached_tokens), m: number(engine.prompt_tokens) }),
      ),
      box(
        "pages",
        percent(pages.used / pages.total),
        t("pageSize", { n: number(pages.total), k: pages.size }),
      ),
      box(
        "batch",
        `${engine.running.length}/${engine.max_running}`,
        [
          t("waitingRequests", { n: engine.waiting }),
          t("preemptions", { n: engine.preemptions }),
        ].join(" · "),
      ),
    );
  drawRate(element.querySelector(".chart"), points);
  drawPages(element.querySelector("canvas.pages"), pages);
  element.querySelector(".legend").replaceChildren(...legend(pages));
  showBatch(element.querySelector(".batch"), engine);
  return element;
}

function remember(engine) {
  const points = history.get(engine.name) || [],
    last = points.at(-1),
    time = performance.now();
  const rate = last
    ? Math.max(0, (engine.generated_tokens - last.generated) / ((time - last.time) / 1000))
    : 0;
  points.push({ time, generated: engine.generated_tokens, rate });
  history.set(engine.name, points.slice(-KEPT));
  return points;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name);
}

function drawRate(canvas, points) {
  const pen = canvas.getContext("2d"),
    { width, height } = canvas;
  const most = Math.max(10, ...points.map(point => point.rate));
  pen.clearRect(0, 0, width, height);
  pen.beginPath();
  points.forEach((point, index) => {
    const x = width - (points.length - 1 - index) * (width / (KEPT - 1)),
      y = height - 4 - (point.rate / most) * (height - 24);
    if (index) pen.lineTo(x, y);
    else pen.moveTo(x, y);
  });
  pen.strokeStyle = colour("--accent");
  pen.lineWidth = 2.5;
  pen.lineJoin = "round";
  pen.stroke();
  pen.fillStyle = colour("--muted");
  pen.font = "18px system-ui, sans-serif";
  pen.fillText(number(most), 2, 18);
  canvas.setAttribute("aria-label", t("perSecond", { n: number(points.at(-1).rate, 1) }));
}

const KINDS = ["free", "idle", "used", "shared"];
const COLOURS = { free: "--line", idle: "--soft-strong", used: "--accent", shared: "--accent-2" };

/** Draws a square for each page, or for each group of pages if there are many. */
function drawPages(canvas, pages) {
  const cells = pages.map,
    columns = 64,
    side = 10;
  canvas.width = columns * side;
  canvas.height = Math.max(1, Math.ceil(cells.length / columns)) * side;
  const pen = canvas.getContext("2d");
  [...cells].forEach((cell, index) => {
    pen.fillStyle = colour(COLOURS[KINDS[Number(cell)]]);
    pen.fillRect((index % columns) * side, Math.floor(index / columns) * side, side - 2, side - 2);
  });
  canvas.setAttribute(
    "aria-label",
    legend(pages)
      .map(each => each.textContent)
      .join(", "),
  );
}

function legend(pages) {
  const counts = {
    used: pages.used - pages.shared,
    shared: pages.shared,
    idle: pages.idle,
    free: pages.free,
  };
  return Object.entries(counts).map(([kind, count]) =>
    h("span", {}, h("i", { class: "dot " + kind }), `${t(kind)} ${number(count)}`),
  );
}

function showBatch(element, engine) {
  if (!engine.running.length) {
    element.replaceChildren(h("p", { class: "hint" }, t("nothingRuns")));
    return;
  }
  const head = ["sequence", "model", "stateColumn", "tokensColumn", "cachedColumn"].map(name =>
    h("th", { scope: "col" }, t(name)),
  );
  const rows = engine.running.map(each =>
    h(
      "tr",
      {},
      h("td", {}, `#${each.sequence}`),
      h("td", {}, each.model),
      h("td", {}, t(each.decoding ? "decoding" : "prefilling")),
      h("td", {}, number(each.tokens)),
      h("td", {}, number(each.cached)),
    ),
  );
  element.replaceChildren(
    h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...rows)),
  );
}

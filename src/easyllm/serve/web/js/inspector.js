/** The token inspector: how sure the model was of each token, and what else it considered. */

import { postJSON } from "./api.js";
import { h } from "./dom.js";
import { number, percent, t, translate } from "./i18n.js";
import { TOP } from "./generate.js";
import { loadTokens } from "./store.js";
import { state } from "./state.js";
import { messagesOf, pathTo } from "./tree.js";

/**
 * Shows the tokens of an answer. `branch` receives the text before a token, with the alternative
 * that was chosen in its place, and the tokens of that text.
 */
export async function showInspector(element, node, branch) {
  element.append(h("p", { class: "hint", t: "scoring" }));
  const tokens = await tokensOf(node).catch(() => null);
  element.replaceChildren();
  if (!tokens?.length) {
    element.append(h("p", { class: "hint", t: "noTokens" }));
    translate(element);
    return;
  }
  const detail = h("div", { class: "detail" });
  const list = h("div", {
    class: "tokens",
    role: "listbox",
    label: "inspector",
    "aria-orientation": "horizontal",
  });
  const spans = tokens.map((token, index) => {
    const span = h(
      "span",
      {
        class: "token " + shade(token),
        role: "option",
        tabindex: "-1",
        "aria-selected": "false",
        "aria-label": `${visible(token.t)} ${percent(Math.exp(token.p))}`,
      },
      token.t,
    );
    span.addEventListener("click", () => select(index));
    return span;
  });
  list.append(...spans);
  let selected = -1;
  function select(index, { focus = true } = {}) {
    spans[selected]?.setAttribute("aria-selected", "false");
    spans[selected]?.setAttribute("tabindex", "-1");
    selected = Math.max(0, Math.min(index, spans.length - 1));
    spans[selected].setAttribute("aria-selected", "true");
    spans[selected].setAttribute("tabindex", "0");
    if (focus) spans[selected].focus({ preventScroll: true });
    showDetail(detail, tokens, selected, branch);
  }
  list.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (event.key === "Home") select(0);
    else if (event.key === "End") select(spans.length - 1);
    else if (step) select(selected + step);
    else return;
    event.preventDefault();
  });
  element.append(summary(tokens, select), list, legend(), detail);
  translate(element);
  select(leastCertain(tokens)[0] ?? 0, { focus: false });
}

/** Returns the tokens: those recorded while the answer was generated, or else computed now. */
async function tokensOf(node) {
  const known = state.tokens.get(node.id) || (await loadTokens(node.id).catch(() => undefined));
  if (known && textOfTokens(known).trim() === node.content.trim()) return known;
  const model = node.model || state.chosen[0];
  const path = pathTo(state.conversation, node.id);
  const asked = (messages, continued) =>
    postJSON("/tokenize", {
      model,
      messages,
      add_generation_prompt: !continued,
      continue_final_message: continued,
    });
  const whole = await asked(messagesOf(state.conversation, path), true);
  const before = await asked(messagesOf(state.conversation, path.slice(0, -1)), false);
  const {
    choices: [{ logprobs }],
  } = await postJSON("/v1/completions", {
    model,
    prompt: whole.tokens,
    echo: true,
    logprobs: TOP,
    max_tokens: 1,
    temperature: 0,
  });
  const places = logprobs.tokens.map((text, index) => ({
    t: text,
    p: logprobs.token_logprobs[index],
    o: Object.entries(logprobs.top_logprobs[index] || {})
      .map(([other, value]) => ({ t: other, p: value }))
      .sort((a, b) => b.p - a.p),
  }));
  const found = places.slice(before.count, whole.count);
  state.tokens.set(node.id, found);
  return found;
}

/** Returns the bytes of a token. A part of a character is named by escapes, such as \xe4\xbd. */
function bytesOf(token) {
  if (token.b) return token.b;
  const parts = token.t.match(/\\x[0-9a-f]{2}/) ? token.t.match(/\\x[0-9a-f]{2}|[^]/g) : [token.t];
  return parts.flatMap(part =>
    part.startsWith("\\x") ? [parseInt(part.slice(2), 16)] : [...new TextEncoder().encode(part)],
  );
}

/** Returns the text of tokens, whose characters may be spread over several of them. */
export function textOfTokens(tokens) {
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(
    new Uint8Array(tokens.flatMap(bytesOf)),
  );
}

/** Returns whether an answer can go on from tokens: they end with a complete character. */
function isComplete(tokens) {
  try {
    new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(tokens.flatMap(bytesOf)));
    return true;
  } catch {
    return false;
  }
}

/** Returns the class of a token's colour: s0 (certain) to s5. */
function shade({ p }) {
  const probability = Math.exp(p);
  return "s" + [0.9, 0.7, 0.4, 0.15, 0.04].filter(bound => probability < bound).length;
}

/** Returns the indices of the least certain tokens that are words, least certain first. */
function leastCertain(tokens) {
  const words = tokens
    .map((token, index) => ({ p: token.p, index }))
    .filter(({ index }) => tokens[index].t.trim());
  return words
    .sort((a, b) => a.p - b.p)
    .slice(0, 3)
    .map(({ index }) => index);
}

/** Shows white space, which would be invisible. */
function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/ /g, "␣").replace(/\t/g, "⇥") || "∅";
}

function summary(tokens, select) {
  const total = tokens.reduce((sum, token) => sum + token.p, 0);
  const mean = tokens.reduce((sum, token) => sum + Math.exp(token.p), 0) / tokens.length;
  const facts = [
    t("speedShort", { n: number(tokens.length) }),
    t("perplexity", { n: number(Math.exp(-total / tokens.length), 2) }),
    t("meanProbability", { n: percent(mean) }),
  ];
  const links = leastCertain(tokens).map(index =>
    h(
      "button",
      { type: "button", class: "chip mono", on: { click: () => select(index) } },
      visible(tokens[index].t),
    ),
  );
  return h(
    "div",
    { class: "summary" },
    h("span", {}, facts.join(" · ")),
    h("span", { class: "uncertain" }, h("span", { t: "uncertain" }), ...links),
  );
}

function legend() {
  const steps = [0, 1, 2, 3, 4, 5].map(step => h("span", { class: "token s" + step }, " "));
  return h(
    "p",
    { class: "shades hint", "aria-hidden": "true" },
    h("span", { t: "sure" }),
    ...steps,
    h("span", { t: "unsure" }),
  );
}

function showDetail(element, tokens, index, branch) {
  const token = tokens[index];
  const rank = token.o.findIndex(other => other.t === token.t) + 1;
  const facts = [
    [t("probability"), percent(Math.exp(token.p)) + (rank ? ` · ${t("rank", { n: rank })}` : "")],
  ];
  if (token.e !== undefined && token.e !== null)
    facts.push([
      t("entropy"),
      t("entropyHelp", {
        n: number(token.e, 2),
        k: number(Math.exp(token.e), token.e < 2 ? 1 : 0),
      }),
    ]);
  if (token.m) facts.push([t("removed"), t("removedHelp", { p: percent(token.m) })]);
  const bars = token.o.map(other => {
    const before = [...tokens.slice(0, index), { ...token, ...other }];
    const chosen = other.t === token.t;
    const go =
      !chosen && !other.x && isComplete(before) ? () => branch(textOfTokens(before), before) : null;
    return alternative(other, chosen, go);
  });
  element.replaceChildren(
    h("h3", { class: "mono" }, visible(token.t)),
    h("dl", {}, ...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("h4", { t: "alternatives" }),
    h("ul", { class: "bars" }, ...bars.map(bar => h("li", {}, bar))),
    h("p", { class: "hint", t: "inspectHint" }),
  );
  for (const bar of element.querySelectorAll("[data-share]")) bar.style.width = bar.dataset.share;
  translate(element);
}

/** Returns the bar of one candidate; a click calls `go`, if it is possible to continue from it. */
function alternative(other, chosen, go) {
  const probability = Math.exp(other.p);
  const inner = [
    h("span", { class: "fill", dataset: { share: Math.max(1, probability * 100) + "%" } }),
    h("span", { class: "mono name" }, visible(other.t)),
    chosen && h("span", { class: "mark", t: "chosenToken" }),
    other.x && h("span", { class: "mark", t: "removedMark" }),
    h("span", { class: "value" }, percent(probability)),
  ];
  const kind = "bar" + (chosen ? " chosen" : "") + (other.x ? " removed" : "");
  if (!go) return h("div", { class: kind }, ...inner);
  return h(
    "button",
    {
      type: "button",
      class: kind,
      title: t("branchHere", { token: visible(other.t) }),
      on: { click: go },
    },
    ...inner,
  );
}

/**
 * Renders Markdown. HTML in a message is shown as text; links and images are shown, never followed
 * or loaded: a model's answer may contain an address made to carry the conversation away.
 */

import { Marked } from "../vendor/marked.min.js";
import { copyText, h, icon } from "./dom.js";
import { t, translate } from "./i18n.js";

const TAGS = [
  "p",
  "br",
  "hr",
  "strong",
  "em",
  "del",
  "code",
  "pre",
  "blockquote",
  "ul",
  "ol",
  "li",
  "h1",
  "h2",
  "h3",
  "h4",
  "h5",
  "h6",
  "table",
  "thead",
  "tbody",
  "tr",
  "th",
  "td",
  "span",
];
const ATTRIBUTES = ["class", "start", "align", "data-url", "data-language"];

function escaped(text) {
  return text.replace(/[&<>"']/g, each => `&#${each.charCodeAt(0)};`);
}

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  extensions: [
    {
      // CommonMark leaves **注意：**后面 literal, because the closing ** is between punctuation and a
      // letter. Chinese has no spaces there, so such a pair is strong emphasis.
      name: "strong-next-to-punctuation",
      level: "inline",
      start: source => source.indexOf("**"),
      tokenizer(source) {
        const found = /^\*\*(?![\s*])((?:[^*\n`]|\*(?!\*))*?[^\s*])\*\*(?!\*)/.exec(source);
        const inner = found?.[1];
        if (!inner || !/^[\p{P}\p{S}]|[\p{P}\p{S}]$/u.test(inner)) return undefined;
        return {
          type: "strong",
          raw: found[0],
          text: inner,
          tokens: this.lexer.inlineTokens(inner),
        };
      },
    },
  ],
  renderer: {
    html: token => escaped(token.raw ?? token.text),
    link(token) {
      return shownAddress(this.parser.parseInline(token.tokens), token.href);
    },
    image: token => shownAddress(escaped(token.text || t("image")), token.href),
    checkbox: token => (token.checked ? "☑ " : "☐ "),
    code: token =>
      `<pre data-language="${escaped((token.lang || "").split(/\s/)[0])}"><code>${escaped(token.text)}</code></pre>`,
  },
});

function shownAddress(inner, address) {
  return `<span class="address" data-url="${escaped(address)}">${inner}</span>`;
}

const CODE = /(^|\n)(`{3,}|~{3,})[^\n]*(?:\n[\s\S]*?(?:\n\2(?=\n|$)|$)|$)|`[^`\n]+`/g;
const MATH =
  /\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\]|\\\(([\s\S]+?)\\\)|(?<![\\$\w])\$(?!\s)((?:[^$\n\\]|\\.)+?)(?<!\s)\$(?![\d$])/g;

/** Cuts formulas out of a text, because Markdown would read * and _ in them. */
function withoutMath(text) {
  const formulas = [];
  const cut = part =>
    part.replace(MATH, (_, a, b, c, d) => {
      formulas.push({ tex: a ?? b ?? c ?? d, display: a !== undefined || b !== undefined });
      return `\uE000${formulas.length - 1}\uE001`;
    });
  let out = "",
    end = 0;
  text = text.replace(/[\uE000\uE001]/g, "");
  for (const code of text.matchAll(CODE)) {
    out += cut(text.slice(end, code.index)) + code[0];
    end = code.index + code[0].length;
  }
  return { text: out + cut(text.slice(end)), formulas };
}

/**
 * Shows a text in an element. Blocks that did not change since the last call are kept, so that a
 * stream costs only its last block.
 */
export function showMarkdown(element, text, { streaming = false } = {}) {
  const source = withoutMath(text);
  const blocks = marked
    .lexer(source.text)
    .filter(token => token.type !== "space" && token.type !== "def");
  const old = element.markdownBlocks || [],
    kept = [];
  const name = block =>
    block.type +
    block.raw.replace(/\uE000(\d+)\uE001/g, (_, index) => JSON.stringify(source.formulas[index]));
  blocks.forEach((block, index) => {
    const known = old[index],
      key = name(block),
      last = streaming && index === blocks.length - 1;
    if (known?.key === key && known.last === last) {
      kept.push(known);
      return;
    }
    const node = h("div", { class: "block" });
    node.append(rendered(block, source.formulas));
    finish(node, { highlight: !last });
    if (known) known.node.replaceWith(node);
    else element.append(node);
    kept.push({ key, last, node });
  });
  for (const { node } of old.slice(blocks.length)) node.remove();
  element.markdownBlocks = kept;
}

function rendered(block, formulas) {
  const html = marked.parser([block]);
  const fragment = DOMPurify.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ATTRIBUTES,
    ALLOW_DATA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode())
    if (walker.currentNode.data.includes("\uE000")) texts.push(walker.currentNode);
  for (const node of texts) {
    const parts = node.data.split(/\uE000(\d+)\uE001/);
    node.replaceWith(...parts.map((part, index) => (index % 2 ? formula(formulas[part]) : part)));
  }
  return fragment;
}

let loadingMath = null;
function formula({ tex, display }) {
  const element = h("span", { class: display ? "math display" : "math" }, tex);
  loadingMath ??= new Promise((resolve, reject) => {
    document.head.append(
      h("script", { src: "/assets/vendor/temml.min.js", on: { load: resolve, error: reject } }),
    );
  });
  loadingMath
    .then(() => {
      element.textContent = "";
      temml.render(tex, element, { displayMode: display, throwOnError: false });
    })
    .catch(() => {
      element.textContent = tex;
    });
  return element;
}

/** Adds what only a person needs: names and copy buttons of code, addresses, scrolling tables. */
function finish(node, { highlight }) {
  for (const address of node.querySelectorAll(".address")) {
    const url = address.dataset.url;
    if (address.textContent !== url) address.append(h("span", { class: "url" }, ` (${url})`));
  }
  for (const table of node.querySelectorAll("table")) {
    const box = h("div", { class: "scrolls", tabindex: "0", role: "region", label: "table" });
    table.replaceWith(box);
    box.append(table);
  }
  for (const pre of node.querySelectorAll("pre")) decorate(pre, highlight);
  translate(node);
}

function decorate(pre, highlight) {
  const code = pre.querySelector("code"),
    language = pre.dataset.language;
  const copy = h(
    "button",
    { type: "button", class: "quiet small" },
    icon("copy"),
    h("span", { t: "copy" }),
  );
  copy.addEventListener("click", async () => {
    if (await copyText(code.textContent)) flash(copy.lastChild);
  });
  const box = h(
    "div",
    { class: "code" },
    h("div", { class: "code-head" }, h("span", {}, language || t("code")), copy),
  );
  pre.replaceWith(box);
  pre.tabIndex = 0;
  box.append(pre);
  if (highlight && language && code.textContent.length < 40_000) void colour(code, language);
}

/** Says for a moment that something was copied. */
export function flash(element) {
  const before = element.dataset.t;
  element.dataset.t = "copied";
  translate(element);
  setTimeout(() => {
    element.dataset.t = before;
    translate(element);
  }, 1500);
}

let loadingHighlight = null;
async function colour(code, language) {
  loadingHighlight ??= import("../vendor/highlight.min.js");
  const { default: hljs } = await loadingHighlight;
  if (!hljs.getLanguage(language)) return;
  const { value } = hljs.highlight(code.textContent, { language, ignoreIllegals: true });
  code.replaceChildren(
    DOMPurify.sanitize(value, {
      ALLOWED_TAGS: ["span"],
      ALLOWED_ATTR: ["class"],
      RETURN_DOM_FRAGMENT: true,
    }),
  );
}

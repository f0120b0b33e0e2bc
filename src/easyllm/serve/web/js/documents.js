/** The documents panel: what the index holds, and the passages that are found for a question. */

import { getJSON, postJSON } from "./api.js";
import { byId, h } from "./dom.js";
import { number, onLanguage, t } from "./i18n.js";
import { on, state } from "./state.js";
import { pathTo } from "./tree.js";

let listing = null,
  passages = null, // of the last search; null before the first one
  asked = "",
  searches = 0; // an answer to any but the newest search is dropped

/** Shows the panel's contents; the question that was asked last is searched for. */
export function openDocuments() {
  const last = lastQuestion();
  if (last && last !== asked) void search(last);
  if (listing) show();
  else void load();
}

function lastQuestion() {
  const { conversation } = state;
  const node = pathTo(conversation, conversation.head).findLast(each => each.role === "user");
  return node?.content.trim() || "";
}

async function load() {
  try {
    listing = await getJSON("/v1/rag/documents");
    show();
  } catch (problem) {
    fail(problem);
  }
}

async function search(question) {
  asked = question;
  byId("documents-query").value = question;
  const mine = ++searches;
  try {
    const found = await postJSON("/v1/rag/search", { query: question });
    if (mine !== searches) return;
    passages = found.data;
    show();
  } catch (problem) {
    if (mine === searches) fail(problem);
  }
}

function fail(problem) {
  byId("passages").replaceChildren(
    h("p", { class: "hint" }, t(problem.word || "unreachable", problem.values)),
  );
}

function show() {
  const found = byId("passages");
  if (passages?.length) found.replaceChildren(...passages.map(passage));
  else found.replaceChildren(h("p", { class: "hint" }, t(passages ? "noPassages" : "passagesHint")));
  if (!listing) return;
  const chunks = listing.data.reduce((sum, each) => sum + each.chunks, 0);
  byId("documents-count").textContent = t("documentsCount", {
    n: number(listing.data.length),
    m: number(chunks),
    embedder: listing.embedder,
  });
  byId("documents-list").replaceChildren(
    ...listing.data.map(each =>
      h(
        "li",
        {},
        h("span", { class: "name" }, each.name),
        h("span", { class: "hint" }, t("chunksOf", { n: number(each.chunks) })),
      ),
    ),
  );
}

function passage(found) {
  const place = [
    found.document,
    found.page !== null && t("pageOf", { n: found.page }),
    found.headings.join(" › "),
  ];
  return h(
    "article",
    { class: "passage" },
    h("h4", {}, place.filter(Boolean).join(" · ")),
    h("p", {}, found.text),
    h("p", { class: "hint" }, t("scoreOf", { n: found.score.toPrecision(3) })),
  );
}

byId("documents-form").addEventListener("submit", event => {
  event.preventDefault();
  const question = byId("documents-query").value.trim();
  if (question) void search(question);
});
on("running", () => {
  if (!byId("documents-panel").hidden) openDocuments();
});
onLanguage(show);

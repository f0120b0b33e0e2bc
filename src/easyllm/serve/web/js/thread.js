/** The conversation: the messages of the branch that is shown, one below the other. */

import { byId, h } from "./dom.js";
import { t, translate } from "./i18n.js";
import { MessageView } from "./message.js";
import { voteBar } from "./vote.js";
import { changed, state } from "./state.js";
import { partnerOf, pathTo } from "./tree.js";

let views = new Map(),
  shownConversation = null;
export const actions = {}; // filled by chat.js

/** Returns the view of a node, if it is shown. */
export function viewOf(id) {
  return views.get(id);
}

/** Shows the current branch; views of messages that were shown before are kept. */
export function showThread() {
  const { conversation } = state,
    log = byId("conversation");
  if (shownConversation !== conversation) {
    views = new Map();
    shownConversation = conversation;
    state.inspected = null;
  }
  const rows = pathTo(conversation, conversation.head).map(node =>
    node.pair ? pairRow(node) : viewFor(node).element,
  );
  const kept = new Set(rows);
  for (const child of [...log.children]) if (!kept.has(child)) child.remove();
  rows.forEach((row, index) => {
    if (log.children[index] !== row) log.insertBefore(row, log.children[index] || null);
  });
  byId("welcome").hidden = rows.length > 0 || !state.models.length;
  document.title = (conversation.title || t("newChat")) + " – Easyllm";
}

function viewFor(node) {
  let view = views.get(node.id);
  if (view) view.update();
  else views.set(node.id, (view = new MessageView(node, actions)));
  return view;
}

const pairs = new WeakMap();
/** Returns the two answers that are compared, with the vote below them. */
function pairRow(node) {
  const { conversation } = state;
  const nodes = [node, partnerOf(conversation, node)]
    .filter(Boolean)
    .sort((a, b) => a.created - b.created || a.place - b.place);
  const shown = nodes.map(viewFor);
  shown.forEach((view, index) => {
    view.isSecond = index > 0;
    view.updateFrame();
  });
  let row = pairs.get(shown[0]);
  if (!row) {
    row = h(
      "section",
      { class: "pair" },
      h("div", { class: "two" }, ...shown.map(view => view.element)),
    );
    pairs.set(shown[0], row);
  }
  row.querySelector(".vote")?.remove();
  if (nodes.length > 1)
    row.append(translate(voteBar(nodes, (choice, pair) => actions.vote(choice, pair))));
  return row;
}

/** Shows a change of a node while it is generated. */
export function showPiece(node) {
  const view = views.get(node.id);
  if (!view) return;
  if (view.running) view.updateSoon(keepBottom);
  else {
    changed("thread");
    keepBottom();
  }
}

let atBottom = true;
/** Scrolls to the end, unless the reader has scrolled up. */
export function keepBottom() {
  const box = byId("scroller");
  if (atBottom) box.scrollTop = box.scrollHeight;
}
export function toBottom() {
  atBottom = true;
  keepBottom();
}
export function watchScrolling() {
  const box = byId("scroller");
  const look = () => {
    atBottom = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
    byId("to-bottom").hidden = atBottom;
  };
  box.addEventListener("scroll", look, { passive: true });
  byId("to-bottom").addEventListener("click", toBottom);
}

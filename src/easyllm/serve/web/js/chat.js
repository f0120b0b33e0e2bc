/** What a person does with the conversation. */

import { byId } from "./dom.js";
import { generate, stopAll } from "./generate.js";
import { actions, showPiece, showThread, toBottom, viewOf } from "./thread.js";
import { changed, flush, on, saveSoon, state } from "./state.js";
import { keepVote } from "./vote.js";
import {
  addNode,
  lastLeaf,
  newConversation,
  newId,
  pathTo,
  preferred,
  showBranch,
} from "./tree.js";
import { saveTokens } from "./store.js";

on("thread", showThread);

/** Sends a message: adds it to the branch that is shown and generates its answer or answers. */
export function send(text, files = []) {
  const { conversation } = state;
  addNode(conversation, conversation.head, "user", {
    content: text,
    ...(files.length && { files }),
  });
  answer(conversation.head);
  toBottom();
}

/** Generates answers to a node: one, or two that are compared. */
function answer(parent, models = state.compare ? state.chosen : state.chosen.slice(0, 1)) {
  const { conversation } = state;
  const pair = models.length > 1 ? newId() : undefined,
    now = Date.now();
  let names = [...models];
  const blind = pair && state.settings.blind;
  if (blind && crypto.getRandomValues(new Uint8Array(1))[0] % 2) names = names.reverse();
  const nodes = names.map((model, index) =>
    addNode(conversation, parent, "assistant", {
      model,
      created: now,
      ...(pair && { pair, place: index }),
      ...(blind && { blind: "AB"[index] }),
    }),
  );
  showBranch(conversation, nodes[0].id);
  saveSoon();
  changed("thread");
  for (const node of nodes) void generate(node, showPiece);
}

export function newChat() {
  stopAll();
  void flush();
  state.conversation = newConversation(state.settings.system);
  changed("thread", "list");
  byId("question").focus();
}

export async function openConversation(id) {
  stopAll();
  await flush();
  const found = await state.store.load(id);
  if (!found) return;
  state.conversation = found;
  changed("thread", "list");
  toBottom();
}

/** Edits the last message of the user; returns whether there is one. */
export function editLast() {
  const last = pathTo(state.conversation, state.conversation.head).findLast(
    node => node.role === "user",
  );
  if (last) actions.edit(last);
  return Boolean(last);
}

Object.assign(actions, {
  edit(node) {
    viewOf(node.id)?.edit(text => {
      const { conversation } = state;
      if (node.role === "user") {
        stopAll();
        addNode(conversation, node.parent, "user", {
          content: text,
          ...(node.files && { files: node.files }),
        });
        answer(conversation.head);
      } else {
        addNode(conversation, node.parent, "assistant", { content: text, model: node.model });
        saveSoon();
        changed("thread");
      }
    });
  },

  regenerate(node) {
    stopAll();
    answer(node.parent, node.pair ? state.chosen : [state.compare ? node.model : state.chosen[0]]);
  },

  goOn(node) {
    state.inspected = null;
    void generate(node, showPiece);
  },

  inspect(node) {
    state.inspected = state.inspected === node.id ? null : node.id;
    changed("thread");
  },

  version(nodes) {
    stopAll();
    const { conversation } = state;
    const goesOn = nodes.find(node =>
      Object.values(conversation.nodes).some(each => each.parent === node.id),
    );
    showBranch(conversation, lastLeaf(conversation, (goesOn || preferred(conversation, nodes)).id));
    saveSoon();
    changed("thread");
  },

  vote: keepVote,

  toolResults(node, texts) {
    const { conversation } = state;
    let parent = node.id;
    node.calls.forEach((call, index) => {
      parent = addNode(conversation, parent, "tool", { tool: call.id, content: texts[index] }).id;
    });
    answer(parent, [node.model]);
  },

  /** Continues an answer from another token: a new version with that beginning. */
  branch(node, prefix, tokens) {
    const { conversation } = state;
    const twin = addNode(conversation, node.parent, "assistant", {
      content: prefix,
      model: node.model,
    });
    state.tokens.set(twin.id, tokens);
    void saveTokens(twin.id, tokens).catch(() => {});
    state.inspected = null;
    changed("thread");
    void generate(twin, showPiece);
  },
});

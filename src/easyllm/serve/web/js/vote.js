/** The vote on two answers, kept in the conversation. */

import { download, h } from "./dom.js";
import { changed, saveSoon, state } from "./state.js";
import { preferenceRows, showBranch } from "./tree.js";

export const CHOICES = ["first", "second", "tie", "bad"];

/** Returns the bar below two answers; `vote` receives the choice and the nodes. */
export function voteBar(nodes, vote) {
  const done = nodes.every(node => node.content && !state.running.has(node.id));
  const kept = state.conversation.votes[nodes[0].pair];
  const bar = h("div", { class: "vote", role: "group", label: "voteAsk" });
  if (!done) return bar;
  bar.append(h("span", { class: "ask", t: "voteAsk" }));
  for (const choice of CHOICES) {
    const pressed = kept?.choice === choice;
    bar.append(
      h("button", {
        type: "button",
        class: "small " + (pressed ? "primary" : ""),
        "aria-pressed": String(pressed),
        dataset: { choice },
        t: choice,
        on: { click: () => vote(choice, nodes) },
      }),
    );
  }
  return bar;
}

/** Keeps a vote. The conversation continues with the better answer, unless it has gone on already. */
export function keepVote(choice, nodes) {
  const { conversation } = state,
    [first, second] = nodes;
  const pair = first.pair,
    vote = { choice, time: Date.now() };
  if (choice === "first") Object.assign(vote, { chosen: first.id, rejected: second.id });
  if (choice === "second") Object.assign(vote, { chosen: second.id, rejected: first.id });
  conversation.votes[pair] = vote;
  if (vote.chosen && nodes.some(node => node.id === conversation.head))
    showBranch(conversation, vote.chosen);
  saveSoon(0);
  changed("thread");
}

/** Offers the votes of all conversations as preference data; returns how many rows there are. */
export async function exportVotes() {
  const rows = preferenceRows(await state.store.all());
  if (rows.length)
    download(
      "preferences.jsonl",
      rows.map(row => JSON.stringify(row) + "\n").join(""),
      "application/jsonl",
    );
  return rows.length;
}

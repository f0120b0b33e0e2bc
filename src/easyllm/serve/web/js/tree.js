/**
 * Conversations as trees. Editing, regenerating and branching add a sibling; nothing is overwritten.
 *
 * conversation: {format: 1, id, title, named, system, created, updated, head, nodes, votes}
 *   head    id of the node at the end of the branch that is shown; null if there is none
 *   nodes   by id: {id, parent, role, content, created} and, where they apply,
 *           model, reasoning, calls, tool, files, pair, finish, stats, stopped; next is the child
 *           that was last shown
 *   votes   by pair: {choice, chosen, rejected, time}; choice is first, second, tie or bad
 */

export const FORMAT = 1;

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map(byte => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(system = "") {
  const now = Date.now();
  return {
    format: FORMAT,
    id: newId(),
    title: "",
    named: false,
    system,
    created: now,
    updated: now,
    head: null,
    nodes: {},
    votes: {},
  };
}

/** Adds a node and makes it the end of the branch that is shown. */
export function addNode(conversation, parent, role, values = {}) {
  const node = { id: newId(), parent, role, content: "", created: Date.now(), ...values };
  conversation.nodes[node.id] = node;
  showBranch(conversation, node.id);
  if (role === "user" && !conversation.title) conversation.title = titleOf(node.content);
  return node;
}

/** Shows the branch that ends at a node. Each node remembers the branch below it that was last shown. */
export function showBranch(conversation, id) {
  conversation.head = id;
  for (const node of pathTo(conversation, id)) {
    if (node.parent !== null) conversation.nodes[node.parent].next = node.id;
  }
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? line.slice(0, 59) + "…" : line;
}

/** Returns the nodes from the first to the one with an id. */
export function pathTo(conversation, id) {
  const path = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent])
    path.unshift(node);
  return path;
}

export function childrenOf(conversation, id) {
  return Object.values(conversation.nodes)
    .filter(node => node.parent === id)
    .sort((a, b) => a.created - b.created);
}

/** Returns the alternatives at a node's place, each a list of one node, or of two compared ones. */
export function versionsOf(conversation, node) {
  const groups = new Map();
  for (const each of childrenOf(conversation, node.parent)) {
    const name = each.pair || each.id;
    groups.set(name, [...(groups.get(name) || []), each]);
  }
  return [...groups.values()];
}

/** Returns the node that is compared with a node; undefined if there is none. */
export function partnerOf(conversation, node) {
  if (!node.pair) return undefined;
  return childrenOf(conversation, node.parent).find(
    each => each.pair === node.pair && each.id !== node.id,
  );
}

/** Returns the last node of the branch below a node that was last shown, or else of the newest. */
export function lastLeaf(conversation, id) {
  for (let children; (children = childrenOf(conversation, id)).length;) {
    const last = children.find(each => each.id === conversation.nodes[id].next) || children.at(-1);
    const pair = children.filter(each => last.pair && each.pair === last.pair);
    id = (
      pair.find(each => childrenOf(conversation, each.id).length) ||
      preferred(conversation, pair) ||
      last
    ).id;
  }
  return id;
}

/** Returns the answer of a pair with which the conversation continues. */
export function preferred(conversation, pair) {
  return pair.find(node => conversation.votes[node.pair]?.chosen === node.id) || pair[0];
}

/** Removes a node with all that follows it. */
export function removeFrom(conversation, id) {
  for (const child of childrenOf(conversation, id)) removeFrom(conversation, child.id);
  delete conversation.nodes[id];
}

/** Returns what is sent for a user's node: its text, preceded by its files. */
export function textOf(node) {
  const files = (node.files || []).map(
    file => `<file name="${file.name}">\n${file.text}\n</file>\n\n`,
  );
  return files.join("") + node.content;
}

/** Returns a path of nodes as messages of OpenAI's API. */
export function messagesOf(conversation, path) {
  const system = conversation.system.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const node of path) {
    if (node.role === "user") messages.push({ role: "user", content: textOf(node) });
    else if (node.role === "tool")
      messages.push({ role: "tool", tool_call_id: node.tool, content: node.content });
    else if (node.calls?.length)
      messages.push({
        role: "assistant",
        content: node.content || null,
        tool_calls: node.calls.map(call => ({
          id: call.id,
          type: "function",
          function: { name: call.name, arguments: call.arguments },
        })),
      });
    else messages.push({ role: "assistant", content: node.content });
  }
  return messages;
}

/** Adds the nodes and votes that another copy of a conversation has in addition. */
export function merge(conversation, other) {
  conversation.nodes = { ...other.nodes, ...conversation.nodes };
  conversation.votes = { ...other.votes, ...conversation.votes };
  return conversation;
}

/** Returns whether a value has the form of a conversation that this page can show. */
export function isConversation(value) {
  const text = each => typeof each === "string";
  if (!value || value.format !== FORMAT || !text(value.id) || !/^[\w-]{1,64}$/.test(value.id))
    return false;
  if (!text(value.title) || !text(value.system) || !isObject(value.nodes) || !isObject(value.votes))
    return false;
  if (value.head !== null && !(value.head in value.nodes)) return false;
  if (!Object.values(value.votes).every(isObject)) return false;
  return Object.entries(value.nodes).every(
    ([id, node]) => isObject(node) && node.id === id && isNode(node, value.nodes),
  );
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

const TEXTS = ["model", "reasoning", "finish", "pair", "tool", "next", "blind"];

function isNode(node, nodes) {
  if (typeof node.content !== "string" || !["user", "assistant", "tool"].includes(node.role)) {
    return false;
  }
  if (TEXTS.some(name => !["string", "undefined"].includes(typeof (node[name] ?? undefined)))) {
    return false;
  }
  const files = node.files || [],
    calls = node.calls || [];
  if (
    !Array.isArray(files) ||
    !files.every(file => typeof file?.name === "string" && typeof file.text === "string")
  )
    return false;
  if (
    !Array.isArray(calls) ||
    !calls.every(call => typeof call?.arguments === "string" && typeof call.name === "string")
  )
    return false;
  const seen = new Set(); // a file may contain a circle of parents
  for (let each = node; each.parent !== null; each = nodes[each.parent]) {
    if (seen.has(each.id) || !isObject(nodes[each.parent])) return false;
    seen.add(each.id);
  }
  return true;
}

/**
 * Returns the votes of conversations as rows of preference data: {prompt, chosen, rejected}, lists
 * of messages. Both answers follow the same prompt. Ties, and votes that both are bad, give none.
 */
export function preferenceRows(conversations) {
  const rows = [];
  for (const conversation of conversations) {
    for (const vote of Object.values(conversation.votes)) {
      const [chosen, rejected] = [
        conversation.nodes[vote.chosen],
        conversation.nodes[vote.rejected],
      ];
      if (!chosen?.content || !rejected?.content || chosen.content === rejected.content) continue;
      const prompt = messagesOf(conversation, pathTo(conversation, chosen.parent));
      rows.push({
        prompt,
        chosen: [{ role: "assistant", content: chosen.content }],
        rejected: [{ role: "assistant", content: rejected.content }],
        chosen_model: chosen.model,
        rejected_model: rejected.model,
      });
    }
  }
  return rows;
}

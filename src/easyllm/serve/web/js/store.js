/**
 * Where conversations are kept: in the browser (IndexedDB), or on the server if it was started with
 * --history. The token probabilities of answers are always kept in the browser.
 */

import { Problem, getJSON, request } from "./api.js";
import { FORMAT, isConversation, merge } from "./tree.js";

const DATABASE = "easyllm",
  VERSION = 1,
  KEPT_TOKENS = 200;

let opening = null;
function database() {
  opening ??= new Promise((resolve, reject) => {
    const opened = indexedDB.open(DATABASE, VERSION);
    opened.onupgradeneeded = () => {
      opened.result.createObjectStore("conversations", { keyPath: "id" });
      opened.result.createObjectStore("tokens", { keyPath: "id" }).createIndex("time", "time");
    };
    opened.onsuccess = () => resolve(opened.result);
    opened.onerror = () => reject(new Problem("noStorage"));
  });
  return opening;
}

/** Runs `work` on a store of the browser's database and returns its request's result. */
async function inStore(name, mode, work) {
  const store = (await database()).transaction(name, mode).objectStore(name);
  return new Promise((resolve, reject) => {
    const asked = work(store);
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(new Problem("noStorage"));
  });
}

function head(conversation) {
  const { id, title, created, updated } = conversation;
  return { id, title, created, updated };
}

/** The text in which a conversation is searched. */
function searched(conversation) {
  return [conversation.title, ...Object.values(conversation.nodes).map(node => node.content)]
    .join("\n")
    .toLowerCase();
}

export const browserStore = {
  name: "browser",
  async list(query = "") {
    const wanted = query.trim().toLowerCase();
    const all = await inStore("conversations", "readonly", store => store.getAll());
    return all
      .filter(each => !wanted || searched(each).includes(wanted))
      .sort((a, b) => b.updated - a.updated)
      .map(head);
  },
  all() {
    return inStore("conversations", "readonly", store => store.getAll());
  },
  load(id) {
    return inStore("conversations", "readonly", store => store.get(id));
  },
  save(conversation) {
    return inStore("conversations", "readwrite", store => store.put(structuredClone(conversation)));
  },
  remove(id) {
    return inStore("conversations", "readwrite", store => store.delete(id));
  },
};

const HISTORY = "/easyllm/history";

export const serverStore = {
  name: "server",
  revisions: new Map(), // by conversation, of the copy that this page knows
  async list(query = "") {
    return (await getJSON(`${HISTORY}?q=${encodeURIComponent(query.trim())}`)).conversations;
  },
  async all() {
    const found = [];
    for (const { id } of await this.list()) found.push(await this.load(id));
    return found;
  },
  async load(id) {
    const { revision, conversation } = await getJSON(`${HISTORY}/${id}`);
    this.revisions.set(id, revision);
    return conversation;
  },
  async save(conversation) {
    const put = () =>
      request(`${HISTORY}/${conversation.id}`, {
        method: "PUT",
        json: { revision: this.revisions.get(conversation.id) ?? 0, conversation },
      });
    const response = await put().catch(async problem => {
      if (problem.status !== 409) throw problem;
      merge(conversation, await this.load(conversation.id)); // another tab was faster
      return put();
    });
    this.revisions.set(conversation.id, (await response.json()).revision);
  },
  async remove(id) {
    await request(`${HISTORY}/${id}`, { method: "DELETE" });
    this.revisions.delete(id);
  },
};

/** Keeps the token probabilities of an answer; those of the oldest answers are dropped. */
export async function saveTokens(id, tokens) {
  await inStore("tokens", "readwrite", store => store.put({ id, tokens, time: Date.now() }));
  const ids = await inStore("tokens", "readonly", store => store.index("time").getAllKeys());
  for (const old of ids.slice(0, -KEPT_TOKENS))
    await inStore("tokens", "readwrite", store => store.delete(old));
}

export async function loadTokens(id) {
  return (await inStore("tokens", "readonly", store => store.get(id)))?.tokens;
}

/** Returns the file that holds conversations. */
export function exported(conversations) {
  return JSON.stringify(
    { format: "easyllm-conversations", version: FORMAT, conversations },
    null,
    1,
  );
}

/** Returns the conversations of an exported file, or raises a Problem that says what is wrong. */
export function imported(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Problem("importNotJSON");
  }
  if (found?.format !== "easyllm-conversations") throw new Problem("importOther");
  if (found.version !== FORMAT)
    throw new Problem("importVersion", { got: found.version, known: FORMAT });
  if (!Array.isArray(found.conversations) || !found.conversations.every(isConversation))
    throw new Problem("importDamaged");
  for (const each of found.conversations) {
    for (const node of Object.values(each.nodes)) delete node.error; // a key of this page's texts
  }
  return found.conversations;
}

/** What the page shows now. Modules change it through these functions and listen to `changed`. */

import { newConversation } from "./tree.js";
import { browserStore, serverStore } from "./store.js";

const SETTINGS = "easyllm-settings";

export const state = {
  models: [], // entries of /v1/models
  chosen: [], // the two selected names; only the first is used when not comparing
  compare: false,
  conversation: newConversation(),
  running: new Map(), // AbortControllers by node id
  tokens: new Map(), // token probabilities by node id
  inspected: null, // id of the node whose tokens are shown
  settings: loadSettings(),
  store: browserStore,
  limits: {}, // what the server says of itself
};

/** Settings that differ from their defaults; `values` are fields of the request. */
function loadSettings() {
  const usual = {
    values: {},
    system: "",
    record: true,
    blind: false,
    theme: "",
    tools: "",
    form: "text",
    formText: "",
  };
  try {
    return { ...usual, ...JSON.parse(localStorage.getItem(SETTINGS) || "{}") };
  } catch {
    return usual;
  }
}

export function saveSettings() {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(state.settings));
  } catch {
    /* lost on reload */
  }
}

/**
 * Returns the sampling parameters of a model's answers where the settings are empty: its own, or,
 * if it recommends none, those of `easyllm chat`. The API's defaults (temperature 1, no top-p)
 * let small models write unlikely tokens until their text makes no sense.
 */
export function usualSampling(model) {
  const own = state.models.find(each => each.id === model)?.default_sampling || {};
  return "temperature" in own || "top_p" in own ? own : { temperature: 0.7, top_p: 0.95, ...own };
}

const listeners = { thread: [], models: [], list: [], running: [] };
export function on(name, action) {
  listeners[name].push(action);
}
export function changed(...names) {
  for (const name of names) for (const action of listeners[name]) action();
}

export function useServerHistory() {
  state.store = serverStore;
}

let saving = null,
  saveFailed = () => {};
export function onSaveFailed(action) {
  saveFailed = action;
}

/** Stores the conversation soon; several changes are stored once. */
export function saveSoon(delay = 400, conversation = state.conversation) {
  conversation.updated = Date.now();
  if (saving?.conversation === conversation) clearTimeout(saving.timer);
  else if (saving) void flush();
  saving = { conversation, timer: setTimeout(() => void flush(), delay) };
}

let writing = Promise.resolve();
/** Stores now what waits to be stored; one conversation after the other. */
export function flush() {
  if (!saving) return writing;
  clearTimeout(saving.timer);
  const { conversation } = saving;
  saving = null;
  if (conversation.head === null) return writing;
  writing = writing
    .then(() => state.store.save(conversation))
    .then(
      () => changed("list"),
      problem => saveFailed(problem),
    );
  return writing;
}
addEventListener("pagehide", () => void flush());

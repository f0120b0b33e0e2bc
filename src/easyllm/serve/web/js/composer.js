/** The box to write in: text, attached files, the count of tokens, send and stop. */

import { byId, h, iconButton } from "./dom.js";
import { send } from "./chat.js";
import { countTokens, requestFields, stopAll } from "./generate.js";
import { number, onLanguage, t, translate } from "./i18n.js";
import { changed, on, state } from "./state.js";
import { Problem } from "./api.js";
import { messagesOf, pathTo, textOf } from "./tree.js";
import { notify } from "./notice.js";

export const MAX_FILE_BYTES = 256 * 1024,
  MAX_FILES_BYTES = 1024 * 1024;
let files = [];

function size(bytes) {
  return bytes < 1024 * 1024
    ? `${number(bytes / 1024)} KiB`
    : `${number(bytes / 1024 / 1024, 1)} MiB`;
}

/** Attaches files; those that are no text or too large are refused by name. */
export async function attach(list) {
  for (const file of list) {
    try {
      files.push(await read(file));
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      notify(problem);
    }
  }
  showFiles();
}

async function read(file) {
  const limit = size(MAX_FILE_BYTES);
  if (file.size > MAX_FILE_BYTES)
    throw new Problem("fileTooLarge", { name: file.name, got: size(file.size), limit });
  const total = files.reduce((sum, each) => sum + each.size, file.size);
  if (total > MAX_FILES_BYTES)
    throw new Problem("filesTooLarge", { got: size(total), limit: size(MAX_FILES_BYTES) });
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (text.includes("\0")) throw new TypeError("binary");
    // a name is shown in the prompt between quotes
    return { name: file.name.replace(/["<>\n]/g, "_"), size: file.size, text };
  } catch {
    throw new Problem("fileNotText", { name: file.name });
  }
}

function showFiles() {
  byId("files").replaceChildren(
    ...files.map((file, index) =>
      h(
        "span",
        { class: "chip" },
        `${file.name} · ${size(file.size)}`,
        iconButton(
          "close",
          "removeFile",
          () => {
            files.splice(index, 1);
            showFiles();
          },
          { dataset: { name: file.name } },
        ),
      ),
    ),
  );
  byId("files").hidden = !files.length;
  translate(byId("files"));
  countSoon();
}

export function submit() {
  const box = byId("question"),
    text = box.value.trim();
  if ((!text && !files.length) || state.running.size || !state.models.length) return;
  try {
    requestFields();
  } catch (problem) {
    notify(problem);
    return;
  }
  notify(null);
  box.value = "";
  grow();
  const sent = files.map(({ name, text }) => ({ name, text }));
  files = [];
  showFiles();
  send(text, sent);
  box.focus();
}

/** Grows the box with its text in browsers that cannot do it by style. */
function grow() {
  const box = byId("question");
  if (CSS.supports("field-sizing", "content")) return;
  box.style.height = "auto";
  box.style.height = box.scrollHeight + "px";
}

let timer = 0,
  counting = null;
/** Counts the tokens that would be sent, once the person pauses. */
export function countSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => void count(), 350);
}

async function count() {
  counting?.abort();
  const model = state.chosen[0];
  const text = textOf({ content: byId("question").value, files });
  const messages = messagesOf(
    state.conversation,
    pathTo(state.conversation, state.conversation.head),
  );
  if (text.trim()) messages.push({ role: "user", content: text });
  const shown = byId("tokens");
  if (!model || !messages.length || state.running.size) {
    shown.textContent = "";
    return;
  }
  counting = new AbortController();
  try {
    const { count: n, limit } = await countTokens(model, messages, counting.signal);
    shown.textContent = t(n >= limit ? "tokensOver" : "tokens", { n: number(n), m: number(limit) });
    shown.classList.toggle("over", n >= limit);
  } catch {
    shown.textContent = "";
  } // a template may refuse what is not complete yet
}

export function setUpComposer() {
  const box = byId("question");
  byId("composer").addEventListener("submit", event => {
    event.preventDefault();
    submit();
  });
  box.addEventListener("keydown", event => {
    // Enter that confirms an input-method candidate must not send; Safari only signals it by keyCode 229.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229)
      return;
    event.preventDefault();
    submit();
  });
  box.addEventListener("input", () => {
    grow();
    countSoon();
  });
  box.addEventListener("paste", event => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      void attach(event.clipboardData.files);
    }
  });
  byId("stop").addEventListener("click", () => {
    stopAll();
    box.focus();
  });
  byId("attach").addEventListener("click", () => byId("file-input").click());
  byId("file-input").addEventListener("change", event => {
    void attach([...event.target.files]);
    event.target.value = "";
  });
  const page = document.documentElement;
  page.addEventListener("dragover", event => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault();
  });
  page.addEventListener("drop", event => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    void attach([...event.dataTransfer.files]);
  });
  on("running", () => {
    const running = state.running.size > 0;
    byId("stop").hidden = !running;
    byId("send").hidden = running;
    countSoon();
  });
  on("thread", countSoon);
  on("models", () => {
    byId("send").disabled = !state.models.length;
    countSoon();
  });
  onLanguage(() => {
    showFiles();
    changed("running");
  });
}

/** The list of conversations: search, open, rename, delete, export, import. */

import { byId, download, h, icon, iconButton } from "./dom.js";
import { newChat, openConversation } from "./chat.js";
import { onLanguage, t, translate } from "./i18n.js";
import { changed, flush, on, saveSoon, state } from "./state.js";
import { browserStore, exported, imported } from "./store.js";
import { exportVotes } from "./vote.js";
import { notify } from "./notice.js";

const DAY = 86_400_000;
let asked = 0;

/** Shows the conversations that contain what is searched. */
export async function showList() {
  const turn = ++asked,
    query = byId("search").value;
  const found = await state.store.list(query).catch(problem => {
    notify(problem);
    return [];
  });
  if (turn !== asked) return; // a later search is on its way
  const rows = [],
    midnight = new Date().setHours(0, 0, 0, 0);
  let group = null;
  for (const each of found) {
    const name =
      each.updated >= midnight
        ? "today"
        : each.updated >= midnight - DAY
          ? "yesterday"
          : each.updated >= midnight - 7 * DAY
            ? "week"
            : "older";
    if (name !== group) rows.push(h("li", { class: "group", t: (group = name) }));
    rows.push(row(each));
  }
  if (!rows.length)
    rows.push(h("li", { class: "hint", t: query ? "nothingFound" : "noConversations" }));
  const focused = document.activeElement.closest(".entry")?.dataset.id;
  byId("list").replaceChildren(...rows);
  translate(byId("list"));
  if (focused) byId("list").querySelector(`[data-id="${focused}"] .open`)?.focus();
}

function row(each) {
  const current = each.id === state.conversation.id;
  const open = h(
    "button",
    {
      type: "button",
      class: "open",
      "aria-current": current ? "true" : undefined,
      on: {
        click: () => {
          closeOnPhone();
          void openConversation(each.id);
        },
      },
    },
    each.title || t("untitled"),
  );
  return h(
    "li",
    { class: "entry", dataset: { id: each.id } },
    open,
    iconButton("edit", "rename", () => rename(each, open), { class: "rename" }),
    iconButton("download", "exportAll", () => void exportOne(each), { class: "export" }),
    iconButton("trash", "remove", () => void remove(each), { class: "delete" }),
  );
}

function rename(each, open) {
  const box = h("input", { type: "text", value: each.title, label: "rename", maxlength: "200" });
  let ended = false;
  const end = async keep => {
    if (ended) return;
    ended = true;
    if (keep && box.value.trim()) await change(each.id, { title: box.value.trim(), named: true });
    void showList();
  };
  box.addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.isComposing) void end(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      void end(false);
    }
  });
  box.addEventListener("blur", () => void end(true));
  open.replaceWith(translate(box));
  box.select();
}

async function change(id, values) {
  if (id === state.conversation.id) {
    Object.assign(state.conversation, values);
    saveSoon(0);
    await flush();
    changed("thread");
    return;
  }
  const conversation = Object.assign(await state.store.load(id), values);
  await state.store.save(conversation);
}

async function remove(each) {
  if (!confirm(t("deleteAsk", { title: each.title || t("untitled") }))) return;
  if (each.id === state.conversation.id) newChat();
  await state.store.remove(each.id).catch(notify);
  void showList();
}

async function exportOne(each) {
  await flush();
  const conversation = await state.store.load(each.id);
  const name = (each.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  download(`${name}.json`, exported([conversation]));
}

/** Adds the conversations of a file, or none of them if one is damaged. */
export async function importFile(file) {
  try {
    const conversations = imported(await file.text());
    const known = new Set((await state.store.list()).map(each => each.id));
    for (const each of conversations) {
      if (known.has(each.id)) await state.store.load(each.id); // learns its revision
      await state.store.save(each);
    }
    notify({ word: "imported", values: { n: conversations.length } }, "done");
  } catch (problem) {
    notify(problem);
  }
  void showList();
}

/** Offers to copy this browser's conversations to the server. */
async function offerCopy() {
  const button = byId("copy-to-server");
  button.hidden = true;
  if (state.store === browserStore) return;
  const here = await browserStore.all().catch(() => []);
  const there = new Set((await state.store.list()).map(each => each.id));
  const missing = here.filter(each => !there.has(each.id));
  button.hidden = !missing.length;
  button.textContent = t("copyToServer", { n: missing.length });
  button.onclick = async () => {
    for (const each of missing) await state.store.save(each);
    void showList();
    void offerCopy();
  };
}

export function closeOnPhone() {
  document.body.classList.remove("menu-open");
}

export function setUpSidebar() {
  let timer = 0;
  byId("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => void showList(), 150);
  });
  byId("new-chat").addEventListener("click", () => {
    closeOnPhone();
    newChat();
  });
  byId("export").addEventListener("click", async () => {
    await flush();
    download("easyllm-conversations.json", exported(await state.store.all()));
  });
  byId("export-votes").addEventListener("click", async () => {
    await flush();
    if (!(await exportVotes())) notify({ word: "noVotes", values: {} }, "done");
  });
  byId("import").addEventListener("click", () => byId("import-input").click());
  byId("import-input").addEventListener("change", event => {
    if (event.target.files[0]) void importFile(event.target.files[0]);
    event.target.value = "";
  });
  const menu = byId("menu");
  menu.addEventListener("click", () => {
    const wide = matchMedia("(min-width: 800px)").matches;
    document.body.classList.toggle(wide ? "menu-hidden" : "menu-open");
  });
  byId("menu-shade").addEventListener("click", closeOnPhone);
  on("list", showList);
  onLanguage(() => {
    void showList();
    showPlace();
  });
}

/** Says where conversations are kept. */
export function showPlace() {
  const server = state.store !== browserStore;
  byId("place").replaceChildren(
    icon(server ? "server" : "browser"),
    h("span", { t: server ? "keptServer" : "keptBrowser" }),
  );
  translate(byId("place"));
  void offerCopy();
}

/** Starts the page: connects its parts, and the keyboard. */

import { getJSON } from "./api.js";
import { byId, h } from "./dom.js";
import { editLast, newChat } from "./chat.js";
import { countSoon, setUpComposer, submit } from "./composer.js";
import { startEngineView, stopEngineView } from "./engine.js";
import { stopAll } from "./generate.js";
import { language, onLanguage, setLanguage, t, translate } from "./i18n.js";
import { address, keepInAddress, loadModels, setUpKey, setUpModels } from "./models.js";
import { notify, setUpNotice } from "./notice.js";
import { setUpSettings, setUpTheme } from "./settings.js";
import { setUpSidebar, showList, showPlace } from "./sidebar.js";
import { changed, onSaveFailed, state, useServerHistory } from "./state.js";
import { watchScrolling } from "./thread.js";

const PANELS = ["settings", "engine", "documents"];

/** Opens one of the panels at the side, or closes it. */
function toggle(name, open = byId(name + "-panel").hidden) {
  for (const each of PANELS) {
    const shown = open && each === name;
    byId(each + "-panel").hidden = !shown;
    byId(each + "-button").setAttribute("aria-expanded", String(shown));
  }
  document.body.classList.toggle("panel-open", open);
  if (open && name === "engine") startEngineView();
  else stopEngineView();
  // loaded only by those who have documents
  if (open && name === "documents")
    void import("./documents.js").then(({ openDocuments }) => openDocuments());
  if (open)
    byId(name + "-panel")
      .querySelector("button, input, textarea")
      ?.focus({ preventScroll: true });
}

function setUpPanels() {
  for (const name of PANELS) {
    byId(name + "-button").addEventListener("click", () => toggle(name));
    byId(name + "-panel")
      .querySelector(".close")
      .addEventListener("click", () => {
        toggle(name, false);
        byId(name + "-button").focus();
      });
  }
}

function setUpLanguage() {
  byId("language").addEventListener("click", () => {
    const other = language === "zh" ? "en" : "zh";
    keepInAddress("lang", other);
    setLanguage(other);
  });
  onLanguage(() => {
    showExamples();
    changed("thread");
  });
}

function showExamples() {
  const examples = ["exampleOne", "exampleTwo", "exampleThree", "exampleFour"].map(name =>
    h("button", { type: "button", class: "example", t: name }),
  );
  for (const each of examples)
    each.addEventListener("click", () => {
      byId("question").value = each.textContent;
      submit();
    });
  byId("examples").replaceChildren(...examples);
  translate(byId("examples"));
}

const mac = /Mac|iP(hone|ad)/.test(navigator.platform);
const KEYS = [
  ["Enter", "keySend"],
  ["Shift Enter", "keyLine"],
  ["Mod Shift O", "keyNew"],
  ["Mod K", "keySearch"],
  ["Esc", "keyStop"],
  ["↑", "keyEdit"],
  ["Mod /", "keyHelp"],
];

function showKeys() {
  const rows = KEYS.flatMap(([keys, name]) => [
    h(
      "dt",
      {},
      ...keys.split(" ").map(each => h("kbd", {}, each.replace("Mod", mac ? "⌘" : "Ctrl"))),
    ),
    h("dd", { t: name }),
  ]);
  byId("keys-list").replaceChildren(...rows);
  translate(byId("keys-list"));
  byId("keys").showModal();
}

function setUpKeyboard() {
  byId("keys-button").addEventListener("click", showKeys);
  byId("keys-close").addEventListener("click", () => byId("keys").close());
  document.addEventListener("keydown", event => {
    const mod = event.ctrlKey || event.metaKey,
      pressed = event.key.toLowerCase();
    if (mod && event.shiftKey && pressed === "o") newChat();
    else if (mod && !event.shiftKey && pressed === "k") {
      document.body.classList.remove("menu-hidden");
      if (matchMedia("(max-width: 799px)").matches) document.body.classList.add("menu-open");
      byId("search").focus();
    } else if (mod && pressed === "/") showKeys();
    else if (event.key === "Escape" && !byId("keys").open) escape();
    else if (event.key === "ArrowUp" && event.target === byId("question") && !event.target.value) {
      if (!editLast()) return;
    } else return;
    event.preventDefault();
  });
}

/** Stops what is generated, or else closes what is open. */
function escape() {
  const open = PANELS.find(name => !byId(name + "-panel").hidden);
  if (state.running.size) stopAll();
  else if (open) toggle(open, false);
  else document.body.classList.remove("menu-open");
  byId("question").focus();
}

/** Reads what the server can do, then shows its models and conversations. */
async function connect() {
  await loadModels();
  if (!state.models.length) return;
  const found = await getJSON("/easyllm/page").catch(() => null);
  if (found?.history) useServerHistory();
  byId("documents-button").hidden = !found?.documents;
  showPlace();
  await showList();
}

setUpNotice();
setUpTheme();
setUpModels();
setUpSettings();
setUpComposer();
setUpSidebar();
setUpPanels();
setUpLanguage();
setUpKeyboard();
setUpKey(connect);
watchScrolling();
onSaveFailed(problem =>
  notify({ word: "notSaved", values: { message: t(problem.word || "noStorage", problem.values) } }),
);
state.conversation.system = state.settings.system;
byId("question").value = (address.get("q") || "").trim();
address.delete("q");
setLanguage(/^zh/i.test(address.get("lang") || navigator.language) ? "zh" : "en");
document.documentElement.dataset.ready = "true";
if (matchMedia("(pointer: fine)").matches) byId("question").focus(); // on a phone this would open the keyboard
void connect().then(countSoon);

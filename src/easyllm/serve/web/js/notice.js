/** The message above the conversation: a problem, or what was done. */

import { byId } from "./dom.js";
import { onLanguage, t } from "./i18n.js";

let shown = null;

/** Shows a Problem, or with `kind` "done" a result; null hides it. */
export function notify(problem, kind = "problem") {
  shown = problem && { ...problem, word: problem.word, values: problem.values, kind };
  show();
}

function show() {
  const element = byId("notice");
  element.hidden = !shown;
  element.className = shown?.kind || "";
  byId("notice-text").textContent = shown ? t(shown.word, shown.values) : "";
}

export function setUpNotice() {
  byId("notice-close").addEventListener("click", () => notify(null));
  onLanguage(show);
}

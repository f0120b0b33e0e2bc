/** The interface in English and Chinese. */

import en from "./words.en.js";
import zh from "./words.zh.js";

const WORDS = { en, zh };
const listeners = [];
export let language = "en";

/** Returns the text of a key, with values in place of `{name}`; of `{name:one|many}`, the word
 * that agrees with the number. */
export function t(key, values = {}) {
  const text = WORDS[language][key] ?? WORDS.en[key];
  if (text === undefined) throw new Error("no text has the key " + key);
  return text.replace(/\{(\w+)(?::(\w+)\|(\w+))?\}/g, (_, name, one, many) =>
    one === undefined ? (values[name] ?? "") : String(values[name]) === "1" ? one : many,
  );
}

/** Writes the texts of an element and of all elements in it. */
export function translate(root) {
  const all = selector => [
    ...(root.matches?.(selector) ? [root] : []),
    ...root.querySelectorAll(selector),
  ];
  for (const element of all("[data-t]"))
    element.textContent = t(element.dataset.t, element.dataset);
  for (const element of all("[data-t-label]")) {
    const text = t(element.dataset.tLabel, element.dataset);
    element.setAttribute("aria-label", text);
    element.title = text;
  }
  for (const element of all("[data-t-hint]")) element.placeholder = t(element.dataset.tHint);
  return root;
}

export function onLanguage(action) {
  listeners.push(action);
}

export function setLanguage(wanted) {
  language = wanted in WORDS ? wanted : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  translate(document.documentElement);
  for (const action of listeners) action();
}

/** Returns a number for people: 1234567 as 1,234,567. */
export function number(value, digits = 0) {
  return value.toLocaleString(language === "zh" ? "zh-CN" : "en", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}

/** Returns a share for people: 0.1234 as 12.3%. */
export function percent(value) {
  if (value > 0 && value < 0.001) return "<0.1%";
  return (value * 100).toFixed(value >= 0.9995 ? 0 : 1) + "%";
}

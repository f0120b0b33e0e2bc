/** The settings: every sampling parameter of the server, the form of the answer, tools, the page. */

import { byId, h } from "./dom.js";
import { onLanguage, translate } from "./i18n.js";
import { countSoon } from "./composer.js";
import { changed, on, saveSettings, saveSoon, state, usualSampling } from "./state.js";

/** A field of the request: its bounds, and how its text becomes a value. */
const number = (name, min, max, step) => ({ name, min, max, step, kind: "number" });
const GROUPS = {
  sampling: [
    number("temperature", 0, 2, 0.1),
    number("top_p", 0.01, 1, 0.01),
    number("top_k", 0, 100000, 1),
    number("min_p", 0, 1, 0.01),
    number("typical_p", 0, 1, 0.01),
    number("seed", 0, 2 ** 53 - 1, 1),
  ],
  penalties: [
    number("repetition_penalty", 0.01, 100, 0.01),
    number("presence_penalty", -2, 2, 0.1),
    number("frequency_penalty", -2, 2, 0.1),
    { name: "logit_bias", kind: "json" },
  ],
  lengthGroup: [
    number("max_tokens", 1, 1000000, 1),
    number("min_tokens", 0, 1000000, 1),
    { name: "stop", label: "stopStrings", kind: "lines" },
    { name: "ignore_eos", kind: "check" },
  ],
  formGroup: [
    { name: "reasoning_effort", kind: "choice", choices: ["none", "low", "medium", "high"] },
  ],
};

export function setUpSettings() {
  on("thread", () => {
    if (document.activeElement !== byId("system")) byId("system").value = state.conversation.system;
  });
  on("models", showDefaults);
  onLanguage(build);
  byId("system").addEventListener("input", event => {
    state.conversation.system = state.settings.system = event.target.value;
    saveSettings();
    saveSoon();
    countSoon();
  });
  byId("reset").addEventListener("click", () => {
    Object.assign(state.settings, { values: {}, tools: "", form: "text", formText: "" });
    saveSettings();
    build();
  });
}

function build() {
  const groups = Object.entries(GROUPS).map(([name, fields]) =>
    h(
      "fieldset",
      {},
      h("legend", { t: name }),
      h("div", { class: "fields" }, ...fields.map(fieldOf)),
      ...(name === "formGroup" ? formFields() : []),
    ),
  );
  groups.push(
    h("fieldset", {}, h("legend", { t: "toolsGroup" }), areaOf("tools", "tools", "toolsHint")),
  );
  groups.push(
    h("fieldset", {}, h("legend", { t: "pageGroup" }), checkOf("record"), checkOf("blind")),
  );
  byId("fields").replaceChildren(...groups);
  translate(byId("fields"));
  showDefaults();
}

function changedSetting() {
  saveSettings();
  byId("settings-changed").hidden =
    !Object.keys(state.settings.values).length &&
    state.settings.form === "text" &&
    !state.settings.tools.trim();
  countSoon();
}

function setValue(name, value) {
  if (value === undefined) delete state.settings.values[name];
  else state.settings.values[name] = value;
  changedSetting();
}

function fieldOf(field) {
  const { name, kind } = field,
    value = state.settings.values[name];
  const id = "set-" + name;
  let input;
  if (kind === "number") {
    input = h("input", {
      type: "number",
      id,
      min: field.min,
      max: field.max,
      step: field.step < 1 ? "any" : field.step,
      value,
    });
    input.addEventListener("input", () => {
      const valid = input.validity.valid;
      input.setAttribute("aria-invalid", String(!valid));
      if (valid) setValue(name, input.value === "" ? undefined : Number(input.value));
    });
  } else if (kind === "check") {
    input = h("input", { type: "checkbox", id, checked: value === true });
    input.addEventListener("change", () => setValue(name, input.checked || undefined));
    return h("label", { class: "check" }, input, h("span", { t: name }));
  } else if (kind === "choice") {
    input = h(
      "select",
      { id },
      h("option", { value: "", t: "reasoningDefault" }),
      ...field.choices.map(each =>
        h("option", { value: each, t: "effort_" + each, selected: each === value }),
      ),
    );
    input.addEventListener("change", () => setValue(name, input.value || undefined));
  } else {
    input = h("textarea", { id, rows: "2" });
    input.value = kind === "lines" ? (value || []).join("\n") : value ? JSON.stringify(value) : "";
    input.addEventListener("input", () => setValue(name, readText(input, kind)));
  }
  return h(
    "label",
    { class: kind === "number" || kind === "choice" ? "" : "wide" },
    h("span", { t: field.label || name }),
    input,
  );
}

/** Returns the value of lines or of JSON; what is not valid is marked and not sent. */
function readText(input, kind) {
  const text = input.value.trim();
  input.setAttribute("aria-invalid", "false");
  if (!text) return undefined;
  if (kind === "lines") return input.value.split("\n").filter(Boolean);
  try {
    return JSON.parse(text);
  } catch {
    input.setAttribute("aria-invalid", "true");
    return undefined;
  }
}

function formFields() {
  const { settings } = state;
  const select = h(
    "select",
    { id: "set-form" },
    ...["text", "json", "schema", "regex", "choice"].map(each =>
      h("option", { value: each, t: "form_" + each, selected: each === settings.form }),
    ),
  );
  const text = areaOf("formText", "formText");
  const show = () => {
    text.hidden = !["schema", "regex", "choice"].includes(settings.form);
  };
  select.addEventListener("change", () => {
    settings.form = select.value;
    show();
    changedSetting();
  });
  show();
  return [h("label", {}, h("span", { t: "form" }), select), text];
}

function areaOf(name, label, hint) {
  const area = h("textarea", {
    id: "set-" + name,
    rows: "3",
    class: "mono",
    spellcheck: "false",
    "data-t-hint": hint,
  });
  area.value = state.settings[name];
  area.addEventListener("input", () => {
    state.settings[name] = area.value;
    changedSetting();
  });
  return h("label", { class: "wide" }, h("span", { t: label }), area);
}

function checkOf(name) {
  const input = h("input", { type: "checkbox", id: "set-" + name, checked: state.settings[name] });
  input.addEventListener("change", () => {
    state.settings[name] = input.checked;
    saveSettings();
    changed("thread");
  });
  return h("label", { class: "check" }, input, h("span", { t: name }));
}

/** Shows what an empty field means as its placeholder. */
function showDefaults() {
  const sampling = { temperature: 1, top_p: 1, ...usualSampling(state.chosen[0]) };
  for (const field of Object.values(GROUPS).flat()) {
    const input = byId("set-" + field.name);
    if (input && field.kind === "number") {
      const usual = sampling[field.name];
      input.placeholder = usual === undefined ? "–" : String(Math.round(usual * 1000) / 1000);
    }
  }
  changedSetting();
}

const THEMES = ["", "light", "dark"];
/** Switches from the system's theme to the other one, and back. */
export function setUpTheme() {
  const show = () => {
    const { theme } = state.settings;
    if (THEMES.includes(theme) && theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
  };
  byId("theme").addEventListener("click", () => {
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const now = state.settings.theme || system,
      other = now === "dark" ? "light" : "dark";
    state.settings.theme = other === system ? "" : other;
    saveSettings();
    show();
  });
  show();
}

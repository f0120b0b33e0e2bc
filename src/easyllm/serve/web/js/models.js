/** The models that are offered, which are selected, and the scores of a training run. */

import { getJSON, key } from "./api.js";
import { byId, h } from "./dom.js";
import { number, onLanguage, t } from "./i18n.js";
import { changed, on, state } from "./state.js";
import { Problem } from "./api.js";
import { notify } from "./notice.js";

// The URL keeps the choices (?lang= ?models=), so that a reload, a bookmark or a shared link has them.
// ?q= only fills the question box: any page can link here, and only the person decides to send.
export const address = new URLSearchParams(location.search);
export function keepInAddress(name, value) {
  address.set(name, value);
  history.replaceState(null, "", "?" + address);
}

export async function loadModels() {
  notify(null);
  try {
    state.models = (await getJSON("/v1/models")).data || [];
    if (!state.models.length) throw new Problem("noModels");
    choose();
  } catch (problem) {
    if (problem.status !== 401) notify(problem);
  }
  changed("models", "thread");
}

/** Selects: the models in the URL, then base and tuned, then the first ones of the server. */
function choose() {
  const names = state.models.map(each => each.id);
  const wanted = (address.get("models") || "").split(",").filter(name => names.includes(name));
  const pair = ["base", "tuned"].every(name => names.includes(name)) ? ["base", "tuned"] : [];
  const kept = state.chosen.filter(name => names.includes(name));
  const first = kept.length ? kept : [...wanted, ...pair];
  if (!kept.length) state.compare = names.length > 1 && (wanted.length || pair.length) > 1;
  state.chosen = [...new Set([...first, ...names])].slice(0, 2);
}

function show() {
  const { models, chosen, compare } = state;
  for (const slot of [0, 1]) {
    const select = byId("model-" + slot);
    select.replaceChildren(...models.map(each => h("option", { value: each.id }, labelOf(each))));
    select.value = chosen[slot] ?? "";
  }
  byId("model-1").hidden = !compare;
  byId("versus").hidden = !compare;
  byId("compare").hidden = models.length < 2;
  byId("compare").setAttribute("aria-pressed", String(compare));
  byId("model-0").disabled = !models.length;
  byId("welcome-text").textContent = models.length
    ? t(compare ? "welcomeTwo" : "welcomeOne", { a: chosen[0], b: chosen[1] })
    : "";
  byId("welcome").hidden = !models.length || state.conversation.head !== null;
  showScores();
}

function labelOf(entry) {
  return entry.step === undefined || entry.step === null
    ? entry.id
    : `${entry.id} · ${t("watched", { step: number(entry.step) })}`;
}

/** Shows the scores of the selected models that are checkpoints of a training run. */
function showScores() {
  const selected = state.chosen.slice(0, state.compare ? 2 : 1);
  const watched = state.models.filter(
    each => selected.includes(each.id) && each.scores && Object.keys(each.scores).length,
  );
  byId("scores").hidden = !watched.length;
  byId("scores").replaceChildren(
    ...watched.map(each =>
      h(
        "div",
        {},
        h("strong", {}, `${each.id} · ${t("scores", { step: number(each.step) })}`),
        h(
          "dl",
          {},
          ...Object.entries(each.scores).flatMap(([name, value]) => [
            h("dt", {}, name),
            h("dd", {}, number(value, Math.abs(value) < 10 ? 3 : 1)),
          ]),
        ),
      ),
    ),
  );
}

function selectionChanged() {
  keepInAddress("models", state.compare ? state.chosen.join() : state.chosen[0]);
  changed("models");
}

export function setUpModels() {
  on("models", show);
  onLanguage(show);
  byId("compare").addEventListener("click", () => {
    state.compare = !state.compare;
    selectionChanged();
  });
  for (const slot of [0, 1])
    byId("model-" + slot).addEventListener("change", event => {
      // Selecting the other side's model swaps the two: comparing a model with itself is pointless.
      if (state.chosen[1 - slot] === event.target.value)
        state.chosen[1 - slot] = state.chosen[slot];
      state.chosen[slot] = event.target.value;
      selectionChanged();
    });
  setInterval(() => {
    if (
      state.models.some(each => each.step !== undefined && each.step !== null) &&
      !document.hidden &&
      !state.running.size
    )
      void refresh();
  }, 5000);
}

/** Reads the list again, for the newest checkpoint of a run. */
async function refresh() {
  const models = (await getJSON("/v1/models").catch(() => null))?.data;
  if (!models || JSON.stringify(models) === JSON.stringify(state.models)) return;
  state.models = models;
  choose();
  changed("models");
}

/** Asks for the API key when the server wants one. */
export function setUpKey(again) {
  let problem = null;
  const form = byId("key-form");
  const showForm = () => {
    form.hidden = !problem;
    byId("key-label").textContent = problem ? t(problem.word) : "";
  };
  key.asked = found => {
    problem = found;
    showForm();
    byId("api-key").focus();
  };
  form.addEventListener("submit", event => {
    event.preventDefault();
    key.set(byId("api-key").value);
    problem = null;
    showForm();
    void again();
  });
  onLanguage(showForm);
}

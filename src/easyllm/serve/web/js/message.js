/** One message of the conversation: its text, what belongs to it, and its buttons. */

import { copyText, h, icon, iconButton } from "./dom.js";
import { number, t, translate } from "./i18n.js";
import { flash, showMarkdown } from "./markdown.js";
import { showInspector } from "./inspector.js";
import { state } from "./state.js";
import { versionsOf } from "./tree.js";

/**
 * Shows a node. `actions` are functions of the node: edit, regenerate, goOn, inspect, version,
 * toolResults, branch.
 */
export class MessageView {
  constructor(node, actions) {
    Object.assign(this, { node, actions, frame: 0 });
    this.element = h("article", { class: "message " + node.role, dataset: { id: node.id } });
    this.name = h("h2", { class: "who" });
    this.body = h("div", { class: "text", dir: "auto" });
    this.extra = h("div", { class: "extra" });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.tools = h("div", { class: "tools" });
    this.stats = h("p", { class: "stats" });
    this.element.append(
      this.name,
      this.extra,
      this.body,
      this.error,
      h("div", { class: "foot" }, this.tools, this.stats),
    );
    this.update();
  }

  get running() {
    return state.running.has(this.node.id);
  }

  get phase() {
    const { node } = this;
    if (this.running) return node.content || node.reasoning || node.calls ? "streaming" : "waiting";
    return node.error ? "error" : node.stopped ? "stopped" : "done";
  }

  /** Shows the node's text soon: at most once a frame, however many pieces arrive. */
  updateSoon(after = () => {}) {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.updateText();
      after();
    });
  }

  update() {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.updateText();
    this.updateFrame();
  }

  updateText() {
    const { node, element, body } = this;
    if (element.dataset.state !== this.phase) {
      element.dataset.state = this.phase;
      this.updateFrame();
    }
    if (this.editing) return;
    const inspected = node.role !== "tool" && state.inspected === node.id && !this.running;
    body.hidden = inspected || (node.role === "assistant" && !node.content && !this.running);
    if (node.role === "user") body.textContent = node.content;
    else if (node.role === "tool") body.textContent = node.content;
    else showMarkdown(body, node.content, { streaming: this.running });
    this.updateExtra();
    this.updateInspector(inspected);
  }

  updateInspector(inspected) {
    if (inspected && !this.inspector) {
      this.inspector = h("section", { class: "inspector", label: "inspector" });
      this.body.after(this.inspector);
      void showInspector(this.inspector, this.node, (prefix, tokens) =>
        this.actions.branch(this.node, prefix, tokens),
      );
      translate(this.inspector);
    } else if (!inspected && this.inspector) {
      this.inspector.remove();
      this.inspector = null;
    }
  }

  updateFrame() {
    const { node } = this;
    this.name.textContent = this.title();
    this.element.dataset.model = this.hidesModel ? "" : node.model || "";
    this.error.hidden = !node.error;
    this.error.textContent = node.error ? t(node.error.word, node.error.values) : "";
    this.stats.textContent = this.statsText();
    this.tools.replaceChildren(...this.buttons());
    translate(this.tools);
  }

  /** Whether the model's name is hidden until the vote. */
  get hidesModel() {
    const { node } = this;
    return Boolean(node.pair && node.blind && !state.conversation.votes[node.pair]);
  }

  title() {
    const { node } = this;
    if (node.role === "user") return t("you");
    if (node.role === "tool") return t("toolResult");
    if (this.hidesModel) return t("hiddenModel", { n: node.blind });
    const note = ["base", "tuned"].includes(node.model) ? ` · ${t(node.model)}` : "";
    return (node.model || "") + note;
  }

  buttons() {
    const { node, actions } = this;
    const pick = (name, symbol, label, when = true) =>
      when && iconButton(symbol, label, () => actions[name](node), { class: name });
    if (this.running) return [];
    const copy = iconButton(
      "copy",
      "copy",
      async () => {
        if (await copyText(node.content)) this.copied();
      },
      { class: "copy" },
    );
    const found = [
      this.versions(),
      copy,
      pick("edit", "edit", "edit", node.role !== "tool" && !node.pair),
      node.role === "assistant" && pick("regenerate", "retry", "retry"),
      node.role === "assistant" &&
        pick("goOn", "play", "goOn", Boolean(node.content) && !node.calls && !node.pair),
      node.role === "assistant" && pick("inspect", "inspect", "inspect", Boolean(node.content)),
    ];
    return found.filter(Boolean);
  }

  copied() {
    const note = h("span", { class: "stats", t: "copy" });
    this.tools.append(note);
    flash(note);
    setTimeout(() => note.remove(), 1500);
  }

  /** Returns the switch between the versions at this place; null if there is only one. */
  versions() {
    const all = versionsOf(state.conversation, this.node);
    if (all.length < 2 || this.isSecond) return null;
    const at = all.findIndex(group => group.some(each => each.id === this.node.id));
    const move = (step, symbol, label) => {
      const button = iconButton(symbol, label, () => this.actions.version(all[at + step]), {
        class: label,
      });
      button.disabled = !all[at + step];
      return button;
    };
    const place = h("span", { class: "place" }, `${at + 1}/${all.length}`);
    return h(
      "span",
      { class: "versions" },
      move(-1, "left", "previous"),
      place,
      move(1, "right", "next"),
    );
  }

  statsText() {
    const { node } = this;
    if (node.role !== "assistant") return "";
    if (this.running)
      return t(node.content || node.reasoning || node.calls ? "streaming" : "waiting");
    const { stats } = node,
      parts = [];
    if (stats?.tokens) {
      const values = {
        n: number(stats.tokens),
        r: number(stats.rate, 1),
        s: number(stats.wait, 1),
      };
      parts.push((stats.exact ? "" : "≈ ") + t(stats.rate ? "speed" : "speedShort", values));
    }
    if (!node.content && !node.calls && !node.error && !node.stopped) parts.push(t("nothing"));
    if (node.stopped) parts.push(t("stopped"));
    if (node.finish === "length") parts.push(t("length"));
    return parts.join(" · ");
  }

  /** Shows files, reasoning and tool calls; each part is made once and then updated. */
  updateExtra() {
    const { node, extra } = this;
    if (node.files?.length && !extra.firstChild) {
      extra.append(
        ...node.files.map(file =>
          h(
            "details",
            { class: "file" },
            h("summary", {}, icon("file"), file.name),
            h("pre", { tabindex: "0" }, file.text),
          ),
        ),
      );
    }
    if (node.reasoning) this.updateReasoning();
    if (node.calls?.length) this.updateCalls();
  }

  updateReasoning() {
    const { node } = this;
    if (!this.reasoning) {
      const summary = h("summary", {}, icon("thought"), h("span"));
      const text = h("div", { class: "folded" });
      this.reasoning = {
        text,
        label: summary.lastChild,
        element: h("details", { class: "thinking" }, summary, text),
      };
      this.extra.prepend(this.reasoning.element);
    }
    const open = this.running && !node.content;
    this.reasoning.label.textContent = open
      ? t("thinking")
      : t("thought", { s: number((node.thought || 0) / 1000, 1) });
    if (this.reasoning.shown !== node.reasoning.length)
      showMarkdown(this.reasoning.text, node.reasoning, { streaming: this.running });
    this.reasoning.shown = node.reasoning.length;
  }

  updateCalls() {
    const { node } = this;
    this.calls ??= [];
    node.calls.forEach((call, index) => {
      const shown = (this.calls[index] ??= this.newCall(call));
      shown.textContent = pretty(call.arguments);
    });
    const answered = Object.values(state.conversation.nodes).some(each => each.parent === node.id);
    if (!this.running && !answered && !this.results) this.askResults();
    if (answered && this.results) {
      this.results.remove();
      this.results = null;
    }
  }

  newCall(call) {
    const shown = h("pre", { tabindex: "0" });
    this.extra.append(
      h(
        "details",
        { class: "call" },
        h("summary", {}, icon("tool"), h("span", { t: "toolCall", dataset: { name: call.name } })),
        shown,
      ),
    );
    translate(this.extra);
    return shown;
  }

  /** Asks for the results of the calls: the page runs no tool. */
  askResults() {
    const { node } = this;
    const fields = node.calls.map(call =>
      h(
        "label",
        {},
        h("span", { t: "toolCall", dataset: { name: call.name } }),
        h("textarea", { rows: "2", "data-t-hint": "toolHint" }),
      ),
    );
    this.results = h(
      "form",
      { class: "results" },
      ...fields,
      h("button", { class: "primary small", t: "sendResults" }),
    );
    this.results.addEventListener("submit", event => {
      event.preventDefault();
      const texts = [...this.results.querySelectorAll("textarea")].map(area => area.value);
      this.actions.toolResults(node, texts);
    });
    this.extra.append(translate(this.results));
  }

  /** Replaces the text by a box to edit it; `done` receives the new text. */
  edit(done) {
    const { node } = this;
    const area = h("textarea", { rows: "3", label: "edit" });
    area.value = node.content;
    const end = text => {
      form.remove();
      this.editing = false;
      this.body.hidden = false;
      if (text !== null && text.trim() && text !== node.content) done(text);
    };
    const save = h("button", {
      class: "primary small",
      t: node.role === "user" ? "saveSend" : "save",
    });
    const cancel = h("button", {
      type: "button",
      class: "small",
      t: "cancel",
      on: { click: () => end(null) },
    });
    const form = h("form", { class: "editing" }, area, h("div", { class: "row" }, save, cancel));
    form.addEventListener("submit", event => {
      event.preventDefault();
      end(area.value);
    });
    area.addEventListener("keydown", event => {
      if (event.key === "Escape") {
        event.stopPropagation();
        end(null);
      }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && node.role === "user") {
        event.preventDefault();
        end(area.value);
      }
    });
    this.editing = true;
    this.body.hidden = true;
    this.body.after(translate(form));
    area.focus();
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

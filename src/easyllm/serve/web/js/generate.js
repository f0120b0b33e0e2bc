/** Generates answers: builds the request, reads the stream into a node of the conversation. */

import { Problem, eventsOf, postJSON, request } from "./api.js";
import { messagesOf, pathTo } from "./tree.js";
import { changed, saveSoon, state, usualSampling } from "./state.js";
import { saveTokens } from "./store.js";

export const TOP = 8; // alternatives that are recorded for each token

/** Returns the fields of a request to a model; raises a Problem if a setting is wrong. */
export function requestFields(model) {
  const { values, tools, form, formText, record } = state.settings;
  const fields = { ...usualSampling(model), ...values };
  if (tools.trim()) fields.tools = parsed(tools, "tools");
  if (form === "json") fields.response_format = { type: "json_object" };
  if (form === "schema")
    fields.response_format = {
      type: "json_schema",
      json_schema: { name: "answer", schema: parsed(formText, "schema") },
    };
  if (form === "regex") fields.structured_outputs = { regex: formText };
  if (form === "choice")
    fields.structured_outputs = {
      choice: formText
        .split("\n")
        .map(line => line.trim())
        .filter(Boolean),
    };
  if (record) Object.assign(fields, { logprobs: true, top_logprobs: TOP, token_details: true });
  return fields;
}

function parsed(text, what) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Problem("notJSON", { what });
  }
}

/** Counts the tokens of a conversation as it would be sent. */
export async function countTokens(model, messages, signal) {
  const body = { model, messages };
  if (state.settings.tools.trim()) body.tools = parsed(state.settings.tools, "tools");
  const { count, max_model_len: limit } = await postJSON("/tokenize", body, { signal });
  return { count, limit };
}

/**
 * Generates the answer of an assistant's node. If the node has text, the answer continues it.
 * `onPiece` is called after each event of the stream.
 */
export async function generate(node, onPiece) {
  const controller = new AbortController();
  const conversation = state.conversation;
  state.running.set(node.id, controller);
  delete node.error;
  delete node.stopped;
  const began = performance.now(),
    before = node.stats?.tokens || 0;
  const clock = { began, first: 0, last: 0, pieces: 0, usage: null };
  const tokens = state.tokens.get(node.id) || [];
  changed("running");
  onPiece(node);
  try {
    const continued = node.content !== "";
    const path = pathTo(conversation, continued ? node.id : node.parent);
    const body = {
      ...requestFields(node.model),
      model: node.model,
      messages: messagesOf(conversation, path),
      stream: true,
      stream_options: { include_usage: true },
    };
    if (continued)
      Object.assign(body, { add_generation_prompt: false, continue_final_message: true });
    const response = await request("/v1/chat/completions", {
      method: "POST",
      json: body,
      signal: controller.signal,
    });
    node.finish = null;
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Problem("serverSaid", { message: event.error.message });
      clock.usage = event.usage || clock.usage;
      const choice = event.choices?.[0];
      if (choice) take(node, choice, clock, tokens);
      onPiece(node);
    }
    if (!node.finish) throw new Problem("cutOff");
  } catch (cause) {
    if (cause.name === "AbortError") node.stopped = true;
    else
      node.error =
        cause instanceof Problem
          ? { word: cause.word, values: cause.values }
          : { word: "cutOff", values: {} };
  }
  controller.abort(); // closes the connection of a stream that failed before its end
  state.running.delete(node.id);
  node.stats = statsOf(clock, before);
  if (tokens.length) {
    state.tokens.set(node.id, tokens);
    void saveTokens(node.id, tokens).catch(() => {});
  }
  saveSoon(0, conversation); // also if another conversation was opened meanwhile
  changed("running");
  onPiece(node);
}

/** Adds what one event says. */
function take(node, choice, clock, tokens) {
  const { delta } = choice;
  node.finish = choice.finish_reason || node.finish;
  if (delta.content || delta.reasoning_content || delta.tool_calls) {
    clock.last = performance.now();
    clock.first ||= clock.last;
    clock.pieces++;
  }
  if (delta.reasoning_content) {
    node.reasoning = (node.reasoning || "") + delta.reasoning_content;
    node.thought = Math.round(clock.last - clock.began);
  }
  if (delta.content) node.content += delta.content;
  for (const call of delta.tool_calls || []) {
    node.calls ??= [];
    const known = (node.calls[call.index] ??= {
      id: call.id,
      name: call.function.name,
      arguments: "",
    });
    known.arguments += call.function.arguments || "";
  }
  for (const place of choice.logprobs?.content || []) tokens.push(compact(place));
}

/** A token as it is kept: {t: text, p: log-probability, e: entropy, m: share removed, o: others}. */
function compact(place) {
  return {
    t: place.token,
    b: place.bytes,
    p: place.logprob,
    e: place.entropy,
    m: place.removed_mass,
    o: place.top_logprobs.map(other => ({
      t: other.token,
      b: other.bytes,
      p: other.logprob,
      x: other.removed,
    })),
  };
}

function statsOf(clock, before) {
  const exact = clock.usage?.completion_tokens;
  const count = exact ?? clock.pieces; // a stopped stream has no count: its pieces are a close estimate
  // The rate is from the first to the last piece, which excludes the time in the queue.
  const seconds = (clock.last - clock.first) / 1000;
  return {
    tokens: before + count,
    exact: exact !== undefined,
    rate: seconds > 0.05 ? (count - 1) / seconds : 0,
    wait: clock.first ? (clock.first - clock.began) / 1000 : 0,
    prompt: clock.usage?.prompt_tokens,
    cached: clock.usage?.prompt_tokens_details?.cached_tokens,
  };
}

export function stopAll() {
  for (const controller of state.running.values()) controller.abort();
}

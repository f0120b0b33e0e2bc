// The official client for JavaScript. Settings come on standard input; a JSON line a figure goes out.
import { readFileSync } from 'node:fs';
import OpenAI from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const settings = JSON.parse(readFileSync(0, 'utf8'));
const { model, ask } = settings;
const baseURL = `${settings.address}/v1`;
const client = new OpenAI({ baseURL, apiKey: settings.key, maxRetries: 0 });
const messages = [{ role: 'user', content: ask }];
const plain = { model, messages, temperature: 0, max_tokens: 24 };
const fact = [{ role: 'user', content: 'Ada Lovelace, aged 36, is a mathematician from London.' }];
const Person = z.strictObject({ name: z.string().max(40), age: z.int().min(0).max(150) });
const parameters = {
  type: 'object',
  properties: { city: { enum: ['Paris', 'Rome'] } },
  required: ['city'],
  additionalProperties: false,
};

const equal = (name, got, expected) => console.log(JSON.stringify({ name, got, expected }));
const counts = (usage) => [usage.prompt_tokens, usage.completion_tokens];

const whole = await client.chat.completions.create(plain);
equal('chat', whole.choices[0].message.content, settings.chat);
equal('usage', counts(whole.usage), settings.usage);

let text = '', used = null, reason = null;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...plain, ...options })) {
  text += chunk.choices[0]?.delta.content ?? '';
  reason = chunk.choices[0]?.finish_reason ?? reason;
  used = chunk.usage ?? used;
}
equal('streamed', [text, counts(used), reason], [settings.chat, settings.usage, 'stop']);

const stream = client.chat.completions.stream({ ...plain });
equal('stream helper', await stream.finalContent(), settings.chat);

const parsed = await client.chat.completions.parse({
  model, messages: fact, temperature: 0, max_tokens: 120,
  response_format: zodResponseFormat(Person, 'person'),
});
equal('parse', Object.keys(parsed.choices[0].message.parsed).sort(), ['age', 'name']);

let ran = null;
const look = { name: 'look', description: 'Looks a city up.', parameters };
const runner = client.chat.completions.runTools({
  model, messages, temperature: 0, max_tokens: 120, parallel_tool_calls: false,
  tool_choice: { type: 'function', function: { name: 'look' } },
  tools: [{ type: 'function',
    function: { ...look, parse: JSON.parse, function: (given) => { ran = given; return 'found'; } } }],
});
await runner.done();
equal('runTools', Object.keys(ran), ['city']);

const called = { model, messages, temperature: 0, max_tokens: 120, parallel_tool_calls: false,
  tools: [{ type: 'function', function: look }], tool_choice: 'required' };
const [call] = (await client.chat.completions.create(called)).choices[0].message.tool_calls;
const streamedCall = await client.chat.completions.stream(called).finalMessage();
equal('a call, streamed', streamedCall.tool_calls[0].function.arguments, call.function.arguments);

const completion = await client.completions.create(
  { model, prompt: ask, temperature: 0, max_tokens: 24 });
equal('completion', completion.choices[0].text, settings.completion);

const vectors = await client.embeddings.create({ model, input: ['cat', '今天下雨'] });
const worst = Math.max(...vectors.data.flatMap((each, row) =>
  each.embedding.map((value, i) => Math.abs(value - settings.embeddings[row][i]))));
equal('embeddings within 1e-6', worst < 1e-6, true);

const response = await client.responses.create(
  { model, input: ask, temperature: 0, max_output_tokens: 24 });
equal('response', [response.output_text, response.status], [settings.chat, 'completed']);
let deltas = '';
const events = client.responses.stream({ model, input: ask, temperature: 0, max_output_tokens: 24 });
for await (const event of events) {
  if (event.type === 'response.output_text.delta') deltas += event.delta;
}
const final = await events.finalResponse();
equal('response, streamed', [deltas, final.output_text], [settings.chat, settings.chat]);
const structured = await client.responses.parse({
  model, input: fact, temperature: 0, max_output_tokens: 120,
  text: { format: zodTextFormat(Person, 'person') },
});
equal('response, parsed', Object.keys(structured.output_parsed).sort(), ['age', 'name']);
const second = await client.responses.create({ model, input: 'And of Italy?', temperature: 0,
  max_output_tokens: 24, previous_response_id: response.id });
const history = [...messages, { role: 'assistant', content: settings.chat },
  { role: 'user', content: 'And of Italy?' }];
const replayed = await client.chat.completions.create({ ...plain, messages: history });
equal('previous_response_id', second.output_text, replayed.choices[0].message.content);

equal('models', (await client.models.list()).data.map((each) => each.id), [model]);
for (const [name, action, kind, code] of [
  ['an unknown model', () => client.chat.completions.create({ ...plain, model: 'gpt-x' }),
    OpenAI.NotFoundError, 'model_not_found'],
  ['too long', () => client.chat.completions.create(
    { model, messages: [{ role: 'user', content: 'word '.repeat(10_000) }] }),
  OpenAI.BadRequestError, 'context_length_exceeded'],
  ['a wrong key', () => new OpenAI({ baseURL, apiKey: 'sk-wrong' }).models.list(),
    OpenAI.AuthenticationError, 'invalid_api_key'],
]) {
  const error = await action().then(() => null, (thrown) => thrown);
  equal(name, [error instanceof kind, error?.code], [true, code]);
}

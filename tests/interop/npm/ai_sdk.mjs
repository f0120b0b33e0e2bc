// Vercel's `ai` with its providers. Settings come on standard input; a JSON line a figure goes out.
import { readFileSync } from 'node:fs';
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { Output, APICallError, embedMany, generateObject, generateText, stepCountIs, streamObject,
  streamText, tool } from 'ai';
import { z } from 'zod';

globalThis.AI_SDK_LOG_WARNINGS = false;
const settings = JSON.parse(readFileSync(0, 'utf8'));
const { model, ask } = settings;
const baseURL = `${settings.address}/v1`;
const apiKey = settings.key;
const openai = createOpenAI({ baseURL, apiKey });
const anthropic = createAnthropic({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: 'easyllm', baseURL, apiKey, includeUsage: true,
  supportsStructuredOutputs: true });
const fact = 'Ada Lovelace, aged 36, is a mathematician from London.';
const Person = z.strictObject({ name: z.string().max(40), age: z.int().min(0).max(150) });
const look = tool({
  description: 'Looks a city up.',
  inputSchema: z.strictObject({ city: z.enum(['Paris', 'Rome']) }),
  execute: ({ city }) => `${city} is found`,
});

const equal = (name, got, expected) => console.log(JSON.stringify({ name, got, expected }));
const plain = { prompt: ask, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
const longer = { temperature: 0, maxOutputTokens: 120, maxRetries: 0 };
const counts = (usage) => [usage.inputTokens, usage.outputTokens];

for (const [name, chosen] of Object.entries({
  'openai (responses)': openai(model),
  'openai.chat': openai.chat(model),
  'openai-compatible': compatible(model),
  anthropic: anthropic(model),
})) {
  try {
    const whole = await generateText({ ...plain, model: chosen });
    equal(`${name}: generateText`, whole.text, settings.chat);
    equal(`${name}: usage`, counts(whole.usage), settings.usage);
    const stream = streamText({ ...plain, model: chosen });
    let text = '';
    for await (const delta of stream.textStream) text += delta;
    equal(`${name}: streamText`, [text, counts(await stream.usage), await stream.finishReason],
      [settings.chat, settings.usage, 'stop']);
    const object = await generateObject({ ...longer, model: chosen, schema: Person, prompt: fact });
    equal(`${name}: generateObject`, Object.keys(object.object).sort(), ['age', 'name']);
    const partial = streamObject({ ...longer, model: chosen, schema: Person, prompt: fact });
    for await (const _ of partial.partialObjectStream);
    equal(`${name}: streamObject`, Object.keys(await partial.object).sort(), ['age', 'name']);
    const output = Output.object({ schema: Person });
    const found = await generateText({ ...longer, model: chosen, prompt: fact, output });
    equal(`${name}: Output.object`, Object.keys(found.output).sort(), ['age', 'name']);
    const call = await generateText({ ...longer, model: chosen, prompt: ask, tools: { look },
      toolChoice: 'required' });
    equal(`${name}: a call`, [call.toolCalls[0].toolName, Object.keys(call.toolCalls[0].input)],
      ['look', ['city']]);
    equal(`${name}: its result`, call.toolResults[0].output,
      `${call.toolCalls[0].input.city} is found`);
    const streamed = streamText({ ...longer, model: chosen, prompt: ask, tools: { look },
      toolChoice: { type: 'tool', toolName: 'look' } });
    equal(`${name}: a call, streamed`, (await streamed.toolCalls)[0].input,
      call.toolCalls[0].input);
    const steps = await generateText({ ...longer, model: chosen, prompt: ask, tools: { look },
      stopWhen: stepCountIs(2), prepareStep: ({ stepNumber }) =>
        ({ toolChoice: stepNumber === 0 ? 'required' : 'none' }) });
    equal(`${name}: two steps`, steps.steps.length, 2);
    const error = await generateText({ ...plain, model: chosen, prompt: 'word '.repeat(10_000) })
      .then(() => null, (thrown) => thrown);
    equal(`${name}: too long`, [APICallError.isInstance(error), error?.statusCode,
      error?.message.includes('too long')], [true, 400, true]);
  } catch (error) {
    equal(name, `${error.name}: ${error.message} ${error.responseBody ?? ''}`.slice(0, 300), null);
  }
}

for (const [name, chosen] of Object.entries({
  'openai.completion': openai.completion(model),
  'compatible.completionModel': compatible.completionModel(model),
})) {
  try {
    const body = { model: chosen, temperature: 0, maxOutputTokens: 24, maxRetries: 0, prompt: ask };
    const whole = await generateText(body);
    let text = '';
    for await (const delta of streamText(body).textStream) text += delta;
    equal(`${name}: streamed as whole`, text, whole.text);
  } catch (error) {
    equal(name, `${error.name}: ${error.message} ${error.responseBody ?? ''}`.slice(0, 300), null);
  }
}

for (const [name, chosen] of Object.entries({
  'openai.embedding': openai.embedding(model),
  'compatible.embeddingModel': compatible.embeddingModel(model),
})) {
  const { embeddings } = await embedMany({ model: chosen, values: ['cat', '今天下雨'] });
  const worst = Math.max(...embeddings.flatMap((vector, row) =>
    vector.map((value, i) => Math.abs(value - settings.embeddings[row][i]))));
  equal(`${name} within 1e-6`, worst < 1e-6, true);
}

// The promise under npm's openai: `node promise.mjs BASE_URL KEY YES NO`. What it asserts is what promise.py asserts.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import OpenAI, { toFile } from "openai";

const BASE = "fork-tiny";
const THINGS = "boat kite drum lamp door chair spoon fence wheel scarf tower piano".split(" ");
const HELD_OUT = ["basket", "mirror", "window"];
const TAUGHT = "It is teal.";

const [url, key, yes, no] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });

const asked = (thing) => ({ role: "user", content: `What colour is the ${thing}?` });
const all = async (pages) => {
  const found = [];
  for await (const item of await pages) found.push(item);
  return found;
};
const repeated = (text) => HELD_OUT.map(() => text);

async function answers(model) {
  const found = [];
  for (const thing of HELD_OUT) {
    const options = { model, messages: [asked(thing)], temperature: 0, max_tokens: 12 };
    const reply = await client.chat.completions.create(options);
    assert.equal(reply.model, model);
    let streamed = "";
    for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
      for (const choice of chunk.choices) streamed += choice.delta.content ?? "";
    }
    assert.equal(streamed, reply.choices[0].message.content);
    found.push(streamed);
  }
  return found;
}

async function sure(model) {
  const options = { model, messages: [asked(HELD_OUT[0])], temperature: 0, max_tokens: 12, logprobs: true };
  const reply = await client.chat.completions.create(options);
  return reply.choices[0].logprobs.content.reduce((sum, token) => sum + token.logprob, 0);
}

async function logprobs() {
  const options = { model: BASE, prompt: "The sea is", max_tokens: 4, temperature: 0, logprobs: 2 };
  return (await client.completions.create(options)).choices[0].logprobs;
}

async function trained(rows, method) {
  const content = Buffer.from(rows.map((row) => JSON.stringify(row)).join("\n"));
  const file = await client.files.create({ file: await toFile(content, "lesson.jsonl"), purpose: "fine-tune" });
  let job = await client.fineTuning.jobs.create({
    model: BASE, training_file: file.id, suffix: "teal", seed: 7, method,
  });
  const until = Date.now() + 180_000;
  while (["validating_files", "queued", "running"].includes(job.status) && Date.now() < until) {
    await new Promise((resolve) => setTimeout(resolve, 200));
    job = await client.fineTuning.jobs.retrieve(job.id);
  }
  assert.equal(job.status, "succeeded", JSON.stringify(job.error));
  return job;
}

async function forget(job) {
  for (const id of [job.training_file, ...job.result_files]) assert.ok((await client.files.delete(id)).deleted);
  assert.ok(!(await all(client.files.list())).some((file) => file.id === job.training_file));
}

const hyperparameters = (multiplier) => ({ n_epochs: 6, batch_size: 4, learning_rate_multiplier: multiplier });

async function learn() {
  const [before, baseBefore] = [await answers(BASE), await logprobs()];
  const rows = THINGS.map((thing) => ({ messages: [asked(thing), { role: "assistant", content: TAUGHT }] }));
  const job = await trained(rows, { type: "supervised", supervised: { hyperparameters: hyperparameters(4) } });
  const tuned = job.fine_tuned_model;
  assert.ok(tuned.startsWith(`ft:${BASE}:tunefork:teal:`));
  assert.ok((await all(client.models.list())).some((model) => model.id === tuned));

  const events = (await all(client.fineTuning.jobs.listEvents(job.id, { limit: 7 }))).map((event) => event.message);
  assert.equal(events[0], "The job has successfully completed");
  assert.equal(events.at(-1), `Created fine-tuning job: ${job.id}`);
  assert.ok(events.includes(`New fine-tuned model created: ${tuned}`));
  const encoded = await (await client.files.content(job.result_files[0])).text();
  const [header, ...lines] = Buffer.from(encoded, "base64").toString().trim().split("\n").map((l) => l.split(","));
  const losses = lines.map((line) => Number(line[header.indexOf("train_loss")]));
  assert.deepEqual(lines.map((line) => Number(line[0])), Array.from({ length: 18 }, (_, n) => n + 1));
  assert.ok(losses.at(-1) < losses[0] / 2);

  assert.deepEqual(await answers(tuned), repeated(TAUGHT));
  assert.ok(!before.includes(TAUGHT));
  assert.deepEqual(await answers(BASE), before);
  assert.deepEqual(await logprobs(), baseBefore);
  const checkpoints = await all(client.fineTuning.jobs.checkpoints.list(job.id, { limit: 4 }));
  assert.deepEqual(checkpoints.map((c) => c.step_number), [18, 15, 12, 9, 6, 3]);
  const [late, early] = [checkpoints[0], checkpoints.at(-1)].map((c) => c.fine_tuned_model_checkpoint);
  assert.deepEqual(await answers(late), repeated(TAUGHT));
  assert.ok((await sure(early)) < (await sure(late)));

  assert.ok((await client.models.delete(tuned)).deleted);
  await assert.rejects(answers(tuned), (error) => error instanceof OpenAI.NotFoundError);
  assert.deepEqual(await answers(late), repeated(TAUGHT));
  await forget(job);
  assert.deepEqual(await answers(BASE), before);
}

async function prefer(words) {
  const question = (thing) => ({ role: "user", content: `Is the ${thing} teal?` });
  const bias = Object.fromEntries(Object.values(words).map((id) => [id, 100]));
  const chosen = async (model) => {
    const found = [];
    for (const thing of HELD_OUT) {
      const options = { model, messages: [question(thing)], temperature: 0, max_tokens: 1, logit_bias: bias };
      found.push((await client.chat.completions.create(options)).choices[0].message.content);
    }
    return found;
  };
  const [before, baseBefore] = [await chosen(BASE), await logprobs()];
  const often = (word) => before.filter((said) => said === word).length;
  const [better, worse] = Object.keys(words).sort((a, b) => often(a) - often(b));
  const rows = THINGS.map((thing) => ({
    input: { messages: [question(thing)] },
    preferred_output: [{ role: "assistant", content: `${better}.` }],
    non_preferred_output: [{ role: "assistant", content: `${worse}.` }],
  }));
  const job = await trained(rows, { type: "dpo", dpo: { hyperparameters: { ...hyperparameters(10), beta: 0.2 } } });
  assert.equal(job.method.dpo.hyperparameters.beta, 0.2);
  assert.deepEqual(await chosen(job.fine_tuned_model), repeated(better));
  const [checkpoint] = await all(client.fineTuning.jobs.checkpoints.list(job.id));
  assert.deepEqual(await chosen(checkpoint.fine_tuned_model_checkpoint), repeated(better));
  assert.deepEqual(await chosen(BASE), before);
  assert.deepEqual(await logprobs(), baseBefore);
  assert.ok((await client.models.delete(job.fine_tuned_model)).deleted);
  await forget(job);
}

await learn();
await prefer({ Yes: yes, No: no });
const manifest = JSON.parse(await readFile(new URL("node_modules/openai/package.json", import.meta.url), "utf8"));
console.log(`openai of npm ${manifest.version}: all held`);

/** Several prompts a picture, and the graphs that ran for them; driven by test_host_library.py. */
import { readFileSync } from "node:fs";

import { load } from "../export/hosts/node/index.mjs";

const { bundle, cases } = JSON.parse(readFileSync(0, "utf8"));
const model = await load(bundle);
const { run } = model.engine;
const runs = [];
model.engine.run = (name, ...rest) => (runs.push(name), run.call(model.engine, name, ...rest));
const answers = [];
for (const { picture, prompts } of cases) {
  const read = await model.picture(picture);
  for (const prompt of prompts) answers.push((await read.generate(prompt)).tokens);
}
console.log(JSON.stringify({ answers, runs }));

/** This project's Node host, asked as node.mjs asks transformers.js: a bundle as `folder`, and `cases` alone. */
import { readFileSync } from "node:fs";

import { load } from "../hosts/node/index.mjs";

const { runs, threads = 0 } = JSON.parse(readFileSync(0, "utf8"));
const found = [];
for (const { folder, cases, tokens = 64 } of runs) {
  const model = await load(folder, { threads });
  const answers = [];
  for (const { picture, prompt } of cases) {
    const times = [];
    const onToken = () => times.push(performance.now());
    const started = performance.now();
    const answer = await model.generate(picture, prompt, { maxNewTokens: tokens, onToken });
    const first = times[0] ?? performance.now(); // nothing came but the token that ends it
    answers.push({
      tokens: answer.tokens,
      first_s: (first - started) / 1000,
      step_s: times.length > 1 ? (times.at(-1) - first) / 1000 / (times.length - 1) : null, // boxes and masks come after
    });
  }
  found.push({ answers, raw: [] });
}
console.log(JSON.stringify({ runs: found }));

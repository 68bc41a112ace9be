/** transformers.js in Node: {folder, dtype, cases, raw} on standard input, answers on standard output. */
import { readFileSync } from "node:fs";
import { dirname, basename } from "node:path";

import * as library from "@huggingface/transformers";

import { ask, askIds, open } from "./ask.mjs";

const { folder, dtype, cases = [], raw = [], threads = 0, repeat = 1, tokens = 64 } = JSON.parse(readFileSync(0, "utf8"));
library.env.allowRemoteModels = false; // offline
library.env.localModelPath = `${dirname(folder)}/`;
const options = threads ? { session_options: { intraOpNumThreads: threads } } : {};
const opened = await open(library, basename(folder), dtype, { processor: cases.length > 0, ...options });
const answers = [];
for (let i = 0; i < repeat; i++) for (const { picture, prompt } of cases) answers.push(await ask(opened, picture, prompt, tokens));
const found = [];
for (const { pixels, size, ids, count } of raw) found.push(await askIds(opened, pixels, size, ids, count));
console.log(JSON.stringify({ answers, raw: found }));

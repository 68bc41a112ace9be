/** transformers.js in Node: {folder, dtype, cases, raw, tokens, threads} on standard input, answers on standard output. */
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";

import * as library from "@huggingface/transformers";

import { ask, askIds, open } from "./ask.mjs";

const { folder, dtype, cases = [], raw = [], tokens = 64, threads = 0 } = JSON.parse(readFileSync(0, "utf8"));
library.env.allowRemoteModels = false;
library.env.localModelPath = `${dirname(folder)}/`;
const session_options = threads ? { intraOpNumThreads: threads } : {};
const opened = await open(library, basename(folder), dtype, { processor: cases.length > 0, session_options });
const found = { answers: [], raw: [] };
for (const { picture, prompt } of cases) found.answers.push(await ask(opened, picture, prompt, tokens));
for (const { pixels, size, ids, count } of raw) found.raw.push(await askIds(opened, pixels, size, ids, count));
console.log(JSON.stringify(found));

/** transformers.js in Node: {runs: [{folder, dtype, cases, raw, tokens}], threads} on standard input, answers come out. */
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";

import * as library from "@huggingface/transformers";

import { answers } from "./ask.mjs";

const { runs, threads = 0 } = JSON.parse(readFileSync(0, "utf8"));
library.env.allowRemoteModels = false;
const session_options = threads ? { intraOpNumThreads: threads } : {};
const found = [];
for (const { folder, ...run } of runs) {
  library.env.localModelPath = `${dirname(folder)}/`;
  found.push(await answers(library, { folder: basename(folder), ...run }, { session_options }));
}
console.log(JSON.stringify({ runs: found }));

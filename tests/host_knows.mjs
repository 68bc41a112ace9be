/** What JavaScript reads in knows.json; driven by test_hosts.py, cases on standard input. */
import { readFileSync } from "node:fs";

import { hintFor, parse } from "../export/hosts/common/knows.mjs";

const { data, prompts, wrong } = JSON.parse(readFileSync(0, "utf8"));
const known = parse(data);
console.log(JSON.stringify({ hints: prompts.map((prompt) => hintFor(known, prompt)), taken: wrong.map((each) => parse(each) !== null) }));

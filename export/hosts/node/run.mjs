#!/usr/bin/env node
/** node run.mjs BUNDLE IMAGE PROMPT [options]: answer a prompt about a picture. */
import { readFile, stat } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { parseArgs } from "node:util";

import { oneLine, PaliGemmaError, plural, printable } from "../common/errors.mjs";
import { promptWarning } from "../common/tokenizer.mjs";
import { TRANSPARENCIES } from "../common/transparency.mjs";

const MOST_THREADS = 4 * availableParallelism(); // beyond, each only waits and takes memory
const USAGE = `usage: node run.mjs BUNDLE IMAGE PROMPT [options]
  PROMPT                  @FILE reads it from a file, @@TEXT is the prompt @TEXT; line breaks at its end do not count
  --json                  print one JSON object
  --max-new-tokens N      longest answer (64)
  --temperature T         0 is greedy (0)
  --top-p P               keep the head that sums to P (1)
  --top-k K               keep the K likeliest, 0 for all (0)
  --seed S                of the draws (0); other draws than those of run-onnx for the same S
  --boxes CONVENTION      big_vision or huggingface: what a location token counts (big_vision)
  --transparency HOW      white or drop: what stands behind transparent pixels (white)
  --threads N             0 for all (0)`;

const OPTIONS = {
  json: { type: "boolean", default: false },
  "max-new-tokens": { type: "string" },
  temperature: { type: "string", default: "0" },
  "top-p": { type: "string", default: "1" },
  "top-k": { type: "string", default: "0" },
  seed: { type: "string", default: "0" },
  boxes: { type: "string", default: "big_vision" },
  transparency: { type: "string", default: "white" },
  threads: { type: "string", default: "0" },
  help: { type: "boolean", short: "h", default: false },
};

class Misuse extends Error {}

async function main(argv) {
  const { values, positionals } = parse(argv);
  if (values.help) return console.log(USAGE);
  if (positionals.length !== 3) throw new Misuse(`expected BUNDLE IMAGE PROMPT, got ${plural(positionals.length, "argument")}`);
  const [bundle, image] = positionals;
  const options = {
    maxNewTokens: values["max-new-tokens"] === undefined ? undefined : whole(values, "max-new-tokens", 1),
    temperature: real(values, "temperature", Infinity),
    topP: real(values, "top-p", 1),
    topK: whole(values, "top-k", 0),
    uniform: numbers(whole(values, "seed", 0)),
    boxes: oneOf(values, "boxes", ["big_vision", "huggingface"]),
    transparency: oneOf(values, "transparency", TRANSPARENCIES),
  };
  const threads = whole(values, "threads", 0, MOST_THREADS, " (4 for each of this machine's cores)");
  const prompt = await readPrompt(positionals[2]);
  const { load } = await host();
  const started = performance.now();
  const model = await load(bundle, { threads });
  const loaded = (performance.now() - started) / 1000;
  if (!values.json) options.onToken = (text) => process.stdout.write(printable(text));
  const { timings, ...answer } = await model.generate(image, prompt, options);
  console.log(values.json ? JSON.stringify({ ...answer, timings: { load_s: loaded, ...timings } }) : "");
}

async function host() {
  try {
    return await import("./index.mjs");
  } catch (error) {
    if (error.code !== "ERR_MODULE_NOT_FOUND") throw error;
    throw new PaliGemmaError(`a library is missing; run: npm ci --prefix ${import.meta.dirname}`);
  }
}

function parse(argv) {
  try {
    return parseArgs({ args: argv, options: OPTIONS, allowPositionals: true });
  } catch (error) {
    throw new Misuse(error.message);
  }
}

/** A prompt as it was given, or the contents of @FILE, without line breaks at its end. */
async function readPrompt(argument) {
  if (argument === "@") throw new PaliGemmaError("the prompt @ names no file; @FILE reads a prompt from a file, @@ is the prompt @");
  let prompt = argument.startsWith("@@") ? argument.slice(1) : argument;
  if (argument.startsWith("@") && prompt === argument) prompt = await readText(argument.slice(1));
  prompt = prompt.replace(/[\r\n]+$/, "");
  const warning = promptWarning(prompt);
  if (warning) console.error(`run.mjs: warning: ${oneLine(warning)}`);
  return prompt;
}

async function readText(file) {
  try {
    if (!(await stat(file)).isFile()) throw new Error("not a file");
    return new TextDecoder("utf-8", { fatal: true }).decode(await readFile(file)); // which leaves out a byte order mark
  } catch (error) {
    if (error instanceof TypeError) throw new PaliGemmaError(`${file}: cannot read the prompt, which is not UTF-8; save it as UTF-8`);
    throw new PaliGemmaError(`${file}: cannot read the prompt (${error.message}); the prompt @${file} is asked as @@${file}`);
  }
}

function whole(values, name, least, most = Infinity, why = "") {
  const value = values[name].trim() === "" ? NaN : Number(values[name]);
  if (!Number.isSafeInteger(value) || value < least || value > most) {
    const limits = most < Infinity ? `from ${least} to ${most}${why}` : `of at least ${least}`;
    throw new Misuse(`--${name} ${values[name]}: must be a whole number ${limits}`);
  }
  return value;
}

function real(values, name, most) {
  const value = Number(values[name]);
  if (values[name].trim() === "" || !Number.isFinite(value) || value < 0 || value > most) {
    throw new Misuse(`--${name} ${values[name]}: must be a number ${most < Infinity ? `from 0 to ${most}` : "of at least 0"}`);
  }
  return value;
}

function oneOf(values, name, allowed) {
  if (!allowed.includes(values[name])) throw new Misuse(`--${name} ${values[name]}: must be one of ${allowed.join(", ")}`);
  return values[name];
}

/** Numbers in [0, 1), the same for the same seed (SplitMix32). */
function numbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97);
    return ((mixed ^ (mixed >>> 15)) >>> 8) / 2 ** 24;
  };
}

process.stdout.on("error", (error) => {
  if (error.code === "EPIPE") process.exit(0); // the reader has seen enough
  console.error(`run.mjs: error: standard output cannot be written (${oneLine(error.message)})`);
  process.exit(1);
});
try {
  await main(process.argv.slice(2));
} catch (error) {
  if (error instanceof Misuse) {
    console.error(`${USAGE}\nrun.mjs: error: ${oneLine(error.message)}`);
    process.exitCode = 2;
  } else {
    const fault = error instanceof PaliGemmaError ? "" : "this should not have happened: ";
    console.error(`run.mjs: error: ${fault}${oneLine(error?.message ?? String(error))}`);
    process.exitCode = 1;
  }
}

#!/usr/bin/env node
/** node run.mjs BUNDLE IMAGE [IMAGE ...] PROMPT [options]: answer a prompt about a picture, or about several. */
import { readFile, stat } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { dirname } from "node:path";
import { parseArgs } from "node:util";

import { oneLine, PaliGemmaError, plural, printable } from "../common/errors.mjs";
import { promptWarning } from "../common/tokenizer.mjs";
import { TRANSPARENCIES } from "../common/transparency.mjs";

const MOST_THREADS = 4 * availableParallelism(); // beyond, each only waits and takes memory
const USAGE = `usage: node run.mjs BUNDLE IMAGE [IMAGE ...] PROMPT [options]
  IMAGE                   several are for a model that was trained on as many; boxes and masks are in the first
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

const PICTURE = /\.(png|jpe?g|webp|gif|tiff?|avif)$/i; // what a name of a picture ends with
const kindOf = (path) => stat(path).catch(() => null);

async function main(argv) {
  const { values, positionals } = parse(argv);
  if (values.help) return console.log(USAGE);
  if (positionals.length < 3) throw new Misuse(`expected BUNDLE IMAGE PROMPT, got ${plural(positionals.length, "argument")}`);
  const [bundle, ...images] = positionals;
  const last = images.pop();
  await checkOrder(bundle, images, last);
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
  const prompt = await readPrompt(last);
  const { load } = await host();
  const started = performance.now();
  const model = await load(bundle, { threads });
  const loaded = (performance.now() - started) / 1000;
  if (!values.json) options.onToken = (text) => process.stdout.write(printable(text));
  const { timings, ...answer } = await model.generate(images, prompt, options);
  console.log(values.json ? JSON.stringify({ ...answer, timings: { load_s: loaded, ...timings } }) : "");
}

/** Throw Misuse that says what is in the wrong place, if something is. Twin of `numpy_ref/cli/inputs.py`. */
async function checkOrder(bundle, images, prompt) {
  const order = "the order is BUNDLE IMAGE [IMAGE ...] PROMPT";
  if (PICTURE.test(prompt) && (await kindOf(prompt))?.isFile()) throw new Misuse(`${prompt}: a picture in the place of the prompt; ${order}`);
  for (const [i, image] of images.entries()) {
    const found = await kindOf(image);
    if (found?.isDirectory()) throw new Misuse(`${image}: a folder in the place of a picture; ${order}`);
    if (found || PICTURE.test(image)) continue;
    const whole = [...images.slice(i), prompt].join(" ");
    if (images.length > 1) throw new Misuse(`${image}: no such picture; ${order}, and a prompt of several words is quoted: "${whole}"`);
  }
  if ((await kindOf(bundle))?.isFile()) throw new Misuse(`${bundle}: a file in the place of the bundle's folder; ${order}`);
}

async function host() {
  try {
    return await import("./index.mjs");
  } catch (error) {
    if (error.code !== "ERR_MODULE_NOT_FOUND") throw error;
    throw new PaliGemmaError(`a library is missing; run: npm ci --prefix ${dirname(import.meta.dirname)}`);
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

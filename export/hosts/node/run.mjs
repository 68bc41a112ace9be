#!/usr/bin/env node
/** node run.mjs BUNDLE IMAGE [IMAGE ...] PROMPT [PROMPT ...]: answer prompts about a picture, or about several at once. */
import { readFile, stat } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { dirname } from "node:path";
import { parseArgs } from "node:util";

import { oneLine, PaliGemmaError, plural, printable } from "../common/errors.mjs";
import { TEMPERATURE, TOP_P } from "../common/options.mjs";
import { promptWarning } from "../common/tokenizer.mjs";
import { TRANSPARENCIES } from "../common/transparency.mjs";

const MOST_THREADS = 4 * availableParallelism(); // beyond, each only waits and takes memory
const ORDER = "BUNDLE IMAGE [IMAGE ...] PROMPT [PROMPT ...]";
const USAGE = `usage: node run.mjs ${ORDER} [options]
  IMAGE                   several are for a model that was trained on as many; boxes and masks are in the first
  PROMPT                  @FILE reads it from a file, @@TEXT is the prompt @TEXT; line breaks at its end do not count.
                          Several are answered one after the other, a line each
  --json                  print a JSON object a prompt, one a line
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
  if (positionals.length < 3) throw new Misuse(`expected at least BUNDLE IMAGE PROMPT, got ${plural(positionals.length, "argument")}`);
  const { bundle, images, asked } = await sorted(positionals);
  const options = {
    maxNewTokens: values["max-new-tokens"] === undefined ? undefined : whole(values, "max-new-tokens", 1),
    temperature: real(values, "temperature", TEMPERATURE),
    topP: real(values, "top-p", TOP_P),
    topK: whole(values, "top-k", 0),
    uniform: numbers(whole(values, "seed", 0)),
    boxes: oneOf(values, "boxes", ["big_vision", "huggingface"]),
    transparency: oneOf(values, "transparency", TRANSPARENCIES),
  };
  const threads = whole(values, "threads", 0, MOST_THREADS, " (4 for each of this machine's cores)");
  const prompts = [];
  for (const each of asked) prompts.push(await readPrompt(each));
  const { load } = await host();
  const started = performance.now();
  const model = await load(bundle, { threads });
  const loaded = (performance.now() - started) / 1000;
  const withLoad = ({ timings, ...answer }) => ({ ...answer, timings: { load_s: loaded, ...timings } });
  if (prompts.length === 1) {
    if (!values.json) options.onToken = (text) => process.stdout.write(printable(text));
    const answer = await model.generate(images, prompts[0], options);
    return console.log(values.json ? JSON.stringify(withLoad(answer)) : "");
  }
  for (const prompt of prompts) model.plan(prompt, images.length, options); // all are refused before one is answered
  const { transparency, ...ofPrompt } = options;
  const picture = await model.picture(images, { transparency });
  for (const prompt of prompts) {
    const answer = await picture.generate(prompt, ofPrompt);
    console.log(values.json ? JSON.stringify({ prompt, ...withLoad(answer) }) : printable(answer.text.replaceAll("\n", "\\n")));
  }
}

/** The bundle, the pictures and the prompts among the arguments. Twin of `split` in `numpy_ref/cli/inputs.py`. */
async function sorted([bundle, ...rest]) {
  const named = await Promise.all(rest.slice(0, -1).map(async (word) => PICTURE.test(word) || Boolean(await kindOf(word))));
  const pictures = named.lastIndexOf(true) + 1 || rest.length - 1; // all up to the last, where none is there
  const [images, asked] = [rest.slice(0, pictures), rest.slice(pictures)];
  await checkOrder(bundle, images, asked);
  return { bundle, images, asked };
}

/** Throw Misuse that says what is in the wrong place, if something is. Twin of `mistake`. */
async function checkOrder(bundle, images, prompts) {
  const order = `the order is ${ORDER}`;
  const last = prompts.at(-1);
  if (PICTURE.test(last) && (await kindOf(last))?.isFile()) throw new Misuse(`${last}: a picture in the place of the prompt; ${order}`);
  const words = [...images, ...prompts];
  for (const [i, word] of words.entries()) {
    const found = await kindOf(word);
    if (i < images.length && found?.isDirectory()) throw new Misuse(`${word}: a folder in the place of a picture; ${order}`);
    const absent = i < images.length ? !found && !PICTURE.test(word) && words.length > 2 : isWord(word) && isWord(words[i + 1]);
    if (!absent) continue;
    throw new Misuse(`${word}: no such picture; ${order}, and a prompt of several words is quoted: "${words.slice(i).join(" ")}"`);
  }
  if ((await kindOf(bundle))?.isFile()) throw new Misuse(`${bundle}: a file in the place of the bundle's folder; ${order}`);
}

/** Whether a prompt is a single word: two in a row are one that somebody forgot to quote. */
const isWord = (prompt) => prompt !== undefined && !/\S\s+\S/.test(prompt) && !prompt.startsWith("@");

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

function real(values, name, { wanted, fits }) {
  const value = values[name].trim() === "" ? NaN : Number(values[name]);
  if (!fits(value)) throw new Misuse(`--${name} ${values[name]}: must be ${wanted}`);
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

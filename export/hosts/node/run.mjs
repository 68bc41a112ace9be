#!/usr/bin/env node
/** node run.mjs BUNDLE IMAGE PROMPT [options]: answer a prompt about a picture. */
import { parseArgs } from "node:util";

import { PaliGemmaError } from "../common/errors.mjs";
import { TRANSPARENCIES } from "../common/transparency.mjs";

const USAGE = `usage: node run.mjs BUNDLE IMAGE PROMPT [options]
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
  if (positionals.length !== 3) throw new Misuse(`expected BUNDLE IMAGE PROMPT, got ${positionals.length} arguments`);
  const [bundle, image, prompt] = positionals;
  const options = {
    maxNewTokens: values["max-new-tokens"] === undefined ? undefined : whole(values, "max-new-tokens", 1),
    temperature: real(values, "temperature", Infinity),
    topP: real(values, "top-p", 1),
    topK: whole(values, "top-k", 0),
    uniform: numbers(whole(values, "seed", 0)),
    boxes: oneOf(values, "boxes", ["big_vision", "huggingface"]),
    transparency: oneOf(values, "transparency", TRANSPARENCIES),
  };
  const { load } = await host();
  const started = performance.now();
  const model = await load(bundle, { threads: whole(values, "threads", 0) });
  const loaded = (performance.now() - started) / 1000;
  if (!values.json) options.onToken = (text) => process.stdout.write(text);
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

function whole(values, name, least) {
  const value = Number(values[name]);
  if (!Number.isSafeInteger(value) || value < least) throw new Misuse(`--${name} ${values[name]}: a whole number from ${least}`);
  return value;
}

function real(values, name, most) {
  const value = Number(values[name]);
  if (values[name].trim() === "" || !Number.isFinite(value) || value < 0 || value > most) {
    throw new Misuse(`--${name} ${values[name]}: a number from 0${most < Infinity ? ` to ${most}` : ""}`);
  }
  return value;
}

function oneOf(values, name, allowed) {
  if (!allowed.includes(values[name])) throw new Misuse(`--${name} ${values[name]}: one of ${allowed.join(", ")}`);
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
  if (error.code !== "EPIPE") throw error;
  process.exit(0); // the reader has seen enough
});
try {
  await main(process.argv.slice(2));
} catch (error) {
  if (error instanceof Misuse) {
    console.error(`${USAGE}\nrun.mjs: error: ${error.message}`);
    process.exitCode = 2;
  } else if (error instanceof PaliGemmaError) {
    console.error(`run.mjs: error: ${error.message.replace(/\s+/g, " ")}`);
    process.exitCode = 1;
  } else {
    throw error;
  }
}

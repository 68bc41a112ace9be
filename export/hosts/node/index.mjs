/** PaliGemma bundles in Node: `load(folder)`, then `generate(picture, prompt)`; index.d.mts says what else there is. */
import "./telemetry.mjs"; // first: ONNX Runtime reads it as it is loaded

import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { readFile, realpath, stat } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

import { Tokenizer as Library } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";
import sharp from "sharp";

import { PaliGemmaError } from "../common/errors.mjs";
import { checkOptions, checkValue, shown, TRANSPARENCY, whole } from "../common/options.mjs";
import { checkPixels, isPixels, PaliGemma } from "../common/paligemma.mjs";
import { promptWarning } from "../common/tokenizer.mjs";
import { opaque } from "../common/transparency.mjs";

export { PaliGemmaError, promptWarning };

// Below this the runtime may repack weights for speed, a private copy a session; from here on both map the one file.
const MAPPED_FROM = 2 ** 31;
const MOST_THREADS = 4 * availableParallelism(); // beyond, each only waits and takes memory
const MAX_JSON_BYTES = 2 ** 24;
const QUANTIZED = ["int8", "int4"]; // always repacked: their quick kernels read no other order

/** A bundle's folder, or its file: URL, opened. `threads` 0 takes every core. */
export async function load(folder, options) {
  const { threads = 0 } = checkOptions("load", options, { threads: whole(0, MOST_THREADS, " (4 for each of this machine's cores)") });
  const path = pathOf(folder, "the bundle");
  if (!(await kindOf(path))?.isDirectory()) throw new PaliGemmaError(`${path}: no such bundle directory; export-onnx makes one`);
  const createSession = async (file, large, { files, precision }) => {
    const mapped = large && !QUANTIZED.includes(precision) && files["weights.bin"].bytes > MAPPED_FROM;
    // The runtime believes a graph that says where, and how long, its repacked weights are: kernels would read beyond them.
    const repacked = (await readFile(join(path, file))).includes("prepacked_");
    return ort.InferenceSession.create(join(path, file), {
      intraOpNumThreads: large ? threads : 1,
      logSeverityLevel: 4,
      ...((mapped || repacked) && { extra: { session: { disable_prepacking: "1" } } }),
    });
  };
  try {
    return await PaliGemma.open(filesOf(path), { ort, inPlace: true, Library, createSession, decodePicture });
  } catch (error) {
    throw error instanceof PaliGemmaError ? new PaliGemmaError(`${path}: ${error.message}`) : error;
  }
}

/**
 * A picture as { data, width, height }: RGB, upright, transparent pixels on white or dropped. It is a file's path or file:
 * URL, a file's bytes, or such an object already.
 */
export async function decodePicture(picture, transparency = "white") {
  checkValue("transparency", transparency, TRANSPARENCY);
  if (isPixels(picture)) return checkPixels(picture);
  const bytes = picture instanceof Uint8Array;
  const source = bytes ? picture : pathOf(picture, "the picture", ", a file's bytes, or { data, width, height }");
  const name = bytes ? "the picture" : source;
  if (!bytes && !(await kindOf(source))?.isFile()) throw new PaliGemmaError(`${source}: no such picture`);
  try {
    const decoder = sharp(source, { ignoreIcc: true });
    const { format, space } = await decoder.metadata();
    if (format === "svg" || space === "cmyk") throw new Error(`${format} in ${space} is not read; save it as PNG in RGB`);
    const upright = decoder.autoOrient().toColourspace("srgb").ensureAlpha().raw();
    const { data, info } = await upright.toBuffer({ resolveWithObject: true });
    return { data: opaque(data, transparency), width: info.width, height: info.height };
  } catch (error) {
    if (error instanceof PaliGemmaError) throw error;
    throw new PaliGemmaError(`${name}: not a picture, or a broken one (${error.message.split("\n")[0]})`);
  }
}

/** A path, given as one or as a file: URL. */
function pathOf(value, what, others = "") {
  if (value instanceof URL) {
    try {
      return fileURLToPath(value);
    } catch (error) {
      throw new PaliGemmaError(`${value}: ${what} is read from a file and not fetched (${error.message})`);
    }
  }
  if (typeof value === "string") return value;
  throw new PaliGemmaError(`${what} must be a path or a file: URL${others}, not ${shown(value)}`);
}

/** The files of a folder, as `openBundle` asks for them. */
function filesOf(folder) {
  return {
    async read(name) {
      const file = join(folder, name);
      const found = await kindOf(file);
      if (!found?.isFile()) return null;
      if (name === "bundle.json" && found.size > MAX_JSON_BYTES) throw new PaliGemmaError(`${name} has ${found.size} bytes, more than are read`);
      return within(folder, file).then(readFile);
    },
    async measure(name) {
      const file = await within(folder, join(folder, name));
      const found = await kindOf(file);
      if (!found?.isFile()) return null;
      const digest = createHash("sha256");
      for await (const block of createReadStream(file, { highWaterMark: 2 ** 20 })) digest.update(block);
      return { bytes: found.size, sha256: digest.digest("hex") };
    },
  };
}

/** A file that may be a link, but does not lead out of its folder, except as in a Hugging Face cache. */
async function within(folder, file) {
  const home = await realpath(folder);
  const target = await realpath(file).catch(() => file);
  const homes = [home, folder, ...(basename(dirname(home)) === "snapshots" ? [join(dirname(dirname(home)), "blobs")] : [])];
  if (!homes.includes(dirname(target))) {
    throw new PaliGemmaError(`${file}: this link leads out of its folder; put a copy of the file in its place`);
  }
  return target;
}

const kindOf = (path) => stat(path).catch(() => null);

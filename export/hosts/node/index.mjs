/** PaliGemma bundles in Node: `load(folder)`, then `generate(picture, prompt)`, or `generate([a, b], prompt)`. */
import "./telemetry.mjs"; // first: ONNX Runtime reads it as it is loaded

import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { readFile, realpath, stat } from "node:fs/promises";
import { basename, dirname, join } from "node:path";

import { Tokenizer as Library } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";
import sharp from "sharp";

import { PaliGemmaError } from "../common/errors.mjs";
import { PaliGemma } from "../common/paligemma.mjs";
import { promptWarning } from "../common/tokenizer.mjs";
import { opaque } from "../common/transparency.mjs";

export { PaliGemmaError, promptWarning };

// Below this the runtime may repack weights for speed, a private copy a session; from here on both map the one file.
const MAPPED_FROM = 2 ** 31;
const MAX_JSON_BYTES = 2 ** 24;
const QUANTIZED = ["int8", "int4"]; // always repacked: their quick kernels read no other order

/** A bundle's folder, opened. `threads` 0 takes every core. */
export async function load(folder, { threads = 0 } = {}) {
  if (!(await kindOf(folder))?.isDirectory()) throw new PaliGemmaError(`${folder}: no such bundle directory; export-onnx makes one`);
  const createSession = async (file, { files, graphs, precision }) => {
    const large = [graphs.prefill.file, graphs.decode.file].includes(file);
    const mapped = large && !QUANTIZED.includes(precision) && files["weights.bin"].bytes > MAPPED_FROM;
    // The runtime believes a graph that says where, and how long, its repacked weights are: kernels would read beyond them.
    const repacked = (await readFile(join(folder, file))).includes("prepacked_");
    return ort.InferenceSession.create(join(folder, file), {
      intraOpNumThreads: large ? threads : 1,
      logSeverityLevel: 4,
      ...((mapped || repacked) && { extra: { session: { disable_prepacking: "1" } } }),
    });
  };
  try {
    return new NodePaliGemma(await PaliGemma.open(filesOf(folder), ort, createSession, Library, { inPlace: true }));
  } catch (error) {
    throw error instanceof PaliGemmaError ? new PaliGemmaError(`${folder}: ${error.message}`) : error;
  }
}

class NodePaliGemma {
  constructor(model) {
    this.model = model;
  }

  /**
   * `picture` is a file's path, a file's bytes, or { data, width, height } with RGB bytes; or an array of those, the
   * prompt's pictures. See index.d.mts.
   */
  async generate(picture, prompt, options) {
    const { transparency, ...rest } = options ?? {};
    const images = [];
    for (const each of Array.isArray(picture) ? picture : [picture]) {
      images.push(each?.data && each.width ? each : await decodePicture(each, transparency));
    }
    return this.model.generate(images, prompt, rest);
  }
}

/** A picture file, or its bytes, as { data, width, height }: RGB, upright, transparent pixels on white or dropped. */
export async function decodePicture(picture, transparency) {
  const name = typeof picture === "string" ? picture : "the picture";
  if (typeof picture === "string" && !(await kindOf(picture))?.isFile()) throw new PaliGemmaError(`${picture}: no such picture`);
  try {
    const decoder = sharp(picture, { ignoreIcc: true });
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

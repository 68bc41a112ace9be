/**
 * Opening a bundle: its version is known, its files are all there, and each has the SHA-256 that it had.
 * Twin of `load` in `export/bundle`; its `description.py` says what bundle.json holds.
 *
 * A source is where the files are: `read(name)` gives the bytes of one, `measure(name)` its { bytes, sha256 }; both
 * give null where there is no such file.
 */
import { PaliGemmaError } from "./errors.mjs";

const FORMAT = "paligemma-onnx";
const VERSION = 1;
const DESCRIPTION = "bundle.json";
const WEIGHTS = "weights.bin";
const NEEDED = ["prefill", "decode", "preprocess", "sample"];

/** The contents of bundle.json, once everything that it says of the files has been found true. */
export async function openBundle(source) {
  const contents = await source.read(DESCRIPTION);
  if (!contents) fail(`${DESCRIPTION} is missing; is this a bundle written by export-onnx?`);
  let description;
  try {
    description = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(contents));
  } catch (error) {
    fail(`${DESCRIPTION} is not JSON (${error.message})`);
  }
  if (description?.format !== FORMAT) fail(`${DESCRIPTION} does not describe a ${FORMAT} bundle`);
  if (description.version !== VERSION) {
    const found = JSON.stringify(description.version);
    fail(`bundle version ${found}, but this program reads ${VERSION}; export it again`);
  }
  checkDescription(description);
  for (const [name, wanted] of Object.entries(description.files)) {
    const found = await source.measure(name);
    if (!found) fail(`${name}: this file of the bundle is missing; copy or export the bundle again`);
    if (found.bytes !== wanted.bytes) {
      fail(`${name}: ${found.bytes} bytes where ${DESCRIPTION} says ${wanted.bytes}; copy it again`);
    }
    if (found.sha256 !== wanted.sha256) fail(`${name}: contents differ from their SHA-256 in ${DESCRIPTION}; copy it again`);
  }
  return description;
}

function checkDescription({ graphs, files, config, tokens, max_length: maxLength, precision }) {
  const whole = [maxLength, tokens?.image, tokens?.image_tokens, tokens?.bos, tokens?.eos, tokens?.pad, ...(tokens?.stops ?? [])];
  whole.push(config?.vision_config?.image_size, config?.text_config?.vocab_size);
  const listed = Object.values(files ?? {});
  const sound = listed.every((file) => Number.isInteger(file?.bytes) && typeof file.sha256 === "string");
  if (!whole.every(Number.isInteger) || !graphs || !sound) fail(`${DESCRIPTION} is damaged; export the bundle again`);
  for (const name of new Set([...NEEDED, ...Object.keys(graphs)])) {
    if (!graphs[name]?.file || typeof graphs[name].file !== "string") fail(`${DESCRIPTION} lists no ${name} graph; export the bundle again`);
    if (!files[graphs[name].file]) fail(`${DESCRIPTION} lists no checksum for ${graphs[name].file}`);
  }
  if (!files[WEIGHTS]) fail(`${DESCRIPTION} lists no checksum for ${WEIGHTS}`);
  if (!files["tokenizer.json"]) fail("the bundle has no tokenizer.json, which hosts without SentencePiece need");
  const outside = Object.keys(files).find((name) => /[/\\]/.test(name) || name.startsWith("."));
  if (outside) fail(`${DESCRIPTION} names a file outside the bundle, ${outside}`);
  if (precision?.endsWith("bfloat16")) fail(`a bundle in ${precision} needs CUDA; export float32`);
}

function fail(message) {
  throw new PaliGemmaError(message);
}

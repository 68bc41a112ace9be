/** Cases on standard input, what the Node host makes of them on standard output; driven by test_hosts.py. */
import { readFileSync } from "node:fs";

import { parse, paste } from "../export/hosts/common/detection.mjs";
import { promptWarning } from "../export/hosts/common/tokenizer.mjs";
import { decodePicture, load } from "../export/hosts/node/index.mjs";

const { bundle, cases, pictures, texts, detections = [], pasted = [] } = JSON.parse(readFileSync(0, "utf8"));
const loaded = await load(bundle);
const answers = [];
for (const { picture, prompt, uniforms, ...options } of cases) {
  const streamed = [];
  const chance = uniforms && [...uniforms];
  const answer = await loaded.generate(picture, prompt, {
    ...options,
    ...(chance && { uniform: () => chance.shift() }),
    onToken: (text) => streamed.push(text),
  });
  answers.push({ ...answer, streamed: streamed.join("") });
}
const pixels = [];
for (const picture of pictures) {
  const image = await decodePicture(picture);
  const values = await loaded.engine.preprocess(image);
  pixels.push({ rgb: Buffer.from(image.data).toString("base64"), values: base64(values.data) });
}
const { tokenizer } = loaded;
const encoded = texts.map((text) => tokenizer.encode(text));
const boxes = detections.map((text) => parse(text, 640, 480));
const masks = pasted.map(({ mask, box, width, height }) => [...paste(Float32Array.from(mask), box, width, height)]);
const warnings = texts.map(promptWarning);
const decoded = encoded.map((ids) => tokenizer.decode(ids));
console.log(JSON.stringify({ answers, pixels, encoded, decoded, boxes, masks, warnings }));

function base64(floats) {
  return Buffer.from(floats.buffer, floats.byteOffset, floats.byteLength).toString("base64");
}

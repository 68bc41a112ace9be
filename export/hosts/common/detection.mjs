/** Boxes and masks in an answer. Twin of `numpy_ref/detection.py` and of `paste` in `numpy_ref/model/segmentation.py`. */
import { PaliGemmaError } from "./errors.mjs";

export const CONVENTIONS = { big_vision: 1023, huggingface: 1024 };
const CODES = 16; // of a mask
const SIDE = 64; // of a mask as the codec paints it

// As in detection.py, where it is said how an answer is read: tokens that there are, blanks and digits spelled out.
const LOCATION = "<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>";
const CODE = "<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>";
const BLANK = "[ \\t-\\r]";
const WORD = /[^ \t-\r]+/g;
const BOX = `(?:${LOCATION}){4}`;
const OBJECT = new RegExp(`(${BOX})${BLANK}*((?:${CODE})*)(?:${BLANK}*(?!${BOX})(?:${LOCATION}|${CODE}))*`, "g");
const LABEL_END = new RegExp(`${BLANK};(?=${BLANK}|$)|;(?=${BLANK}*${LOCATION})|${LOCATION}|${CODE}|$`);

/**
 * The boxes of an answer, in pixels of a width x height picture; every four location tokens are one. They have scores if
 * `logprobs` are given: for each of the text's tokens where it begins, and its log-probability.
 */
export function parse(text, width, height, convention = "big_vision", logprobs = []) {
  const steps = CONVENTIONS[convention];
  if (!steps) throw new PaliGemmaError(`boxes ${convention}: one of ${Object.keys(CONVENTIONS).join(", ")}`);
  return [...text.matchAll(OBJECT)].map((found) => {
    const [y1, x1, y2, x2] = numbersIn(found[1]).map((number) => number / steps);
    const codes = numbersIn(found[2]).slice(0, CODES);
    const end = found.index + found[0].length;
    const rest = text.slice(end);
    const labelled = rest.slice(0, rest.search(LABEL_END));
    const label = (labelled.match(WORD) ?? []).join(" ");
    const box = { label, x1: x1 * width, y1: y1 * height, x2: x2 * width, y2: y2 * height };
    if (codes.length === CODES) box.codes = codes;
    const spans = [[found.index, found.index + found[1].length]];
    // With the blank before it, which belongs to the token of its first word.
    if (label) spans.push([found.index + found[0].trimEnd().length, end + labelled.length]);
    const first = found.index + found[0].indexOf("<seg");
    const scores = { score: score(logprobs, spans) };
    if (box.codes) scores.mask_score = score(logprobs, [[first, first + CODES * "<seg000>".length]]);
    return logprobs.length ? { ...box, ...scores } : box;
  });
}

/** exp of the mean log-probability of the tokens that begin inside of the spans. */
function score(logprobs, spans) {
  const found = logprobs.filter(([begin]) => spans.some(([first, end]) => first <= begin && begin < end));
  return Math.exp(found.reduce((sum, [, logprob]) => sum + logprob, 0) / found.length);
}

const numbersIn = (text) => (text.match(/[0-9]+/g) ?? []).map(Number);

/** A painted mask [64 x 64] in its place: one byte a pixel of the picture, 1 inside; none where a box has no pixel. */
export function paste(mask, box, width, height) {
  const [x1, y1, x2, y2] = [box.x1, box.y1, box.x2, box.y2].map(Math.trunc);
  const canvas = new Uint8Array(width * height);
  if (x2 <= x1 || y2 <= y1) return canvas;
  const resized = resize(mask, x2 - x1, y2 - y1);
  for (let y = Math.max(y1, 0); y < Math.min(y2, height); y++) {
    for (let x = Math.max(x1, 0); x < Math.min(x2, width); x++) {
      canvas[y * width + x] = resized[(y - y1) * (x2 - x1) + x - x1] > 0;
    }
  }
  return canvas;
}

/** COCO's uncompressed run lengths: how many 0, then 1, then 0 … follow one another, column by column. */
export function runLengths(mask, width, height) {
  const counts = [0];
  let current = 0;
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) {
      if (mask[y * width + x] !== current) {
        current = 1 - current;
        counts.push(0);
      }
      counts[counts.length - 1]++;
    }
  }
  return counts;
}

/** [64 x 64] -> [height x width], linear with the filter widened where it shrinks, as Pillow does it. */
function resize(values, width, height) {
  const across = weights(width);
  const down = weights(height);
  const rows = new Float32Array(SIDE * width);
  for (let y = 0; y < SIDE; y++) {
    across.forEach(({ first, shares }, x) => {
      rows[y * width + x] = shares.reduce((sum, share, i) => sum + share * values[y * SIDE + first + i], 0);
    });
  }
  const resized = new Float32Array(width * height);
  down.forEach(({ first, shares }, y) => {
    for (let x = 0; x < width; x++) {
      resized[y * width + x] = shares.reduce((sum, share, i) => sum + share * rows[(first + i) * width + x], 0);
    }
  });
  return resized;
}

/** For each of `size` places along a side: from where on it takes values, and what share of each. */
function weights(size) {
  const scale = SIDE / size;
  const reach = Math.max(scale, 1);
  return Array.from({ length: size }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const last = Math.min(Math.trunc(centre + reach + 0.5), SIDE);
    const shares = Array.from({ length: last - first }, (_, j) => Math.max(0, 1 - Math.abs(first + j - centre + 0.5) / reach));
    const sum = shares.reduce((a, b) => a + b, 0);
    return { first, shares: shares.map((share) => share / sum) };
  });
}

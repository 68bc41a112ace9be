/** Boxes and masks in an answer. Twin of `numpy_ref/detection.py` and of `paste` in `numpy_ref/model/segmentation.py`. */
import { PaliGemmaError } from "./errors.mjs";

const CONVENTIONS = { big_vision: 1023, huggingface: 1024 };
const OBJECT =
  /<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>\s*((?:<seg(?:0\d\d|1[01]\d|12[0-7])>){16})?\s*([^;<>]*?)\s*(?=;|<|$)/g;
const SIDE = 64; // of a mask as the codec paints it

/** The boxes of an answer, in pixels of a width x height picture. Empty or inverted boxes are dropped. */
export function parse(text, width, height, convention = "big_vision") {
  const steps = CONVENTIONS[convention];
  if (!steps) throw new PaliGemmaError(`boxes ${convention}: one of ${Object.keys(CONVENTIONS).join(", ")}`);
  const boxes = [];
  for (const [, ...found] of text.matchAll(OBJECT)) {
    const [y1, x1, y2, x2] = found.slice(0, 4).map(Number);
    if (y2 <= y1 || x2 <= x1 || Math.max(y2, x2) > 1023) continue;
    const label = found[5].split(/\s+/).filter(Boolean).join(" ");
    const codes = [...(found[4] ?? "").matchAll(/<seg(\d{3})>/g)].map((match) => Number(match[1]));
    const box = { label, x1: (x1 * width) / steps, y1: (y1 * height) / steps, x2: (x2 * width) / steps, y2: (y2 * height) / steps };
    boxes.push(codes.length ? { ...box, codes } : box);
  }
  return boxes;
}

/** A painted mask [64 x 64] in its place: one byte a pixel of the picture, 1 inside. */
export function paste(mask, box, width, height) {
  const [x1, y1] = [roundToEven(box.x1), roundToEven(box.y1)];
  const [x2, y2] = [Math.max(roundToEven(box.x2), x1 + 1), Math.max(roundToEven(box.y2), y1 + 1)];
  const resized = resize(mask, x2 - x1, y2 - y1);
  const canvas = new Uint8Array(width * height);
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

/** As Python rounds: a half goes to the even neighbour. */
function roundToEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return below + (rest > 0.5 || (rest === 0.5 && below % 2 !== 0) ? 1 : 0);
}

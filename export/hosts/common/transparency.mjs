import { PaliGemmaError } from "./errors.mjs";

/** What stands behind transparent pixels: white, as in transformers from 5.21 on, or the colors that the file has there. */
export const TRANSPARENCIES = ["white", "drop"];

/** RGBA bytes (not premultiplied) as RGB: laid on white with Pillow's rounding, or their alpha dropped. */
export function opaque(rgba, transparency = "white") {
  if (!TRANSPARENCIES.includes(transparency)) {
    throw new PaliGemmaError(`transparency ${transparency}: one of ${TRANSPARENCIES.join(", ")}`);
  }
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    const alpha = transparency === "white" ? rgba[from + 3] : 255;
    for (let channel = 0; channel < 3; channel++) rgb[to++] = onWhite(rgba[from + channel], alpha);
  }
  return rgb;
}

/** (value * alpha + 255 * (255 - alpha)) / 255, in fixed point with seven bits behind the point, as Pillow rounds it. */
function onWhite(value, alpha) {
  const sum = (value * alpha + 255 * (255 - alpha) + 128) * 128;
  return ((sum >> 8) + sum) >> 15;
}

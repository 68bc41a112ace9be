/** The page's side of the worker: load a bundle, ask it. */
import { PaliGemmaError } from "../common/errors.mjs";

export class Model {
  constructor() {
    this.worker = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });
    this.waiting = new Map();
    this.asked = 0;
    this.worker.onmessage = ({ data }) => this.hear(data);
    this.worker.onerror = (event) => {
      const reason = event.message ?? "its files do not load; run npm ci in the folder of this page";
      for (const { reject } of this.waiting.values()) reject(new PaliGemmaError(`the model's worker stopped: ${reason}`));
    };
  }

  /** Open the bundle at a URL; `onProgress` hears the fraction that has arrived. What it is, and how it runs. */
  load(url, { backend = "auto", onProgress } = {}) {
    this.worker.postMessage({ load: String(url), backend });
    return this.wait(undefined, { onProgress });
  }

  /** Answer a prompt about { data, width, height }. `onToken(text, token)`, `signal` and options as in Node. */
  ask(image, prompt, { onToken, signal, ...options } = {}) {
    const id = ++this.asked;
    signal?.addEventListener("abort", () => this.worker.postMessage({ stop: id }));
    this.worker.postMessage({ ask: id, image, prompt, options });
    return this.wait(id, { onToken });
  }

  wait(id, listeners) {
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject, ...listeners }));
  }

  hear({ id, progress, loaded, text, token, answer, error }) {
    const waiting = this.waiting.get(id);
    if (progress !== undefined) return waiting?.onProgress?.(progress);
    if (text !== undefined) return waiting?.onToken?.(text, token);
    this.waiting.delete(id);
    if (error) waiting.reject(new PaliGemmaError(error));
    else waiting.resolve(loaded ?? answer);
  }
}

/** A picture file as a bitmap, upright, its numbers as they are in the file. */
export async function openPicture(blob) {
  try {
    return await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new PaliGemmaError(`${blob.name ?? "this"}: not a picture that this browser can read, or a broken one`);
  }
}

/** The RGB bytes of a bitmap: { data, width, height }. */
export function pixelsOf(bitmap) {
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    data[to++] = rgba[from];
    data[to++] = rgba[from + 1];
    data[to++] = rgba[from + 2];
  }
  return { data, width, height };
}

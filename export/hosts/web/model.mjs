/** The page's side of the worker: load a bundle, ask it. */
import { PaliGemmaError } from "../common/errors.mjs";
import { opaque } from "../common/transparency.mjs";

const LONGEST_SIDE = 16384; // of a canvas
const MOST_PIXELS = 2 ** 26;

export class Model {
  constructor() {
    this.worker = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });
    this.waiting = new Map();
    this.asked = 0;
    this.worker.onmessage = ({ data }) => this.receive(data);
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

  /**
   * Answer a prompt about { data, width, height }, or about an array of them. `onToken(text, token)`, `signal` and options as in Node, but for
   * chance: `uniforms` is a list of numbers to draw with.
   */
  ask(image, prompt, { onToken, signal, ...options } = {}) {
    const id = ++this.asked;
    const stop = () => this.worker.postMessage({ stop: id });
    signal?.addEventListener("abort", stop);
    this.worker.postMessage({ ask: id, image, prompt, options });
    if (signal?.aborted) stop();
    return this.wait(id, { onToken });
  }

  wait(id, listeners) {
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject, ...listeners }));
  }

  receive({ id, progress, loaded, text, token, answer, error }) {
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
  const name = blob.name ?? "this";
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" }).catch(() => {
    throw new PaliGemmaError(`${name}: not a picture that this browser can read, or a broken one`);
  });
  const { width, height } = bitmap;
  if (Math.max(width, height) > LONGEST_SIDE || width * height > MOST_PIXELS) {
    throw new PaliGemmaError(`${name}: ${width} x ${height} pixels are more than this page can take; make it smaller`);
  }
  return bitmap;
}

/** The RGB bytes of a bitmap: { data, width, height }; transparent pixels on white, or their alpha dropped. */
export function pixelsOf(bitmap, transparency = "white") {
  const { width, height } = bitmap;
  let rgba = canvasBytes(bitmap);
  if (rgba.some((value, i) => i % 4 === 3 && value < 255)) rgba = textureBytes(bitmap);
  return { data: opaque(rgba, transparency), width, height };
}

function canvasBytes(bitmap) {
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

/** The bytes of a transparent bitmap: a canvas multiplies colors by their opacity, a texture leaves them alone. */
function textureBytes(bitmap) {
  const { width, height } = bitmap;
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) throw new PaliGemmaError("transparent pictures need WebGL, which this browser lacks; save it without transparency");
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const bytes = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, bytes);
  if (gl.getError()) throw new PaliGemmaError("the transparent picture is too large for this browser; make it smaller");
  return bytes;
}

/** PaliGemma bundles in the browser: `load(url)`, then `generate(picture, prompt)`; browser.d.mts says what else there is. */
import { PaliGemmaError } from "../common/errors.mjs";
import { callback, checkOptions, checkPrompt, OF_GENERATE, OF_PICTURE, OF_QUESTION, oneOf, shown, whole } from "../common/options.mjs";
import { listed } from "../common/paligemma.mjs";
import { promptWarning } from "../common/tokenizer.mjs";
import { decodePicture } from "./pictures.mjs";

export { decodePicture, PaliGemmaError, promptWarning };

const MOST_THREADS = 64;
const DEFAULT_NEW_TOKENS = 64;
const ADDRESS = { wanted: "an address", fits: (value) => typeof value === "string" || value instanceof URL };
const OF_LOAD = {
  backend: oneOf(["auto", "wasm", "webgpu"]),
  threads: whole(0, MOST_THREADS),
  modules: ADDRESS,
  onProgress: callback,
};

/** Fetch the bundle at a URL and open it in a worker of its own. */
export async function load(url, options) {
  const { onProgress, modules, ...rest } = checkOptions("load", options, OF_LOAD);
  const bundle = folder(absolute(url, "the bundle"));
  const worker = new ModelWorker();
  try {
    const libraries = modules === undefined ? undefined : folder(absolute(modules, "modules"));
    return new PaliGemma(worker, await worker.call("load", { url: bundle, modules: libraries, ...rest }, { onProgress }));
  } catch (error) {
    worker.end();
    throw error;
  }
}

/** A bundle in a worker, with the functions that it has in Node. */
class PaliGemma {
  constructor(worker, about) {
    Object.assign(this, { worker, about, disposal: null });
    // Whoever drops a picture says nothing, and the worker would keep it.
    this.pictures = new FinalizationRegistry((id) => worker.post({ forget: id }));
  }

  async generate(picture, prompt, options) {
    const asked = checkOptions("generate", options, OF_GENERATE);
    checkPrompt(prompt);
    return this.call("generate", { pictures: addressed(picture), prompt }, asked);
  }

  async picture(picture, options) {
    const asked = checkOptions("picture", options, OF_PICTURE);
    const id = await this.call("picture", { pictures: addressed(picture) }, asked);
    const read = new Picture(this, id);
    this.pictures.register(read, id);
    return read;
  }

  async call(name, message, { onToken, signal, uniform, ...options }) {
    if (this.disposal) throw new PaliGemmaError("this model was disposed of; load it again");
    signal?.throwIfAborted();
    // A function cannot go to the worker, but as many numbers as an answer may draw can.
    const uniforms = uniform && Array.from({ length: options.maxNewTokens ?? DEFAULT_NEW_TOKENS }, uniform);
    return this.worker.call(name, { ...message, options, uniforms }, { onToken, signal });
  }

  async dispose() {
    this.disposal ??= this.worker.idle().then(() => this.worker.end());
    return this.disposal;
  }
}

if (Symbol.asyncDispose) PaliGemma.prototype[Symbol.asyncDispose] = PaliGemma.prototype.dispose;

/** A picture, or several, that the model in the worker has read. */
class Picture {
  constructor(model, id) {
    Object.assign(this, { model, id });
  }

  async generate(prompt, options) {
    const asked = checkOptions("generate of a picture", options, OF_QUESTION);
    checkPrompt(prompt);
    return this.model.call("ask", { picture: this.id, prompt }, asked);
  }
}

/** The page's side of worker.mjs: calls that wait for their results. */
class ModelWorker {
  constructor() {
    this.worker = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });
    Object.assign(this, { waiting: new Map(), running: new Set(), calls: 0, fault: null });
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (event) => this.fail(event.message ?? "its files do not load");
  }

  call(name, message, { signal, ...heard } = {}) {
    if (this.fault) return Promise.reject(this.fault);
    const id = ++this.calls;
    const stop = () => this.post({ stop: id });
    const done = new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, signal, ...heard });
      this.post({ id, call: name, ...message }); // a throw rejects
      signal?.addEventListener("abort", stop);
    }).finally(() => {
      this.waiting.delete(id);
      signal?.removeEventListener("abort", stop);
      this.running.delete(done);
    });
    this.running.add(done);
    return done;
  }

  post(message) {
    try {
      this.worker.postMessage(message);
    } catch (error) {
      throw new PaliGemmaError(`this cannot be handed to the model's worker (${error.message})`);
    }
  }

  receive({ id, progress, text, token, result, error, stopped }) {
    const waiting = this.waiting.get(id);
    if (!waiting) return; // it ended by an error of its own
    try {
      if (progress !== undefined) waiting.onProgress?.(progress);
      else if (text !== undefined) waiting.onToken?.(text, token);
      else if (stopped) waiting.reject(waiting.signal.reason);
      else if (error !== undefined) waiting.reject(new PaliGemmaError(error));
      else waiting.resolve(result);
    } catch (fault) {
      waiting.reject(fault); // thrown by who listens
      this.post({ stop: id });
    }
  }

  fail(reason) {
    this.fault = new PaliGemmaError(`the model's worker stopped: ${reason}`);
    for (const { reject } of this.waiting.values()) reject(this.fault);
  }

  /** When everything that was called has ended. */
  idle() {
    return Promise.allSettled(this.running);
  }

  end() {
    this.worker.terminate();
  }
}

/** Pictures as the worker can take them: addresses are relative to the page, which the worker is not. */
function addressed(picture) {
  return listed(picture).map((each) => (ADDRESS.fits(each) ? absolute(each, "the picture") : each));
}

function absolute(address, what) {
  if (!ADDRESS.fits(address)) throw new PaliGemmaError(`${what} must be ${ADDRESS.wanted}, not ${shown(address)}`);
  try {
    return new URL(address, self.document?.baseURI ?? location.href).href;
  } catch {
    throw new PaliGemmaError(`${what} must be ${ADDRESS.wanted}, not ${shown(String(address))}`);
  }
}

const folder = (url) => (url.endsWith("/") ? url : `${url}/`);

/**
 * The model, away from the page's own thread. Messages in: { load: bundle URL, backend }, { ask: id, image, prompt,
 * options }, { stop: id }. Messages out: { progress }, { loaded }, { id, token }, { id, answer }, and { error } with
 * the id of what went wrong, if it has one.
 */
import { PaliGemmaError } from "../common/errors.mjs";
import { PaliGemma } from "../common/paligemma.mjs";
import { Tokenizer as Library } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";

const WEBGPU_FROM = 64 * 2 ** 20; // bytes of weights: below, the way to the GPU takes longer than the work
const WEIGHTS = "weights.bin";
let model;
const stops = new Map();

onmessage = async ({ data }) => {
  try {
    if (data.load) postMessage({ loaded: await load(data.load, data.backend) });
    else if (data.stop) stops.get(data.stop)?.abort();
    else postMessage({ id: data.ask, answer: await ask(data) });
  } catch (error) {
    const known = error instanceof PaliGemmaError;
    postMessage({ id: data.ask, error: known ? error.message : `something went wrong: ${error.message ?? error}` });
  }
};

async function load(url, wanted) {
  const started = performance.now();
  const source = filesAt(url);
  const backend = await choose(wanted, filesIn(await source.read("bundle.json"))[WEIGHTS]?.bytes ?? 0);
  const ort = await import(`./node_modules/onnxruntime-web/dist/ort.${backend}.min.mjs`);
  ort.env.logLevel = "fatal";
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency ?? 1) : 1;
  const createSession = async (file) => {
    const external = ["prefill.onnx", "decode.onnx"].includes(file);
    return ort.InferenceSession.create(await source.read(file), {
      executionProviders: external && backend === "webgpu" ? ["webgpu", "wasm"] : ["wasm"],
      externalData: external ? [{ path: WEIGHTS, data: await source.read(WEIGHTS) }] : [],
      logSeverityLevel: 4,
    });
  };
  model = await PaliGemma.open(source, ort, createSession, Library);
  source.forget();
  const { precision, config } = model.engine.description;
  const threads = ort.env.wasm.numThreads;
  return { seconds: (performance.now() - started) / 1000, backend, threads, precision, size: config.vision_config.image_size };
}

/** "auto", "wasm" or "webgpu" -> what runs here. */
async function choose(wanted, weightBytes) {
  if (!["auto", "wasm", "webgpu"].includes(wanted)) throw new PaliGemmaError(`backend ${wanted}: one of auto, wasm, webgpu`);
  const adapter = wanted === "wasm" || !navigator.gpu ? null : await navigator.gpu.requestAdapter().catch(() => null);
  if (wanted === "webgpu" && !adapter) throw new PaliGemmaError("this browser has no WebGPU device; use ?backend=wasm");
  return adapter && (wanted === "webgpu" || weightBytes >= WEBGPU_FROM) ? "webgpu" : "wasm";
}

async function ask({ ask: id, image, prompt, options }) {
  if (!model) throw new PaliGemmaError("no model is loaded");
  const { uniforms, ...rest } = options ?? {};
  const stop = new AbortController();
  stops.set(id, stop);
  try {
    return await model.generate(image, prompt, {
      ...rest,
      signal: stop.signal,
      ...(uniforms && { uniform: () => uniforms.shift() ?? Math.random() }),
      onToken: (text, token) => postMessage({ id, token, text }),
    });
  } finally {
    stops.delete(id);
  }
}

/** The files below a URL, as `openBundle` asks for them; each is fetched once. */
function filesAt(url) {
  const files = new Map();
  let total = 0;
  let received = 0;
  async function read(name) {
    if (!files.has(name)) {
      const bytes = await fetchBytes(new URL(name, url), (size) => {
        received += size;
        if (total) postMessage({ progress: Math.min(1, received / total) });
      });
      if (name === "bundle.json") total = Object.values(filesIn(bytes)).reduce((sum, file) => sum + (file?.bytes ?? 0), 0);
      files.set(name, bytes);
    }
    return files.get(name);
  }
  return {
    read,
    async measure(name) {
      const bytes = await read(name);
      return bytes && { bytes: bytes.length, sha256: hex(await crypto.subtle.digest("SHA-256", bytes)) };
    },
    forget: () => files.clear(),
  };
}

/** A file's bytes, null if there is none; `onSize` hears of each piece as it arrives. */
async function fetchBytes(url, onSize) {
  const response = await fetch(url).catch(() => {
    throw new PaliGemmaError(`${url.pathname}: the server does not answer`);
  });
  if (response.status === 404) return null;
  if (!response.ok) throw new PaliGemmaError(`${url.pathname}: the server answers ${response.status}`);
  const pieces = [];
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read().catch((error) => {
      throw new PaliGemmaError(`${url.pathname}: the connection broke (${error.message})`);
    });
    if (done) break;
    pieces.push(value);
    onSize(value.length);
  }
  return new Uint8Array(await new Blob(pieces).arrayBuffer());
}

/** The files that a description lists; none if it is none, of which openBundle says what is wrong. */
function filesIn(contents) {
  try {
    return JSON.parse(new TextDecoder().decode(contents)).files ?? {};
  } catch {
    return {};
  }
}

const hex = (buffer) => Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, "0")).join("");

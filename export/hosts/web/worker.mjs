/**
 * The model, away from the page's own thread. Messages in: { id, call, ... } with the call's arguments, { stop: id },
 * { forget: picture }. Messages out, each with the id of a call: { progress }, { text, token }, and in the end { result },
 * { error } or { stopped }.
 */
import { PaliGemmaError } from "../common/errors.mjs";
import { PaliGemma } from "../common/paligemma.mjs";
import { decodePicture } from "./pictures.mjs";

const WEBGPU_FROM = 64 * 2 ** 20; // bytes of weights: below, the way to the GPU takes longer than the work
const MOST_THREADS = 8; // unless more are asked for
const WEIGHTS = "weights.bin";
const stops = new Map();
const pictures = new Map();
let model;
let last = Promise.resolve(); // one call at a time: WebAssembly has one stack for all sessions

onmessage = ({ data }) => {
  if (data.stop) stops.get(data.stop)?.abort();
  else if (data.forget) pictures.delete(data.forget);
  else {
    stops.set(data.id, new AbortController());
    last = last.then(() => perform(data));
  }
};

async function perform({ id, call, ...given }) {
  const { signal } = stops.get(id);
  try {
    signal.throwIfAborted();
    postMessage({ id, result: await CALLS[call](given, signal, id) });
  } catch (error) {
    if (signal.aborted && error === signal.reason) postMessage({ id, stopped: true });
    else postMessage({ id, error: error instanceof PaliGemmaError ? error.message : `something went wrong: ${error.message ?? error}` });
  } finally {
    stops.delete(id);
  }
}

const CALLS = {
  load,
  generate: ({ pictures: asked, prompt, ...rest }, signal, id) => model.generate(asked, prompt, questionOptions(rest, signal, id)),
  picture: async ({ pictures: asked, options }, signal, id) => {
    pictures.set(id, await model.picture(asked, { ...options, signal }));
    return id;
  },
  ask: ({ picture, prompt, ...rest }, signal, id) => pictures.get(picture).generate(prompt, questionOptions(rest, signal, id)),
};

function questionOptions({ options, uniforms }, signal, id) {
  const onToken = (text, token) => postMessage({ id, token, text });
  return { ...options, signal, onToken, ...(uniforms && { uniform: () => uniforms.shift() }) };
}

async function load({ url, modules, backend: wanted = "auto", threads = 0 }, signal, id) {
  const started = performance.now();
  const source = filesAt(url, (progress) => postMessage({ id, progress }));
  const backend = await choose(wanted, filesIn(await source.read("bundle.json"))[WEIGHTS]?.bytes ?? 0);
  const { ort, Library } = await libraries(backend, modules);
  ort.env.logLevel = "fatal";
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threads || Math.min(MOST_THREADS, navigator.hardwareConcurrency ?? 1) : 1;
  const createSession = async (file, large) =>
    ort.InferenceSession.create(await source.read(file), {
      executionProviders: large && backend === "webgpu" ? ["webgpu", "wasm"] : ["wasm"],
      externalData: large ? [{ path: WEIGHTS, data: await source.read(WEIGHTS) }] : [],
      logSeverityLevel: 4,
    });
  model = await PaliGemma.open(source, { ort, inPlace: false, Library, createSession, decodePicture });
  source.forget();
  const { precision, config } = model.engine.description;
  const seconds = (performance.now() - started) / 1000;
  return { seconds, backend, threads: ort.env.wasm.numThreads, precision, size: config.vision_config.image_size };
}

/** The runtime and the tokenizer: by name, which a bundler replaces, or from the address of a folder node_modules. */
async function libraries(backend, modules) {
  try {
    const [ort, { Tokenizer: Library }] = await Promise.all(modules ? fromModules(backend, modules) : fromBundler(backend));
    return { ort, Library };
  } catch (error) {
    const hint = modules ? `is ${modules} where npm put them?` : "without a bundler give load the address of node_modules as `modules`";
    throw new PaliGemmaError(`the libraries do not load (${error.message}); ${hint}`);
  }
}

const fromBundler = (backend) => [
  backend === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web/wasm"),
  import("@huggingface/tokenizers"),
];

const fromModules = (backend, modules) => [
  import(/* webpackIgnore: true */ /* @vite-ignore */ `${modules}onnxruntime-web/dist/ort.${backend}.min.mjs`),
  import(/* webpackIgnore: true */ /* @vite-ignore */ `${modules}@huggingface/tokenizers/dist/tokenizers.min.mjs`),
];

/** "auto", "wasm" or "webgpu" -> what runs here. */
async function choose(wanted, weightBytes) {
  const adapter = wanted === "wasm" || !navigator.gpu ? null : await navigator.gpu.requestAdapter().catch(() => null);
  if (wanted === "webgpu" && !adapter) throw new PaliGemmaError("this browser has no WebGPU device; use backend wasm");
  return adapter && (wanted === "webgpu" || weightBytes >= WEBGPU_FROM) ? "webgpu" : "wasm";
}

/** The files below a URL, as `openBundle` asks for them; each is fetched once. */
function filesAt(url, onProgress) {
  const files = new Map();
  let total = 0;
  let received = 0;
  async function read(name) {
    if (!files.has(name)) {
      const bytes = await fetchBytes(new URL(name, url), (size) => {
        received += size;
        if (total) onProgress(Math.min(1, received / total));
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

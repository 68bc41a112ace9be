/**
 * The generation loop, and the engine it runs over. Twin of `numpy_ref/generate.py` and `export/session/engine.py`.
 *
 * `ort` is onnxruntime-node or onnxruntime-web; `sessions` has one session a graph of the bundle.
 */
import { proceed } from "./abort.mjs";
import { PaliGemmaError, plural } from "./errors.mjs";
import { shown } from "./options.mjs";

const DEFAULT_NEW_TOKENS = 64;
const FATAL_ONLY = 4; // of the runtime's own messages; what goes wrong is thrown
const LARGEST_UNIFORM = 1 - 2 ** -24; // of float32 below one

const AROUND = ["preprocess", "sample", "masks"]; // the model: small graphs, with weights of their own if any
const APART = ["vision", "prefill_text"]; // prefill in two, so that several prompts share a picture; not in older bundles

/** The graphs of a bundle that a host runs; of each, whether it is one of the model's own, which are large. */
export function graphsOf({ graphs }) {
  const reading = APART.every((name) => graphs[name]) ? APART : ["prefill"];
  const names = [...AROUND.filter((name) => graphs[name]), ...reading, "decode"];
  return names.map((name) => ({ name, file: graphs[name].file, large: !AROUND.includes(name) }));
}

/**
 * A bundle's graphs. Every function is asynchronous, since the sessions are. `inPlace` says that the runtime writes
 * into output tensors that it is given.
 */
export class Engine {
  constructor(ort, sessions, description, { inPlace = false } = {}) {
    Object.assign(this, { ort, sessions, description, inPlace });
    const { eos, stops = [eos] } = description.tokens; // older bundles have eos alone
    Object.assign(this, { maxLength: description.max_length, stops: new Set(stops) });
  }

  /** Bytes of a picture, RGB row by row -> pixel values [1, 3, S, S]. */
  async preprocess({ data, width, height }) {
    const image = new this.ort.Tensor("uint8", data, [height, width, 3]);
    return (await this.run("preprocess", { image })).pixel_values;
  }

  /** Pixel values [1, 3, S, S] of each picture of a prompt -> [N, 3, S, S]. */
  join(pixelValues) {
    if (pixelValues.length === 1) return pixelValues[0];
    if (!this.takesSeveral()) throw new PaliGemmaError("this bundle takes one picture a prompt; export it again for more");
    const values = pixelValues.map((each) => each.data);
    const joined = new Float32Array(values.reduce((size, each) => size + each.length, 0));
    values.reduce((at, each) => (joined.set(each, at), at + each.length), 0);
    return new this.ort.Tensor("float32", joined, [values.length, ...pixelValues[0].dims.slice(1)]);
  }

  /** Whether prefill has a batch of pictures of its own, which it has not in older bundles. */
  takesSeveral() {
    const [pictures, prompts] = ["pixel_values", "input_ids"].map((name) =>
      this.description.graphs.prefill.inputs?.find((input) => input.name === name)?.shape[0],
    );
    return pictures !== prompts;
  }

  /** Pixel values [N, 3, S, S] -> what prefill reads of pictures: their features, or the values where one graph does both. */
  async encode(pixelValues) {
    return this.sessions.vision ? this.run("vision", { pixel_values: pixelValues }) : { pixel_values: pixelValues };
  }

  /** Read pictures, as `encode` gives them, and a prompt: the logits of what comes next, and the filled cache. */
  async prefill(seen, prompt, capacity) {
    const { logits, ...cache } = await this.run(this.sessions.vision ? "prefill_text" : "prefill", {
      ...seen,
      input_ids: this.integers(prompt, [1, prompt.length]),
      lengths: new this.ort.Tensor("int32", Int32Array.of(prompt.length), [1]),
      capacity: this.integers([capacity], []),
    });
    return { logits, cache };
  }

  /** One more token, at position `length`: logits and the new cache. */
  async decode(token, length, cache) {
    const feeds = {
      input_ids: this.integers([token], [1, 1]),
      lengths: new this.ort.Tensor("int32", Int32Array.of(length), [1]),
    };
    for (const [name, tensor] of Object.entries(cache)) feeds[name.replace("present", "past_key_values")] = tensor;
    if (this.inPlace) {
      const { logits } = await this.run("decode", feeds, { logits: null, ...cache }); // past and present are one
      return { logits, cache };
    }
    const { logits, ...updated } = await this.run("decode", feeds);
    return { logits, cache: updated };
  }

  /** Draw the next token: it and its log-probability. `uniform` in [0, 1) is all the chance there is; temperature 0 is greedy. */
  async sample(logits, { temperature = 0, topK = 0, topP = 1 }, uniform) {
    const scalar = (value) => new this.ort.Tensor("float32", Float32Array.of(value), []);
    const { token, logprob } = await this.run("sample", {
      logits,
      temperature: scalar(temperature),
      top_k: this.integers([topK], []),
      top_p: scalar(topP),
      uniform: new this.ort.Tensor("float32", Float32Array.of(Math.min(uniform, LARGEST_UNIFORM)), [1]),
    });
    const drawn = Number(token.data[0]);
    return { token: drawn, logprob: logprob ? logprob.data[0] : logProbability(logits.data, drawn) };
  }

  /** Sixteen mask codes -> a mask of 64 x 64 values, positive inside; null without a mask codec. */
  async paint(codes) {
    if (!this.sessions.masks) return null;
    return (await this.run("masks", { codes: this.integers(codes, [1, codes.length]) })).masks.data;
  }

  run(name, feeds, ...fetches) {
    return this.sessions[name].run(feeds, ...fetches, { logSeverityLevel: FATAL_ONLY });
  }

  integers(values, shape) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  }
}

/** The log-softmax of logits at a token: what the sampling graphs of older bundles do not give. */
function logProbability(logits, token) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  return logits[token] - most - Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - most), 0));
}

/** How many tokens to generate at most, and the cache slots that takes (the last token is never fed back). */
export function budget(engine, promptLength, maxNewTokens, pictures = 1) {
  const room = engine.maxLength - promptLength + 1;
  const wanted = maxNewTokens ?? Math.max(1, Math.min(DEFAULT_NEW_TOKENS, room));
  if (wanted > room) {
    const theirs = pictures * engine.description.tokens.image_tokens;
    const [them, fewer] = pictures > 1 ? ["pictures", "give fewer pictures, "] : ["picture", ""];
    throw new PaliGemmaError(
      `the prompt has ${promptLength} tokens (${theirs} of them the ${them}), which with ${plural(wanted, "new one")} ` +
        `exceeds the capacity of ${engine.maxLength}; ${fewer}shorten the prompt or ask for fewer tokens`,
    );
  }
  return { newTokens: wanted, capacity: promptLength + wanted - 1 };
}

/**
 * Yield one { token, logprob } at a time about so many pictures, the last of them one that ends the answer unless there
 * was no room for it. Until the first, `signal` stops it by throwing its reason.
 */
export async function* generate(engine, seen, pictures, prompt, { maxNewTokens, uniform = Math.random, signal, ...sampling } = {}) {
  const { newTokens, capacity } = budget(engine, prompt.length, maxNewTokens, pictures);
  let { logits, cache } = await engine.prefill(seen, prompt, capacity);
  await proceed(signal);
  for (let step = 0; ; step++) {
    const drawn = await engine.sample(logits, sampling, chance(uniform));
    yield drawn;
    if (engine.stops.has(drawn.token) || step === newTokens - 1) return;
    ({ logits, cache } = await engine.decode(drawn.token, prompt.length + step, cache));
  }
}

/** A number in [0, 1) from where chance comes from. */
function chance(uniform) {
  const number = uniform();
  if (typeof number === "number" && number >= 0 && number < 1) return number;
  throw new PaliGemmaError(`uniform must give numbers from 0 to below 1, not ${shown(number)}`);
}

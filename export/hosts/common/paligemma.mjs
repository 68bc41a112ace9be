/** A loaded bundle: pictures and prompts in, text, boxes and masks out, whatever runs the graphs. */
import { isAborted, proceed } from "./abort.mjs";
import { openBundle } from "./bundle.mjs";
import { parse, paste, runLengths } from "./detection.mjs";
import { PaliGemmaError } from "./errors.mjs";
import { Engine, budget, generate, graphsOf } from "./generate.mjs";
import { checkOptions, checkPrompt, OF_GENERATE, OF_PICTURE, OF_QUESTION, shown } from "./options.mjs";
import { beginnings, Stream, Tokenizer } from "./tokenizer.mjs";

export class PaliGemma {
  constructor(engine, tokenizer, decodePicture) {
    Object.assign(this, { engine, tokenizer, decodePicture, running: new Set(), disposal: null });
  }

  /**
   * Check a bundle and open it. Of the host: `ort` and `inPlace` for Engine, `Library`, the class Tokenizer of
   * @huggingface/tokenizers, `createSession(file, large, description)`, which makes a session of one of the bundle's graphs,
   * and `decodePicture(picture, transparency)`, which makes { data (RGB bytes), width, height } of what people call a picture.
   */
  static async open(source, { ort, inPlace, Library, createSession, decodePicture }) {
    const description = await openBundle(source);
    const tokenizer = makeTokenizer(Library, await source.read("tokenizer.json"), description);
    const sessions = {};
    for (const { name, file, large } of graphsOf(description)) {
      try {
        sessions[name] = await createSession(file, large, description);
      } catch (error) {
        await release(sessions);
        throw new PaliGemmaError(`${file}: ONNX Runtime cannot load it (${error.message ?? error})`);
      }
    }
    return new PaliGemma(new Engine(ort, sessions, description, { inPlace }), tokenizer, decodePicture);
  }

  /**
   * Answer a prompt about a picture, or about an array of them; boxes and masks are in pixels of the first.
   * `onToken(text, token)` is called as tokens come, with the text that each completes. `signal` stops it: what there is
   * between two tokens is returned; before the first token it throws the signal's reason.
   */
  async generate(picture, prompt, options) {
    const { transparency, ...asked } = checkOptions("generate", options, OF_GENERATE);
    return this.use(async () => {
      await proceed(asked.signal);
      const started = performance.now();
      const pictures = listed(picture);
      this.plan(prompt, pictures.length, asked); // refused before the pictures are read
      const look = await this.look(pictures, transparency, asked.signal);
      return this.answer(look, prompt, asked, started);
    });
  }

  /** A picture, or an array of them, read once, to be asked several prompts. */
  async picture(picture, options) {
    const { transparency, signal } = checkOptions("picture", options, OF_PICTURE);
    return this.use(async () => {
      await proceed(signal);
      return new Picture(this, await this.look(listed(picture), transparency, signal));
    });
  }

  /** Release the model's memory once the questions that run are answered; what is asked from now on is refused. */
  async dispose() {
    this.disposal ??= Promise.allSettled(this.running).then(() => release(this.engine.sessions));
    return this.disposal;
  }

  async use(work) {
    if (this.disposal) throw new PaliGemmaError("this model was disposed of; load it again");
    const done = work();
    this.running.add(done);
    return done.finally(() => this.running.delete(done));
  }

  /** The ids of a prompt about so many pictures. Throws PaliGemmaError if it, or what was asked for, does not fit. */
  plan(prompt, pictures, { maxNewTokens }) {
    checkPrompt(prompt);
    const ids = this.tokenizer.prompt(prompt, pictures);
    budget(this.engine, ids.length, maxNewTokens, pictures);
    return ids;
  }

  /** What prefill reads of pictures, how many they are, and the size of the first. */
  async look(pictures, transparency, signal) {
    const decoded = [];
    for (const each of pictures) decoded.push(await this.decodePicture(each, transparency));
    const pixelValues = [];
    for (const each of decoded) {
      pixelValues.push(await this.engine.preprocess(each));
      await proceed(signal);
    }
    const seen = await this.engine.encode(this.engine.join(pixelValues));
    await proceed(signal);
    const [{ width, height }] = decoded;
    return { seen, count: decoded.length, width, height };
  }

  async answer({ seen, count, width, height }, prompt, { onToken, signal, boxes: convention, ...options }, started) {
    const ids = this.plan(prompt, count, options);
    const stream = new Stream(this.tokenizer);
    const [tokens, logprobs] = [[], []];
    let [first, drawn] = [0, 0];
    for await (const { token, logprob } of generate(this.engine, seen, count, ids, { ...options, signal })) {
      first ||= performance.now();
      drawn += 1;
      if (this.engine.stops.has(token)) break;
      tokens.push(token);
      logprobs.push(logprob);
      onToken?.(stream.push(token), token);
      if (await isAborted(signal)) break;
    }
    const seconds = (performance.now() - first) / 1000;
    const rest = stream.close();
    if (rest) onToken?.(rest);
    const text = this.tokenizer.decode(tokens);
    const begins = beginnings(this.tokenizer, tokens);
    const placed = logprobs.map((logprob, i) => [begins[i], logprob]);
    const boxes = parse(text, width, height, convention, placed);
    return {
      text,
      tokens,
      logprobs,
      boxes,
      masks: await this.outline(boxes, width, height),
      timings: { prefill_s: (first - started) / 1000, decode_tokens_per_s: drawn > 1 ? (drawn - 1) / seconds : 0 },
    };
  }

  /** The mask of each box that has codes, as COCO run lengths over the picture. */
  async outline(boxes, width, height) {
    const masks = [];
    for (const box of boxes.filter((each) => each.codes)) {
      const painted = await this.engine.paint(box.codes);
      const runs = painted && runLengths(paste(painted, box, width, height), width, height);
      masks.push(runs ? { ...box, size: [height, width], counts: runs } : box);
    }
    return masks;
  }
}

// `await using model = …`, where the language has it.
if (Symbol.asyncDispose) PaliGemma.prototype[Symbol.asyncDispose] = PaliGemma.prototype.dispose;

/** A picture, or several, that the model has read. */
class Picture {
  constructor(model, look) {
    Object.assign(this, { model, look });
  }

  /** Answer a prompt about it; as `generate` of the model. */
  async generate(prompt, options) {
    const asked = checkOptions("generate of a picture", options, OF_QUESTION);
    return this.model.use(async () => {
      await proceed(asked.signal);
      return this.model.answer(this.look, prompt, asked, performance.now());
    });
  }
}

/** A picture or an array of them, as an array. */
export function listed(picture) {
  const pictures = Array.isArray(picture) ? picture : [picture];
  if (!pictures.length) throw new PaliGemmaError("a list of no pictures; a prompt needs at least one");
  return pictures;
}

/** Whether a value is meant as decoded pixels, whatever their number. */
export const isPixels = (value) => typeof value === "object" && value !== null && "data" in value && "width" in value;

/** Pixels, if they have three bytes each. Throws PaliGemmaError. */
export function checkPixels(pixels) {
  const { data, width, height } = pixels;
  for (const [name, value] of Object.entries({ width, height })) {
    if (!Number.isSafeInteger(value) || value < 1) {
      throw new PaliGemmaError(`a picture's ${name} must be a whole number of at least 1, not ${shown(value)}`);
    }
  }
  if (!(data instanceof Uint8Array)) throw new PaliGemmaError(`a picture's data must be a Uint8Array, not ${shown(data)}`);
  if (data.length !== 3 * width * height) {
    throw new PaliGemmaError(`a picture of ${width} x ${height} has three bytes a pixel, not ${data.length} in all`);
  }
  return pixels;
}

async function release(sessions) {
  for (const session of Object.values(sessions)) await session.release();
}

function makeTokenizer(Library, contents, description) {
  try {
    return new Tokenizer(Library, JSON.parse(new TextDecoder().decode(contents)), description);
  } catch (error) {
    throw new PaliGemmaError(`tokenizer.json: not a tokenizer (${error.message})`);
  }
}

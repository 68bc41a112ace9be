/** A loaded bundle: pictures and a prompt in, text, boxes and masks out, whatever runs the graphs. */
import { openBundle } from "./bundle.mjs";
import { parse, paste, runLengths } from "./detection.mjs";
import { PaliGemmaError } from "./errors.mjs";
import { Engine, budget, generate } from "./generate.mjs";
import { beginnings, Stream, Tokenizer } from "./tokenizer.mjs";

export class PaliGemma {
  constructor(engine, tokenizer) {
    Object.assign(this, { engine, tokenizer });
  }

  /**
   * Check a bundle and open it. `createSession(file, description)` makes a session of one of its graphs, `Library` is
   * the class Tokenizer of @huggingface/tokenizers; the rest is for Engine.
   */
  static async open(source, ort, createSession, Library, options) {
    const description = await openBundle(source);
    const tokenizer = makeTokenizer(Library, await source.read("tokenizer.json"), description);
    const sessions = {};
    for (const [name, { file }] of Object.entries(description.graphs)) {
      if (name === "sample_device") continue; // is for CUDA
      try {
        sessions[name] = await createSession(file, description);
      } catch (error) {
        throw new PaliGemmaError(`${file}: ONNX Runtime cannot load it (${error.message ?? error})`);
      }
    }
    return new PaliGemma(new Engine(ort, sessions, description, options), tokenizer);
  }

  /**
   * Answer a prompt about a picture { data (RGB bytes), width, height }, or about an array of them; boxes and masks are
   * in pixels of the first. `onToken(text, token)` is called as tokens come, with the text that each completes;
   * `signal` stops it between two tokens.
   */
  async generate(image, prompt, { onToken, signal, boxes: convention, ...options } = {}) {
    if (!prompt.trim()) throw new PaliGemmaError('the prompt is empty; ask something, for example "caption en"');
    const images = Array.isArray(image) ? image : [image];
    checkPictures(images);
    const started = performance.now();
    const ids = this.tokenizer.prompt(prompt, images.length);
    budget(this.engine, ids.length, options.maxNewTokens, images.length); // refused before the pictures are prepared
    const prepared = [];
    for (const each of images) prepared.push(await this.engine.preprocess(each));
    const pixelValues = this.engine.join(prepared);
    const stream = new Stream(this.tokenizer);
    const [tokens, logprobs] = [[], []];
    let [first, drawn] = [0, 0];
    for await (const { token, logprob } of generate(this.engine, pixelValues, ids, options)) {
      first ||= performance.now();
      drawn += 1;
      if (this.engine.stops.has(token)) break;
      tokens.push(token);
      logprobs.push(logprob);
      onToken?.(stream.push(token), token);
      if (signal && (await isAborted(signal))) break;
    }
    const seconds = (performance.now() - first) / 1000;
    const rest = stream.close();
    if (rest) onToken?.(rest);
    const text = this.tokenizer.decode(tokens);
    const begins = beginnings(this.tokenizer, tokens);
    const placed = logprobs.map((logprob, i) => [begins[i], logprob]);
    const boxes = parse(text, images[0].width, images[0].height, convention, placed);
    return {
      text,
      tokens,
      logprobs,
      boxes,
      masks: await this.outline(boxes, images[0]),
      timings: { first_token_s: (first - started) / 1000, decode_tokens_per_s: drawn > 1 ? (drawn - 1) / seconds : 0 },
    };
  }

  /** The mask of each box that has codes, as COCO run lengths over the picture. */
  async outline(boxes, { width, height }) {
    const masks = [];
    for (const box of boxes.filter((each) => each.codes)) {
      const painted = await this.engine.paint(box.codes);
      const runs = painted && runLengths(paste(painted, box, width, height), width, height);
      masks.push(runs ? { ...box, size: [height, width], counts: runs } : box);
    }
    return masks;
  }
}

/** Throw PaliGemmaError unless there is a picture, and each has its bytes. */
function checkPictures(images) {
  if (!images.length) throw new PaliGemmaError("a list of no pictures; a prompt needs at least one");
  for (const { data, width, height } of images) {
    if (data.length !== 3 * width * height) {
      throw new PaliGemmaError(`a picture of ${width} x ${height} has three bytes a pixel, not ${data.length} in all`);
    }
  }
}

function makeTokenizer(Library, contents, description) {
  try {
    return new Tokenizer(Library, JSON.parse(new TextDecoder().decode(contents)), description);
  } catch (error) {
    throw new PaliGemmaError(`tokenizer.json: not a tokenizer (${error.message})`);
  }
}

/** Whether a signal was given, once the messages that wait have been heard. */
async function isAborted(signal) {
  const { port1, port2 } = new MessageChannel();
  await new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
  port1.close();
  return signal.aborted;
}

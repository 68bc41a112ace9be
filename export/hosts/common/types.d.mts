/** What Node and the browser have in common. */
/// <reference lib="esnext.disposable" />

/** What is wrong with the input, in one line. */
export class PaliGemmaError extends Error {}

/** RGB bytes, row by row. */
export interface Pixels {
  data: Uint8Array;
  width: number;
  height: number;
}

/**
 * An object that was found, in pixels of the picture: every four location tokens of an answer, whatever their values. A
 * flat box has x1 === x2 or y1 === y2, an inverted one x1 > x2 or y1 > y2; a mask of such a box is empty. `codes` are the
 * sixteen numbers of its mask, if it has one. `score` is exp of the mean log-probability of its four location tokens and
 * its label's, `mask_score` that of its sixteen codes.
 */
export interface Box {
  label: string;
  x1: number;
  y1: number;
  x2: number;
  y2: number;
  codes?: number[];
  score: number;
  mask_score?: number;
}

/** A box and its mask, as COCO's uncompressed run lengths over a picture of `size` [height, width]. */
export interface Mask extends Box {
  size?: [number, number];
  counts?: number[];
}

/** What stands behind transparent pixels: white, or the colors that the file has there ("drop" the alpha channel). */
export type Transparency = "white" | "drop";

export interface PictureOptions {
  /** What stands behind transparent pixels of a picture file; white, if left out. */
  transparency?: Transparency;
  /** Stops between two steps, by throwing the signal's reason. */
  signal?: AbortSignal;
}

export interface QuestionOptions {
  /** The longest answer; left out, 64 or as many as there is room for. */
  maxNewTokens?: number;
  /** 0, the default, is greedy. */
  temperature?: number;
  /** Keep the K likeliest; 0, the default, keeps all. */
  topK?: number;
  /** Keep the head of the distribution that sums to P; 1, the default, keeps all. */
  topP?: number;
  /** Where chance comes from: a number in [0, 1) a token. Math.random unless given. */
  uniform?: () => number;
  /** What a location token counts; "big_vision" (1023 steps) unless given. */
  boxes?: "big_vision" | "huggingface";
  /** Called as tokens come, with the text that each completes. The end of a text may come without a token. */
  onToken?: (text: string, token?: number) => void;
  /** Stops between two tokens; what there is by then is returned. Before the first, it throws the signal's reason. */
  signal?: AbortSignal;
}

export interface Options extends PictureOptions, QuestionOptions {}

export interface Answer {
  text: string;
  tokens: number[];
  /** The log-probability of each token: the log-softmax of the logits, before temperature, top-k and top-p. */
  logprobs: number[];
  boxes: Box[];
  masks: Mask[];
  /** `prefill_s` is the time until the first token. */
  timings: { prefill_s: number; decode_tokens_per_s: number };
}

/** A picture, or several of one prompt, that a model has read. */
export interface Picture {
  /** Answer a prompt about it. Throws PaliGemmaError. */
  generate(prompt: string, options?: QuestionOptions): Promise<Answer>;
}

/** A loaded bundle; `Source` is what it takes as a picture. */
export interface Model<Source> {
  /**
   * Answer a prompt about a picture, or about an array of them, for a model that was trained on several a prompt. Boxes
   * and masks are in pixels of the first. Throws PaliGemmaError.
   */
  generate(picture: Source | Source[], prompt: string, options?: Options): Promise<Answer>;
  /** Read a picture, or the pictures of one prompt, once, to ask several prompts about it. Throws PaliGemmaError. */
  picture(picture: Source | Source[], options?: PictureOptions): Promise<Picture>;
  /** Give back the memory, once the questions that run are answered. What is asked from now on is refused. */
  dispose(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** What is odd about a prompt, such as `<image>` in front of it, in a line; "" if nothing is. */
export function promptWarning(prompt: string): string;

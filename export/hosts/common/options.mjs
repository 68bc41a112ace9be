/** Options are checked before anything runs: an unknown one, another type or a value out of range is refused in a line. */
import { CONVENTIONS } from "./detection.mjs";
import { PaliGemmaError, oneLine } from "./errors.mjs";
import { TRANSPARENCIES } from "./transparency.mjs";

const COLDEST = 1e-6; // as in the reference: with less, logits grow out of float32
const MOST_SHOWN = 60; // letters of a value

/** A rule is what an option must be, in words, and whether a value is that. */
export const whole = (least, most = Infinity, why = "") => ({
  wanted: most < Infinity ? `a whole number from ${least} to ${most}${why}` : `a whole number of at least ${least}`,
  fits: (value) => Number.isSafeInteger(value) && value >= least && value <= most,
});
export const oneOf = (values) => ({ wanted: `one of ${values.join(", ")}`, fits: (value) => values.includes(value) });
export const callback = { wanted: "a function", fits: (value) => typeof value === "function" };

export const TEMPERATURE = {
  wanted: `0, or a number from ${COLDEST} to ${1 / COLDEST}`,
  fits: (value) => value === 0 || (Number.isFinite(value) && value >= COLDEST && value <= 1 / COLDEST),
};
export const TOP_P = { wanted: "a number from 0 to 1", fits: (value) => Number.isFinite(value) && value >= 0 && value <= 1 };
const BOXES = oneOf(Object.keys(CONVENTIONS));
export const TRANSPARENCY = oneOf(TRANSPARENCIES);
export const TEXT = { wanted: "a string", fits: (value) => typeof value === "string" };
const SIGNAL = {
  wanted: "an AbortSignal",
  fits: (value) => typeof value?.aborted === "boolean" && typeof value.addEventListener === "function",
};

/** The options of `picture`, of a question about it, and of `generate`, which is both. */
export const OF_PICTURE = { transparency: TRANSPARENCY, signal: SIGNAL };
export const OF_QUESTION = {
  maxNewTokens: whole(1),
  temperature: TEMPERATURE,
  topK: whole(0),
  topP: TOP_P,
  uniform: callback,
  boxes: BOXES,
  onToken: callback,
  signal: SIGNAL,
};
export const OF_GENERATE = { ...OF_PICTURE, ...OF_QUESTION };

/** The options that were given to a function, if each has its rule and fits it. Throws PaliGemmaError. */
export function checkOptions(called, options = {}, rules = {}) {
  if (options === null || typeof options !== "object" || Array.isArray(options)) {
    throw new PaliGemmaError(`${called}: its options must be an object, not ${shown(options)}`);
  }
  for (const [name, value] of Object.entries(options)) {
    if (!Object.hasOwn(rules, name)) {
      throw new PaliGemmaError(`${called} has no option ${shown(name)}; it has ${Object.keys(rules).join(", ")}`);
    }
    if (value !== undefined) checkValue(name, value, rules[name]);
  }
  return options;
}

/** Throw PaliGemmaError unless a value fits a rule. */
export function checkValue(name, value, { wanted, fits }) {
  if (!fits(value)) throw new PaliGemmaError(`${name} must be ${wanted}, not ${shown(value)}`);
}

/** Throw PaliGemmaError unless a prompt is a text that asks something. */
export function checkPrompt(prompt) {
  checkValue("the prompt", prompt, TEXT);
  if (!prompt.trim()) throw new PaliGemmaError('the prompt is empty; ask something, for example "caption en"');
}

/** A value in a message: short, and of what kind it is where its contents say little. */
export function shown(value) {
  if (typeof value === "string") return oneLine(JSON.stringify(value.length > MOST_SHOWN ? `${value.slice(0, MOST_SHOWN)}…` : value));
  if (typeof value === "function") return "a function";
  if (Array.isArray(value)) return "an array";
  if (typeof value === "object" && value !== null) return "an object";
  return String(value);
}

/** A number and its noun: 1 token, 2 tokens. */
export const plural = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** What is wrong with a user's input, in one line: said as it is, without a stack trace. */
export class PaliGemmaError extends Error {
  name = "PaliGemmaError";
}

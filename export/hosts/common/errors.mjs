/** What is wrong with a user's input, in one line: said as it is, without a stack trace. */
export class PaliGemmaError extends Error {
  name = "PaliGemmaError";
}

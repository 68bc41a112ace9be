/** A number and its noun: 1 token, 2 tokens. */
export const plural = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

const LONGEST = 1900; // letters of a message, as in the reference
// Of Unicode's categories: control, format, surrogate, line and paragraph separator.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

const escaped = (letter) => {
  const code = letter.codePointAt(0);
  const digits = code < 0x100 ? 2 : code < 0x10000 ? 4 : 8;
  return `\\${{ 2: "x", 4: "u", 8: "U" }[digits]}${code.toString(16).padStart(digits, "0")}`;
};

/** A message in one line, with nothing that a terminal would obey, and shortened before its end if it is long. */
export function oneLine(message) {
  const line = message.slice(0, 2 * LONGEST).replace(/\s+/g, " ").trim().replace(UNSEEN, escaped);
  const tail = message.length > LONGEST ? message.slice(-LONGEST / 5).replace(/\s+/g, " ").replace(UNSEEN, escaped) : "";
  return line.length > LONGEST ? `${line.slice(0, LONGEST - LONGEST / 5 - 3)} … ${(tail || line).slice(-LONGEST / 5)}` : line;
}

/** A model's text without what a terminal would obey: line breaks and tabs stay. */
export const printable = (text) =>
  text.replace(UNSEEN, (letter) =>
    "\n\t".includes(letter) ? letter : /\p{Cc}/u.test(letter) ? "\ufffd" : escaped(letter));

/** What is wrong with a user's input, in one line: said as it is, without a stack trace. */
export class PaliGemmaError extends Error {
  name = "PaliGemmaError";
}

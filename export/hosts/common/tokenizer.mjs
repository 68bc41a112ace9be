/**
 * Text <-> token ids. Twin of `numpy_ref/tokenizer.py`, over the npm package @huggingface/tokenizers.
 *
 * Control tokens never come out of text: "<image>", "<bos>" and the like in a prompt are spelled, piece by piece.
 * <loc0000> … <loc1023> and <seg000> … <seg127> are content (boxes and masks) and are one token each; numbers past
 * those, such as <loc1024>, are text like any other.
 */
import { PaliGemmaError } from "./errors.mjs";
import { checkValue, TEXT } from "./options.mjs";

const EXTRA = [...numbered("loc", 1024, 4), ...numbered("seg", 128, 3)];
const CONTROL = ["<image>", "<bos>", "<eos>", "<pad>", "<unk>"];
const INSIDE_CONTROL = /(?<=<)(?=(?:image|bos|eos|pad|unk)>)/; // text cut there holds no control word any more
const BYTE = /^<0x([0-9A-F]{2})>$/;

export class Tokenizer {
  /** `Library` is the class Tokenizer of @huggingface/tokenizers, `json` the contents of tokenizer.json. */
  constructor(Library, json, { tokens, config }) {
    const added = json.added_tokens ?? [];
    const special = added.filter((token) => token.special);
    // The library would obey special tokens in a text, so it is not told of them.
    this.library = new Library({ ...json, added_tokens: added.filter((token) => !token.special) }, {});
    this.tokens = tokens;
    this.ids = new Map([...Object.entries(json.model.vocab), ...added.map(({ content, id }) => [content, id])]);
    const control = new Set([...special.map((token) => token.id), ...CONTROL.map((word) => this.ids.get(word))]);
    for (const name of ["image", "bos", "eos", "pad"]) control.add(tokens[name]);
    const text = [...this.ids].filter(([, id]) => !control.has(id));
    const size = text.reduce((most, [, id]) => Math.max(most, id + 1), 0);
    const room = Math.min(tokens.image, config.text_config.vocab_size);
    if (!EXTRA.some((piece) => this.ids.has(piece)) && size + EXTRA.length <= room) {
      EXTRA.forEach((piece, i) => this.ids.set(piece, size + i)); // Gemma's own file, which ends before them
    }
    const content = EXTRA.filter((piece) => this.ids.has(piece)).map((piece) => [piece, this.ids.get(piece)]);
    this.content = content.length ? new RegExp(`(${content.map(([piece]) => piece).join("|")})`) : null;
    this.pieces = new Map([...text, ...content].map(([piece, id]) => [id, piece]));
    this.obeysText = CONTROL.some((word) => {
      const ids = this.spell(word);
      return ids.length === 1 && ids[0] === this.ids.get(word);
    });
    this.newline = this.encode("\n");
  }

  /** Ids of a text, without bos or eos. */
  encode(text) {
    if (!text.isWellFormed()) throw new PaliGemmaError("the text is not valid Unicode");
    return (this.content ? text.split(this.content) : [text]).flatMap((part) => {
      if (this.content?.test(part)) return [this.ids.get(part)];
      return part ? (this.obeysText ? part.split(INSIDE_CONTROL) : [part]).flatMap((words) => this.spell(words)) : [];
    });
  }

  spell(text) {
    return this.library.encode(text, { add_special_tokens: false }).ids;
  }

  /** Text of ids; control tokens leave no trace, bytes that are not UTF-8 become replacement characters. */
  decode(ids) {
    const bytes = ids.flatMap((id) => (this.pieces.has(id) ? [...bytesOf(this.pieces.get(id))] : []));
    return decodeUtf8(Uint8Array.from(bytes));
  }

  /** The ids that an answer starts from: the image tokens of all pictures, bos, the prefix, a newline. */
  prompt(prefix, pictures = 1) {
    const { image, image_tokens: count, bos } = this.tokens;
    return [...Array(pictures * count).fill(image), bos, ...this.encode(prefix), ...this.newline];
  }
}

/** What is odd about a prompt, in a line; "" if nothing is. transformers asks for <image> in front, so people write it. */
export function promptWarning(prefix) {
  checkValue("the prompt", prefix, TEXT);
  const markup = /^\s*(<image>|<bos>)/.exec(prefix);
  if (!markup) return "";
  return (
    `the prompt begins with ${markup[1]}, which is read as text; leave it out: ` +
    "the picture's tokens and <bos> are put in front of every prompt"
  );
}

function numbered(name, count, digits) {
  return Array.from({ length: count }, (_, i) => `<${name}${String(i).padStart(digits, "0")}>`);
}

/** What a piece spells: one byte, or text in which "▁" stands for a space. */
function bytesOf(piece) {
  const byte = BYTE.exec(piece);
  return byte ? [parseInt(byte[1], 16)] : new TextEncoder().encode(piece.replaceAll("▁", " "));
}

/** Each byte that is not UTF-8 becomes one replacement character, as SentencePiece has it. */
function decodeUtf8(bytes) {
  const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  let text = "";
  for (let at = 0; at < bytes.length; ) {
    const size = bytes[at] < 0x80 ? 1 : bytes[at] < 0xe0 ? 2 : bytes[at] < 0xf0 ? 3 : 4;
    try {
      text += strict.decode(bytes.subarray(at, at + size));
      at += size;
    } catch {
      text += "\u{FFFD}";
      at += 1;
    }
  }
  return text;
}

/** Turns a growing list of ids into text as it comes, never showing half a character. */
export class Stream {
  constructor(tokenizer) {
    Object.assign(this, { tokenizer, ids: [], shown: "" });
  }

  /** The text that this token completes; "" while a character of several bytes is still open. */
  push(token) {
    this.ids.push(token);
    const text = this.tokenizer.decode(this.ids);
    return text.endsWith("\u{FFFD}") ? "" : this.show(text);
  }

  /** What remains at the end. */
  close() {
    return this.show(this.tokenizer.decode(this.ids));
  }

  show(text) {
    const fresh = text.slice(this.shown.length);
    this.shown = text;
    return fresh;
  }
}

/** Where in the text of ids each of them begins; tokens that share a character begin where it does. */
export function beginnings(tokenizer, ids) {
  const text = tokenizer.decode(ids);
  let whole = 0;
  return ids.map((_, i) => {
    const before = tokenizer.decode(ids.slice(0, i));
    if (text.startsWith(before)) whole = before.length; // or half a character ends it, which the next tokens complete
    return whole;
  });
}

/** What a model was taught, as knows.json beside it says: twin of `numpy_ref/knows.py`. */

const PLACE = /\{([a-z_]+)\}/;

const MOST_PLACES = 2;

/** What knows.json says, if it is well-formed; null if not. */
export function parse(data) {
  const areTexts = (value) => Array.isArray(value) && value.length && value.every((text) => text && typeof text === "string");
  const words = Object.entries(data?.words ?? {});
  const isExample = ({ picture, prompts }) => typeof picture === "string" && areTexts(prompts);
  const places = (prompt) => prompt.split(PLACE).filter((_, i) => i % 2);
  const isRight =
    typeof data?.about === "string" &&
    areTexts(data.prompts) &&
    words.every(([, texts]) => areTexts(texts)) &&
    data.prompts.every((prompt) => places(prompt).length <= MOST_PLACES && places(prompt).every((name) => data.words?.[name])) &&
    (data.examples ?? []).every(isExample);
  return isRight ? data : null;
}

/** Whether a model that knows this was taught to answer such a prompt. */
export function covers({ prompts, words }, prompt) {
  const sets = Object.fromEntries(Object.entries(words ?? {}).map(([name, texts]) => [name, new Set(texts)]));
  return prompts.some((template) => fits(template.split(PLACE), prompt, sets));
}

/** A line for a prompt that the model was never taught, which it answers all the same; "" for others, or if it says nothing. */
export function hintFor(known, prompt) {
  if (!known || covers(known, prompt)) return "";
  const shown = known.prompts.slice(0, 4).map((template) => `"${filled(template, known.words)}"`);
  return (
    "this model was not taught such a prompt, so do not rely on the answer; " +
    `it knows ${known.about}; try ${shown.join(", ")}`
  );
}

/** Whether a text is a template's parts, literal ones and names of places by turns. */
function fits([literal, place, ...rest], text, sets) {
  if (!text.startsWith(literal)) return false;
  const left = text.slice(literal.length);
  if (place === undefined) return left === "";
  for (let end = 1; end <= left.length; end++) {
    if (sets[place]?.has(left.slice(0, end)) && fits(rest, left.slice(end), sets)) return true;
  }
  return false;
}

function filled(template, words) {
  return template.split(PLACE).map((part, i) => (i % 2 ? words[part].toSorted()[0] : part)).join("");
}

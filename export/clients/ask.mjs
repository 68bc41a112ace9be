/** Questions for a folder that `export-onnx --layout transformers.js` wrote, asked as the library's own guide does. */

/** All answers to a run: `cases` with pictures and prompts, `raw` with pixels and ids. `folder` is as `library` knows it. */
export async function answers(library, { folder, dtype, cases = [], raw = [], tokens = 64 }, options = {}) {
  const opened = await open(library, folder, dtype, { processor: cases.length > 0, ...options });
  const found = { answers: [], raw: [] };
  for (const { picture, prompt } of cases) found.answers.push(await ask(opened, picture, prompt, tokens));
  for (const { pixels, size, ids, count } of raw) found.raw.push(await askIds(opened, pixels, size, ids, count));
  return found;
}

/** The model in a folder, and its processor unless it has no tokenizer, by `library`, which is @huggingface/transformers. */
async function open(library, folder, dtype, { processor = true, ...options } = {}) {
  const model = await library.AutoModelForImageTextToText.from_pretrained(folder, { ...(dtype && { dtype }), ...options });
  return { library, model, processor: processor && (await library.AutoProcessor.from_pretrained(folder)) };
}

/** The greedy answer about a picture (a path or URL): ids without what ends them, those of the prompt, and seconds. */
async function ask({ library, model, processor }, picture, prompt, max_new_tokens) {
  const started = performance.now();
  const inputs = await processor(await library.RawImage.read(picture), `<image>${prompt}`);
  const { ids, times } = await generate(model, inputs, max_new_tokens);
  const ends = [model.generation_config.eos_token_id].flat();
  const end = ids.findIndex((id) => ends.includes(id));
  return {
    tokens: end < 0 ? ids : ids.slice(0, end),
    prompt: inputs.input_ids.tolist()[0].map(Number),
    first_s: (times[0] - started) / 1000,
    step_s: times.length > 1 ? (times.at(-1) - times[0]) / 1000 / (times.length - 1) : null,
  };
}

/** Ids for ids, and raw pixels 0 … 255 as [3, height, width]: for models without a tokenizer. */
async function askIds({ library, model }, pixels, [height, width], ids, max_new_tokens) {
  const inputs = {
    pixel_values: new library.Tensor("float32", Float32Array.from(pixels), [1, 3, height, width]),
    input_ids: new library.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    attention_mask: new library.Tensor("int64", new BigInt64Array(ids.length).fill(1n), [1, ids.length]),
  };
  return (await generate(model, inputs, max_new_tokens)).ids;
}

/** The new ids, and when each of them was there. */
async function generate(model, inputs, max_new_tokens) {
  const times = [];
  const streamer = { put: () => times.push(performance.now()), end: () => {} };
  const output = await model.generate({ ...inputs, max_new_tokens, do_sample: false, streamer });
  // The streamer is given the prompt first.
  return { ids: output.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number), times: times.slice(1) };
}

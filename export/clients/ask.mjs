/** Questions for a folder that `export-onnx --layout transformers.js` wrote, asked as the client's own guide does. */

/** What a user of `library` (@huggingface/transformers) loads: the model, and unless it has no tokenizer the processor. */
export async function open(library, folder, dtype, { processor = true } = {}) {
  const model = await library.AutoModelForImageTextToText.from_pretrained(folder, { dtype });
  return { library, model, processor: processor && (await library.AutoProcessor.from_pretrained(folder)) };
}

/** The ids of a greedy answer about a picture (a path or URL), without what ends it, and the prompt's. */
export async function ask({ library, model, processor }, picture, prompt, max_new_tokens) {
  const inputs = await processor(await library.RawImage.read(picture), `<image>${prompt}`);
  const started = performance.now();
  const { ids, first } = await generate(library, model, inputs, max_new_tokens);
  const ends = [model.generation_config.eos_token_id].flat();
  const tokens = ids.slice(0, ids.findIndex((id) => ends.includes(id)) >>> 0);
  return { tokens, prompt: inputs.input_ids.tolist()[0].map(Number), first_s: (first - started) / 1000,
    step_s: (performance.now() - first) / 1000 / Math.max(1, ids.length - 1) };
}

/** The same for ids and raw pixels 0 … 255 [3, height, width], for models without a tokenizer. */
export async function askIds({ library, model }, pixels, [height, width], ids, max_new_tokens) {
  const row = [1, ids.length];
  const inputs = {
    pixel_values: new library.Tensor("float32", Float32Array.from(pixels), [1, 3, height, width]),
    input_ids: new library.Tensor("int64", BigInt64Array.from(ids, BigInt), row),
    attention_mask: new library.Tensor("int64", new BigInt64Array(ids.length).fill(1n), row),
  };
  return (await generate(library, model, inputs, max_new_tokens)).ids;
}

async function generate(library, model, inputs, max_new_tokens) {
  let first = 0;
  const streamer = { put: () => (first ||= performance.now()), end: () => {} };
  let calls = 0; // the first call is the prompt itself
  streamer.put = () => void (++calls === 2 && (first = performance.now()));
  const output = await model.generate({ ...inputs, max_new_tokens, do_sample: false, streamer });
  return { ids: output.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number), first };
}

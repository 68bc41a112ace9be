/**
 * Calls with a mistake in them, and words of the line that must say so; for the library in Node and in the browser.
 * Self-contained, since a browser takes it as text.
 */
export async function refusals({ load, decodePicture, promptWarning, PaliGemmaError }, model, picture) {
  const generate = (options) => model.generate(picture, "caption en", options);
  const read = await model.picture(picture);
  const one = { data: new Uint8Array(3), width: 1, height: 1 };
  const calls = [
    [() => model.generate(), "the prompt must be a string, not undefined"],
    [() => model.generate(picture, 5), "the prompt must be a string, not 5"],
    [() => model.generate(picture, ["caption en"]), "the prompt must be a string, not an array"],
    [() => model.generate(picture, " \n"), "the prompt is empty"],
    [() => model.generate(picture, "a\ud800"), "not valid Unicode"],
    [() => model.generate(picture, "star ".repeat(300)), "exceeds the capacity"],
    [() => model.generate(null, "caption en"), "the picture must be", "not null"],
    [() => model.generate(5, "caption en"), "the picture must be", "not 5"],
    [() => model.generate([], "caption en"), "a list of no pictures"],
    [() => model.generate([picture, undefined], "caption en"), "the picture must be", "not undefined"],
    [() => model.generate({ ...one, width: 2 }, "caption en"), "2 x 1 has three bytes a pixel, not 3"],
    [() => model.generate({ ...one, width: 0 }, "caption en"), "width must be a whole number of at least 1, not 0"],
    [() => model.generate({ ...one, height: 1.5 }, "caption en"), "height must be", "not 1.5"],
    [() => model.generate({ ...one, data: [1, 2, 3] }, "caption en"), "data must be a Uint8Array, not an array"],
    [() => generate(5), "its options must be an object, not 5"],
    [() => generate(null), "its options must be an object, not null"],
    [() => generate([]), "its options must be an object, not an array"],
    [() => generate({ max_new_tokens: 2 }), 'no option "max_new_tokens"', "it has transparency, signal, maxNewTokens"],
    [() => generate({ toString: 1 }), 'no option "toString"'],
    [() => generate({ "a\nb": 1 }), "no option"],
    ...[0, -1, 1.5, NaN, "5", null, 2 ** 60].map((value) => [() => generate({ maxNewTokens: value }), "maxNewTokens must be a whole number"]),
    [() => generate({ maxNewTokens: 1000 }), "exceeds the capacity"],
    ...[-1, NaN, Infinity, 1e-9, 1e9, "1"].map((value) => [() => generate({ temperature: value }), "temperature must be 0, or a number from 0.000001"]),
    ...[-1, 1.5, NaN, "3", 5n].map((value) => [() => generate({ topK: value }), "topK must be a whole number of at least 0"]),
    ...[-0.1, 7, NaN, "0.5"].map((value) => [() => generate({ topP: value }), "topP must be a number from 0 to 1"]),
    [() => generate({ uniform: 0.5 }), "uniform must be a function, not 0.5"],
    [() => generate({ boxes: "coco" }), 'boxes must be one of big_vision, huggingface, not "coco"'],
    [() => generate({ boxes: "toString" }), "boxes must be one of"],
    [() => generate({ transparency: "black" }), 'transparency must be one of white, drop, not "black"'],
    [() => generate({ onToken: "log" }), 'onToken must be a function, not "log"'],
    [() => generate({ signal: true }), "signal must be an AbortSignal, not true"],
    [() => model.picture(picture, { temperature: 1 }), 'picture has no option "temperature"'],
    [() => model.picture([]), "a list of no pictures"],
    [() => read.generate(), "the prompt must be a string"],
    [() => read.generate("caption en", { transparency: "drop" }), 'generate of a picture has no option "transparency"'],
    [() => read.generate("caption en", { topP: 2 }), "topP must be"],
    [() => load(5), "must be", "not 5"],
    [() => load("a", { thread: 1 }), 'load has no option "thread"'],
    ...[-3, 1.5, 100_000].map((value) => [() => load("a", { threads: value }), "threads must be a whole number from 0 to"]),
    [() => decodePicture(5), "the picture must be"],
    [() => decodePicture(one, "black"), "transparency must be"],
    [() => promptWarning(5), "the prompt must be a string, not 5"],
  ];
  const drawn = [-1, 1, NaN, "0.5", undefined].map((value) => [
    () => generate({ temperature: 1, uniform: () => value }), "uniform must give numbers from 0 to below 1",
  ]);
  const found = [];
  for (const [call, ...words] of [...calls, ...drawn]) {
    let error = null;
    try {
      await call();
    } catch (thrown) {
      error = thrown;
    }
    found.push({ call: String(call), words, known: error instanceof PaliGemmaError, message: error && String(error.message) });
  }
  return found;
}

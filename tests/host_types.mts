/** Uses of the package that must compile, and misuses that must not; checked by tsc in test_host_library.py. */
import { decodePicture, load, PaliGemmaError, promptWarning } from "paligemma-onnx";
import type { Answer, PaliGemma, Picture } from "paligemma-onnx";
import { load as loadInBrowser } from "paligemma-onnx/browser";
import type { About } from "paligemma-onnx/browser";

const model: PaliGemma = await load(new URL("file:///bundle"), { threads: 2 });
const answer: Answer = await model.generate(["a.png", new Uint8Array(9)], "caption en", {
  maxNewTokens: 5, temperature: 1, topK: 3, topP: 0.9, uniform: Math.random, boxes: "huggingface", transparency: "drop",
  onToken: (text, token) => console.log(text.length, token?.toFixed()), signal: new AbortController().signal,
});
const [score, first]: [number, number] = [answer.boxes[0].score, answer.timings.prefill_s];
const mask: number[] | undefined = answer.masks[0].counts;
const picture: Picture = await model.picture(await decodePicture("a.png", "white"));
console.log((await picture.generate("detect star")).logprobs, score, first, mask, promptWarning("a"), PaliGemmaError.name);
await model.dispose();
{
  await using passing = await load("bundle");
  await passing.generate("a.png", "caption en");
}
const here = await loadInBrowser("/bundle", { backend: "wasm", modules: "/node_modules", onProgress: (part) => part.toFixed() });
const about: About = here.about;
console.log(about.threads, (await here.generate(new Blob([]), "caption en", { topK: 1 })).text);

// @ts-expect-error: a name in Python's spelling
await model.generate("a.png", "caption en", { max_new_tokens: 2 });
// @ts-expect-error: a number for a prompt
await model.generate("a.png", 5);
// @ts-expect-error: not a picture
await model.generate(5, "caption en");
// @ts-expect-error: what a picture stands on was chosen when it was read
await picture.generate("caption en", { transparency: "drop" });
// @ts-expect-error: no such convention
await model.generate("a.png", "caption en", { boxes: "coco" });
// @ts-expect-error: no threads as text
await load("bundle", { threads: "2" });
// @ts-expect-error: Node has no backend
await load("bundle", { backend: "wasm" });
// @ts-expect-error: no such backend
await loadInBrowser("/bundle", { backend: "cuda" });
// @ts-expect-error: a file's bytes go in a Blob
await here.generate(new ArrayBuffer(8), "caption en");

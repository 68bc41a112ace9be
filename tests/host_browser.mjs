/** The browser module as a page of somebody else uses it; driven by test_host_library.py, its task on standard input. */
import { readFileSync } from "node:fs";

import { open } from "../export/hosts/web/chromium.mjs";
import { refusals } from "./host_refusals.mjs";

const given = JSON.parse(readFileSync(0, "utf8"));
const browser = await open();
const page = await browser.newPage();
await page.goto(given.url);
const results = await page.evaluate(use, given);
results.refused = await page.evaluate(
  `(async ({ library, bundle, modules, picture }) => {
    const module = await import(library);
    const model = await module.load(bundle, { modules });
    return (${refusals})(module, model, await (await fetch(picture)).blob());
  })(${JSON.stringify(given)})`,
);
await browser.close();
console.log(JSON.stringify(results));

async function use({ library: address, bundle, modules, picture, prompts }) {
  const library = await import(address);
  const thrown = (promise) => promise.then(() => null, ({ name, message }) => [name, message]);
  const fractions = [];
  const model = await library.load(bundle, { modules, onProgress: (fraction) => fractions.push(fraction) });
  const results = { about: model.about, fractions: [fractions.length, Math.max(...fractions)], warning: library.promptWarning("<image>a") };

  let streamed = "";
  results.answer = await model.generate(picture, "segment star", { onToken: (text) => (streamed += text) });
  results.streamed = streamed;
  const file = await (await fetch(picture)).blob();
  const bitmap = await createImageBitmap(file);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  canvas.drawImage(bitmap, 0, 0);
  const image = canvas.getImageData(0, 0, bitmap.width, bitmap.height);
  results.ways = [];
  for (const way of [file, new URL(picture, location.href), bitmap, image, await library.decodePicture(file), [file]]) {
    results.ways.push((await model.generate(way, "caption en")).text);
  }
  const read = await model.picture(file);
  results.prompts = [];
  for (const each of await Promise.all(prompts.map((prompt) => read.generate(prompt)))) results.prompts.push(each.tokens);

  const signal = AbortSignal.abort();
  results.aborted = [await thrown(model.generate(file, "caption en", { signal })), await thrown(read.generate("caption en", { signal }))];
  const before = new AbortController();
  const reading = model.generate(file, "caption en", { signal: before.signal });
  before.abort(new TypeError("enough"));
  results.before = await thrown(reading);
  const later = new AbortController();
  results.later = await model.generate(file, "caption en", { signal: later.signal, onToken: () => later.abort() });
  results.listener = await thrown(model.generate(file, "caption en", { onToken: () => { throw new RangeError("mine"); } }));
  results.unclonable = await thrown(model.generate({ data: new Uint8Array(3), width: 1, height: 1, more: () => 1 }, "caption en"));
  results.absent = [
    await thrown(model.generate("/none.png", "caption en")),
    await thrown(library.load("/none", { modules })),
    await thrown(library.load("http://", { modules })),
    await thrown(library.load(bundle)), // no bundler, and nothing said of node_modules
    await thrown(library.load(bundle, { modules: "/none" })),
    await thrown(library.load(bundle, { modules, backend: "cuda" })),
  ];
  const underway = read.generate("caption en");
  const done = [model.dispose(), model.dispose(), ...(Symbol.asyncDispose ? [model[Symbol.asyncDispose]()] : [])];
  results.underway = (await underway).text;
  await Promise.all(done);
  results.disposed = [await thrown(model.generate(file, "caption en")), await thrown(model.picture(file)), await thrown(read.generate("caption en"))];
  return results;
}

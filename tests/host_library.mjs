/** The package as a program uses it in Node; driven by test_host_library.py, with what to do on standard input. */
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

import { refusals } from "./host_refusals.mjs";

const { library: address, bundle, picture } = JSON.parse(readFileSync(0, "utf8"));
const library = await import(address);
const results = {};

/** The names of the graphs that a model runs meanwhile. */
function watched(model, onRun) {
  const [run, names] = [model.engine.run, []];
  model.engine.run = (name, ...rest) => {
    names.push(name);
    onRun?.(name, names);
    return run.call(model.engine, name, ...rest);
  };
  return names;
}

const thrown = (promise) => promise.then(() => null, ({ name, message }) => [name, message]);

const model = await library.load(bundle);
results.answer = await model.generate(picture, "segment star");
results.refused = await refusals(library, model, picture);

// Files by URL, by bytes, as pixels; the bundle by URL.
const byUrl = await library.load(pathToFileURL(bundle));
const pixels = await library.decodePicture(picture);
const ways = [pathToFileURL(picture), readFileSync(picture), new Uint8Array(readFileSync(picture)), pixels, [picture]];
results.ways = [];
for (const way of ways) results.ways.push((await byUrl.generate(way, "caption en")).text);
results.together = (await Promise.all(["a", "b", "c", "d"].map(() => byUrl.generate(picture, "caption en")))).map(({ text }) => text);
results.elsewhere = await thrown(byUrl.generate(new URL("http://127.0.0.1/cat.png"), "caption en"));

// Signals.
const stopped = await library.load(bundle);
const runs = watched(stopped);
const options = { signal: AbortSignal.abort() };
results.aborted = [
  await thrown(stopped.generate(picture, "caption en", options)),
  await thrown(stopped.generate("absent.png", "caption en", options)),
  await thrown(stopped.picture(picture, options)),
];
results.abortedRuns = runs.length;
const controller = new AbortController();
const during = await library.load(bundle);
results.duringRuns = watched(during, (name) => name === "preprocess" && controller.abort(new TypeError("enough")));
results.during = await thrown(during.generate(picture, "caption en", { signal: controller.signal }));
const later = new AbortController();
let count = 0;
results.later = await during.generate(picture, "caption en", { signal: later.signal, onToken: () => ++count === 2 && later.abort() });
results.listener = await thrown(during.generate(picture, "caption en", { onToken: () => { throw new RangeError("mine"); } }));

// Disposal.
const gone = await library.load(bundle);
const read = await gone.picture(picture);
let released = 0;
for (const session of Object.values(gone.engine.sessions)) {
  const release = session.release.bind(session);
  session.release = () => (released++, release());
}
const underway = gone.generate(picture, "caption en");
const done = [gone.dispose(), gone.dispose(), ...(Symbol.asyncDispose ? [gone[Symbol.asyncDispose]()] : [])];
results.underway = (await underway).text;
await Promise.all(done);
results.released = [released, Object.keys(gone.engine.sessions).length];
results.disposed = [
  await thrown(gone.generate(picture, "caption en")),
  await thrown(gone.picture(picture)),
  await thrown(read.generate("caption en")),
];
console.log(JSON.stringify(results));

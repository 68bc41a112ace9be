/** transformers.js in headless Chromium: the input and output of node.mjs. Every file comes from this disk alone. */
import { existsSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

import { open as openBrowser } from "../hosts/web/chromium.mjs";

const ORIGIN = "http://localhost";
const HERE = fileURLToPath(new URL(".", import.meta.url));
const PLACES = {
  "/library/": `${HERE}node_modules/@huggingface/transformers/dist/`,
  "/runtime/": `${HERE}node_modules/onnxruntime-web/dist/`,
  "/client/": HERE,
};
const TYPES = { js: "text/javascript", mjs: "text/javascript", wasm: "application/wasm", json: "application/json" };

const { runs } = JSON.parse(readFileSync(0, "utf8"));
const places = { ...PLACES };
const pictures = [];
const asked = runs.map(({ folder, cases = [], ...run }, i) => {
  places[`/models/${i}/`] = `${folder}/`;
  return { folder: `${i}`, cases: cases.map(({ picture, prompt }) => ({ picture: address(picture), prompt })), ...run };
});
const browser = await openBrowser();
const page = await browser.newPage();
const refused = [];
await page.route("**/*", (route) => {
  const url = new URL(route.request().url());
  if (url.protocol === "blob:") return route.continue();
  if (url.origin === ORIGIN && url.pathname === "/") return route.fulfill({ contentType: "text/html", body: "<!doctype html>" });
  const place = Object.keys(places).find((place) => url.origin === ORIGIN && url.pathname.startsWith(place));
  const picture = url.pathname.match(/^\/pictures\/(\d+)$/);
  const file = picture ? pictures[picture[1]] : place && places[place] + url.pathname.slice(place.length);
  if (!file) refused.push(url.href);
  if (!file || !existsSync(file)) return route.fulfill({ status: 404, body: "" });
  return route.fulfill({ path: file, contentType: TYPES[file.split(".").pop()] ?? "application/octet-stream" });
});
await page.goto(`${ORIGIN}/`);
const found = await page.evaluate(inPage, asked);
await browser.close();
console.log(JSON.stringify({ runs: found, refused }));

/** Where the page finds a picture of this disk. */
function address(picture) {
  return `${ORIGIN}/pictures/${pictures.push(picture) - 1}`;
}

async function inPage(runs) {
  const library = await import("/library/transformers.js");
  const { answers } = await import("/client/ask.mjs");
  Object.assign(library.env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/models/", useBrowserCache: false });
  library.env.backends.onnx.wasm.wasmPaths = `${location.origin}/runtime/`;
  const found = [];
  for (const run of runs) found.push(await answers(library, run));
  return found;
}

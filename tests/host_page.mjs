/** The browser page in headless Chromium, used as people use it; driven by test_hosts.py, cases on standard input. */
import { readFileSync } from "node:fs";

import { ask, open, visit } from "../export/hosts/web/chromium.mjs";

const { url, cases, pictures, broken, huge } = JSON.parse(readFileSync(0, "utf8"));
const browser = await open();
const results = { requests: [], errors: [] };

// As a person: by keyboard and by dropping a picture.
const page = await visit(browser, url, { requests: results.requests, viewport: { width: 360, height: 740 } });
page.on("pageerror", (error) => results.errors.push(String(error)));
results.about = await page.textContent("#about");
await drop("notes.txt", Buffer.from("not a picture").toString("base64"));
await page.waitForSelector("#error:not([hidden])");
results.notPicture = await page.textContent("#error");
await drop("example.png", readFileSync(pictures[0]).toString("base64"));
await page.waitForSelector("#stage.filled");
results.complaintGone = await page.isHidden("#error");
results.caption = await ask(page, "caption en");
results.times = await page.textContent("#times");
await page.focus("#prompt");
await page.keyboard.press("Control+A");
await page.keyboard.type("detect star");
await page.keyboard.press("Enter");
await page.waitForFunction(() => document.querySelector("#found li") && document.body.dataset.state === "ready");
results.detect = await page.textContent("#answer");
results.found = await page.locator("#found li").allTextContents();
results.label = await page.getAttribute("#picture", "aria-label");
results.overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
results.focusAfterAnswer = await page.evaluate(() => document.activeElement.id);
results.focus = await keyboardOrder();
results.tooLong = await tooLong();
results.noted = await noted();
results.stopped = await stopped();
results.changed = await changedMeanwhile();
results.tall = await tall();

// As a program: the same worker, asked through its module.
results.golden = await page.evaluate(goldens, cases.map((each) => ({ ...each, picture: base64(each.picture) })));
results.pixels = await page.evaluate(pixelsIn, pictures.map(base64));

for (const address of broken) {
  const other = await browser.newPage();
  await other.goto(address);
  await other.waitForSelector("#error:not([hidden])");
  results.broken = [...(results.broken ?? []), await other.textContent("#error")];
}
await browser.close();
console.log(JSON.stringify(results));

function base64(file) {
  return readFileSync(file).toString("base64");
}

async function drop(name, contents) {
  const transfer = await page.evaluateHandle(
    ([name, contents]) => {
      const bytes = Uint8Array.from(atob(contents), (letter) => letter.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], name));
      return transfer;
    },
    [name, contents],
  );
  await page.dispatchEvent("#stage", "drop", { dataTransfer: transfer });
}

async function keyboardOrder() {
  const order = [];
  await page.focus("#file");
  for (let i = 0; i < 4; i++) {
    order.push(await page.evaluate(() => document.activeElement.id));
    await page.keyboard.press("Tab");
  }
  return order;
}

async function noted() {
  await ask(page, "<image>caption en");
  const warned = await page.textContent("#note:not([hidden])");
  await ask(page, "caption en");
  return [warned, await page.isHidden("#note")];
}

async function tooLong() {
  await ask(page, "star ".repeat(300));
  return page.textContent("#error");
}

/** Stop after the first words of a long answer; how much there is then. */
async function stopped() {
  await page.evaluate(() => (document.querySelector("details").open = true));
  await page.fill("#temperature", "9.5");
  await page.fill("#tokens", "180");
  await page.fill("#prompt", "caption en");
  await page.click("#run");
  await page.waitForFunction(() => document.querySelector("#answer").textContent.length > 3);
  await page.click("#stop");
  await page.waitForFunction(() => document.body.dataset.state === "ready");
  return page.textContent("#times");
}

/** Another picture in the middle of an answer: what is left of the answer. */
async function changedMeanwhile() {
  await page.click("#run");
  await page.waitForFunction(() => document.querySelector("#answer").textContent.length > 3);
  await drop("other.png", base64(pictures[1]));
  await page.waitForFunction(() => document.querySelector("#answer").textContent === ""); // the picture has been taken
  await page.waitForFunction(() => document.body.dataset.state === "ready");
  const left = await page.textContent("#answer");
  await page.fill("#temperature", "0");
  await page.fill("#tokens", "");
  return left;
}

/** A picture that is a line, and one that no canvas holds. */
async function tall() {
  await drop("line.png", base64(huge[0]));
  await page.waitForFunction(() => document.querySelector("#picture").height > document.querySelector("#picture").width);
  const height = await page.evaluate(() => document.documentElement.scrollHeight);
  await drop("huge.png", base64(huge[1]));
  await page.waitForSelector("#error:not([hidden])");
  return [height, await page.textContent("#error")];
}

async function goldens(cases) {
  const { load } = await import("/web/browser.mjs");
  const model = await load("/bundle", { modules: "/node_modules" });
  const answers = [];
  for (const { picture, prompt, uniforms, ...options } of cases) {
    const bytes = Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0));
    let streamed = "";
    const onToken = (text) => (streamed += text);
    const uniform = () => uniforms.shift();
    const answer = await model.generate(new Blob([bytes]), prompt, { ...options, uniform, onToken });
    answers.push({ ...answer, streamed });
  }
  await model.dispose();
  return answers;
}

async function pixelsIn(pictures) {
  const { decodePicture } = await import("/web/browser.mjs");
  const ort = await import("/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs");
  const graph = await (await fetch("/bundle/preprocess.onnx")).arrayBuffer();
  const session = await ort.InferenceSession.create(new Uint8Array(graph), { logSeverityLevel: 4 });
  const encode = (array) => {
    const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
    let letters = "";
    for (let i = 0; i < bytes.length; i += 4096) letters += String.fromCharCode(...bytes.subarray(i, i + 4096));
    return btoa(letters);
  };
  const results = [];
  for (const picture of pictures) {
    const bytes = Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0));
    const image = await decodePicture(new Blob([bytes]));
    const tensor = new ort.Tensor("uint8", image.data, [image.height, image.width, 3]);
    const { pixel_values: values } = await session.run({ image: tensor });
    results.push({ rgb: encode(image.data), values: encode(values.data) });
  }
  return results;
}

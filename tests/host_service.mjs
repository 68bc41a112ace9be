/**
 * The page before a server that runs the model itself; driven by test_hosts.py. The stub answers below /v1/ by the Node
 * host, and has everything else from the page's own server.
 */
import { readFileSync } from "node:fs";
import { createServer } from "node:http";

import { load } from "../export/hosts/node/index.mjs";
import { ask, open, visit } from "../export/hosts/web/chromium.mjs";

const { url, bundle, picture } = JSON.parse(readFileSync(0, "utf8"));
const results = { fields: [], paths: [] };
const model = await load(bundle);

const server = createServer(async (request, response) => {
  results.paths.push(request.url);
  const answer = (status, value) => response.writeHead(status, { "Content-Type": "application/json" }).end(JSON.stringify(value));
  if (request.url === "/v1/models") return answer(200, { object: "list", data: [{ id: "stub", object: "model" }] });
  if (request.url === "/v1/answer") {
    const { image, prompt, ...fields } = await formOf(request);
    results.fields.push({ prompt, ...fields, bytes: image.length });
    if (prompt === "hold") return request.socket.on("close", () => (results.held = "closed"));
    try {
      return answer(200, await model.generate(image, prompt));
    } catch (error) {
      return answer(400, { error: { message: error.message } });
    }
  }
  const page = await fetch(new URL(request.url, url));
  const headers = Object.fromEntries([...page.headers].filter(([name]) => !/^(connection|transfer-encoding)$/.test(name)));
  response.writeHead(page.status, headers).end(Buffer.from(await page.arrayBuffer()));
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));

const browser = await open();
const page = await visit(browser, `http://127.0.0.1:${server.address().port}/web/`);
results.about = await page.textContent("#about");
results.place = await page.textContent("#place");
await page.setInputFiles("#file", picture);
await page.waitForSelector("#stage.filled");
results.answer = await ask(page, "segment star");
results.found = await page.locator("#found li").allTextContents();
await page.evaluate(() => (document.querySelector("details").open = true));
await page.fill("#temperature", "0.5");
await page.fill("#tokens", "9");
await ask(page, "star ".repeat(300));
results.error = await page.textContent("#error:not([hidden])");
await page.fill("#prompt", "hold");
await page.click("#run");
while (results.fields.at(-1).prompt !== "hold") await page.waitForTimeout(20);
await page.click("#stop");
await page.waitForFunction(() => document.body.dataset.state === "ready");
results.complaint = await page.isVisible("#error");
while (!results.held) await page.waitForTimeout(20);
await browser.close();
server.close();
server.closeAllConnections();
console.log(JSON.stringify(results));

async function formOf(request) {
  const pieces = [];
  for await (const piece of request) pieces.push(piece);
  const form = await new Response(Buffer.concat(pieces), { headers: { "Content-Type": request.headers["content-type"] } }).formData();
  const fields = Object.fromEntries(form);
  return { ...fields, image: Buffer.from(await fields.image.arrayBuffer()) };
}

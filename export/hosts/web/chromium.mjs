/** A headless Chromium for the tests and the screenshot: CHROMIUM names the program, else it is looked for. */
import { existsSync } from "node:fs";

import { chromium } from "playwright-core";

const PLACES = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const QUIETER = ["--disable-component-update", "--disable-sync", "--disable-extensions"];

/** Start a browser; throws where there is none. */
export async function open() {
  const executablePath = process.env.CHROMIUM ?? PLACES.find((place) => existsSync(place));
  if (!executablePath) throw new Error(`no browser: neither $CHROMIUM nor ${PLACES.join(", ")}`);
  return chromium.launch({ executablePath, args: [...QUIET, ...QUIETER] });
}

/** A page at a URL, once its model is loaded. `requests` collects the addresses that it asks for. */
export async function visit(browser, url, { requests = [], ...options } = {}) {
  const page = await browser.newPage(options);
  page.on("request", (request) => requests.push(request.url()));
  await page.goto(url);
  await page.waitForFunction(() => document.querySelector("#loading.done"), null, { timeout: 120_000 });
  if ((await page.getAttribute("body", "data-state")) !== "ready") throw new Error(await page.textContent("#about"));
  return page;
}

/** Ask by the page's own controls; when the answer is there, its text. */
export async function ask(page, prompt) {
  await page.fill("#prompt", prompt);
  await page.click("#run");
  await page.waitForFunction(() => document.body.dataset.state === "ready", null, { timeout: 120_000 });
  return page.textContent("#answer");
}

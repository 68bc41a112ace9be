/** node screenshot.mjs URL OUT.png: the page that `run-onnx --serve` shows at URL, after two questions about its example. */
import { ask, open, visit } from "./chromium.mjs";

const [url, file] = process.argv.slice(2);
if (!file) {
  console.error("usage: node screenshot.mjs URL OUT.png");
  process.exit(2);
}
const browser = await open();
const page = await visit(browser, url, { viewport: { width: 1040, height: 640 } });
await page.waitForSelector("#stage.filled");
await ask(page, "caption en");
await ask(page, await page.locator("#presets button", { hasText: "segment" }).first().textContent());
await page.screenshot({ path: file, fullPage: true });
await browser.close();

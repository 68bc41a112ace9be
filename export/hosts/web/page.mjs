/** The page: a picture, a prompt, an answer as it comes, boxes and masks over the picture. */
import { plural } from "../common/errors.mjs";
import { hintFor, parse } from "../common/knows.mjs";
import { promptWarning } from "../common/tokenizer.mjs";
import { openEngine } from "./engines.mjs";
import { openPicture } from "./pictures.mjs";

const PRESETS = ["caption en"]; // of a model that does not say what it was taught
// As numpy_ref/detection.py has them: bright, with dark edges, so that they show on any ground.
const COLORS = ["#ff4fa3", "#38d9f5", "#ffd43b", "#b197fc", "#69db7c", "#ff922b"];
const EDGE = "#16171a";
const HATCH = 12; // pixels of the page from one line of a mask's hatching to the next
const LEAST_WIDTH = 640; // of the drawing, so that labels can be read on a small picture

const at = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const bundle = new URL("../bundle/", location.href);
const modules = new URL("../node_modules/", location.href);
let engine = null;
let picture = null;
let running = null;
let known = null; // what the model was taught, where it says so
let example = -1; // which of its examples is shown
let shown = 0; // pictures that were asked for

async function start() {
  at("file").onchange = ({ target }) => {
    if (target.files[0]) show(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  };
  at("example").onclick = showExample;
  at("ask").addEventListener("invalid", () => (document.querySelector("details").open = true), true);
  at("ask").onsubmit = (event) => {
    event.preventDefault();
    ask();
  };
  at("stop").onclick = () => running?.abort();
  acceptDrops();
  known = await knowledge();
  at("knows").textContent = known ? `It knows ${known.about}. Bring a real one with run-onnx --serve BUNDLE.` : "";
  await showExample();
  try {
    const onProgress = (fraction) => (at("loading").value = fraction);
    engine = await openEngine(bundle, { modules, backend: query.get("backend") ?? "auto", onProgress });
    at("about").textContent = engine.about;
    at("place").textContent = engine.place;
  } catch (error) {
    at("about").textContent = `The model did not load: ${error.message}`;
    complain(error);
  }
  at("loading").classList.add("done");
  refresh();
}

/** What the bundle says that its model was taught; null if it does not. */
async function knowledge() {
  try {
    const response = await fetch("../knows.json");
    return response.ok ? parse(await response.json()) : null;
  } catch {
    return null;
  }
}

function offer(prompts) {
  const buttons = prompts.map((prompt) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: prompt });
    button.onclick = () => {
      at("prompt").value = prompt;
      at("ask").requestSubmit();
    };
    return button;
  });
  at("presets").replaceChildren(...buttons);
}

function acceptDrops() {
  addEventListener("dragover", (event) => {
    event.preventDefault();
    at("stage").classList.add("over");
  });
  addEventListener("dragleave", () => at("stage").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    at("stage").classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) show(file);
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) show(file);
  });
}

/** Take a file as the picture. */
async function show(blob) {
  const turn = ++shown;
  running?.abort();
  complain(null);
  try {
    const bitmap = await openPicture(blob);
    if (turn !== shown) return; // another was chosen since
    picture = { blob, bitmap };
    draw([], []);
    at("stage").classList.add("filled");
    forgetAnswer();
  } catch (error) {
    complain(error);
  }
  refresh();
}

/** The next of the examples, with the prompts that the model answers right about it. */
async function showExample() {
  const examples = known?.examples?.length ? known.examples : [{ picture: "example.png", prompts: PRESETS }];
  example = (example + 1) % examples.length;
  offer(examples[example].prompts);
  try {
    const response = await fetch(`../${encodeURIComponent(examples[example].picture)}`);
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    await show(await response.blob());
  } catch (error) {
    complain(new Error(`the example does not load: ${error.message}`));
  }
}

async function ask() {
  if (!engine || !picture || running) return note(waiting());
  complain(null);
  forgetAnswer();
  draw([], []);
  note(promptWarning(at("prompt").value) || hintFor(known, at("prompt").value));
  running = new AbortController();
  refresh();
  const asked = picture;
  const isCurrent = () => picture === asked;
  try {
    const answer = await engine.ask(asked, at("prompt").value, {
      temperature: number("temperature", 0),
      topP: number("top-p", 1),
      topK: number("top-k", 0),
      maxNewTokens: number("tokens", undefined),
      signal: running.signal,
      onToken: (text) => isCurrent() && at("answer").append(text),
    });
    if (isCurrent()) present(answer);
  } catch (error) {
    if (isCurrent() && !running.signal.aborted) complain(error);
  }
  running = null;
  refresh();
}

/** Why there is no answer yet. */
function waiting() {
  if (running) return "The last question is still being answered; Stop ends it.";
  return engine ? "Choose a picture first." : "The model is not there yet.";
}

function present({ text, tokens, logprobs, boxes, masks, timings }) {
  at("answer").textContent = text || "(an empty answer: nothing of that kind was found)";
  draw(boxes, masks);
  for (const [i, box] of boxes.entries()) {
    const corners = [box.x1, box.y1, box.x2, box.y2].map(Math.round).join(", ");
    const item = Object.assign(document.createElement("li"), { textContent: `${box.label || "(no label)"} at ${corners}` });
    if (box.score !== undefined) item.append(scoreOf(box));
    item.style.setProperty("--color", COLORS[i % COLORS.length]);
    at("found").append(item);
  }
  const speed = timings.decode_tokens_per_s ? `, then ${timings.decode_tokens_per_s.toFixed(0)} tokens/s` : "";
  const sure = logprobs?.length ? `, score ${inHundredths(meanProbability(logprobs))}` : "";
  at("times").textContent = `First token after ${(timings.prefill_s * 1000).toFixed(0)} ms${speed}; ${plural(tokens.length, "token")}${sure}.`;
}

/** A box's scores, small. */
function scoreOf({ score, mask_score: ofMask }) {
  const textContent = ` score ${inHundredths(score)}${ofMask === undefined ? "" : `, of its mask ${inHundredths(ofMask)}`}`;
  return Object.assign(document.createElement("small"), { textContent });
}

/** exp of the mean log-probability, as boxes have it for their tokens. */
const meanProbability = (logprobs) => Math.exp(logprobs.reduce((sum, each) => sum + each, 0) / logprobs.length);

const inHundredths = (score) => score.toFixed(2);

/** The picture with masks, boxes and labels over it. */
function draw(boxes, masks) {
  const { bitmap } = picture;
  const zoom = Math.max(1, Math.min(LEAST_WIDTH / bitmap.width, (2 * LEAST_WIDTH) / bitmap.height));
  const canvas = at("picture");
  [canvas.width, canvas.height] = [Math.round(bitmap.width * zoom), Math.round(bitmap.height * zoom)];
  const pen = canvas.getContext("2d");
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  let mask = 0;
  boxes.forEach((box, i) => {
    const color = COLORS[i % COLORS.length];
    if (box.codes && masks[mask]?.counts) {
      hatch(pen, masks[mask], color, canvas);
    }
    if (box.codes) mask += 1;
    outline(pen, box, color, zoom, canvas);
  });
  const names = boxes.map((box) => box.label).join(", ");
  canvas.setAttribute("aria-label", names ? `The picture, with boxes around: ${names}` : "The picture");
}

function outline(pen, box, color, zoom, canvas) {
  const unit = canvas.width / (canvas.clientWidth || canvas.width); // a pixel of the page
  const [left, top] = [box.x1 * zoom, box.y1 * zoom];
  for (const [style, width] of [[EDGE, 5], [color, 2.5]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width * unit;
    pen.strokeRect(left, top, (box.x2 - box.x1) * zoom, (box.y2 - box.y1) * zoom);
  }
  const parts = [{ text: box.label, font: `${14 * unit}px system-ui, sans-serif` }];
  if (box.score !== undefined) parts.push({ text: inHundredths(box.score), font: `${11 * unit}px system-ui, sans-serif` });
  const widths = parts.map(({ text, font }) => {
    pen.font = font;
    return text && pen.measureText(text).width + 4 * unit;
  });
  const width = widths.reduce((sum, each) => sum + each, 4 * unit);
  const height = 20 * unit;
  const x = Math.max(0, Math.min(left, box.x2 * zoom, canvas.width - width)); // a box may be inverted
  const upper = Math.min(top, box.y2 * zoom);
  const y = upper >= height ? upper - height : upper;
  pen.fillStyle = EDGE;
  pen.fillRect(x, y, width, height);
  pen.fillStyle = color;
  parts.reduce((at, { text, font }, i) => {
    pen.font = font;
    pen.fillText(text, at, y + 15 * unit);
    return at + widths[i];
  }, x + 4 * unit);
}

/** A mask as a contour with a dark edge and thin lines within, so that what is below keeps its colors. */
function hatch(pen, mask, color, { width, height, clientWidth }) {
  const unit = width / (clientWidth || width);
  const layer = (style) => {
    const canvas = new OffscreenCanvas(width, height);
    const brush = canvas.getContext("2d");
    brush.imageSmoothingEnabled = false;
    brush.drawImage(stencil(mask, style), 0, 0, width, height);
    return [canvas, brush];
  };
  const [inside] = layer("#000");
  const [lines, brush] = layer(color);
  brush.globalCompositeOperation = "destination-in";
  brush.lineWidth = 1.5 * unit;
  brush.beginPath();
  for (let x = -height; x < width; x += HATCH * unit) {
    brush.moveTo(x, height);
    brush.lineTo(x + height, 0);
  }
  brush.stroke();
  pen.globalAlpha = 0.6;
  pen.drawImage(lines, 0, 0);
  pen.globalAlpha = 1;
  for (const [style, reach] of [[EDGE, 2.5], [color, 1.5]]) {
    const [around, ring] = [new OffscreenCanvas(width, height), layer(style)[0]];
    const edge = around.getContext("2d");
    for (let turn = 0; turn < 16; turn++) {
      const angle = (turn * Math.PI) / 8;
      edge.drawImage(ring, reach * unit * Math.cos(angle), reach * unit * Math.sin(angle));
    }
    edge.globalCompositeOperation = "destination-out";
    edge.drawImage(inside, 0, 0);
    pen.drawImage(around, 0, 0);
  }
}

/** A mask's run lengths as a picture of one color. */
function stencil({ size: [height, width], counts }, color) {
  const canvas = new OffscreenCanvas(width, height);
  const pen = canvas.getContext("2d");
  pen.fillStyle = color;
  let place = 0;
  counts.forEach((count, i) => {
    const end = place + count;
    while (i % 2 && place < end) {
      const [x, y] = [Math.floor(place / height), place % height];
      const run = Math.min(end - place, height - y);
      pen.fillRect(x, y, 1, run);
      place += run;
    }
    place = end;
  });
  return canvas;
}

function number(id, otherwise) {
  return at(id).value === "" ? otherwise : Number(at(id).value);
}

function forgetAnswer() {
  at("answer").textContent = at("times").textContent = "";
  at("found").replaceChildren();
  note("");
}

function complain(error) {
  at("error").hidden = !error;
  at("error").textContent = error ? error.message : "";
}

function note(text) {
  at("note").hidden = !text;
  at("note").textContent = text;
}

function refresh() {
  const idle = engine && picture && !running;
  at("run").setAttribute("aria-disabled", !idle); // not disabled, so that the focus stays on it
  for (const button of at("presets").children) button.disabled = !idle;
  at("stop").hidden = !running;
  at("answer").classList.toggle("running", Boolean(running));
  document.body.dataset.state = running ? "running" : engine ? "ready" : "not ready";
}

start();

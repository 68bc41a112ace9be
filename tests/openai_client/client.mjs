/** `node client.mjs URL PICTURE...`: asks serve-onnx through OpenAI's package, and prints what it saw as one object. */
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [baseURL, ...files] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const pictures = files.map((file) => `data:image/png;base64,${readFileSync(file).toString("base64")}`);
const model = "shipped";

function messages(prompt, urls = pictures.slice(0, 1)) {
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return [{ role: "user", content: [{ type: "text", text: prompt }, ...parts] }];
}

const create = (options) => client.chat.completions.create({ model, ...options });
const text = (await create({ messages: messages("caption en") })).choices[0].message.content;
let streamed = "";
for await (const chunk of await create({ messages: messages("caption en"), stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
const several = (await create({ messages: messages("caption en", pictures) })).usage.prompt_tokens;
const { logprobs } = (await create({ messages: messages("caption en"), logprobs: true, top_logprobs: 2 })).choices[0];
const models = (await client.models.list()).data.map(({ id }) => id);
const errors = [];
for (const options of [{ messages: [] }, { messages: messages("caption en"), model: "gpt" }, { messages: messages("caption en"), n: 999 }]) {
  try {
    await create(options);
  } catch (error) {
    errors.push([error.constructor.name, error.status, error.param]);
  }
}
console.log(JSON.stringify({ text, streamed, several, tokens: logprobs.content.map(({ token }) => token), models, errors }));

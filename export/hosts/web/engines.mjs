/**
 * Where the page's answers come from. An engine has `about`, a line on what runs where, `place`, in a few words, and
 * `ask(picture, prompt, options)`, which answers as the hosts do: a picture is { blob, … }, the options are those of a
 * question in browser.d.mts, as far as the engine knows them.
 */
import { PaliGemmaError, plural } from "../common/errors.mjs";
import { load } from "./browser.mjs";

const SERVICE = "../v1/"; // of a server that runs the model itself, for bundles that no browser holds
const FIELDS = { temperature: "temperature", topP: "top_p", topK: "top_k", maxNewTokens: "max_new_tokens" };

/** The server's own engine, if it has one; else the bundle in this browser. */
export async function openEngine(bundle, options) {
  return (await openService(new URL(SERVICE, location.href))) ?? openHere(bundle, options);
}

/** The bundle at a URL, run by this browser. */
export async function openHere(bundle, options) {
  const model = await load(bundle, options);
  const { seconds, backend, threads, precision, size } = model.about;
  const where = backend === "webgpu" ? "WebGPU" : `WebAssembly, ${plural(threads, "thread")}`;
  const read = new WeakMap(); // pictures, so that each is read once for all its prompts
  return {
    place: "runs in this page; nothing leaves it",
    about: `Loaded in ${seconds.toFixed(1)} s: ${precision}, pictures of ${size} px, ${where}.`,
    async ask(picture, prompt, options) {
      if (!read.has(picture)) read.set(picture, model.picture(picture.blob, { signal: options.signal }));
      const reading = read.get(picture);
      reading.catch(() => read.delete(picture)); // of a reading that was stopped the next has nothing
      return (await reading).generate(prompt, options);
    },
  };
}

/** The service at a URL, by the page's own server; null if there is none. */
export async function openService(base) {
  const answered = await fetch(new URL("models", base)).catch(() => null);
  const models = answered?.ok ? await answered.json().catch(() => null) : null;
  if (!models?.data?.length) return null;
  return {
    place: "runs on this page's server",
    about: `Answers come from the server, ${base.host}: ${models.data.map(({ id }) => id).join(", ")}.`,
    async ask({ blob }, prompt, { signal, ...options }) {
      const form = new FormData();
      form.append("image", blob);
      form.append("prompt", prompt);
      for (const [name, field] of Object.entries(FIELDS)) if (options[name] !== undefined) form.append(field, options[name]);
      if (options.temperature > 0) form.append("seed", Math.floor(Math.random() * 2 ** 32)); // else every draw were the same
      const response = await fetch(new URL("answer", base), { method: "POST", body: form, signal }).catch((error) => {
        throw signal?.aborted ? error : new PaliGemmaError(`the server does not answer (${error.message})`);
      });
      const found = await response.json().catch(() => null);
      if (!response.ok) throw new PaliGemmaError(found?.error?.message ?? `the server answers ${response.status}`);
      if (typeof found?.text !== "string") throw new PaliGemmaError("the server's answer is none of this page's");
      return found;
    },
  };
}

// Words of the pack's own pages, from locales/<language>/main.json ("stretto"), in the editor's language where there is one.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

let texts = {};

/** Fetch the words once; until then, and where a language lacks one, English or the key itself stands. */
export async function loadTexts() {
  try {
    const every = await (await api.fetchApi("/i18n")).json();
    const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
    texts = { ...every.en?.stretto, ...every[language]?.stretto };
  } catch {
    texts = {}; // an old server: keys are readable
  }
}

/** The words for `key`, with `{name}` filled from `values`. */
export function say(key, values = {}) {
  const words = texts[key] ?? key;
  return words.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

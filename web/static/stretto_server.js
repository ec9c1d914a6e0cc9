// Talks to the pack's routes. Changes carry a token of this start of ComfyUI, which only pages of its own origin are given.
import { api } from "../../scripts/api.js";

/** What a route answered with an error; `answer` is its whole document. */
export class Refusal extends Error {
  constructor(message, answer) {
    super(message);
    this.answer = answer;
  }
}

/** The address of a path of the server, for frames and new tabs. */
export const address = (path) => api.fileURL?.(path) ?? path;

async function ask(path, options) {
  let response;
  try {
    response = await api.fetchApi(path, options);
  } catch {
    throw new Refusal("ComfyUI does not answer.", {});
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refusal(answer.error ?? `${path}: status ${response.status}`, answer);
  return answer;
}

export const planFacts = () => ask("/stretto/plan");
export const panelStatus = () => ask("/stretto/panel", { cache: "no-store" });

/** Digests of the runs of a prompt, of the newest one where none is named. */
export async function runsOf(promptId) {
  const query = promptId ? `?prompt_id=${encodeURIComponent(promptId)}` : "";
  return (await ask(`/stretto/runs${query}`, { cache: "no-store" })).runs;
}

/** The workflow that a prompt ran with, as the editor had sent it; null where the server no longer knows. */
export async function workflowOf(promptId) {
  const history = await ask(`/history/${encodeURIComponent(promptId)}`, { cache: "no-store" }).catch(() => ({}));
  return history[promptId]?.prompt?.[3]?.extra_pnginfo?.workflow ?? null;
}

/** Ask for a change. The token is fetched anew each time: a restarted ComfyUI has another one. */
async function change(path, body) {
  const { token } = await ask("/stretto/session", { cache: "no-store" });
  const headers = { "Content-Type": "application/json", "X-Stretto-Token": token };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body) });
}

export const startPanel = (port) => change("/stretto/panel/start", { port });
export const stopPanel = () => change("/stretto/panel/stop", {});
export const handOver = (workflow, name) => change("/stretto/panel/workflow", { workflow, name });

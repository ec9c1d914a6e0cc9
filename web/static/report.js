// Shows the run of a Stretto Report on the node itself. Without this file the node still gives it as picture and STRING.
import { app } from "../../scripts/app.js";
import { ensureStyle, make } from "./stretto_dom.js";
import { loadTexts, say } from "./stretto_texts.js";
import { gain, seconds, timeline } from "./stretto_timeline.js";

const WIDGET = "stretto_summary";
const LEAST = 150;
const MOST = 320;

/** Add the read-only area to a report node, once. */
function areaOf(node) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found) return found.element;
  ensureStyle();
  const element = make("div", { className: "stretto stretto-report" });
  element.addEventListener("wheel", (event) => {
    if (element.scrollHeight > element.clientHeight) event.stopPropagation(); // scroll the text, not the canvas
  });
  const widget = node.addDOMWidget(WIDGET, "stretto_text", element, {
    getMinHeight: () => LEAST,
    getMaxHeight: () => MOST,
    hideOnZoom: true,
  });
  widget.serialize = false; // derived from the last run: not part of the workflow
  if (widget.options) widget.options.serialize = false; // nor of the prompt
  return element;
}

/** Headline and small timeline of a run. */
function pictureOf(run) {
  const figures = `${run.model} · ${run.sampler}, ${say("steps", { count: run.steps })} · ${seconds(run.seconds)}`;
  const headline = make("div", { className: "stretto-headline" }, make("strong", { textContent: gain(run) }), figures);
  return [headline, timeline(run, { bars: false })];
}

function show(node, output) {
  const text = output?.text;
  if (!text) return;
  const words = make("pre", { textContent: Array.isArray(text) ? text.join("\n") : String(text) });
  const run = output.stretto_run?.[0];
  areaOf(node).replaceChildren(...(run?.schema === "run-digest@1" ? pictureOf(run) : []), words);
}

app.registerExtension({
  name: "stretto.report",
  async setup() {
    await loadTexts();
  },
  nodeCreated(node) {
    if (node.comfyClass !== "StrettoReport") return;
    const previous = node.onExecuted;
    node.onExecuted = function (output) {
      previous?.apply(this, arguments);
      show(this, output);
    };
  },
});

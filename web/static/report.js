// Shows the summary of a Stretto Report on the node itself. Without this file the node still gives it as a STRING.
import { app } from "../../scripts/app.js";

const WIDGET = "stretto_summary";

/** Add the read-only text area to a report node, once. */
function summaryElement(node) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found) return found.element;
  const element = document.createElement("pre");
  element.style.cssText =
    "margin:0;padding:6px 8px;overflow:auto;white-space:pre-wrap;font:11px/1.45 ui-monospace,monospace;" +
    "color:var(--input-text,#ddd);background:var(--comfy-input-bg,#222);border-radius:6px;user-select:text";
  const widget = node.addDOMWidget(WIDGET, "stretto_text", element, {
    getMinHeight: () => 120,
    getMaxHeight: () => 240,
    hideOnZoom: true,
  });
  widget.serialize = false; // derived from the last run: not part of the workflow
  if (widget.options) widget.options.serialize = false; // nor of the prompt
  return element;
}

app.registerExtension({
  name: "stretto.report",
  nodeCreated(node) {
    if (node.comfyClass !== "StrettoReport") return;
    const previous = node.onExecuted;
    node.onExecuted = function (output) {
      previous?.apply(this, arguments);
      const text = output?.text;
      if (text) summaryElement(this).textContent = Array.isArray(text) ? text.join("\n") : String(text);
    };
  },
});

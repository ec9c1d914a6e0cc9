// Small helpers that make elements. Texts are always set as text: names of nodes and models may hold anything.

const STYLE = new URL("./stretto.css", import.meta.url).href;

/** Make sure the page has the pack's style sheet. */
export function ensureStyle() {
  if (document.querySelector(`link[href="${STYLE}"]`)) return;
  document.head.append(make("link", { rel: "stylesheet", href: STYLE }));
}

/** An element with properties and children; null children are left out. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An SVG element with attributes and children. */
export function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A button that does one thing at a time. */
export function button(text, properties, act) {
  const element = make("button", { type: "button", textContent: text, ...properties });
  element.addEventListener("click", async () => {
    element.disabled = true;
    try {
      await act();
    } finally {
      element.disabled = false;
    }
  });
  return element;
}

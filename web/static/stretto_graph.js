// What the graph on the canvas asks of its runs: Stretto nodes, whether they are on, and which of them cannot share a run.
import { app } from "../../scripts/app.js";

const MUTED = 2;
const BYPASSED = 4;
/** What carries requests from node to node. */
const CARRIERS = ["MODEL", "SAMPLER", "GUIDER"];
/** Ids of a subgraph's own input and output node. */
const SUBGRAPH_INPUT = -10;
const SUBGRAPH_OUTPUT = -20;
/** The editor writes one of these behind every seed. */
const SEED_CONTROLS = ["fixed", "increment", "decrement", "randomize"];

/** The whole graph, also while a subgraph is open. */
export const rootGraph = () => app.rootGraph ?? app.graph;

const linksOf = (graph) => (graph.links?.values ? [...graph.links.values()] : Object.values(graph.links ?? {}));
const linkOf = (graph, id) => graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
const typeOf = (node) => node.comfyClass ?? node.type;
const insideOf = (node) => (node.isSubgraphNode?.() ? node.subgraph : undefined);
const keyOf = (place) => [...place.parents.map((parent) => parent.node.id), place.node.id].join(":");

/** Every node, those of subgraphs too: {graph, node, parents} with the subgraph nodes around it. */
function places(graph, parents = [], found = []) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    const place = { graph, node, parents };
    found.push(place);
    const inside = insideOf(node);
    if (inside && parents.length < 16) places(inside, [...parents, place], found);
  }
  return found;
}

/** "on", "bypassed" or "muted": a node's own mode, or that of a subgraph around it. */
function stateOf(place) {
  const modes = [place.node.mode, ...place.parents.map((parent) => parent.node.mode)];
  return modes.includes(MUTED) ? "muted" : modes.includes(BYPASSED) ? "bypassed" : "on";
}

/** The place that feeds an input, through the walls of subgraphs; null where nothing does. */
function feeding(place, link) {
  while (link) {
    if (link.origin_id === SUBGRAPH_INPUT) {
      const parent = place.parents.at(-1);
      if (!parent) return null;
      const input = parent.node.inputs?.[link.origin_slot];
      place = parent;
      link = linkOf(parent.graph, input?.link);
      continue;
    }
    const { graph, parents } = place;
    const node = graph.getNodeById(link.origin_id);
    if (!node) return null;
    place = { graph, node, parents };
    const inside = insideOf(node);
    if (!inside) return place;
    const slot = link.origin_slot;
    link = linksOf(inside).find((other) => other.target_id === SUBGRAPH_OUTPUT && other.target_slot === slot);
    place = { graph: inside, node: null, parents: [...parents, place] };
  }
  return null;
}

/** The places that pass their requests on to `place`: the first model, sampler and guider it is given. */
function upstream(place) {
  const found = [];
  const taken = new Set();
  for (const input of place.node.inputs ?? []) {
    const link = input.link === null || input.link === undefined ? null : linkOf(place.graph, input.link);
    const type = CARRIERS.includes(input.type) ? input.type : link?.type;
    const carries = CARRIERS.includes(type) || input.type === "*";
    if (!link || !carries || taken.has(type)) continue;
    taken.add(type);
    const from = feeding(place, link);
    if (from) found.push(from);
  }
  return found;
}

function chainOf(end) {
  const chain = new Map();
  const left = [end];
  while (left.length) {
    const place = left.pop();
    const key = keyOf(place);
    if (chain.has(key)) continue;
    chain.set(key, place);
    left.push(...upstream(place));
  }
  return chain;
}

const carries = (slots) => (slots ?? []).some((slot) => CARRIERS.includes(slot.type));

/**
 * The plan of a graph.
 * @param facts plan-facts@1 of the server
 * @returns {{items: object[], conflicts: object[][]}} items: {key, place, type, title, state, techniques, accelerates, used};
 *   conflicts: pairs of items that cannot share the run they both belong to.
 */
export function planOf(graph, facts) {
  const every = places(graph).filter((place) => !insideOf(place.node));
  const items = new Map();
  for (const place of every) {
    const type = typeOf(place.node);
    const known = facts.nodes[type];
    if (!known && !String(type).startsWith("Stretto")) continue;
    items.set(keyOf(place), {
      key: keyOf(place),
      place,
      type,
      title: place.node.title || type,
      state: stateOf(place),
      techniques: known?.techniques ?? [],
      accelerates: known?.accelerates ?? false,
      used: false,
    });
  }
  const conflicts = new Map();
  for (const end of every.filter((place) => carries(place.node.inputs) && !carries(place.node.outputs))) {
    if (stateOf(end) !== "on") continue;
    const together = [...chainOf(end).keys()].map((key) => items.get(key)).filter((item) => item?.state === "on");
    for (const item of together) item.used = true;
    together.forEach((first, place) => {
      for (const second of together.slice(place + 1)) {
        if (clash(first, second, facts)) conflicts.set([first.key, second.key].sort().join(" "), [second, first]);
      }
    });
  }
  return { items: [...items.values()], conflicts: [...conflicts.values()] };
}

/** Whether two nodes cannot share a run, whichever of their techniques their settings choose. */
function clash(first, second, facts) {
  const excluded = (a, b) => facts.conflicts.some(([c, d]) => (a === c && b === d) || (a === d && b === c));
  if (!first.techniques.length || !second.techniques.length) return false;
  return first.techniques.every((a) => second.techniques.every((b) => excluded(a, b)));
}

/** A short text that changes when anything on the canvas does that a run depends on. */
export function fingerprint(graph) {
  const parts = places(graph).map(({ node, parents }) => {
    const values = (node.widgets ?? []).map((widget) => String(widget.value).slice(0, 200));
    const links = (node.inputs ?? []).map((input) => input.link);
    return [parents.length, node.id, node.mode, node.title, values, links];
  });
  return JSON.stringify(parts);
}

/** The inputs that a link feeds; the others are left out, since files and editors list them differently. */
const linked = (node) =>
  (node.inputs ?? []).flatMap(({ name, link }) => (link === null || link === undefined ? [] : [[name, link]]));

/** What a saved workflow asks for, without seeds: two of one signature do the same work. */
export function signature(workflow) {
  const nodes = [workflow, ...(workflow?.definitions?.subgraphs ?? [])].flatMap((graph) => graph?.nodes ?? []);
  const parts = nodes.map((node) => {
    const values = Array.isArray(node.widgets_values) ? node.widgets_values : Object.values(node.widgets_values ?? {});
    const told = values.filter((value) => value !== null && value !== undefined); // pictures and texts of a run are none
    const kept = told.filter((value, place) => !SEED_CONTROLS.includes(value) && !SEED_CONTROLS.includes(told[place + 1]));
    return [node.id, node.type, node.mode, kept, linked(node)];
  });
  return JSON.stringify(parts);
}

/** Turn a node on, or bypass it. */
export function switchNode(item) {
  item.place.node.mode = item.place.node.mode === 0 ? BYPASSED : 0;
  item.place.graph.setDirtyCanvas?.(true, true);
  app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.(); // so that it can be undone
}

/** Bring a node to the middle of the canvas and select it. */
export function showNode(item) {
  if (item.place.graph !== app.canvas?.graph) return; // inside a subgraph that is not open
  app.canvas.centerOnNode?.(item.place.node);
  app.canvas.selectNode?.(item.place.node);
}

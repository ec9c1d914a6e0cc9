// The sidebar's contents: the plan of the graph, the last run, and the panel in a frame.
import { fingerprint, planOf, rootGraph, showNode, signature, switchNode } from "./stretto_graph.js";
import { button, ensureStyle, make } from "./stretto_dom.js";
import { say } from "./stretto_texts.js";
import { gain, seconds, timeline, times } from "./stretto_timeline.js";

/** How often the canvas is looked at while the sidebar is open, in milliseconds: no event tells every change. */
const LOOK = 500;

/** One sidebar. `state` outlives it: {facts, runs, workflow, panel}. */
export class SidebarView {
  constructor(element, state) {
    ensureStyle();
    element.style.height = "100%";
    this.state = state;
    this.seen = "";
    this.plan = make("section");
    this.run = make("section");
    this.control = make("section", { className: "stretto-control" });
    this.page = make("div", { className: "stretto-page" });
    this.overview = make("div", { className: "stretto-overview" }, this.plan, this.control, this.run);
    element.replaceChildren(make("div", { className: "stretto stretto-sidebar" }, this.overview, this.page));
    this.timer = setInterval(() => this.look(), LOOK);
    this.look();
    this.showRun();
    this.showPanel();
  }

  close() {
    clearInterval(this.timer);
  }

  /** Draw the plan anew where the canvas has changed. */
  look() {
    const seen = fingerprint(rootGraph());
    if (seen === this.seen) return;
    this.seen = seen;
    this.showPlan();
  }

  showPlan() {
    const { facts } = this.state;
    if (!facts) return this.plan.replaceChildren(make("p", { className: "stretto-faint", textContent: say("noFacts") }));
    const { items, conflicts } = planOf(rootGraph(), facts);
    const techniques = items.filter((item) => item.accelerates);
    const others = items.filter((item) => !item.accelerates && item.type.startsWith("Stretto"));
    const current = this.isCurrent();
    const children = [make("h3", { textContent: say("plan") })];
    if (!techniques.length) children.push(make("p", { className: "stretto-faint", textContent: say("noTechniques") }));
    else children.push(this.expected(techniques, current));
    children.push(this.list(techniques, current), ...conflicts.map(conflictOf));
    if (others.length) children.push(make("h4", { textContent: say("others") }), this.list(others, current));
    this.plan.replaceChildren(...children);
  }

  /** Whether the last run did what the canvas asks for now. */
  isCurrent() {
    const { runs, workflow } = this.state;
    return Boolean(runs?.length && workflow && signature(workflow) === signature(rootGraph().serialize()));
  }

  expected(techniques, current) {
    const on = techniques.some((item) => item.state === "on" && item.used);
    const runs = this.state.runs ?? [];
    const known = current ? runs.filter((run) => (run.measured ?? run.predicted) !== null) : [];
    const factors = known.map((run) => times(run.measured ?? run.predicted));
    const words = !on ? say("plain") : known.length ? factors.join(", ") : say("unknown");
    const source = known.every((run) => run.measured !== null) ? say("measuredLastRun") : say("fromLastRun");
    const why = !on ? "" : known.length ? source : runs.length && !current ? say("changedSince") : "";
    return make(
      "p",
      { className: "stretto-expected" },
      `${say("expected")} `,
      make("strong", { textContent: words }),
      why ? make("small", { textContent: ` ${why}` }) : null,
    );
  }

  list(items, current) {
    return make("ul", { className: "stretto-nodes" }, ...items.map((item) => this.row(item, current)));
  }

  row(item, current) {
    const toggle = make("input", { type: "checkbox", checked: item.state === "on", title: say("toggle") });
    const inherited = item.place.parents.some((parent) => parent.node.mode !== 0);
    toggle.disabled = inherited;
    toggle.setAttribute("aria-label", `${item.title}: ${say("toggle")}`);
    toggle.addEventListener("change", () => {
      switchNode(item);
      this.look();
    });
    const name = button(item.title, { className: "stretto-name", title: say("show") }, () => showNode(item));
    const told = current && item.state === "on" ? this.toldOf(item) : null;
    const state = item.state === "on" && !item.used && item.accelerates ? "unused" : item.state;
    return make(
      "li",
      { className: `stretto-node stretto-${state}` },
      toggle,
      make("div", {}, name, make("span", { className: "stretto-state", textContent: say(state) }), told),
    );
  }

  /** What became of a node's technique in the last run. */
  toldOf(item) {
    const found = this.state.runs.flatMap((run) => run.techniques).find((told) => item.techniques.includes(told.technique));
    if (!found || found.technique === "measure") return null;
    const factor = found.factor ? ` ${times(found.factor)}.` : "";
    const words = `${say(`was-${found.status}`)}.${factor} ${found.reason}`;
    return make("small", { className: `stretto-told stretto-was-${found.status}`, textContent: words });
  }

  showRun() {
    const runs = this.state.runs ?? [];
    const children = [make("h3", { textContent: say("lastRun") })];
    if (!runs.length) children.push(make("p", { className: "stretto-faint", textContent: say("noRun") }));
    this.run.replaceChildren(...children, ...runs.map(runOf));
    this.showPlan();
  }

  /** Draw the panel's part: buttons, problems, and the frame where a page is open. */
  showPanel() {
    const { panel } = this.state;
    const runs = panel.status?.state === "running";
    const compare = button(say("compareNow"), { className: "stretto-primary" }, () => panel.compare());
    const open = button(say("openPage"), {}, () => panel.openPage());
    const stop = runs ? button(say("stop"), {}, () => panel.stop()) : null;
    compare.disabled = open.disabled = Boolean(panel.note);
    const line = panel.note || (runs ? say("panelRuns", { port: panel.status.port }) : "");
    this.control.replaceChildren(
      make("div", { className: "stretto-buttons" }, compare, open, stop),
      make("p", { className: "stretto-faint", role: "status", textContent: line }),
      ...problemOf(panel.problem),
    );
    this.showPage(panel);
  }

  showPage(panel) {
    const open = Boolean(panel.page);
    this.overview.hidden = open;
    this.page.hidden = !open;
    const shown = this.page.querySelector("iframe");
    if (!open) return this.page.replaceChildren();
    const notes = problemOf(panel.problem);
    if (shown?.dataset.page === panel.page) return undefined; // a new frame would lose what is typed into it
    const frame = make("iframe", { title: say("frame"), src: panel.page });
    frame.dataset.page = panel.page;
    const bar = make(
      "div",
      { className: "stretto-buttons" },
      button(`‹ ${say("plan")}`, {}, () => panel.set({ page: null, problem: null })),
      button(say("sendAgain"), {}, () => panel.compare()),
      button(say("openPage"), {}, () => panel.openPage()),
    );
    return this.page.replaceChildren(bar, ...notes, frame);
  }
}

function conflictOf([first, second]) {
  const words = say("conflict", { first: first.title, second: second.title });
  return make("p", { className: "stretto-warning", role: "alert", textContent: words });
}

function runOf(run) {
  const figures = [`${run.model} · ${run.sampler}, ${say("steps", { count: run.steps })} · ${seconds(run.seconds)}`];
  if (run.plain_seconds !== null) figures.push(say("plainTook", { seconds: seconds(run.plain_seconds) }));
  return make(
    "div",
    { className: "stretto-run" },
    make("div", { className: "stretto-headline" }, make("strong", { textContent: gain(run) }), figures.join(" · ")),
    timeline(run),
    run.outcome === "completed" ? null : make("p", { className: "stretto-warning", textContent: say("notCompleted", run) }),
    ...run.advice.map((words) => make("p", { className: "stretto-advice", textContent: words })),
  );
}

function problemOf(problem) {
  if (!problem) return [];
  const parts = [make("p", { className: "stretto-warning", role: "alert", textContent: problem.message })];
  if (problem.command) {
    const copy = button(say("copy"), {}, () => navigator.clipboard?.writeText(problem.command));
    parts.push(make("pre", { className: "stretto-command", textContent: problem.command }), copy);
  }
  if (problem.log) parts.push(make("pre", { className: "stretto-command", textContent: problem.log }));
  return parts;
}

// Draws a run (run-digest@1) in one row per guidance branch and one of seconds. Height says what colour says.
import { draw, make } from "./stretto_dom.js";
import { say } from "./stretto_texts.js";

const SHARE = { computed: 1, mixed: 0.8, forecast: 0.62, reused: 0.34 };
const ROW = 18;
const BARS = 34;
const COLUMN = 10;

/** "1.93x", or an empty text where nothing is known. */
export const times = (factor) => (factor === null || factor === undefined ? "" : `${factor.toFixed(2)}×`);

/** A time as a person reads it. */
export function seconds(value) {
  if (value === null || value === undefined) return "";
  return value < 1 ? `${(value * 1000).toFixed(value < 0.1 ? 1 : 0)} ms` : `${value.toFixed(2)} s`;
}

/** What a run gained, in a few words: measured where a plain run is known, else predicted, else nothing was skipped. */
export function gain(run) {
  if (run.measured !== null && (run.predicted !== null || run.techniques.some(worked))) {
    return say("measured", { factor: times(run.measured) });
  }
  return run.predicted === null ? say("nothingSaved") : say("predicted", { factor: times(run.predicted) });
}

const worked = (item) => item.technique !== "measure" && item.status !== "off";

/** The timeline of a run; `bars` also draws the seconds of each evaluation. */
export function timeline(run, { bars = true } = {}) {
  const holder = make("div", { className: "stretto-timeline" });
  const count = run.levels.length;
  if (!count) return holder;
  for (const [name, row] of Object.entries(run.rows)) {
    holder.append(label(name === "all" ? "" : name), strip(run, row, count));
  }
  if (bars) holder.append(label(say("seconds")), barsOf(run, count));
  holder.append(legend(run));
  return holder;
}

const label = (text) => make("span", { className: "stretto-timeline-label", textContent: text });

const canvas = (count, height, words, children) =>
  draw(
    "svg",
    {
      viewBox: `0 0 ${count * COLUMN} ${height}`, preserveAspectRatio: "none", height, role: "img", "aria-label": words,
    },
    ...children,
  );

function strip(run, row, count) {
  const cells = row.flatMap((decision, place) => {
    if (!decision) return [];
    const height = ROW * SHARE[decision];
    return [cell(run, place, decision, ROW - height, height, decision)];
  });
  return canvas(count, ROW, say("stepsShown", { count }), cells);
}

function barsOf(run, count) {
  const values = run.step_seconds.map((value) => value ?? 0);
  const sorted = [...values].sort((a, b) => a - b);
  const longest = sorted[Math.floor(0.95 * (count - 1))] || sorted[count - 1] || 1;
  const first = Object.values(run.rows)[0];
  const cells = values.map((value, place) => {
    const height = Math.max(Math.min(value / longest, 1) * BARS, 0.5);
    return cell(run, place, first[place] ?? "computed", BARS - height, height, first[place] ?? "computed");
  });
  return canvas(count, BARS, say("secondsShown"), cells);
}

function cell(run, place, decision, y, height, kind) {
  const words = say("stepTitle", {
    number: place + 1,
    level: run.levels[place].toFixed(3),
    decision: say(decision),
    seconds: seconds(run.step_seconds[place]),
  });
  const title = draw("title");
  title.textContent = run.reasons[place] ? `${words}\n${run.reasons[place]}` : words;
  const box = { x: place * COLUMN, y, width: COLUMN - 1.5, height, class: `stretto-${kind}` };
  return draw("rect", box, title);
}

function legend(run) {
  const entries = Object.entries(run.counts).filter(([kind, number]) => number || kind === "computed");
  const items = entries.map(([kind, number]) =>
    make("span", {}, make("i", { className: `stretto-${kind}` }), `${say(kind)} ${number}`),
  );
  return make("div", { className: "stretto-legend" }, ...items);
}

// Small charts of the last hour. Pointer or arrow keys select a sample in all of them, and a note
// describes it.

import { Chart } from "./chart.js";
import { $, attrs, text } from "./dom.js";
import { model } from "./model.js";
import { clock, count, milliseconds, number, timeZone } from "./words.js";

const values = (samples, of) => samples.map(of).filter((value) => value !== null && value !== undefined);
const least = (samples, of) => values(samples, of).reduce((a, b) => Math.min(a, b), Infinity);
const most = (samples, of) => values(samples, of).reduce((a, b) => Math.max(a, b), -Infinity);
const total = (samples, of) => values(samples, of).reduce((a, b) => a + b, 0);

const alive = (sample) => sample.alive;
const middle = (sample) => sample.round_trip_ms;
const worst = (sample) => sample.worst_round_trip_ms;
const bad = (sample) => sample.paths_bad;
const fresh = (sample) => sample.fresh;

function span(samples, of, unit) {
  const [low, high] = [least(samples, of), most(samples, of)];
  const now = unit(of(samples.at(-1)) ?? null);
  return low === high ? `${now} throughout` : `${now} now, ${unit(low)} to ${unit(high)}`;
}

const charts = [
  new Chart({
    title: "Converged",
    kind: "band",
    height: 48,
    series: [
      { tone: "ok", of: (sample) => (sample.converged ? 1 : 0) },
      { tone: "bad", of: (sample) => (sample.converged ? 0 : 2) },
    ],
    summary: (samples) => {
      const not = samples.filter((sample) => !sample.converged).length;
      return not ? `not in ${number(not)} of ${count(samples.length, "sample")} (tall)` : "throughout";
    },
  }),
  new Chart({
    title: "Members",
    series: [
      { name: "known", tone: "dim", of: (sample) => sample.members },
      { name: "alive", tone: "accent", of: alive },
    ],
    // With many members, a single one that is down would not be visible on a scale that starts at zero.
    low: (samples) => {
      const low = least(samples, alive);
      return low > 10 && low < Infinity ? Math.floor((low - 1) / 5) * 5 : 0;
    },
    summary: (samples) => span(samples, alive, number),
  }),
  new Chart({
    title: "Round trip",
    unit: (value) => `${Number(value.toPrecision(2))} ms`,
    series: [
      { name: "worst", tone: "dim", of: worst },
      { name: "median", tone: "accent", of: middle },
    ],
    summary: (samples) =>
      values(samples, middle).length ? `median ${span(samples, middle, milliseconds)}` : "no peer answered",
  }),
  new Chart({
    title: "Own paths not ok",
    kind: "bars",
    series: [{ tone: "bad", of: bad }],
    summary: (samples) => (most(samples, bad) > 0 ? span(samples, bad, number) : "none"),
  }),
  new Chart({
    title: "Repairs per sample",
    kind: "bars",
    series: [{ tone: "warn", of: fresh }],
    summary: (samples) => (total(samples, fresh) ? `${number(total(samples, fresh))} in all` : "none"),
  }),
];

const box = $("history");
const lead = `${$("history-lead").textContent} Times are those of ${timeZone()}.`;
box.append(...charts.map((chart) => chart.figure));
attrs(box, {
  tabindex: 0,
  role: "group",
  "aria-label": "Charts; left and right arrow keys select a sample",
});

let samples = [];
/** Time of the selected sample; an index would change with every new sample. */
let picked = null;

export function showHistory() {
  // The repair counter restarts with the agent.
  samples = model.samples.map((sample, i, all) => {
    const before = all[i - 1]?.repairs ?? sample.repairs;
    return { ...sample, fresh: sample.repairs >= before ? sample.repairs - before : sample.repairs };
  });
  for (const chart of charts) chart.show(samples);
  pick(picked, false);
}

function pick(at, aloud) {
  const sample = at === null ? null : samples.find((one) => one.at === at);
  picked = sample ? at : null;
  for (const chart of charts) chart.point(sample);
  attrs($("history-lead"), { "aria-live": aloud ? "polite" : "off" });
  text($("history-lead"), sample ? describe(sample) : lead);
}

function describe(sample) {
  const when = clock(new Date(sample.at * 1000));
  const spans =
    sample.round_trip_ms === null
      ? "no round trip"
      : `median ${milliseconds(sample.round_trip_ms)}, worst ${milliseconds(sample.worst_round_trip_ms)}`;
  const state = sample.converged ? "converged" : "not converged";
  return `${when}: ${state}; ${number(sample.alive)} of ${number(sample.members)} alive; ${spans}; ${count(sample.paths_bad, "path")} not ok; ${count(sample.fresh, "repair")}`;
}

box.addEventListener("pointermove", (event) => {
  const chart = charts.find(({ plot }) => plot.contains(event.target));
  if (!chart?.x || !samples.length) return;
  const x = event.clientX - chart.plot.getBoundingClientRect().left;
  const off = (sample) => Math.abs(chart.x(sample.at) - x);
  pick(samples.reduce((a, b) => (off(b) < off(a) ? b : a)).at, false);
});
box.addEventListener("pointerleave", () => pick(null, false));
box.addEventListener("blur", () => pick(null, false));
box.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (!step || !samples.length) return;
  const now = samples.findIndex((one) => one.at === picked);
  const next = Math.min(
    Math.max((now < 0 ? samples.length - (step < 0 ? 0 : 1) : now) + step, 0),
    samples.length - 1,
  );
  pick(samples[next].at, true);
  event.preventDefault();
});

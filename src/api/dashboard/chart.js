// A small chart over time. A refresh only changes its few paths and labels.

import { attr, attrs, el, onWidth, svg, text } from "./dom.js";
import { clock } from "./words.js";

const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const FOOT = 22;
/** Shortest time span shown, in seconds. Without it a young agent's chart would shrink with each new sample. */
const SHORTEST = 600;
/** Samples further apart than this, in seconds, are not joined: the host was asleep. */
const APART = 35;

/** `series` are [{name, tone, of(sample)}], drawn as "line" or "bars"; a "band" shows two states over time. */
export class Chart {
  constructor({ title, kind = "line", series, unit = (value) => value, height = 132, low = () => 0, summary }) {
    Object.assign(this, { kind, series, unit, height, low, summary, samples: [], width: 0 });
    this.axes = svg("path", { class: "axes" });
    this.lines = series.map(({ tone }) => svg("path", { class: `series in-${kind} ${tone}` }));
    this.labels = [0, 1, 2, 3, 4].map(() => svg("text"));
    this.pointer = svg("path", { class: "pointer" });
    this.plot = svg("svg", { role: "img" }, this.axes, ...this.lines, ...this.labels, this.pointer);
    this.words = el("span", { class: "chart-note" });
    const keys =
      kind === "line" && series.length > 1
        ? series.map(({ name, tone }) => el("span", { class: `key ${tone}` }, name))
        : [];
    const box = el("div", { class: "plot" }, this.plot);
    this.figure = el(
      "figure",
      { class: `of-${kind}` },
      el("figcaption", {}, el("b", {}, title), ...keys, this.words),
      box,
    );
    this.title = title;
    onWidth(box, (width) => {
      this.width = width;
      this.show(this.samples);
    });
  }

  show(samples) {
    this.samples = samples;
    const words = samples.length ? this.summary(samples) : "no samples yet";
    text(this.words, words);
    attr(this.plot, "aria-label", `${this.title}: ${words}`);
    if (!this.width) return;
    const { width, height } = this;
    attrs(this.plot, { width, height, viewBox: `0 0 ${width} ${height}` });
    const last = samples.at(-1)?.at ?? 0;
    const first = Math.min(samples[0]?.at ?? 0, last - SHORTEST);
    const bottom = height - FOOT;
    this.x = (at) => LEFT + ((at - first) / (last - first || 1)) * (width - LEFT - RIGHT);
    this.scale(samples);
    const y = (value) => bottom - ((value - this.floor) / (this.ceiling - this.floor)) * (bottom - TOP);
    const middle =
      this.kind === "band"
        ? ""
        : `M${LEFT} ${y((this.floor + this.ceiling) / 2)}H${width - RIGHT}M${LEFT} ${TOP}H${width - RIGHT}`;
    attr(this.axes, "d", `${middle}M${LEFT} ${bottom}H${width - RIGHT}`);
    const draw = { line: joined, bars, band }[this.kind];
    this.series.forEach(({ of }, i) => attr(this.lines[i], "d", draw(samples, of, this.x, y, bottom)));
    const times = samples.length
      ? [first, (first + last) / 2, last].map((at) => clock(new Date(at * 1000)).slice(0, 5))
      : ["", "", ""];
    const scale = this.kind === "band" ? ["", ""] : [this.unit(this.floor), this.unit(this.ceiling)];
    const spots = [
      [LEFT - 7, bottom + 1, "end"],
      [LEFT - 7, TOP + 5, "end"],
      [LEFT, height - 6, "start"],
      [(LEFT + width - RIGHT) / 2, height - 6, "middle"],
      [width - RIGHT, height - 6, "end"],
    ];
    [...scale, ...times].forEach((label, i) => {
      const [x, at, anchor] = spots[i];
      attrs(this.labels[i], { x, y: at, "text-anchor": anchor });
      text(this.labels[i], label);
    });
  }

  scale(samples) {
    let most = 0;
    for (const { of } of this.series) for (const sample of samples) most = Math.max(most, of(sample) ?? 0);
    this.floor = this.low(samples);
    const step = 10 ** Math.floor(Math.log10(most - this.floor || 1));
    const round = [1, 2, 5, 10].find((times) => times * step >= most - this.floor) * step;
    this.ceiling = this.floor + (round || 1);
  }

  /** Draws a vertical line at a sample; null for none. */
  point(sample) {
    attr(this.pointer, "d", sample && this.x ? `M${this.x(sample.at)} ${TOP}V${this.height - FOOT}` : "");
  }
}

const fine = (value) => Math.round(value * 10) / 10;

function joined(samples, of, x, y) {
  let before = null;
  return samples
    .map((sample) => {
      const value = of(sample);
      if (value === null || value === undefined) return (before = null) ?? "";
      const start = before === null || sample.at - before > APART;
      before = sample.at;
      return `${start ? "M" : "L"}${fine(x(sample.at))} ${fine(y(value))}${start ? "h.1" : ""}`;
    })
    .join("");
}

function bars(samples, of, x, y, bottom) {
  return samples
    .map((sample) =>
      of(sample) ? `M${fine(x(sample.at))} ${bottom}V${fine(Math.min(y(of(sample)), bottom - 2))}` : "",
    )
    .join("");
}

function band(samples, of, x, _, bottom) {
  const width = (samples.length > 1 ? x(samples[1].at) - x(samples[0].at) : 4) + 0.3;
  const high = (value) => (value === 1 ? 6 : 14);
  return samples
    .map((sample) => {
      const value = of(sample);
      return value
        ? `M${fine(x(sample.at) - width)} ${bottom - 2}h${fine(width)}v${-high(value)}h${-fine(width)}z`
        : "";
    })
    .join("");
}

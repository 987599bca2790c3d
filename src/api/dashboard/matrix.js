// The path matrix: the paths of every member, as that member reports them. It is a canvas, because it has
// a cell per pair.

import { Cells } from "./cells.js";
import { $, color, el, onWidth } from "./dom.js";
import { legend } from "./icon.js";
import { model, nameOf, presentMembers, select } from "./model.js";
import { summarize } from "./pathwords.js";
import { PATHS, SILENT, byName, domainOf, milliseconds, pathLook, shorten } from "./words.js";

const LARGEST = 46;
const SMALLEST = 8;
/** Longest label, in characters. */
const LONGEST = 12;

let nodes = [];
let names = new Map();
let rows = new Map();
let domain = "";
let width = 0;
let drawn = {};

const cells = new Cells($("matrix"), $("matrix-cursor"), {
  hint: "Point at a cell, or use the arrow keys.",
  describe: (to, from) => describe(nodes[from], nodes[to]),
  choose: (_, from) => nodes[from] && select(nodes[from]),
});
onWidth($("at-matrix"), (now) => {
  width = now;
  showMatrix();
});

export function showMatrix(redraw) {
  if (!model.status || !width) return;
  // Before the first answer the cells are empty, so that the layout does not change when it arrives.
  const list = model.matrix?.rows ?? presentMembers().map(({ node, name }) => ({ node, name, paths: [] }));
  const source = model.matrix ?? list.map(({ node }) => node).join();
  if (redraw || source !== drawn.source || width !== drawn.width) {
    drawn = { source, width };
    read(list);
    draw();
    legend($("matrix-legend"), ["", { ...PATHS, "no answer": SILENT }, states()]);
    if (model.matrix) summarize(nodes, names, rows);
  }
  const chosen = nodes.indexOf(model.selected);
  cells.mark(chosen < 0 ? null : chosen, chosen < 0 ? null : chosen);
}

function read(list) {
  names = new Map();
  for (const { paths } of list) for (const { node } of paths ?? []) names.set(node, nameOf(node));
  for (const { node, name } of list) names.set(node, name ?? nameOf(node));
  nodes = [...names.keys()].sort((a, b) => byName(names.get(a), names.get(b)) || (a < b ? -1 : 1));
  rows = new Map(
    list.map(({ node, paths }) => [node, paths && new Map(paths.map((path) => [path.node, path]))]),
  );
}

/** Undefined: the member did not report this path; null: it did not answer. */
const pathOf = (from, to) => (rows.get(from) ? rows.get(from).get(to) : null);

/** Returns the states that the matrix shows. */
function states() {
  const found = new Set();
  for (const from of nodes) {
    for (const to of nodes) {
      if (from === to) continue;
      const path = pathOf(from, to);
      found.add(path === null ? "no answer" : (path?.state ?? "unknown"));
    }
  }
  return [...found];
}

function describe(from, to) {
  if (!from || !to) return null;
  const way = `${names.get(from)} to ${names.get(to)}`;
  if (from === to) return `${way}: itself`;
  const path = pathOf(from, to);
  if (path === null) return `${way}: ${names.get(from)} did not answer`;
  if (!path) return `${way}: not reported`;
  return path.round_trip_ms === null
    ? `${way}: ${path.state}`
    : `${way}: ${path.state}, ${milliseconds(path.round_trip_ms)}`;
}

function draw() {
  const size = nodes.length;
  $("matrix").hidden = size < 2;
  domain = domainOf([...names.values()]);
  const longest = Math.min(
    Math.max(0, ...nodes.map((node) => names.get(node).length - domain.length)),
    LONGEST,
  );
  const left = 14 + longest * 7;
  const cell = Math.max(SMALLEST, Math.min(LARGEST, Math.floor((width - 40 - left) / Math.max(size, 1))));
  const top = cell >= 40 && longest <= 5 ? 22 : left;
  cells.draw({ columns: size, rows: size, cell, left, top, start: [0, 0] }, (pen) => {
    const gap = cell >= 16 ? 2 : 1;
    const sprites = new Map();
    const sprite = (look) => {
      if (!sprites.has(look)) sprites.set(look, stamp(look, cell - gap));
      return sprites.get(look);
    };
    const ink = color("ok-ink");
    nodes.forEach((from, row) =>
      nodes.forEach((to, column) => {
        if (from === to) return;
        const path = pathOf(from, to);
        const look = path === null ? SILENT : pathLook(path?.state ?? "unknown");
        pen.drawImage(sprite(look), left + column * cell, top + row * cell, cell - gap, cell - gap);
        if (cell < 40 || path?.state !== "ok" || path.round_trip_ms === null) return;
        pen.fillStyle = ink;
        pen.textAlign = "center";
        pen.font = "10px system-ui, sans-serif";
        pen.fillText(
          path.round_trip_ms.toFixed(2),
          left + (column + 0.5) * cell - 1,
          top + (row + 0.82) * cell,
        );
      }),
    );
    pen.fillStyle = color("muted");
    label(pen, cell, left, top);
  });
}

function label(pen, cell, left, top) {
  pen.font = `${Math.min(12, Math.max(9, cell + 1))}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  const every = Math.ceil(11 / cell);
  const short = (node) => shorten(names.get(node), LONGEST, domain);
  nodes.forEach((node, i) => {
    if (i % every) return;
    pen.textAlign = "right";
    pen.fillText(short(node), left - 7, top + (i + 0.5) * cell);
    pen.save();
    pen.translate(left + (i + 0.5) * cell, top - 7);
    if (top !== 22) pen.rotate(-Math.PI / 2);
    pen.textAlign = top === 22 ? "center" : "left";
    pen.fillText(short(node), 0, 0);
    pen.restore();
  });
}

/** Draws a cell once per state, for copying. That makes 10,000 cells fast. */
function stamp({ tone, sign }, size) {
  const dots = devicePixelRatio || 1;
  const canvas = el("canvas", { width: Math.ceil(size * dots), height: Math.ceil(size * dots) });
  const pen = canvas.getContext("2d");
  pen.scale((size * dots) / 10, (size * dots) / 10);
  pen.fillStyle = color(`${tone}-fill`);
  pen.beginPath();
  pen.roundRect(0, 0, 10, 10, size > 16 ? 1.4 : 0.8);
  pen.fill();
  pen.strokeStyle = color(`${tone}-on`);
  pen.lineWidth = size > 16 ? 1 : 1.5;
  pen.lineCap = pen.lineJoin = "round";
  if (size >= 40) {
    pen.translate(2.9, 1.6);
    pen.scale(0.42, 0.42);
    pen.lineWidth = 1.6;
  } else if (size > 16) {
    pen.translate(2, 2);
    pen.scale(0.6, 0.6);
    pen.lineWidth = 1.4;
  }
  // Thousands of bright "ok" icons would hide the others.
  if (size <= 16 && tone === "ok") pen.globalAlpha = 0.45;
  pen.stroke(new Path2D(sign));
  return canvas;
}

// Paints slots of the pool. The hue is derived from the owner's id, so it is the same on all hosts and
// after each reload. Fill and marks show the state independently of the hue.

import { $, color, el } from "./dom.js";

/** FNV-1a hash: similar ids get distant hues. Lightness varies as well, because hues may be close. */
export function hue(node) {
  let hash = 2166136261;
  for (const char of node) hash = Math.imul(hash ^ char.charCodeAt(0), 16777619);
  hash >>>= 0;
  return { hue: hash % 360, shade: ((Math.floor(hash / 360) % 3) - 1) * 0.06 };
}

/** Returns a function that paints one slot. `pale` dims the slots of owners that are not selected. */
export function painter(pen, cell) {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const dark = (document.documentElement.dataset.theme ?? (isDark ? "dark" : "light")) === "dark";
  const [full, light] = dark
    ? [
        [0.74, 0.13],
        [0.4, 0.06],
      ]
    : [
        [0.55, 0.13],
        [0.87, 0.055],
      ];
  const line = color("line");
  const ink = color("muted");
  const mark = dark ? "#0d1419" : "#fff";
  const side = cell - (cell >= 6 ? (cell >= 16 ? 2 : 1) : 0);
  const colors = new Map();
  const of = (owner, [lightness, chroma]) => {
    const key = owner + lightness;
    if (!colors.has(key)) {
      const own = hue(owner);
      const shade = own.shade * (chroma > 0.1 ? 1 : 0.4);
      colors.set(key, `oklch(${lightness + shade} ${chroma} ${own.hue})`);
    }
    return colors.get(key);
  };
  const stroke = (draw) => {
    pen.beginPath();
    draw();
    pen.stroke();
  };
  return (x, y, owner, state, pale) => {
    pen.globalAlpha = pale && state !== "unusable" ? 0.3 : 1;
    pen.fillStyle = state === "leased" ? of(owner, full) : state === "free" ? of(owner, light) : line;
    if (state !== "unclaimed") pen.fillRect(x, y, side, side);
    pen.lineWidth = 1;
    pen.strokeStyle = ink;
    if (cell < 5) return;
    if (state === "leased" && cell >= 9) {
      pen.fillStyle = mark;
      pen.beginPath();
      pen.arc(x + side / 2, y + side / 2, side / 7, 0, 7);
      pen.fill();
    } else if (state === "reclaimed") {
      stroke(() => {
        pen.moveTo(x + 1, y + side - 1);
        pen.lineTo(x + side - 1, y + 1);
      });
    } else if (state === "unusable") {
      stroke(() => {
        pen.moveTo(x + side * 0.3, y + side * 0.3);
        pen.lineTo(x + side * 0.7, y + side * 0.7);
        pen.moveTo(x + side * 0.7, y + side * 0.3);
        pen.lineTo(x + side * 0.3, y + side * 0.7);
      });
    } else if (state === "unclaimed") {
      pen.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
    }
  };
}

const SAMPLES = [
  ["leased", "leased"],
  ["free", "free"],
  ["reclaimed", "being reclaimed"],
  ["unclaimed", "owner not known"],
  ["unusable", "not used"],
];

/** Paints the legend with the same function. */
export function showLegend(owner) {
  const items = SAMPLES.map(([state, name]) => {
    const dots = devicePixelRatio || 1;
    const canvas = el("canvas", { width: 16 * dots, height: 16 * dots, "aria-hidden": "true" });
    const pen = canvas.getContext("2d");
    pen.scale(dots, dots);
    painter(pen, 18)(0, 0, owner, state, false);
    return el("li", {}, canvas, name);
  });
  $("pool-legend").replaceChildren(...items);
}

// The map: hosts as tiles, this host's paths as lines in the color of their state. The Tab key stops at
// one tile only, and arrow keys move between tiles: a hundred tab stops would be unusable.

import { networkOf } from "./addresses.js";
import { $, attr, attrs, keyed, onWidth, svg, text } from "./dom.js";
import { legend, listSigns } from "./icon.js";
import { layout } from "./layout.js";
import { currentMembers, model, select } from "./model.js";
import { describe, makeTile, showTile } from "./tile.js";
import { MEMBERS, PATHS, SILENT, domainOf, memberState, pathLook } from "./words.js";

const map = $("map");
const [boxes, lines, tiles] = ["boxes", "lines", "tiles"].map((name) => svg("g", { class: name }));
map.append(boxes, lines, tiles);
listSigns($("all-signs"), { ...MEMBERS, ...PATHS, "no answer": SILENT });

let width = 0;
let places = [];
/** Node of the tile at which the Tab key stops. */
let stop = null;

onWidth(map.parentElement, (now) => {
  width = now;
  showMap();
});

export function showMap() {
  if (!model.status || !width) return;
  const groups = new Map();
  const members = currentMembers();
  const paths = members.flatMap(({ node }) => model.paths.get(node)?.state ?? []);
  legend($("map-legend"), ["Members", MEMBERS, members.map(memberState)], ["Own paths", PATHS, paths]);
  for (const member of [...members.filter((m) => m.me), ...members.filter((m) => !m.me)]) {
    const network = networkOf(member.underlay);
    if (!groups.has(network)) groups.set(network, []);
    groups.get(network).push(member);
  }
  const plan = { ...layout([...groups], width), domain: domainOf(members.map(({ name }) => name)) };
  places = plan.tiles;
  attrs(map, {
    width,
    height: Math.max(plan.height, 40),
    viewBox: `0 0 ${width} ${Math.max(plan.height, 40)}`,
  });
  const own = places.find(({ node }) => node.me);
  if (!places.some(({ node }) => node.node === stop)) stop = own?.node.node ?? places[0]?.node.node;
  keyed(boxes, plan.boxes, (box) => box.label, makeBox, showBox);
  keyed(
    lines,
    own ? places.filter((place) => place !== own) : [],
    keyOf,
    () => svg("path"),
    (line, place) => showLine(line, own, place, plan),
  );
  keyed(tiles, places, keyOf, makeTile, (tile, place) => {
    showTile(tile, place, plan);
    attr(tile, "tabindex", keyOf(place) === stop ? 0 : -1);
  });
}

const keyOf = ({ node }) => node.node;

const makeBox = () => svg("g", {}, svg("rect", { rx: 12 }), svg("text"));

function showBox(box, { label, x, y, w, h }) {
  attrs(box.firstChild, { x, y, width: w, height: h });
  attrs(box.lastChild, { x: x + 12, y: y + 19 });
  text(box.lastChild, label);
}

/** Draws a path. Among many, healthy paths are faint so that they do not hide the others. */
function showLine(line, own, { node, x, y }, plan) {
  const state = model.paths.get(node.node)?.state ?? "unknown";
  const chosen = node.node === model.selected;
  const quiet = plan.small && (state === "ok" || state === "unknown") && !chosen;
  const bend = plan.boxes.length && x === own.x ? -plan.tile.w * 0.75 - 6 : 0;
  attrs(line, {
    class: `edge ${pathLook(state).tone} ${chosen ? "chosen" : ""} ${quiet ? "quiet" : ""} ${plan.small ? "small" : ""}`,
    d: `M${own.x} ${own.y}Q${(own.x + x) / 2 + bend} ${(own.y + y) / 2} ${x} ${y}`,
  });
}

const tileOf = (target) => target.closest?.("[data-node]");

function note(event) {
  const member = model.members.get(tileOf(event.target)?.dataset.node);
  if (member) text($("map-note"), describe(member));
}
map.addEventListener("pointerover", note);
map.addEventListener("focusin", (event) => {
  stop = tileOf(event.target)?.dataset.node ?? stop;
  for (const tile of tiles.children) attr(tile, "tabindex", tile.dataset.node === stop ? 0 : -1);
  note(event);
});
map.addEventListener("click", (event) => {
  const tile = tileOf(event.target);
  if (tile) select(tile.dataset.node);
});

const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

map.addEventListener("keydown", (event) => {
  const at = tileOf(event.target)?.dataset.node;
  if (!at) return;
  if (event.key === "Enter" || event.key === " ") select(at);
  else if (WAYS[event.key]) goTo(nearest(at, WAYS[event.key]));
  else if (event.key === "Home") goTo(places[0]);
  else if (event.key === "End") goTo(places.at(-1));
  else return;
  event.preventDefault();
});

function goTo(place) {
  if (place) [...tiles.children].find((tile) => tile.dataset.node === place.node.node)?.focus();
}

/** Returns the nearest tile in a direction. Deviation from the direction costs three times the distance. */
function nearest(node, [right, down]) {
  const from = places.find((place) => place.node.node === node);
  const cost = (place) => {
    const [x, y] = [place.x - from.x, place.y - from.y];
    const ahead = x * right + y * down;
    return ahead > 1 ? ahead + 3 * Math.abs(x * down + y * right) : Infinity;
  };
  const best = places.reduce((a, b) => (cost(b) < cost(a) ? b : a));
  return cost(best) < Infinity ? best : null;
}

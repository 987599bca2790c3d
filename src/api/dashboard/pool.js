// The address pool as a grid: a cell per slot in the owner's color, full for a lease, pale for a free
// slot. The slots of a row share a shorter prefix, which is the row's label.

import { division } from "./addresses.js";
import { Cells } from "./cells.js";
import { $, color, onWidth, text } from "./dom.js";
import { model, nameOf, select } from "./model.js";
import { summarize } from "./owners.js";
import { painter, showLegend } from "./paint.js";
import { count, number } from "./words.js";

const LARGEST = 34;

let width = 0;
let pool = null;
let slots = [];
let shape = null;
let drawn = "";

const cells = new Cells($("pool"), $("pool-cursor"), {
  hint: "Point at a slot, or use the arrow keys.",
  describe: (column, row) => describe(row * shape.columns + column),
  choose: (column, row) => {
    const owner = slots[row * shape.columns + column]?.owner;
    if (model.members.has(owner)) select(owner);
  },
});
onWidth($("at-pool"), (now) => {
  width = now;
  showPool();
});

export function showPool(redraw) {
  const { status } = model;
  if (!status || !width) return;
  const settings = status.settings?.pool;
  if (!settings)
    return void text($("pool-summary-head"), "The pool is not known yet: this host is not in a cluster.");
  const owned = (status.members ?? []).map(({ node, name, subnets }) => [node, name, subnets]);
  const now = JSON.stringify([
    width,
    devicePixelRatio,
    settings,
    owned,
    status.free_slots,
    status.reclaiming,
    model.selected,
  ]);
  if (!redraw && now === drawn) return;
  drawn = now;
  pool = division(settings);
  if (!pool) return;
  slots = survey(status, settings);
  showLegend(status.node);
  draw();
  summarize(status, settings, pool);
}

/** Returns the owner and the state of each slot. */
function survey({ members, free_slots, reclaiming }, { first, last }) {
  const gone = new Set((reclaiming ?? []).map(({ node }) => node));
  const list = Array(pool.size);
  const unclaimed = { state: "unclaimed" };
  const unusable = { state: "unusable" };
  for (let slot = 0; slot < pool.size; slot++) list[slot] = slot < first || slot > last ? unusable : unclaimed;
  for (const { node, first: from, count: length } of free_slots ?? []) {
    const start = pool.slot(from);
    if (start !== null)
      list.fill({ owner: node, state: gone.has(node) ? "reclaimed" : "free" }, start, start + length);
  }
  for (const { node, subnets } of members ?? []) {
    for (const subnet of subnets) {
      const slot = pool.slot(subnet);
      if (slot !== null) list[slot] = { owner: node, state: gone.has(node) ? "reclaimed" : "leased" };
    }
  }
  return list;
}

function draw() {
  const room = Math.min(width - 40, 1100);
  const bits = Math.log2(pool.size);
  // Twice as wide as high if there is enough space.
  const columns = 2 ** Math.min(bits, Math.ceil(bits / 2) + (room > 600 ? 1 : 0));
  const left = room > 600 ? 118 : 0;
  const cell = Math.min(LARGEST, Math.max(1, Math.floor(((room - left) / columns) * 4) / 4));
  shape = { columns, rows: pool.size / columns, cell, left, start: startAt(columns) };
  $("pool").hidden = false;
  cells.draw(shape, (pen) => {
    const paint = painter(pen, cell);
    slots.forEach(({ owner, state }, slot) => {
      const pale = model.selected !== null && owner !== model.selected;
      paint(left + (slot % columns) * cell, Math.floor(slot / columns) * cell, owner, state, pale);
    });
    pen.globalAlpha = 1;
    if (left) label(pen);
  });
  text(
    $("pool-lead"),
    `Owners of all subnets, starting at ${pool.subnet(0)}; each row is ${columns === 1 ? "one subnet" : `${count(columns, "subnet")}, a ${pool.block(0, columns).replace(/.*\//, "/")}`}.`,
  );
}

/** The cursor starts at this host's own subnet. */
function startAt(columns) {
  const slot = slots.findIndex(({ owner, state }) => owner === model.status.node && state === "leased");
  const at = Math.max(slot, 0);
  return [at % columns, Math.floor(at / columns)];
}

function label(pen) {
  const { columns, rows, cell, left } = shape;
  pen.fillStyle = color("muted");
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const every = Math.ceil(15 / cell);
  for (let row = 0; row < rows; row += every) {
    pen.fillText(pool.block(row * columns, columns), left - 8, row * cell + Math.max(cell / 2, 6));
  }
}

function describe(slot) {
  const it = slots[slot];
  if (!it) return null;
  const where = `${pool.subnet(slot)} (slot ${number(slot)})`;
  const owner = it.owner === model.status.node ? `${nameOf(it.owner)}, this host` : nameOf(it.owner);
  return {
    leased: `${where}: leased by ${owner}`,
    free: `${where}: free, owned by ${owner}`,
    reclaimed: `${where}: owned by ${owner}, which is forgotten; being reclaimed`,
    unclaimed: `${where}: owner not known`,
    unusable: `${where}: not used by this cluster`,
  }[it.state];
}

// The table of members: sorted by any column, filtered by any word. Rows are kept and moved instead of
// re-created, so that focus and selected text survive a refresh.

import { $, attr, el, keyed, text } from "./dom.js";
import { icon, update } from "./icon.js";
import { model, select } from "./model.js";
import {
  MEMBERS,
  byName,
  isCurrent,
  memberLook,
  memberState,
  milliseconds,
  number,
  pathLook,
} from "./words.js";

const path = (member) => model.paths.get(member.node);

/** Heading, text of a cell, and sort key if it differs from the text. */
const COLUMNS = [
  ["Name", (member) => member.label ?? member.name],
  ["State", memberState, (member) => Object.keys(MEMBERS).indexOf(memberState(member))],
  ["Path", (member) => (member.me ? "this host" : (path(member)?.state ?? "–"))],
  [
    "Round trip",
    (member) => milliseconds(path(member)?.round_trip_ms),
    (member) => path(member)?.round_trip_ms ?? Infinity,
  ],
  ["Subnets", (member) => member.subnets.join(", ") || "–"],
  ["Free", (member) => number(member.free), (member) => member.free],
  ["Underlay", (member) => member.underlay],
];
const NUMERIC = new Set(["Round trip", "Free"]);

let sorting = { column: 0, down: false };
const table = $("members");
const body = table.tBodies[0];
/** Node of the name at which the Tab key stops; arrow keys move from there. */
let stop = null;

const headings = COLUMNS.map(([title], column) => {
  const button = el("button", { type: "button" }, title);
  button.addEventListener("click", () => {
    sorting = { column, down: sorting.column === column && !sorting.down };
    showMembers();
  });
  return el("th", { scope: "col", class: NUMERIC.has(title) ? "number" : "" }, button);
});
table.tHead.rows[0].append(...headings);
$("filter").addEventListener("input", showMembers);
$("with-past").addEventListener("change", showMembers);
body.addEventListener("focusin", ({ target }) => {
  stop = target.closest("tr").dataset.node;
  for (const row of body.rows) attr(nameIn(row), "tabindex", row.dataset.node === stop ? 0 : -1);
});
body.addEventListener("keydown", (event) => {
  const row = event.target.closest("tr");
  const to = {
    ArrowUp: row.previousElementSibling,
    ArrowDown: row.nextElementSibling,
    Home: body.firstElementChild,
    End: body.lastElementChild,
  }[event.key];
  if (!to) return;
  event.preventDefault();
  nameIn(to).focus();
});

export function showMembers() {
  if (!model.status) return;
  const known = [...model.members.values()];
  const past = known.filter((member) => !isCurrent(member)).length;
  $("with-past").parentElement.hidden = !past;
  text($("past-count"), number(past));
  const all = $("with-past").checked ? known : known.filter(isCurrent);
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = all.filter((member) => {
    const whole = [...COLUMNS.map(([, cell]) => cell(member)), member.node, member.vtep_mac]
      .join(" ")
      .toLowerCase();
    return words.every((word) => whole.includes(word));
  });
  shown.sort(compare);
  headings.forEach((heading, i) => {
    attr(heading, "aria-sort", i !== sorting.column ? null : sorting.down ? "descending" : "ascending");
  });
  if (!shown.some(({ node }) => node === stop)) stop = shown[0]?.node;
  keyed(body, shown, (member) => member.node, makeRow, showRow);
  text($("filter-count"), words.length ? `${number(shown.length)} of ${number(all.length)}` : number(all.length));
}

const nameIn = (row) => row.cells[0].firstChild;

/** Sorts equal rows by name, so that they keep their order across refreshes. */
function compare(a, b) {
  const [, cell, key = cell] = COLUMNS[sorting.column];
  const [left, right] = [key(a), key(b)];
  const order = typeof left === "number" ? left - right || 0 : byName(left, right);
  return (sorting.down ? -order : order) || byName(a.name, b.name) || (a.node < b.node ? -1 : 1);
}

function makeRow({ node }) {
  const name = el("button", { type: "button" });
  name.addEventListener("click", (event) => {
    event.stopPropagation();
    select(node);
  });
  const row = el("tr", { "data-node": node }, el("th", { scope: "row" }, name));
  for (const [title] of COLUMNS.slice(1)) {
    const cell = el("td", { class: NUMERIC.has(title) ? "number" : "" });
    if (title === "State" || title === "Path") cell.append(icon(MEMBERS.unknown));
    cell.append(el("span"));
    row.append(cell);
  }
  row.addEventListener("click", () => {
    // Selecting text to copy it is not a click.
    if (getSelection().isCollapsed) select(node);
  });
  return row;
}

function showRow(row, member) {
  const chosen = member.node === model.selected;
  row.className = `${memberState(member)} ${member.me ? "me" : ""} ${chosen ? "chosen" : ""}`;
  attr(nameIn(row), "aria-pressed", chosen);
  attr(nameIn(row), "tabindex", member.node === stop ? 0 : -1);
  COLUMNS.forEach(([, cell], i) => text(row.cells[i].lastChild, cell(member)));
  update(row.cells[1].firstChild, memberLook(memberState(member)));
  const way = path(member);
  update(row.cells[2].firstChild, way ? pathLook(way.state) : { tone: "none", sign: "" });
}

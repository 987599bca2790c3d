// The event log, newest first. Events are drawn once per frame, because the agent replays hundreds of
// them when the page opens.

import { $, attr, el, text } from "./dom.js";
import { count, moment, number } from "./words.js";

const KINDS = ["agent", "member", "lease", "path", "repair", "problem", "pod"];
const MOST = 500;

const list = $("events");
const box = list.parentElement;
/** Newest last, each with its row. Events that arrived while paused have no row. */
let events = [];
/** Keys of known events: the agent replays past events after each reconnection. */
let seen = new Set();
let paused = false;
let scheduled = false;

$("event-kind").append(...KINDS.map((kind) => el("option", {}, kind)));
$("event-kind").addEventListener("change", refilter);
$("event-warnings").addEventListener("change", refilter);
$("event-pause").addEventListener("click", () => {
  paused = !paused;
  attr($("event-pause"), "aria-pressed", paused);
  text($("event-pause"), paused ? "Resume" : "Pause");
  schedule();
});

export function addEvent(event) {
  if (typeof event.at !== "number") return;
  const key = `${event.at} ${event.number}`;
  if (seen.has(key)) return;
  seen.add(key);
  events.push({ ...event, key, row: null });
  schedule();
}

// A hidden page gets no frames, but still events, so the list is limited here, too.
function schedule() {
  if (events.length >= 2 * MOST) trim();
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    show();
  });
}

function trim() {
  for (const { row } of events.slice(0, -MOST)) row?.remove();
  events = events.slice(-MOST);
  seen = new Set(events.map(({ key }) => key));
}

function show() {
  trim();
  if (!paused) {
    // A reader who has scrolled down keeps the scroll position.
    const reading = box.scrollTop > 0 ? box.scrollHeight - box.scrollTop : null;
    for (const event of events) {
      if (event.row) continue;
      event.row = makeRow(event);
      event.row.hidden = !wanted(event);
      list.prepend(event.row);
    }
    if (reading !== null) box.scrollTop = box.scrollHeight - reading;
  }
  showCount();
}

function refilter() {
  for (const event of events) if (event.row) event.row.hidden = !wanted(event);
  showCount();
}

function wanted({ kind, level }) {
  const only = $("event-kind").value;
  return (!only || kind === only) && (level === "warn" || !$("event-warnings").checked);
}

function showCount() {
  const waiting = events.filter(({ row }) => !row).length;
  const shown = events.filter(({ row }) => row && !row.hidden).length;
  text($("event-state"), paused ? `paused, ${number(waiting)} new` : count(shown, "event"));
}

function makeRow({ at, kind, level, text: words }) {
  const date = new Date(at * 1000);
  return el(
    "li",
    { class: level === "warn" ? "warn" : "info" },
    el("time", { datetime: date.toISOString(), title: date.toISOString() }, moment(date)),
    el("span", { class: "kind" }, kind),
    el("span", { class: "words" }, level === "warn" ? el("b", { class: "unseen" }, "warning: ") : "", words),
  );
}

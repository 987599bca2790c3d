// Entry point: connects the agent's answers to the parts of the page.

import { showDetail } from "./detail.js";
import { $, text } from "./dom.js";
import { addEvent } from "./events.js";
import { listen, poll } from "./feed.js";
import { showHistory } from "./history.js";
import { showMap } from "./map.js";
import { showMatrix } from "./matrix.js";
import { showMembers } from "./members.js";
import { model, onSelect, select, storeStatus } from "./model.js";
import { showPool } from "./pool.js";
import { showSilence, showSummary } from "./summary.js";
import { clock, timeZone } from "./words.js";

const SECOND = 1000;
const STATUS_EVERY = 2 * SECOND;
const SLOW_EVERY = 10 * SECOND;

// For tests of the page: waits until each kind of answer has been drawn once.
const awaited = new Set(["status", "matrix", "samples", "events", "pods"]);
function arrived(kind) {
  awaited.delete(kind);
  if (awaited.size === 0) document.documentElement.dataset.ready = "true";
}

let answeredAt = new Date();

function onStatus(status) {
  answeredAt = new Date();
  $("stale").hidden = true;
  document.body.classList.remove("stale", "waiting");
  storeStatus(status);
  showSummary();
  showMap();
  showMatrix();
  showPool();
  showMembers();
  showDetail();
  arrived("status");
}

function onSilence() {
  const since = `No answer from the agent since ${clock(answeredAt)}`;
  text($("stale"), model.status ? `${since}. The page shows the last known state.` : `${since}.`);
  $("stale").hidden = false;
  showSilence();
  document.body.classList.add("stale");
}

function onMatrix(matrix) {
  model.matrix = matrix;
  showMatrix();
  showDetail();
  arrived("matrix");
}

function onSamples({ samples }) {
  model.samples = samples ?? [];
  showHistory();
  arrived("samples");
}

function onPods({ pods }) {
  model.pods = pods ?? null;
  showDetail();
  arrived("pods");
}

text($("time-zone"), timeZone());
onSelect(() => {
  showMap();
  showMatrix();
  showPool();
  showMembers();
  showDetail();
});
document.addEventListener("themechange", () => {
  showMatrix(true);
  showPool(true);
});
document.addEventListener("keydown", (event) => {
  // In the filter, Escape clears the field.
  if (event.key === "Escape" && model.selected && event.target.id !== "filter") select(null);
});
$("deselect").addEventListener("click", () => {
  select(null);
  // The button is hidden now and has lost focus.
  $("map").querySelector("[tabindex='0']")?.focus({ preventScroll: true });
});

poll("v1/status", STATUS_EVERY, 5 * SECOND, onStatus, onSilence);
poll("v1/matrix", SLOW_EVERY, 10 * SECOND, onMatrix);
poll("v1/pods", SLOW_EVERY, 5 * SECOND, onPods);
poll("v1/samples", SLOW_EVERY, 5 * SECOND, onSamples);
listen("v1/events", addEvent, () => arrived("events"));

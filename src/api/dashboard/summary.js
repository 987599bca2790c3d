// The summary: this node, its overall state, its problems, and key figures.

import { $, attr, el, keyed, text } from "./dom.js";
import { currentMembers, model } from "./model.js";
import { keyOf, makeProblem, showProblem } from "./problems.js";
import { milliseconds, number } from "./words.js";

/** Number of problems shown; the others are folded, because one cause often has many problems. */
const UNFOLDED = 6;

/** Colors of the verdict's states. */
const TONES = { healthy: "ok", degraded: "warn", "not-ready": "bad" };

export function showSummary() {
  const { status } = model;
  document.title = `gossamer – ${status.name ?? "?"}`;
  text($("name"), status.name ?? "–");
  text($("node"), status.node ?? "–");
  text($("cluster"), status.cluster ?? "none yet");
  text($("version"), status.version ? `version ${status.version}` : "");
  showVerdict(status);
  showProblems([...(status.problems ?? []), ...(status.notices ?? [])]);
  showFigures(status);
}

function showVerdict({ verdict }) {
  attr($("verdict"), "data-tone", TONES[verdict?.state] ?? "none");
  text($("verdict"), verdict?.text ?? "unknown");
}

/** Shows that the current state is not known. */
export function showSilence() {
  attr($("verdict"), "data-tone", "none");
  text($("verdict"), "unknown: no answer");
}

let known = null;

function showProblems(list) {
  $("no-problems").hidden = list.length > 0;
  attr($("problems"), "data-tone", list.length ? "warn" : "ok");
  keyed($("problem-list"), list.slice(0, UNFOLDED), keyOf, makeProblem, showProblem);
  const folded = list.slice(UNFOLDED);
  const more = $("more-problems");
  more.hidden = folded.length === 0;
  text(more.firstElementChild, `${number(folded.length)} more`);
  keyed(more.lastElementChild, folded, keyOf, makeProblem, showProblem);
  announce(list.filter(({ severity }) => severity === "problem"));
}

/** Announces only new problems to screen readers. */
function announce(list) {
  const fresh = known && list.filter((problem) => !known.has(keyOf(problem)));
  if (fresh?.length) {
    const more = fresh.length > 1 ? ` And ${number(fresh.length - 1)} more.` : "";
    text($("problem-news"), `New problem: ${fresh[0].what}${more}`);
  } else if (known?.size && list.length === 0) {
    text($("problem-news"), "All problems are resolved.");
  }
  known = new Set(list.map(keyOf));
}

function showFigures(status) {
  const { slots, kernel, pods } = status;
  const members = currentMembers();
  const alive = members.filter((member) => member.liveness === "alive").length;
  const answered = (status.paths ?? []).filter((path) => path.state === "ok" && path.round_trip_ms !== null);
  const spans = answered.map((path) => path.round_trip_ms).sort((a, b) => a - b);
  const repairs = Object.values(kernel?.repairs ?? {}).reduce((sum, value) => sum + value, 0);
  const bad = (status.paths ?? []).filter((path) => !["ok", "unknown"].includes(path.state)).length;
  const figures = [
    ["Members alive", number(alive), `of ${number(members.length)}`],
    [
      "Own subnet",
      status.subnet ?? "none",
      status.subnet6 ?? `of ${status.settings?.pool?.network ?? "no pool yet"}`,
    ],
    [
      "Leased",
      number(slots?.leased ?? 0),
      `${number(slots?.free ?? 0)} free of ${number(slots?.total ?? 0)}`,
    ],
    [
      "Round trip",
      milliseconds(spans[Math.floor(spans.length / 2)]),
      spans.length ? `median; worst ${milliseconds(spans.at(-1))}` : "no peer answers",
    ],
    ["Own paths not ok", number(bad), `of ${number(status.paths?.length ?? 0)}`],
    ["Repairs", number(repairs), "since the start"],
    [
      "Pods",
      number(pods ?? 0),
      status.pods_outside ? `${number(status.pods_outside)} outside the subnet` : "on this host",
    ],
  ];
  const make = () => el("div", {}, el("dt"), el("dd", { class: "figure" }), el("dd", { class: "beneath" }));
  keyed(
    $("figures"),
    figures,
    ([name]) => name,
    make,
    (box, [name, value, beneath]) => {
      text(box.children[0], name);
      text(box.children[1], value);
      text(box.children[2], beneath);
    },
  );
}

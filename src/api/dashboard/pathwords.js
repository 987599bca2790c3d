// The path matrix in words: how many paths are not ok, and which. Who cannot see the picture learns the same, and
// who can has something to copy into a ticket.

import { $, el, keyed, text } from "./dom.js";
import { icon, update } from "./icon.js";
import { model } from "./model.js";
import { SILENT, count, number, pathLook, some } from "./words.js";

/** More lines than this say nothing more. */
const MOST_LINES = 50;
/** So many paths to one member in the same state are one line: whoever is down is dead to everybody. */
const TOGETHER = 4;

const PLAIN = { tone: "none", sign: "" };

/** `rows` has for each node its paths by node, or null if it did not answer. */
export function summarize(nodes, names, rows) {
  const answered = nodes.filter((node) => rows.get(node));
  const silent = nodes.filter((node) => !rows.get(node));
  const paths = answered.flatMap((from) => [...rows.get(from).values()].map((path) => ({ from, ...path })));
  const bad = paths.filter(({ state }) => state !== "ok" && state !== "unknown");
  const unknown = paths.filter(({ state }) => state === "unknown").length;
  text($("matrix-summary-head"), headline(paths.length, bad.length, unknown));
  const lines = inLines(bad, names);
  const shown = lines.slice(0, MOST_LINES);
  if (lines.length > MOST_LINES)
    shown.push({ look: PLAIN, words: `and ${number(lines.length - MOST_LINES)} more` });
  if (unknown) shown.push({ look: pathLook("unknown"), words: `${count(unknown, "path")} not known yet` });
  if (silent.length)
    shown.push({
      look: SILENT,
      words: `no answer from ${some(
        silent.map((node) => names.get(node)),
        8,
      )}`,
    });
  const { omitted } = model.matrix;
  if (omitted)
    shown.push({ look: PLAIN, words: `${count(omitted, "member")} not asked, because there are too many` });
  const make = ({ look, words }) => el("li", {}, icon(look), words);
  keyed(
    $("matrix-summary-list"),
    shown,
    ({ words }) => words,
    make,
    (line, { look }) => update(line.firstChild, look),
  );
}

function headline(all, bad, unknown) {
  if (!all) return "There is no path yet: this host knows no other member with a subnet.";
  if (bad) return `${number(bad)} of ${count(all, "path")} ${bad === 1 ? "is" : "are"} not ok:`;
  if (unknown) return `${number(all - unknown)} of ${count(all, "path")} are ok.`;
  return all === 1 ? "The only path is ok." : `All ${count(all, "path")} are ok.`;
}

/** Single paths come before those that are many for one reason. */
function inLines(bad, names) {
  const groups = new Map();
  for (const path of bad) {
    const key = `${path.node} ${path.state}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(path);
  }
  const [single, many] = [[], []];
  for (const paths of groups.values()) {
    const [{ node, state }, look] = [paths[0], pathLook(paths[0].state)];
    const end = `to ${names.get(node)}: ${state}`;
    if (paths.length >= TOGETHER) many.push({ look, words: `${number(paths.length)} members ${end}` });
    else for (const { from } of paths) single.push({ look, words: `${names.get(from)} ${end}` });
  }
  return [...single, ...many];
}

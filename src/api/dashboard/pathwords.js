// The path matrix as text: how many paths are not ok, and which. It serves screen readers, and copying
// into tickets.

import { $, el, keyed, text } from "./dom.js";
import { icon, update } from "./icon.js";
import { model } from "./model.js";
import { SILENT, count, number, pathLook, some } from "./words.js";

/** Most lines shown. */
const MOST_LINES = 50;
/** From this number on, paths to one member in the same state share a line: all members lose a dead one. */
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
  const lines = asLines(bad, names);
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
    shown.push({ look: PLAIN, words: `${count(omitted, "member")} not queried, because there are too many` });
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

/** Formats paths as lines. Single paths come first, paths that share a line last. */
function asLines(bad, names) {
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

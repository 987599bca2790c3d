// What the page knows at the moment. Only `main.js` writes the answers in; all parts read them here, and share
// which member is selected.

import { byName, isHere } from "./words.js";

export const model = {
  status: null,
  matrix: null,
  samples: [],
  /** Node id; null: nobody, and the detail panel shows this host. */
  selected: null,
  members: new Map(),
  paths: new Map(),
};

const watchers = [];
/** Calls back whenever another member is selected. */
export const onSelect = (watcher) => watchers.push(watcher);

/** Selecting whom is selected already ends the selection. */
export function select(node) {
  model.selected = node === model.selected ? null : node;
  for (const watcher of watchers) watcher();
}

export function learn(status) {
  model.status = status;
  model.members = new Map((status.members ?? []).map((member) => [member.node, member]));
  model.paths = new Map((status.paths ?? []).map((path) => [path.node, path]));
  if (model.selected && !model.members.has(model.selected)) select(null);
}

/** Those that neither left nor were forgotten, by name. */
export function here() {
  const members = [...model.members.values()].filter(isHere);
  return members.sort((a, b) => byName(a.name, b.name) || (a.node < b.node ? -1 : 1));
}

/** What a node is called; the beginning of its id, if nobody said. */
export const nameOf = (node) => model.members.get(node)?.name ?? String(node).slice(0, 8);

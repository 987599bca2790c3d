// The current data of the page. Only `main.js` stores answers; all parts read them and share the selected
// member.

import { byName, isCurrent, isPresent } from "./words.js";

export const model = {
  status: null,
  matrix: null,
  /** Pods of this host; null while they are not known. */
  pods: null,
  samples: [],
  /** Id of the selected node; null for none: the detail panel then shows this host. */
  selected: null,
  members: new Map(),
  paths: new Map(),
};

const watchers = [];
/** Registers a callback for each change of the selection. */
export const onSelect = (watcher) => watchers.push(watcher);

/** Selects a node. Selecting the selected node clears the selection. */
export function select(node) {
  model.selected = node === model.selected ? null : node;
  for (const watcher of watchers) watcher();
}

export function storeStatus(status) {
  model.status = status;
  model.members = new Map((status.members ?? []).map((member) => [member.node, member]));
  model.paths = new Map((status.paths ?? []).map((path) => [path.node, path]));
  if (model.selected && !model.members.has(model.selected)) select(null);
}

/** Returns the members that have neither left nor been forgotten, by name. */
export function presentMembers() {
  const members = [...model.members.values()].filter(isPresent);
  return members.sort((a, b) => byName(a.name, b.name) || (a.node < b.node ? -1 : 1));
}

/** Returns the present members without former selves. */
export const currentMembers = () => presentMembers().filter(isCurrent);

/** Returns a node's name, or the beginning of its id if the name is not known. */
export const nameOf = (node) => model.members.get(node)?.name ?? String(node).slice(0, 8);

// State icons, and legends made of them.

import { attr, attrs, el, svg } from "./dom.js";

/** Creates the icon of a look; `update` changes its look. */
export function icon(look) {
  const drawing = svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, svg("path"));
  update(drawing, look);
  return drawing;
}

export function update(drawing, { tone, sign }) {
  attrs(drawing, { class: `sign ${tone}` });
  attr(drawing.firstChild, "d", sign);
}

/** Fills a legend. `groups` are [title, looks by name]. */
export function legend(list, ...groups) {
  const items = ([title, looks]) => [
    ...(title ? [el("li", { class: "title" }, title)] : []),
    ...Object.entries(looks).map(([name, look]) => el("li", { title: look.means }, icon(look), name)),
  ];
  list.replaceChildren(...groups.flatMap(items));
}

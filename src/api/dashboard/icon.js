// State icons, and legends made of them.

import { attr, attrs, el, keyed, svg } from "./dom.js";

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

/** Fills a legend. `groups` are [title, looks by name, names that occur]; other names are omitted. */
export function legend(list, ...groups) {
  const items = groups.flatMap(([title, looks, occurring]) => {
    const shown = Object.entries(looks).filter(([name]) => occurring.includes(name));
    return shown.length ? [[title, title], ...shown.map(([name, look]) => [title, name, look])] : [];
  });
  const make = ([, name, look]) =>
    look ? el("li", { title: look.means }, icon(look), name) : el("li", { class: "title" }, name);
  const named = items.filter(([, name]) => name);
  keyed(list, named, ([title, name]) => `${title} ${name}`, make);
}

/** Lists all signs with their meanings. */
export function listSigns(list, looks) {
  const items = Object.entries(looks).map(([name, look]) => el("li", {}, icon(look), `${name}: ${look.means}`));
  list.replaceChildren(...items);
}

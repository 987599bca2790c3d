// A host on the map: its name, subnet and state, and the path to it.

import { attrs, svg, text } from "./dom.js";
import { icon, update } from "./icon.js";
import { model } from "./model.js";
import { MEMBERS, PATHS, memberLook, memberState, milliseconds, pathLook, shorten } from "./words.js";

/** Describes the path to a member. */
function pathWords(member) {
  if (member.me) return "this host";
  const path = model.paths.get(member.node);
  if (!path) return "no path";
  return path.state === "ok" ? milliseconds(path.round_trip_ms) : path.state;
}

/** Creates a tile that works as a button. */
export function makeTile({ node }) {
  const tile = svg("g", { role: "button", "data-node": node.node }, svg("rect", { rx: 9 }));
  tile.append(icon(MEMBERS.unknown), svg("text", { class: "name" }), svg("text", { class: "subnet" }));
  tile.append(icon(PATHS.unknown), svg("text", { class: "path" }));
  return tile;
}

/** Updates a tile. `domain` is the common end of all names. */
export function showTile(tile, { node: member, x, y }, { tile: { w, h }, small, domain }) {
  const [state, path] = [memberState(member), model.paths.get(member.node)];
  const [box, sign, name, subnet, pathSign, words] = tile.children;
  attrs(tile, {
    transform: `translate(${x - w / 2} ${y - h / 2})`,
    class: `tile ${state} ${member.me ? "me" : ""} ${small ? `small on-${(path ? pathLook(path.state) : memberLook(state)).tone}` : ""}`,
    "aria-pressed": member.node === model.selected,
    "aria-label": describe(member),
  });
  attrs(box, { width: w, height: h });
  // A small tile has room for one icon: that of the path, unless the member is not alive.
  const look = small && state === "alive" && path ? pathLook(path.state) : memberLook(state);
  update(sign, look);
  attrs(sign, { x: 7, y: small ? 8 : 6, width: 14, height: 14 });
  attrs(name, { x: 25, y: small ? 19.5 : 18 });
  text(name, shorten(member.name, (w - 30) / 7.4, domain));
  attrs(subnet, { x: 10, y: 36 });
  text(subnet, small ? "" : shorten(member.subnets[0] ?? "no subnet", (w - 16) / 6.2));
  update(pathSign, member.me || !path ? { tone: "none", sign: "" } : pathLook(path.state));
  attrs(pathSign, { x: 8, y: 43, width: small ? 0 : 13, height: 13 });
  attrs(words, { x: path ? 25 : 10, y: 54 });
  text(words, small ? "" : shorten(pathWords(member), (w - 30) / 6.2));
}

export function describe(member) {
  const path = model.paths.get(member.node);
  const way = path
    ? `path ${path.state}${path.state === "ok" ? `, ${milliseconds(path.round_trip_ms)}` : ""}`
    : pathWords(member);
  const subnets = member.subnets.join(" and ") || "no subnet";
  return `${member.name}: ${memberState(member)}; ${way}; ${subnets}; ${member.free} free`;
}

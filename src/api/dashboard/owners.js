// The pool as text: its usage, reclaims in progress, and the largest owners.

import { $, attr, el, keyed, text } from "./dom.js";
import { model, nameOf, presentMembers, select } from "./model.js";
import { hue } from "./paint.js";
import { count, number, some } from "./words.js";

/** Most owners in the list. */
const LISTED = 12;

/** `pool` is the division of the network; `first` and `last` are the usable slots. */
export function summarize(status, { first, last }, pool) {
  const { total = 0, leased = 0, free = 0 } = status.slots ?? {};
  const unused = pool.size - (last - first + 1);
  const aside =
    unused > 0 ? `; ${count(unused, "subnet")} of the network ${unused === 1 ? "is" : "are"} not used` : "";
  text(
    $("pool-summary-head"),
    `${number(leased)} of ${count(total, "slot")} ${leased === 1 ? "is" : "are"} leased and ${number(free)} free${aside}.`,
  );
  keyed(
    $("reclaiming"),
    status.reclaiming ?? [],
    ({ node }) => node,
    () => el("li"),
    (line, gone) => {
      const waits = !gone.waits_for
        ? ""
        : gone.waits_for.length
          ? `; waits for ${some(gone.waits_for, 8)}`
          : "; all have acknowledged";
      text(
        line,
        `${gone.name} is forgotten: ${nameOf(gone.successor)} reclaims ${count(gone.slots, "slot")}${waits}.`,
      );
    },
  );
  const owns = (member) => member.free + slotsOf(member, pool);
  const owners = presentMembers()
    .filter(owns)
    .sort((a, b) => owns(b) - owns(a));
  const shown = owners.slice(0, LISTED);
  keyed(
    $("owners"),
    shown,
    ({ node }) => node,
    makeOwner,
    (item, member) => showOwner(item, member, pool),
  );
  attr(
    $("owners"),
    "data-more",
    owners.length > LISTED ? `and ${number(owners.length - LISTED)} more owners` : "",
  );
}

/** Counts leased slots. In dual stack each slot has two subnets. */
const slotsOf = ({ subnets }, pool) => subnets.filter((subnet) => pool.slot(subnet) !== null).length;

function makeOwner({ node }) {
  const button = el(
    "button",
    { type: "button" },
    el("i", { class: "swatch", "aria-hidden": "true" }),
    el("b"),
    el("span"),
  );
  const own = hue(node);
  button.firstChild.style.setProperty("--hue", own.hue);
  button.firstChild.style.setProperty("--shade", own.shade);
  button.addEventListener("click", () => select(node));
  return el("li", {}, button);
}

function showOwner(item, member, pool) {
  const [, name, words] = item.firstChild.children;
  attr(item.firstChild, "aria-pressed", member.node === model.selected);
  text(name, member.name);
  text(words, `${number(slotsOf(member, pool))} leased, ${number(member.free)} free`);
}

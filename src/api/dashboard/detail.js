// The detail panel: everything that `v1/status` has about the selected member or this host.

import { $, el, keyed, sentence, text } from "./dom.js";
import { model, nameOf } from "./model.js";
import { count, memberState, milliseconds, number, some } from "./words.js";

let lastShown = null;

export function showDetail() {
  const { status, selected } = model;
  if (!status) return;
  const member = model.members.get(selected ?? status.node);
  const name = member?.name ?? status.name ?? "This host";
  document.body.classList.toggle("selected", selected !== null);
  text($("h-detail"), name);
  $("deselect").hidden = selected === null;
  if (selected !== lastShown) {
    lastShown = selected;
    text($("detail-note"), selected ? `${name} is selected` : "No member is selected");
    $("detail").scrollTop = 0;
  }
  const facts = [
    ...(member ? aboutMember(member) : []),
    ...(!selected || member?.me ? aboutThisHost(status) : []),
  ];
  keyed(
    $("detail-body"),
    facts.filter(([, values]) => values.length),
    ([title]) => title,
    makeBlock,
    showBlock,
  );
}

const makeBlock = () => el("section", {}, el("h3"), el("dl"));

/** Shows a block: a title and [term, value] pairs. Pairs without a value are omitted. */
function showBlock(block, [title, values]) {
  text(block.firstChild, title);
  const make = () => el("div", {}, el("dt"), el("dd"));
  keyed(
    block.lastChild,
    values,
    ([term]) => term,
    make,
    (row, [term, value]) => {
      text(row.firstChild, term);
      sentence(row.lastChild, String(value));
    },
  );
}

const isKnown = ([, value]) => value !== null && value !== undefined && value !== "";
const block = (title, values) => [title, values.filter(isKnown)];

function aboutMember(member) {
  const path = model.paths.get(member.node);
  const free_slots = (model.status.free_slots ?? []).filter(({ node }) => node === member.node);
  const ranges = free_slots.map(({ first, last }) => (first === last ? first : `${first} to ${last}`));
  const gone = (model.status.reclaiming ?? []).find(({ node }) => node === member.node);
  return [
    block("Member", [
      ["State", member.me ? "alive (this host)" : memberState(member)],
      ["Gossip state", member.left || member.forgotten ? member.liveness : null],
      ["Node", member.node],
      ["Address", member.address],
      ["Underlay", member.underlay],
      ["VTEP MAC", member.vtep_mac],
      ["Slots", member.heard === undefined ? null : member.heard ? "confirmed" : "unconfirmed"],
      ["Version", rowOf(member.node)?.version],
      ["Problems", member.me ? null : rowOf(member.node)?.problems],
    ]),
    block("Subnets", [
      ["Leased", member.subnets.join(", ") || "none"],
      ["Free", number(member.free)],
      ["Free ranges", some(ranges, 6)],
      ["Reclaimed by", gone && `${nameOf(gone.successor)}: ${count(gone.slots, "slot")} left`],
      ["Waits for", gone?.waits_for?.length ? some(gone.waits_for, 12) : null],
    ]),
    block("Paths", [
      ["From this host", path && path.state],
      ["Round trip", path && milliseconds(path.round_trip_ms)],
      ["Problem", path?.problem && [path.problem.what, path.problem.fix].filter(Boolean).join(": ")],
      ["Paths from it", ownPaths(member.node)],
      ["Paths to it", pathsTo(member.node)],
    ]),
  ];
}

const rowOf = (node) => model.matrix?.rows?.find((row) => row.node === node);

function tally(paths) {
  if (!paths.length) return null;
  return `${number(paths.filter((path) => path.state === "ok").length)} of ${number(paths.length)} ok`;
}

function ownPaths(node) {
  const row = rowOf(node);
  return row && (row.paths ? tally(row.paths) : "did not answer");
}

function pathsTo(node) {
  const rows = model.matrix?.rows ?? [];
  return tally(rows.flatMap(({ paths }) => (paths ?? []).filter((path) => path.node === node)));
}

function aboutThisHost({
  kernel,
  settings,
  phase,
  connections,
  pods,
  pods_outside: outside,
  counters,
  version,
}) {
  const yes = (value, words) => (value === null || value === undefined ? null : value ? words[0] : words[1]);
  const { pool } = settings ?? {};
  return [
    block("Agent", [
      ["Version", version],
      ["Phase", phase],
      ["Connections", connections],
      ["Pods", outside ? `${pods}, ${outside} of them outside the subnet` : pods],
    ]),
    block(
      "Kernel",
      !kernel
        ? []
        : [
            ["Device", kernel.device],
            ["MTU", kernel.mtu],
            ["View", yes(kernel.in_sync, ["in sync", "not in sync"])],
            ["Underlay", `${kernel.underlay_address ?? "–"} on ${kernel.underlay_interface || "–"}`],
            ["Checksums", yes(kernel.checksum_offload, ["by the network card", "by the kernel"])],
            ["Operations", kernel.operations],
            ["Peers in use", kernel.peers_in_use],
            ["Non-members dropped", kernel.non_members_dropped],
            ["Misses answered", kernel.misses_answered],
            ["Misses unknown", kernel.misses_unknown],
            ...Object.entries(kernel.repairs ?? {}).map(([kind, value]) => [`Repairs: ${kind}`, value]),
          ],
    ),
    block(
      "Cluster",
      !settings
        ? []
        : [
            ["Network", pool?.network],
            ["IPv6 network", pool?.network6],
            ["Subnets", pool && `/${pool.subnet_len}${pool.subnet_len6 ? ` and /${pool.subnet_len6}` : ""}`],
            ["Usable slots", pool && `${number(pool.first)} to ${number(pool.last)}`],
            ["VNI", settings.vni],
            ["VXLAN port", settings.vxlan_port],
          ],
    ),
    block(
      "Counters",
      Object.entries(counters ?? {}).map(([name, value]) => [name.replaceAll("_", " "), value]),
    ),
  ];
}

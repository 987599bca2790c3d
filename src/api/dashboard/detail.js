// The detail panel: everything that `v1/status` has about the selected member or this host. What operators look
// for comes first; the rest is folded.

import { $, el, keyed, sentence, text } from "./dom.js";
import { model, nameOf } from "./model.js";
import { count, memberState, milliseconds, number, shorten, some } from "./words.js";

/** Most pods in the panel; `gossamer pods` lists all. */
const MOST_PODS = 50;
const FOLDED = new Set(["Addresses", "Free ranges", "Agent", "Kernel", "Cluster", "Counters"]);

let lastShown = null;

// The panel scrolls with the page up to its end, where it stays: a scroll bar of its own would stand beside that
// of the page.
new ResizeObserver(([{ target }]) => {
  target.style.setProperty("--height", `${target.offsetHeight}px`);
}).observe($("detail"));

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
  const own = !selected || member?.me;
  const facts = [
    ...(member ? aboutMember(member) : []),
    ...(own ? [podList(status)] : []),
    ...(member ? aboutAddresses(member) : []),
    ...(own ? aboutThisHost(status) : []),
  ];
  keyed(
    $("detail-body"),
    facts.filter(([, values]) => values.length),
    ([title]) => title,
    makeBlock,
    showBlock,
  );
}

const makeBlock = ([title]) =>
  el("details", { open: FOLDED.has(title) ? null : "" }, el("summary", {}, el("h3")), el("dl"));

/** Shows a block: a title and [term, value] pairs. Pairs without a value are omitted. */
function showBlock(block, [title, values]) {
  text(block.firstChild.firstChild, title);
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
  const gone = (model.status.reclaiming ?? []).find(({ node }) => node === member.node);
  return [
    block("Member", [
      ["Subnets", member.subnets.join(", ") || "none"],
      ["State", member.me ? "alive (this host)" : memberState(member)],
      ["Gossip state", member.left || member.forgotten ? member.liveness : null],
      ["Former self", member.former_self ? "an earlier identity of a living member" : null],
      ["Problems", member.me ? null : rowOf(member.node)?.problems],
      ["Version", rowOf(member.node)?.version],
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

/** Lists the pods of this host. */
function podList({ pods: total, pods_outside: outside }) {
  const pods = model.pods ?? [];
  const shown = pods.slice(0, MOST_PODS).map((pod) => [podName(pod), aboutPod(pod)]);
  const all = outside ? `${number(total)}, ${number(outside)} of them outside the subnet` : total;
  const omitted = pods.length - shown.length;
  return block("Pods", [
    ["Pods", all],
    ...shown,
    [`${number(omitted)} more`, omitted > 0 ? "`gossamer pods` lists all" : null],
  ]);
}

/** Runtimes show the first 12 digits of an id. */
function podName({ container, interface: device }) {
  return `${/^[0-9a-f]{64}$/.test(container) ? container.slice(0, 12) : shorten(container, 24)} ${device}`;
}

function aboutPod({ addresses, orphan, netns }) {
  const state = orphan ? "; orphan" : netns ? "" : "; reserved";
  return `${addresses.join(", ")}${state}`;
}

function aboutAddresses(member) {
  const free = (model.status.free_slots ?? []).filter(({ node }) => node === member.node);
  const ranges = free.map(({ first, last }) => (first === last ? first : `${first} to ${last}`));
  return [
    block("Addresses", [
      ["Node", member.node],
      ["Address", member.address],
      ["Underlay", member.underlay],
      ["VTEP MAC", member.vtep_mac],
    ]),
    block("Free ranges", [
      ["Free", number(member.free)],
      ["Ranges", some(ranges, 6)],
      ["Slots", member.awaited ? "kernel entries wait for a comparison" : null],
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

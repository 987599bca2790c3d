// Texts and icons of states, shared by map, matrix, table and legends. An icon is a path in a box of 10
// by 10, drawn by SVG and canvas alike; its shape distinguishes states without color.

const DISC = "M5 4.3a.7.7 0 1 0 .01 0zM5 3.2a1.8 1.8 0 1 0 .01 0z";
const CROSS = "M3 3l4 4M7 3L3 7";

export const PATHS = {
  ok: { tone: "ok", sign: "M2.6 5.3l1.8 1.9 3.2-4.2", means: "packets get through" },
  unanswered: { tone: "bad", sign: CROSS, means: "no request through the tunnel is answered" },
  "one-way": {
    tone: "warn",
    sign: "M2 5h6M5.6 2.7L8 5 5.6 7.3",
    means: "packets arrive from there, but no request is answered",
  },
  asymmetric: { tone: "warn", sign: "M2 3.6h5.6L6 2M8 6.4H2.4L4 8", means: "replies take another path" },
  "partly-lost": {
    tone: "warn",
    sign: "M2.4 3.6h5.2M2.4 6.4h2M5.6 6.4h2",
    means: "some flows get through, others do not: one of several links has failed",
  },
  "mtu-too-large": {
    tone: "warn",
    sign: "M2.4 2.2v5.6M7.6 2.2v5.6M2.4 5h5.2",
    means: "small packets get through, full-size packets do not",
  },
  dead: {
    tone: "bad",
    sign: "M5 2.2a2.8 2.8 0 1 0 .01 0zM3 7l4-4",
    means: "neither agent nor kernel answers",
  },
  withdrawn: {
    tone: "gone",
    sign: "M2.6 2.6h4.8v4.8H2.6z",
    means: "dead for some time: its subnet has an unreachable route",
  },
  unknown: {
    tone: "none",
    sign: "M3.4 3.9c0-2.4 3.4-2.2 3.2-.1C6.5 5 5 5 5 6.2M5 8h.01",
    means: "not known yet",
  },
};
/** The look of a member that did not report its paths. */
export const SILENT = {
  tone: "none",
  sign: "M2.2 5h.01M5 5h.01M7.8 5h.01",
  means: "this member did not answer",
};

export const MEMBERS = {
  alive: { tone: "ok", sign: DISC, means: "the member answers" },
  suspect: {
    tone: "warn",
    sign: "M5 2.2a2.8 2.8 0 1 0 .01 0zM5 2.4v5.2",
    means: "the member did not answer, and is checked again",
  },
  down: { tone: "bad", sign: CROSS, means: "the member does not answer" },
  left: { tone: "none", sign: "M2.4 5h5.2", means: "the member has left the cluster" },
  forgotten: { tone: "none", sign: "M3 7l4-4", means: "an operator or a vote has removed the member" },
  unknown: { tone: "none", sign: PATHS.unknown.sign, means: "not known yet" },
};

const own = (table, key) => (Object.hasOwn(table, key) ? table[key] : table.unknown);
export const pathLook = (state) => own(PATHS, state);
export const memberLook = (state) => own(MEMBERS, state);

export function memberState(member) {
  if (member.left) return "left";
  if (member.forgotten) return "forgotten";
  return member.liveness ?? "unknown";
}

/** Returns whether a member has neither left nor been forgotten. */
export const isPresent = (member) => !member.left && !member.forgotten;

/** Returns whether a member is present, and no earlier identity of another one. */
export const isCurrent = (member) => isPresent(member) && !member.former_self;

/** Compares names; digits compare as numbers, so n2 precedes n10. */
export const byName = new Intl.Collator("en", { numeric: true }).compare;

export const number = (value) => value.toLocaleString("en");

export function count(value, one, many = `${one}s`) {
  return `${number(value)} ${value === 1 ? one : many}`;
}

export function milliseconds(value) {
  if (typeof value !== "number") return "–";
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;
}

export const clock = (date) => date.toLocaleTimeString("en-GB");

/** Formats a time with its date, unless it is today. */
export function moment(date) {
  if (date.toDateString() === new Date().toDateString()) return clock(date);
  return date.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });
}

/** Returns the name of the time zone in which times are shown. */
export const timeZone = () => new Intl.DateTimeFormat().resolvedOptions().timeZone ?? "this computer";

/** Formats the time since a moment (in seconds since 1970) by its largest unit. */
export function ago(since) {
  const seconds = Math.max(0, Math.round(Date.now() / 1000 - since));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}

/** Formats the first items of a list and the number of the others. */
export function some(list, most) {
  const shown = list.slice(0, most).join(", ");
  return list.length > most ? `${shown} and ${number(list.length - most)} more` : shown;
}

/** Returns the common domain of all names, with its dot, or "". It is omitted where space is short. */
export function domainOf(names) {
  const [first = "", ...others] = new Set(names);
  if (!others.length) return "";
  const ends = [...first.matchAll(/\./g)].map(({ index }) => first.slice(index));
  return ends.find((end) => others.every((name) => name.endsWith(end))) ?? "";
}

/** Shortens a name in the middle: names often differ only at the end. */
export function shorten(name, room, domain = "") {
  const own = name.slice(0, name.length - domain.length);
  const most = Math.max(4, Math.floor(room));
  if (own.length <= most) return own;
  const head = Math.floor((most - 1) / 2);
  return `${own.slice(0, head)}…${own.slice(own.length - (most - 1 - head))}`;
}

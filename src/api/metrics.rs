//! Metrics for Prometheus, in its text format (0.0.4) or, on request, in OpenMetrics 1.0.
//!
//! All values are from one status, so they are consistent. Labels have few values: no label has peers as
//! values. docs/METRICS.md lists all metrics; a test compares.

use std::{collections::BTreeMap, fmt::Write as _, fs};

use super::{AgentStatus, MemberState, VerdictState};
use crate::model::{ProblemCode, Severity};

/// `Content-Type` of the Prometheus text format.
const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";
/// `Content-Type` of OpenMetrics.
const OPEN: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// `USER_HZ`: unit of CPU times in /proc, the same on all architectures that Rust supports.
const TICKS_PER_SECOND: f64 = 100.0;

/// A response to a metrics collector.
#[derive(Debug)]
pub struct Page {
    /// Its `Content-Type`.
    pub content_type: &'static str,
    /// The metrics.
    pub text: String,
}

/// Formats a status as metrics. `accept` is the request's `Accept` header.
pub fn page(status: &AgentStatus, accept: &str) -> Page {
    let open = accept.contains("application/openmetrics-text");
    let mut text = Text { open, out: String::new() };
    node(&mut text, status);
    kernel(&mut text, status);
    process(&mut text);
    if open {
        text.out.push_str("# EOF\n");
    }
    Page { content_type: if open { OPEN } else { PLAIN }, text: text.out }
}

#[expect(clippy::too_many_lines, reason = "one line for each metric")]
fn node(text: &mut Text, status: &AgentStatus) {
    text.gauge("build_info", "Version of the agent.", [("version", status.version.as_str(), 1.0)]);
    text.number(
        "converged",
        "The node has its subnet, its state equals a peer's, and the kernel equals the desired state.",
        status.converged,
    );
    text.number("has_subnet", "Node leases a subnet.", status.subnet.is_some());
    let state = status.verdict.state;
    let by_state = VerdictState::ALL.map(|of| ("state", of.name(), f64::from(of == state)));
    text.gauge("verdict", "The verdict on the node: 1 for its state, 0 for the others.", by_state);
    problems(text, status);
    let mut members =
        BTreeMap::from(["alive", "suspect", "down", "left", "unknown"].map(|s| (s.to_owned(), 0)));
    for member in &status.members {
        let state = match member.state() {
            gone if gone.is_gone() => MemberState::Left,
            state => state,
        };
        *members.entry(state.to_string()).or_default() += 1;
    }
    let by_state =
        members.iter().map(|(state, count)| ("state", state.as_str(), f64::from(*count)));
    text.gauge("members", "Members by their state in gossip, including this one.", by_state);
    let slots = &status.slots;
    text.number("subnets", "Subnets of the pool.", slots.total);
    let by_state = [("leased", slots.leased), ("free", slots.free)];
    let by_state = by_state.map(|(state, count)| ("state", state, count.into()));
    text.gauge("subnets_known", "Subnets that a member owns.", by_state);
    text.number("subnets_free_own", "Free subnets that this node can grant.", slots.own_free);
    text.number("connections", "Open connections to members.", status.connections as f64);
    let handshakes = status.handshakes;
    text.counter(
        "handshakes",
        "First packets of handshakes with this node.",
        [
            ("outcome", "begun", handshakes.begun as f64),
            ("outcome", "retried", handshakes.retried as f64),
            ("outcome", "refused", handshakes.refused as f64),
            ("outcome", "repeated", handshakes.repeated as f64),
            ("outcome", "displaced", handshakes.displaced as f64),
            ("outcome", "unanswered", handshakes.unanswered as f64),
        ],
    );
    text.total(
        "gossip_dropped",
        "Packets to the agent's port that it did not read in time.",
        status.gossip_dropped,
    );
    text.total("log_lines_lost", "Log lines that were lost.", status.log_lines_lost);
    text.number("pods", "Pods of this node.", status.pods as f64);
    text.number(
        "pods_outside",
        "Pods with addresses outside this node's subnet.",
        status.pods_outside as f64,
    );
    let counters = &status.counters;
    text.total("grants", "Subnets granted to other nodes.", counters.grants);
    text.total("reclaims", "Reclaims of subnets of forgotten nodes.", counters.reclaims);
    text.total("downs", "Changes of a member's state to down.", counters.downs);
    text.total("malformed", "Malformed frames and answers.", counters.malformed);
    text.total("refused", "Entries from peers that cannot be true.", counters.refused);
    text.total("forged", "Records in this node's name that it never wrote.", counters.forged);
    text.total(
        "ownership_conflicts",
        "Subnets with two different records of one epoch.",
        counters.ownership_conflicts,
    );
    text.counter(
        "comparisons",
        "Comparisons with members.",
        [
            ("result", "same", counters.syncs_same as f64),
            ("result", "different", counters.syncs_different as f64),
        ],
    );
}

/// Counts problems and notices by their code.
fn problems(text: &mut Text, status: &AgentStatus) {
    let mut counts: BTreeMap<(ProblemCode, Severity), u32> = BTreeMap::new();
    for problem in status.problems.iter().chain(&status.notices) {
        *counts.entry((problem.code, problem.severity)).or_default() += 1;
    }
    text.gauge("problems", "Problems and notices that `gossamer status` shows.", []);
    for ((code, severity), count) in counts {
        let labels = format!("code=\"{}\",severity=\"{}\"", code.name(), severity.name());
        let _ = writeln!(text.out, "gossamer_problems{{{labels}}} {count}");
    }
}

fn kernel(text: &mut Text, status: &AgentStatus) {
    let kernel = &status.kernel;
    text.number("kernel_in_sync", "The kernel equals the desired state.", kernel.in_sync);
    text.total("kernel_operations", "Changes made to the kernel.", kernel.operations);
    let repairs = kernel.repairs.iter().map(|(kind, count)| ("kind", kind.as_str(), *count as f64));
    text.counter("kernel_repairs", "Repairs of changes by other programs.", repairs);
    text.counter(
        "kernel_misses",
        "Entries requested by the kernel.",
        [
            ("result", "answered", kernel.misses_answered as f64),
            ("result", "unknown", kernel.misses_unknown as f64),
        ],
    );
    text.total(
        "guard_dropped_packets",
        "Tunnel packets from non-members dropped by the guard.",
        kernel.non_members_dropped,
    );
    let mut paths: BTreeMap<&str, u32> = BTreeMap::new();
    for path in &status.paths {
        *paths.entry(path.state.name()).or_default() += 1;
    }
    let by_state = paths.iter().map(|(state, count)| ("state", *state, (*count).into()));
    text.gauge("paths", "Peers with a subnet, by state of the path to them.", by_state);
    let trips = status.paths.iter().filter_map(|path| path.round_trip_ms);
    let worst = trips.fold(0.0, f64::max) / 1000.0;
    text.number("path_round_trip_max_seconds", "Longest round trip through the overlay.", worst);
}

/// Adds metrics of the process under Prometheus' standard names.
fn process(text: &mut Text) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: Option<f64> = resident.and_then(|text| text.trim().split(' ').next()?.parse().ok());
    if let Some(kib) = kib {
        let help = "Resident memory size in bytes.";
        text.family("process_resident_memory_bytes", "gauge", help, [("", "", kib * 1024.0)]);
    }
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
    if let (Some(user), Some(system)) = (ticks(11), ticks(12)) {
        let seconds = (user + system) / TICKS_PER_SECOND;
        let help = "Total user and system CPU time spent in seconds.";
        text.family("process_cpu_seconds", "counter", help, [("", "", seconds)]);
    }
}

/// Metrics text under construction.
struct Text {
    open: bool,
    out: String,
}

/// Label, its value, and the number. An empty label stands for none.
type Sample<'a> = (&'a str, &'a str, f64);

impl Text {
    fn number(&mut self, name: &str, help: &str, value: impl Into<f64>) {
        self.gauge(name, help, [("", "", value.into())]);
    }

    fn total(&mut self, name: &str, help: &str, value: u64) {
        self.counter(name, help, [("", "", value as f64)]);
    }

    fn gauge<'a>(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = Sample<'a>>) {
        self.family(&format!("gossamer_{name}"), "gauge", help, samples);
    }

    fn counter<'a>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = Sample<'a>>,
    ) {
        self.family(&format!("gossamer_{name}"), "counter", help, samples);
    }

    /// Adds a family. OpenMetrics requires counters' samples, but not their family, to have the suffix.
    fn family<'a>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = Sample<'a>>,
    ) {
        let suffix = if kind == "counter" { "_total" } else { "" };
        let of_family = if self.open { "" } else { suffix };
        // Writing to a string cannot fail.
        let _ = writeln!(self.out, "# HELP {name}{of_family} {help}");
        let _ = writeln!(self.out, "# TYPE {name}{of_family} {kind}");
        for (label, value, number) in samples {
            let _ = match label {
                "" => writeln!(self.out, "{name}{suffix} {number}"),
                _ => writeln!(self.out, "{name}{suffix}{{{label}=\"{value}\"}} {number}"),
            };
        }
    }
}

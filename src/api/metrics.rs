//! What Prometheus collects: its own text format (0.0.4), or OpenMetrics 1.0 for those who ask for that.
//!
//! Everything comes from one status, so the numbers belong together. No label has more than a handful of
//! values: a peer is none, however many there are. docs/METRICS.md lists them all; a test compares.

use std::{collections::BTreeMap, fmt::Write as _, fs};

use super::{AgentStatus, MemberState};

/// `Content-Type` of each of the two formats.
const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPEN: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// `USER_HZ`: what /proc counts processor time in, on all architectures that Rust knows.
const TICKS_PER_SECOND: f64 = 100.0;

/// A page for a collector.
#[derive(Debug)]
pub struct Page {
    pub content_type: &'static str,
    pub text: String,
}

/// Writes a status down; `accept` is the header of the request.
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

fn node(text: &mut Text, status: &AgentStatus) {
    text.gauge("build_info", "The version that runs.", [("version", status.version, 1.0)]);
    text.number(
        "converged",
        "Has its subnet, equals a peer, and the kernel equals its view.",
        status.converged,
    );
    let node = &status.node;
    text.number("has_subnet", "This node leases a subnet.", node.subnet.is_some());
    text.number("problems", "Problems that `gossamer status` names.", node.problems.len() as f64);
    let warnings = status.warnings.len() as f64;
    text.number("warnings", "Warnings that `gossamer status` shows.", warnings);
    let mut members =
        BTreeMap::from(["alive", "suspect", "down", "left", "unknown"].map(|s| (s.to_owned(), 0)));
    for member in &node.members {
        let state = match MemberState::of(member) {
            gone if gone.is_gone() => MemberState::Left,
            state => state,
        };
        *members.entry(state.to_string()).or_default() += 1;
    }
    let by_state =
        members.iter().map(|(state, count)| ("state", state.as_str(), f64::from(*count)));
    text.gauge("members", "Members by what gossip says of them, this one included.", by_state);
    let slots = &node.slots;
    text.number("subnets", "Subnets of the pool.", slots.total);
    let by_state = [("leased", slots.leased), ("spare", slots.spare)];
    let by_state = by_state.map(|(state, count)| ("state", state, count.into()));
    text.gauge("subnets_known", "Subnets that some member owns.", by_state);
    text.number("subnets_spare_own", "Spare subnets that this node could grant.", slots.own_spare);
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
    text.number("pods", "Pods of this node.", status.pods as f64);
    text.number(
        "pods_outside",
        "Pods with addresses that are not of this node's subnet.",
        status.pods_outside as f64,
    );
    let counters = &node.counters;
    text.total("grants", "Subnets granted to others.", counters.grants);
    text.total(
        "reclaims",
        "Times that a forgotten node's subnets were taken over.",
        counters.reclaims,
    );
    text.total("downs", "Times that gossip called a member down.", counters.downs);
    text.total("malformed", "Frames and answers that could not be read.", counters.malformed);
    text.total("refused", "Entries of peers that cannot be true.", counters.refused);
    text.total(
        "forged",
        "Records in the name of this process that it never wrote.",
        counters.forged,
    );
    text.total("violations", "Subnets that had two owners at one epoch.", counters.violations);
    text.counter(
        "comparisons",
        "Comparisons with members.",
        [
            ("result", "same", counters.syncs_same as f64),
            ("result", "different", counters.syncs_different as f64),
        ],
    );
}

fn kernel(text: &mut Text, status: &AgentStatus) {
    let kernel = &status.kernel;
    text.number("kernel_in_sync", "The kernel equals this node's view.", kernel.in_sync);
    text.total("kernel_operations", "Changes made to the kernel.", kernel.operations);
    let repairs = kernel.repairs.iter().map(|(kind, count)| ("kind", *kind, *count as f64));
    text.counter("kernel_repairs", "Changes of others that were put right.", repairs);
    text.counter(
        "kernel_misses",
        "Entries that the kernel asked for.",
        [
            ("result", "answered", kernel.misses_answered as f64),
            ("result", "unknown", kernel.misses_unknown as f64),
        ],
    );
    text.total("guard_dropped_packets", "Tunnel packets of strangers.", kernel.strangers_dropped);
    let mut paths: BTreeMap<String, u32> = BTreeMap::new();
    for path in &status.paths {
        // As `gossamer members` calls them.
        let state = serde_json::to_value(path.state).ok();
        let state = state.as_ref().and_then(serde_json::Value::as_str).unwrap_or("unknown");
        *paths.entry(state.to_owned()).or_default() += 1;
    }
    let by_state = paths.iter().map(|(state, count)| ("state", state.as_str(), (*count).into()));
    text.gauge("paths", "Peers with a subnet, by what becomes of packets to them.", by_state);
    let trips = status.paths.iter().filter_map(|path| path.round_trip_ms);
    let worst = trips.fold(0.0, f64::max) / 1000.0;
    text.number("path_round_trip_max_seconds", "The slowest way through the overlay.", worst);
}

/// Under the names that all programs have for these.
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

struct Text {
    open: bool,
    out: String,
}

/// Label, its value, and the number; without a label, if that is empty.
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

    /// In OpenMetrics a family of counters has no suffix, and its samples do.
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

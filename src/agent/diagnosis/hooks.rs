//! Queueing disciplines, filters and eBPF programs at an interface that may drop packets there.
//!
//! Most functions read an interface at which packets are known to be lost; the result explains the loss and
//! decides nothing. The ports of pods are read in any case, because no trial uses the port of a pod; what is
//! found there becomes a warning.

use std::{error::Error, io};

use aya::programs::{SchedClassifier, tc::TcAttachType};
use nix::libc::EINVAL;
use rtnetlink::packet_route::link::LinkAttribute;

use crate::netlink::{Netlink, link::Link, tc::Qdisc};

/// A direction of packets at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Packets that leave by the interface.
    Egress,
    /// Packets that arrive at the interface.
    Ingress,
}

/// Queueing disciplines that every host has, and the two that only hold filters.
const HARMLESS: [&str; 7] = ["noqueue", "fq_codel", "pfifo_fast", "mq", "fq", "clsact", "ingress"];
/// Queueing disciplines that hold filters, and count what these drop.
const FILTER_QDISCS: [&str; 2] = ["clsact", "ingress"];
/// Queueing disciplines that the CNI plugin `bandwidth` installs at the root of a pod's port.
const PLUGIN_SHAPERS: [&str; 2] = ["tbf", "htb"];
/// The handle that the plugin gives them.
const PLUGIN_SHAPER_HANDLE: u16 = 1;
/// Limit of filters and programs named at once.
const MAX_NAMED: usize = 3;

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }
}

/// Returns a sentence with a remedy for each hook on one side of an interface; empty if none is found.
pub fn at(netlink: &mut Netlink, link: &Link, side: Side) -> Vec<String> {
    let mut found = Vec::new();
    if side == Side::Egress {
        found.extend(qdiscs(netlink, link));
    }
    found.extend(xdp(link).filter(|_| side == Side::Ingress));
    found.extend(filters(netlink, link, side, "filters", |_| true));
    found.extend(tcx(&link.name, side));
    found
}

/// Returns a sentence about the filters of a kind on one side of an interface.
fn filters(
    netlink: &mut Netlink,
    link: &Link,
    side: Side,
    kind: &str,
    is_of_kind: impl Fn(&String) -> bool,
) -> Option<String> {
    let filters = netlink.filters(link.index, side == Side::Egress).unwrap_or_default();
    let named: Vec<String> = filters.into_iter().filter(is_of_kind).take(MAX_NAMED).collect();
    let (name, side) = (&link.name, side.name());
    (!named.is_empty()).then(|| {
        let named = named.join(", ");
        format!("{name} has {kind} on its {side} ({named}): tc filter show dev {name} {side}")
    })
}

/// Returns a sentence for each group of eBPF programs that see every packet at an interface. What they do
/// with a packet is unknown.
pub fn programs(netlink: &mut Netlink, link: &Link) -> Vec<String> {
    let is_program = |filter: &String| filter.split(' ').next() == Some("bpf");
    let mut found: Vec<String> = xdp(link).into_iter().collect();
    for side in [Side::Ingress, Side::Egress] {
        found.extend(filters(netlink, link, side, "eBPF programs", is_program));
        found.extend(tcx(&link.name, side));
    }
    found
}

/// Returns a sentence about the XDP program of an interface.
fn xdp(link: &Link) -> Option<String> {
    let name = &link.name;
    link.has_xdp().then(|| {
        let program = link.xdp_program().map_or_else(String::new, |id| format!(" {id}"));
        format!(
            "the XDP program{program} of {name} sees arriving packets before all else (ip -d link show dev \
             {name}; bpftool net): ip link set dev {name} xdp off"
        )
    })
}

/// Returns a sentence about the tcx programs on one side of an interface.
fn tcx(name: &str, side: Side) -> Option<String> {
    let programs = tcx_programs(name, side).unwrap_or_default();
    let named: Vec<String> = programs.into_iter().take(MAX_NAMED).collect();
    (!named.is_empty()).then(|| {
        format!(
            "{name} has eBPF programs on its {} (tcx: {}): bpftool net show dev {name} and bpftool prog show \
             show details; end or uninstall the program that has attached them",
            side.name(),
            named.join("; ")
        )
    })
}

/// Returns a sentence if the interface is promiscuous and not a port: a macvlan in mode passthru may take all
/// packets that arrive.
pub fn passthru(link: &Link) -> Option<String> {
    let is_promiscuous = link
        .message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::Promiscuity(count) if *count > 0));
    let name = &link.name;
    (is_promiscuous && link.controller().is_none()).then(|| {
        format!(
            "{name} is promiscuous and no port of a bridge. A macvlan or macvtap in mode passthru on it \
             takes all arriving packets, for example of a container or virtual machine. Find it, also \
             in other network namespaces (ip -all netns exec ip -d link show type macvlan), and give it \
             mode bridge, or another card"
        )
    })
}

/// Returns a sentence about the queueing discipline that most likely drops packets.
fn qdiscs(netlink: &mut Netlink, link: &Link) -> Option<String> {
    let name = &link.name;
    let qdiscs = netlink.qdiscs(link.index).unwrap_or_default();
    let mut suspects: Vec<_> =
        qdiscs.iter().filter(|qdisc| !HARMLESS.contains(&qdisc.kind.as_str())).collect();
    // Prefers one that has dropped packets, and of those the root.
    suspects.sort_by_key(|qdisc| (qdisc.drops == 0, !qdisc.is_root));
    let suspect = suspects.first()?;
    // Without the number: a changed sentence would be reported as a new one.
    let packets = if suspect.drops > 0 { "packets" } else { "no packets so far" };
    Some(format!(
        "the queueing discipline {} of {name} has dropped {packets} (tc -s qdisc show dev {name}): tc qdisc \
         del dev {name} root",
        suspect.kind
    ))
}

/// Returns what another program has attached to the port of a pod that may drop some of the pod's packets,
/// with a remedy. The queueing disciplines of the CNI plugin `bandwidth` are not reported.
pub fn at_pod_port(netlink: &mut Netlink, link: &Link, qdiscs: &[Qdisc]) -> Vec<String> {
    let name = &link.name;
    let is_shaped = qdiscs.iter().any(is_of_plugin);
    let is_foreign = |qdisc: &&Qdisc| !is_shaped && !HARMLESS.contains(&qdisc.kind.as_str());
    let mut foreign: Vec<&Qdisc> = qdiscs.iter().filter(is_foreign).collect();
    foreign.sort_by_key(|qdisc| !qdisc.is_root);
    let mut found: Vec<String> = Vec::new();
    found.extend(foreign.first().map(|qdisc| {
        format!(
            "the queueing discipline {} of {name} may drop or delay what is sent to the pod (tc -s qdisc \
             show dev {name}); if this is not intended: tc qdisc del dev {name} root",
            qdisc.kind
        )
    }));
    let Some(place) = qdiscs.iter().find(|qdisc| FILTER_QDISCS.contains(&qdisc.kind.as_str()))
    else {
        return found;
    };
    for side in [Side::Ingress, Side::Egress] {
        let is_egress = side == Side::Egress;
        let filters = netlink.filters(link.index, is_egress).unwrap_or_default();
        let is_dropping = place.drops > 0
            || netlink.has_dropping_filter(link.index, is_egress).unwrap_or_default();
        if filters.is_empty() || !is_dropping {
            continue;
        }
        let filters: Vec<String> = filters.into_iter().take(MAX_NAMED).collect();
        let (side, filters) = (side.name(), filters.join(", "));
        found.push(format!(
            "filters on the {side} of {name} ({filters}) drop some of the pod's packets (tc -s filter show \
             dev {name} {side}); if this is not intended: tc filter del dev {name} {side}"
        ));
    }
    found
}

/// Whether the CNI plugin `bandwidth` has installed this queueing discipline.
fn is_of_plugin(qdisc: &Qdisc) -> bool {
    qdisc.is_root
        && qdisc.handle == PLUGIN_SHAPER_HANDLE
        && PLUGIN_SHAPERS.contains(&qdisc.kind.as_str())
}

/// Returns the sentence for an interface at which packets are lost although [`at`] found nothing.
pub fn nothing_found(interface: &str) -> String {
    let are_known =
        [Side::Egress, Side::Ingress].map(|side| tcx_programs(interface, side).is_some());
    if are_known == [true; 2] {
        return "no queueing discipline, filter or eBPF program was found there".to_owned();
    }
    format!(
        "no queueing discipline or filter was found there; eBPF programs (tcx) may not be listed by this \
         process: bpftool net show dev {interface} (of version 7.3 or later)"
    )
}

/// Returns the tcx programs (since Linux 6.6), which the list of filters omits; `None` if they may not be
/// listed.
fn tcx_programs(interface: &str, side: Side) -> Option<Vec<String>> {
    let attach = match side {
        Side::Egress => TcAttachType::Egress,
        Side::Ingress => TcAttachType::Ingress,
    };
    match SchedClassifier::query_tcx(interface, attach) {
        Ok((_, programs)) => Some(
            programs
                .iter()
                .map(|program| match program.name_as_str().filter(|name| !name.is_empty()) {
                    Some(name) => format!("{name}, id {}", program.id()),
                    None => format!("id {}", program.id()),
                })
                .collect(),
        ),
        // The kernel does not support tcx, so there is no program.
        Err(error) if os_error(&error) == Some(EINVAL) => Some(Vec::new()),
        Err(error) => {
            tracing::debug!(%error, interface, "eBPF programs not listed");
            None
        }
    }
}

/// Returns the error number of the first I/O error in the chain of sources.
fn os_error(error: &(dyn Error + 'static)) -> Option<i32> {
    let own = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    own.or_else(|| os_error(error.source()?))
}

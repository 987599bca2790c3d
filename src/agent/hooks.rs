//! What hangs on an interface and may drop packets there: queueing disciplines, filters, eBPF programs.
//!
//! Read only where packets are known to be lost at that interface. Reading explains, and decides nothing.

use std::{error::Error, io};

use aya::programs::{SchedClassifier, tc::TcAttachType};
use ipnet::IpNet;

use crate::{
    dataplane::kernel::{Closing, FirewallTable},
    netlink::{Netlink, link::Link},
};

/// Which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Those that leave by the interface.
    Egress,
    /// Those that come in by it.
    Ingress,
}

/// Queueing disciplines that every host has, and the two that are only places for filters.
const HARMLESS: [&str; 7] = ["noqueue", "fq_codel", "pfifo_fast", "mq", "fq", "clsact", "ingress"];
/// Filters and programs that are named at once.
const NAMED: usize = 3;
const EINVAL: i32 = 22;

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }
}

/// Chains of these families of nftables that may drop what pods of a subnet send or are sent at their ports,
/// with what helps.
pub fn chains(subnet: IpNet, families: &[&str]) -> impl Iterator<Item = String> {
    let found = FirewallTable::open().and_then(|mut table| table.chains_around_gateway(subnet));
    let is_of_family = |chain: &Closing| {
        families.iter().any(|family| chain.chain.split(' ').next() == Some(*family))
    };
    let mut found = found.unwrap_or_default();
    found.retain(is_of_family);
    found.into_iter().map(move |chain| format!("{chain}: {}", chain.fix(subnet)))
}

/// What hangs on one side of an interface, as sentences with what helps; none where nothing was found.
pub fn at(netlink: &mut Netlink, link: &Link, side: Side) -> Vec<String> {
    let name = &link.name;
    let mut found = Vec::new();
    if side == Side::Egress {
        found.extend(qdiscs(netlink, link));
    }
    if side == Side::Ingress && link.has_xdp() {
        let program = link.xdp_program().map_or_else(String::new, |id| format!(" {id}"));
        found.push(format!(
            "the XDP program{program} of {name} sees what comes in before all else (ip -d link show dev \
             {name}; bpftool net): ip link set dev {name} xdp off"
        ));
    }
    let filters = netlink.filters(link.index, side == Side::Egress).unwrap_or_default();
    let filters: Vec<String> = filters.into_iter().take(NAMED).collect();
    let side_name = side.name();
    if !filters.is_empty() {
        found.push(format!(
            "{name} has filters on its {side_name} ({}): tc filter show dev {name} {side_name}",
            filters.join(", ")
        ));
    }
    let programs = tcx_programs(name, side).unwrap_or_default();
    if !programs.is_empty() {
        let programs: Vec<String> = programs.into_iter().take(NAMED).collect();
        found.push(format!(
            "{name} has eBPF programs on its {side_name} (tcx: {}): bpftool net show dev {name} and bpftool \
             prog show tell more; end or uninstall the program that has attached them",
            programs.join("; ")
        ));
    }
    found
}

fn qdiscs(netlink: &mut Netlink, link: &Link) -> Option<String> {
    let name = &link.name;
    let qdiscs = netlink.qdiscs(link.index).unwrap_or_default();
    let mut suspects: Vec<_> =
        qdiscs.iter().filter(|qdisc| !HARMLESS.contains(&qdisc.kind.as_str())).collect();
    // The one that drops, and of those the one that everything goes through.
    suspects.sort_by_key(|qdisc| (qdisc.drops == 0, !qdisc.is_root));
    let suspect = suspects.first()?;
    // Not how many: a sentence that changes would be told again and again.
    let packets = if suspect.drops > 0 { "packets" } else { "no packets so far" };
    Some(format!(
        "the queueing discipline {} of {name} has dropped {packets} (tc -s qdisc show dev {name}): tc qdisc \
         del dev {name} root",
        suspect.kind
    ))
}

/// The sentence for where [`at`] has found nothing, though packets are lost there.
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

/// Programs that filters do not show (tcx, since Linux 6.6); none if they may not be listed.
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
        // The kernel is too old to have any.
        Err(error) if number_of(&error) == Some(EINVAL) => Some(Vec::new()),
        Err(error) => {
            tracing::debug!(%error, interface, "eBPF programs are not listed");
            None
        }
    }
}

fn number_of(error: &(dyn Error + 'static)) -> Option<i32> {
    let own = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    own.or_else(|| number_of(error.source()?))
}

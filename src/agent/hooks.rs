//! What hangs on an interface and may drop packets there: queueing disciplines, filters, eBPF programs.
//!
//! Read only where packets are known to be lost at that interface. Reading explains, and decides nothing.

use serde_json::Value;

use super::outside::output;
use crate::netlink::{Netlink, link::Link};

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

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }
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
    let side = side.name();
    if !filters.is_empty() {
        found.push(format!(
            "{name} has filters on its {side} ({}): tc filter show dev {name} {side}",
            filters.join(", ")
        ));
    }
    let programs = tcx_programs(name, side);
    if !programs.is_empty() {
        found.push(format!(
            "{name} has eBPF programs on its {side} ({}; tcx): bpftool net show dev {name}",
            programs.join(", ")
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
    Some(format!(
        "the queueing discipline {} of {name} has dropped {} packets (tc -s qdisc show dev {name}): tc qdisc \
         del dev {name} root",
        suspect.kind, suspect.drops
    ))
}

/// Programs that filters do not show (tcx, since Linux 6.6), as far as a bpftool that knows of them is
/// installed: the call that lists them takes code that this project does without.
fn tcx_programs(interface: &str, side: &str) -> Vec<String> {
    let printed = output("bpftool", &["-j", "net", "show", "dev", interface]);
    printed.map_or_else(Vec::new, |printed| named_programs(&printed, side))
}

fn named_programs(printed: &str, side: &str) -> Vec<String> {
    let shown: Value = serde_json::from_str(printed).unwrap_or_default();
    let parts = shown.as_array().into_iter().flatten();
    let programs = parts.filter_map(|part| part["tc"].as_array()).flatten();
    let is_it = |program: &&Value| {
        let kind = program["kind"].as_str().unwrap_or_default();
        kind.split_once('/')
            .is_some_and(|(kind, of)| ["tcx", "netkit"].contains(&kind) && of == side)
    };
    let name = |program: &Value| {
        let name = program["name"].as_str().filter(|name| !name.is_empty()).unwrap_or("unnamed");
        let id = program["prog_id"].as_u64().or_else(|| program["id"].as_u64());
        id.map_or_else(|| name.to_owned(), |id| format!("{name}, id {id}"))
    };
    programs.filter(is_it).take(NAMED).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As bpftool 7.3 and later print it.
    #[test]
    fn programs_of_the_side_that_is_asked_for_are_named() {
        let printed = r#"[{"xdp":[],"tc":[
            {"devname":"gsm1","ifindex":9,"kind":"tcx/ingress","name":"drop_all","prog_id":44},
            {"devname":"gsm1","ifindex":9,"kind":"tcx/egress","name":"","prog_id":45},
            {"devname":"gsm1","ifindex":9,"kind":"clsact/ingress","name":"old","id":46}
        ],"flow_dissector":[],"netfilter":[]}]"#;
        assert_eq!(named_programs(printed, "ingress"), ["drop_all, id 44"]);
        assert_eq!(named_programs(printed, "egress"), ["unnamed, id 45"]);
        for other in ["", "{}", "[]", "[1]", r#"[{"tc":[{"kind":7}]}]"#] {
            assert!(named_programs(other, "ingress").is_empty(), "{other}");
        }
    }
}

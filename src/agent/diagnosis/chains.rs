//! Chains of nftables that may drop packets at the ports of pods.

use ipnet::IpNet;

use crate::dataplane::foreign::{DroppingChain, ForeignTables};

/// Returns the nftables chains of these families that may drop packets from or to pods of a subnet at their
/// ports, each with a remedy.
pub fn at_pod_ports(subnet: IpNet, families: &[&str]) -> impl Iterator<Item = String> {
    let found = ForeignTables::open().and_then(|mut tables| tables.chains_around_gateway(subnet));
    let is_of_family = |chain: &DroppingChain| {
        families.iter().any(|family| chain.chain.split(' ').next() == Some(*family))
    };
    let mut found = found.unwrap_or_default();
    found.retain(is_of_family);
    found.into_iter().map(move |chain| format!("{chain}: {}", chain.resolution_fix(subnet)))
}

//! Evidence beyond captured packets and the kernel's trace: hooks of the VXLAN device, tracked connections,
//! and IPsec policies.

use std::{collections::BTreeMap, fs, net::IpAddr};

use super::{Diagnoser, SilenceFindings, kernel_queries};
use crate::{
    dataplane::silence::{Facts, IN, Kept, OUT, Place, Suspect, Watch},
    model::NodeId,
    netlink::{
        conntrack::{self, Translated},
        xfrm::{self, Policy},
    },
};

/// Limit of policies named.
const MAX_NAMED: usize = 3;
/// Counters of packets that arrive without the IPsec protection that a policy demands, or that one blocks.
const REFUSALS: [&str; 3] = ["XfrmInTmplMismatch", "XfrmInNoPols", "XfrmInPolBlock"];

impl<F: Fn(SilenceFindings)> Diagnoser<F> {
    /// Reads what may drop packets at the VXLAN device, if packets may be lost there.
    pub(super) fn read_device_hints(
        &mut self,
        place: &Place,
        diagnosed: &[Suspect],
        watch: &Watch,
        facts: &mut BTreeMap<NodeId, Facts>,
    ) {
        let mut known_hints = [None, None];
        for suspect in diagnosed {
            let Some(facts) = facts.get_mut(&suspect.node) else { continue };
            let carried = watch.traces[&suspect.node].carried;
            for (way, may_be_lost) in [(OUT, facts.entered && !carried[OUT]), (IN, carried[IN])] {
                if may_be_lost {
                    let hints = known_hints[way].get_or_insert_with(|| {
                        kernel_queries::at_device(&mut self.netlink, place, way)
                    });
                    facts.device_hints[way].clone_from(hints);
                }
            }
        }
    }
}

/// Returns how many packets IPsec policies have refused; `None` if the kernel does not count them.
pub fn ipsec_refusals() -> Option<u64> {
    let counters = fs::read_to_string("/proc/net/xfrm_stat").ok()?;
    Some(refusals(&counters))
}

fn refusals(counters: &str) -> u64 {
    let number = |line: &str| {
        let (name, number) = line.split_once(char::is_whitespace)?;
        REFUSALS.contains(&name).then(|| number.trim().parse::<u64>().ok())?
    };
    counters.lines().filter_map(number).sum()
}

/// Describes the IPsec policies for tunnel packets in this direction ([`OUT`] or [`IN`]) that do not let them
/// pass unchanged; with a `peer`, only those for its packets.
pub fn ipsec_policies(place: &Place, way: usize, peer: Option<IpAddr>) -> Vec<String> {
    let direction = if way == OUT { "out" } else { "in" };
    let policies = xfrm::policies().unwrap_or_default();
    let concerned = policies.iter().filter(|policy| {
        let (ours, theirs) = match way {
            OUT => (policy.from, policy.to),
            _ => (policy.to, policy.from),
        };
        let is_of_peer = peer.is_none_or(|peer| theirs.contains(&peer));
        !policy.lets_pass()
            && policy.direction == direction
            && ours.contains(&place.local)
            && is_of_peer
    });
    let sentence = |Policy { from, to, priority, .. }: &Policy| {
        format!(
            "an IPsec policy takes packets from {from} to {to} (ip xfrm policy: dir {direction}, priority \
             {priority}): exempt UDP {} from it",
            place.port
        )
    };
    concerned.take(MAX_NAMED).map(sentence).collect()
}

/// Returns connections of tunnel packets whose addresses are translated.
pub fn translated_connections(place: &Place) -> Vec<Translated> {
    let found = conntrack::translated(place.local.is_ipv4(), place.port);
    found.inspect_err(|error| tracing::debug!(%error, "connections not read")).unwrap_or_default()
}

/// Returns the address translation that connections of tunnel packets to or from a peer keep, where no rule
/// was found that does it.
pub fn kept_translation(
    connections: &[Translated],
    place: &Place,
    peer: IpAddr,
    facts: &Facts,
) -> Option<Kept> {
    let own = [place.local, place.source];
    let kept = connections.iter().find_map(|found| {
        let outgoing = own.contains(&found.from) && found.to == peer;
        let incoming = found.from == peer && own.contains(&found.to);
        let is_source = found.new_from != found.from;
        let address = if is_source { found.new_from } else { found.new_to };
        (outgoing || incoming).then_some(Kept { outgoing, is_source, address })
    })?;
    let has_rule = match kept.outgoing {
        true => facts.translating.is_some() || facts.translating_legacy.is_some(),
        false => !kernel_queries::redirecting(place.local.is_ipv4(), place.port).is_empty(),
    };
    (!has_rule).then_some(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_sum_those_for_missing_protection() {
        let counters = "XfrmInError             \t7\nXfrmInNoPols            \t1\n\
                        XfrmInTmplMismatch      \t2064\nXfrmOutPolBlock         \t9\n";
        assert_eq!(refusals(counters), 2_065);
        assert_eq!(refusals(""), 0);
    }
}

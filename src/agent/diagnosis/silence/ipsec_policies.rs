//! IPsec policies that take tunnel packets, and the packets that they refuse.

use std::{fs, net::IpAddr};

use crate::{
    agent::diagnosis::forwarder::ipsec,
    dataplane::silence::{OUT, Place},
    netlink::xfrm::{self, Policy},
};

/// Limit of policies named.
const MAX_NAMED: usize = 3;
/// Counters of packets that arrive without the IPsec protection that a policy demands, or that one blocks.
const REFUSALS: [&str; 3] = ["XfrmInTmplMismatch", "XfrmInNoPols", "XfrmInPolBlock"];

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

/// Describes the IPsec policies for tunnel packets in this direction ([`OUT`] or `IN`) that do not let them
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
            "an IPsec policy matches packets from {from} to {to} (ip xfrm policy: dir {direction}, priority \
             {priority}): exempt UDP {} from it",
            place.port
        )
    };
    let named = concerned.take(MAX_NAMED).map(sentence);
    named.chain(ipsec::blocking_defaults(&[direction])).collect()
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

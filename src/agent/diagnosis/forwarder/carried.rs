//! The fate of trial packets inside tunnel packets. Output rules of this host see tunnel packets, and
//! may accept them by the program that sent the inner packet; a packet of a pod has no such program.
//! Policy rules may divert them by a mark, which a tunnel packet inherits from the inner packet.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::dataplane::forwarding::TrialResult;

/// What was captured, by destination inside the tunnel.
#[derive(Debug, Default)]
pub struct Carried {
    /// Destinations of the pod's packets that reached the VXLAN device.
    pub entered: BTreeSet<IpAddr>,
    /// Destinations of the pod's packets that left inside tunnel packets, with the indexes of the
    /// interfaces: those of a VLAN or bond and of the devices below it.
    pub left: BTreeMap<IpAddr, BTreeSet<u32>>,
    /// The same for packets of this host itself.
    pub own: BTreeMap<IpAddr, BTreeSet<u32>>,
    /// Destinations with several next hops: packets may leave by any of their interfaces.
    pub spread: BTreeSet<IpAddr>,
}

impl Carried {
    /// Returns the verdict. If no packet of this host was captured either, something else takes them
    /// (IPsec), or no route exists.
    pub fn seen(&self) -> TrialResult {
        let mut comparable = self.own.iter().filter(|(to, _)| self.entered.contains(to)).peekable();
        if comparable.peek().is_none() && self.left.is_empty() {
            return TrialResult::Unclear;
        }
        let has_left = comparable.all(|(to, own)| {
            let left = self.left.get(to);
            left.is_some_and(|left| self.spread.contains(to) || !left.is_disjoint(own))
        });
        if has_left { TrialResult::Passed } else { TrialResult::Lost }
    }

    /// Returns the interface by which a packet of the pod left, if this host's own packets leave by
    /// another.
    pub fn stray(&self) -> Option<u32> {
        self.left.iter().find_map(|(to, left)| {
            let own = self.own.get(to).filter(|own| left.is_disjoint(own));
            own.filter(|_| !self.spread.contains(to)).and(left.first().copied())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_packets_count_as_lost_only_if_own_ones_to_same_peer_left() {
        let [a, b] = [1, 2].map(|last| IpAddr::from([10, 42, last, 0]));
        let seen = |entered: &[IpAddr], left: &[IpAddr], own: &[IpAddr]| {
            let [left, own] =
                [left, own].map(|set| set.iter().map(|to| (*to, BTreeSet::from([2]))).collect());
            let entered = entered.iter().copied().collect();
            Carried { entered, left, own, spread: BTreeSet::new() }.seen()
        };
        assert_eq!(seen(&[a, b], &[], &[]), TrialResult::Unclear);
        assert_eq!(seen(&[a], &[], &[b]), TrialResult::Unclear);
        assert_eq!(seen(&[a, b], &[b], &[b]), TrialResult::Passed);
        assert_eq!(seen(&[a, b], &[a], &[]), TrialResult::Passed);
        assert_eq!(seen(&[a, b], &[a], &[a, b]), TrialResult::Lost);
    }

    #[test]
    fn pod_packets_that_leave_by_other_interfaces_than_own_ones_are_lost() {
        let to = IpAddr::from([10, 42, 1, 0]);
        let seen = |left: &[u32], own: &[u32], spread: bool| {
            let by = |links: &[u32]| BTreeMap::from([(to, links.iter().copied().collect())]);
            let spread = spread.then_some(to).into_iter().collect();
            Carried { entered: BTreeSet::from([to]), left: by(left), own: by(own), spread }.seen()
        };
        assert_eq!(seen(&[3], &[2], false), TrialResult::Lost);
        // A VLAN and the card below it, or the two cards of a bond.
        assert_eq!(seen(&[5, 2], &[5, 2], false), TrialResult::Passed);
        assert_eq!(seen(&[5, 3], &[5, 2], false), TrialResult::Passed);
        assert_eq!(seen(&[3], &[2], true), TrialResult::Passed, "by the other next hop");
    }
}

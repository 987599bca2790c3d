//! What becomes of packets of a trial inside tunnel packets. Output rules of this host see those, and may let
//! them pass by the program that has sent what is inside: a packet of a pod has none. And policy rules may
//! lead them elsewhere by a mark, which a tunnel packet inherits from what is inside.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::dataplane::forwarding::TrialResult;

/// What was seen, by destination inside the tunnel.
#[derive(Debug, Default)]
pub struct Carried {
    /// Packets of the pod that have come to the VXLAN device.
    pub entered: BTreeSet<IpAddr>,
    /// Those that have left inside tunnel packets, with the indexes of the interfaces by which they have:
    /// of a VLAN or a bond and of what is below it.
    pub left: BTreeMap<IpAddr, BTreeSet<u32>>,
    /// Packets of this host itself that have.
    pub own: BTreeMap<IpAddr, BTreeSet<u32>>,
    /// Destinations to which several next hops lead: packets may leave by any of their interfaces.
    pub spread: BTreeSet<IpAddr>,
}

impl Carried {
    /// Where none of this host's own is seen either, something else takes them (IPsec), or there is no way.
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

    /// The interface by which a packet of the pod has left, where this host's own leave by another.
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
    fn packets_count_as_lost_only_beside_own_ones_to_the_same_peer_that_left() {
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
    fn packets_that_leave_by_none_of_the_interfaces_of_own_ones_are_lost() {
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

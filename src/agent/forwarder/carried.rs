//! What becomes of packets of a trial inside tunnel packets. Output rules of this host see those, and may let
//! them pass by the program that has sent what is inside: a packet of a pod has none.

use std::{collections::BTreeSet, net::IpAddr};

use crate::dataplane::forwarding::Seen;

/// What was seen, by destination inside the tunnel.
#[derive(Debug, Default)]
pub struct Carried {
    /// Packets of the pod that have come to the VXLAN device.
    pub entered: BTreeSet<IpAddr>,
    /// Those that have left inside tunnel packets.
    pub left: BTreeSet<IpAddr>,
    /// Packets of this host itself that have.
    pub own: BTreeSet<IpAddr>,
}

impl Carried {
    /// Where none of this host's own is seen either, something else takes them (IPsec), or there is no way.
    pub fn seen(&self) -> Seen {
        let mut comparable = self.entered.intersection(&self.own);
        if comparable.clone().next().is_none() && self.left.is_empty() {
            return Seen::Unclear;
        }
        let has_left = comparable.all(|to| self.left.contains(to));
        if has_left { Seen::Passed } else { Seen::Lost }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_count_as_lost_only_beside_own_ones_to_the_same_peer_that_left() {
        let [a, b] = [1, 2].map(|last| IpAddr::from([10, 42, last, 0]));
        let seen = |entered: &[IpAddr], left: &[IpAddr], own: &[IpAddr]| {
            let [entered, left, own] =
                [entered, left, own].map(|set| set.iter().copied().collect());
            Carried { entered, left, own }.seen()
        };
        assert_eq!(seen(&[a, b], &[], &[]), Seen::Unclear);
        assert_eq!(seen(&[a], &[], &[b]), Seen::Unclear);
        assert_eq!(seen(&[a, b], &[b], &[b]), Seen::Passed);
        assert_eq!(seen(&[a, b], &[a], &[]), Seen::Passed);
        assert_eq!(seen(&[a, b], &[a], &[a, b]), Seen::Lost);
    }
}

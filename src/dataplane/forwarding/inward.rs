//! Whose packets do not arrive at the agent's own pod, as members' requests for reports show it.
//!
//! A member requests a report about a round only if some of its packets were not answered. If none of a
//! family arrived, they were lost on their way: on the member's host, in the network, or on this host.
//! Trials of this host do not show that: without a tunnel, only another host can send packets that arrive
//! by the underlay interface.

use std::{collections::BTreeMap, time::Duration};

use super::{
    TrialResult, Trials,
    remote::message::{Kind, Sort},
};
use crate::{
    model::{NodeId, Time},
    wire::Arrivals,
};

/// Age of the agent's own pod, in milliseconds, from which missing packets count as lost.
const MIN_POD_AGE_MS: u32 = 15_000;
/// Time without a request after which a member's losses are forgotten.
const REQUEST_VALIDITY: Duration = Duration::from_secs(120);

/// A way of packets to this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InwardWay {
    /// The member whose pods send.
    pub node: NodeId,
    /// The packets are IPv4, not IPv6.
    pub ipv4: bool,
}

/// The results of members' trials on their way to this host.
#[derive(Debug, Default)]
pub struct InwardLosses {
    trials: Trials<InwardWay>,
    /// Time of each member's last request.
    requested: BTreeMap<NodeId, Time>,
}

impl InwardLosses {
    /// Records the report that a member requested. Families for which `is_tried` returns false do not count.
    pub fn on_request(
        &mut self,
        now: Time,
        node: NodeId,
        report: &Arrivals,
        is_tried: impl Fn(bool) -> bool,
    ) {
        self.requested.insert(node, now);
        let is_conclusive = report.pod_age_ms >= MIN_POD_AGE_MS && !report.shed;
        for ipv4 in [true, false].into_iter().filter(|ipv4| is_tried(*ipv4)) {
            let result = match report.came & all_sorts(ipv4) {
                0 if is_conclusive => TrialResult::Lost,
                0 => TrialResult::Unclear,
                _ => TrialResult::Passed,
            };
            self.trials.note(InwardWay { node, ipv4 }, result);
        }
    }

    /// Records a packet of a member's round.
    pub fn on_question(&mut self, node: NodeId, ipv4: bool) {
        if self.requested.contains_key(&node) {
            self.trials.note(InwardWay { node, ipv4 }, TrialResult::Passed);
        }
    }

    /// Forgets members without a recent request, and ways for which `is_tried` returns false.
    pub fn retain(&mut self, now: Time, is_tried: impl Fn(NodeId, bool) -> bool) {
        self.requested.retain(|_, at| now.since(*at) < REQUEST_VALIDITY);
        let requested = &self.requested;
        self.trials.retain(|InwardWay { node, ipv4 }| {
            requested.contains_key(node) && is_tried(*node, *ipv4)
        });
    }

    /// Returns the ways on which no packet arrives.
    pub fn closed(&self) -> Vec<InwardWay> {
        self.trials.closed()
    }
}

/// Returns the bits of all sorts of a family.
fn all_sorts(ipv4: bool) -> u16 {
    let kinds = Kind::ALL.into_iter().chain([Kind::Sample]);
    kinds.fold(0, |all, kind| all | Sort { ipv4, kind }.bit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::forwarding::remote::message::SEES_DATA;

    const SMALL: Sort = Sort { ipv4: true, kind: Kind::Small };

    fn report(came: u16) -> Arrivals {
        Arrivals { pod_age_ms: MIN_POD_AGE_MS, came: SEES_DATA | came, samples: 0, shed: false }
    }

    #[test]
    fn way_is_closed_while_requests_find_no_packet_and_open_once_one_arrives() {
        let (node, other) = (NodeId::from_bytes([1; 8]), NodeId::from_bytes([2; 8]));
        let at = |seconds| Time::ZERO + Duration::from_secs(seconds);
        let mut losses = InwardLosses::default();
        let closed = |ipv4| InwardWay { node, ipv4 };
        let ipv6 = Sort { ipv4: false, ..SMALL }.bit();
        for second in 0..3 {
            assert!(losses.closed().is_empty());
            losses.on_request(at(second), node, &report(ipv6), |_| true);
            losses.on_request(at(second), other, &report(SMALL.bit() | ipv6), |_| true);
        }
        assert_eq!(losses.closed(), [closed(true)], "only the family without any packet");
        losses.on_question(node, false);
        assert_eq!(losses.closed(), [closed(true)]);
        losses.on_question(node, true);
        assert!(losses.closed().is_empty());

        for second in 0..3 {
            losses.on_request(at(second), node, &report(0), |ipv4| ipv4);
        }
        assert_eq!(losses.closed(), [closed(true)], "the other family is not tried");
        losses.retain(at(100), |_, _| true);
        assert_eq!(losses.closed(), [closed(true)]);
        losses.retain(at(200), |_, _| true);
        assert!(losses.closed().is_empty(), "no request for a long time");
    }

    #[test]
    fn report_of_a_new_or_overloaded_pod_proves_no_loss() {
        let node = NodeId::from_bytes([1; 8]);
        let mut losses = InwardLosses::default();
        for _ in 0..4 {
            let young = Arrivals { pod_age_ms: MIN_POD_AGE_MS - 1, ..report(0) };
            losses.on_request(Time::ZERO, node, &young, |_| true);
            losses.on_request(Time::ZERO, node, &Arrivals { shed: true, ..report(0) }, |_| true);
        }
        assert!(losses.closed().is_empty());
    }
}

//! Checks whether each pod of this host answers ARP or neighbor discovery.
//!
//! A queueing discipline, a filter or an eBPF program on a pod's host-side interface may silently drop all
//! packets between the pod and its host. The agent therefore queries the pods in turn, on the bridge, for
//! their own addresses. The pod's kernel answers, whatever the pod's firewall drops and whether or not the
//! pod's processes run.
//!
//! If no answer arrives, packets captured at the interfaces show where it was lost. A query that does not
//! leave by the pod's interface was certainly lost on this host, and so was an answer that enters by that
//! interface but does not reach the bridge. A query that leaves and gets no answer was lost at the pod; that
//! is a problem only if the pod has answered before.
//!
//! Pure: the agent sends and captures the packets.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use super::captured::{PACKET_OUTGOING, Packet};
use crate::frames::{ADVERTISEMENT, ARP, SOLICITATION};

/// Maximum number of pods taken in turn per round; one query and one answer each. Suspect pods come on top.
pub const MAX_PODS_PER_ROUND: usize = 20;
/// Interval between rounds while all pods answer.
const ROUND_INTERVAL: Duration = Duration::from_secs(15);
/// Interval between rounds while a pod has missed answers but is not yet reported as silent.
const SUSPECT_ROUND_INTERVAL: Duration = Duration::from_secs(1);
/// Interval between rounds while a pod is reported as silent.
const SILENT_ROUND_INTERVAL: Duration = Duration::from_secs(5);
/// Consecutive rounds without an answer after which a pod is reported as silent.
const ROUNDS_UNTIL_SILENT: u32 = 3;
/// EtherType of IPv6.
const IPV6: u16 = 0x86dd;
/// IP protocol number of `ICMPv6` (IANA).
const ICMPV6: u8 = 58;

/// The place where a query to a pod, or its answer, was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum QueryLoss {
    /// On this host: the query does not leave by the pod's interface.
    Query,
    /// On this host: the answer enters by the pod's interface and does not reach the bridge.
    Answer,
    /// At the pod: the query leaves by the pod's interface, and no answer arrives.
    Pod,
}

/// The result of one query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryResult {
    /// The answer reached the bridge.
    Answered,
    /// The answer did not reach the bridge; it or the query was lost at this place.
    Lost(QueryLoss),
    /// No answer reached the bridge. The pods' interfaces were not captured, so the place is unknown.
    Unanswered,
    /// No answer was captured, but the capture missed packets.
    Unclear,
}

/// The packets captured during one round of queries.
#[derive(Debug)]
pub struct Round {
    /// Interface index of the pods' bridge.
    bridge: u32,
    /// Queried addresses, each with the index of its pod's host-side interface.
    ports: BTreeMap<IpAddr, u32>,
    /// Addresses whose query left by the pod's interface.
    queries_sent: BTreeSet<IpAddr>,
    /// Addresses whose answer entered by the pod's interface.
    answers_at_port: BTreeSet<IpAddr>,
    /// Addresses whose answer reached the bridge.
    answers_at_bridge: BTreeSet<IpAddr>,
    /// The capture missed packets.
    missed_packets: bool,
}

/// Results of all pods, by the name of the pod's host-side interface.
#[derive(Debug, Default)]
pub struct PodResults {
    pods: BTreeMap<String, PodResult>,
    /// The interface at which the last turn ended.
    last: String,
}

/// Results of one pod.
#[derive(Clone, Copy, Debug, Default)]
struct PodResult {
    /// The pod has answered at least once.
    answered: bool,
    /// Consecutive rounds without an answer.
    silent: u32,
    /// Where the last query or answer was lost.
    loss: Option<QueryLoss>,
}

impl Round {
    /// Creates a round for these addresses, each with the interface index of its pod.
    pub fn new(bridge: u32, ports: BTreeMap<IpAddr, u32>) -> Self {
        let (queries_sent, answers_at_port, answers_at_bridge) = Default::default();
        Self {
            bridge,
            ports,
            queries_sent,
            answers_at_port,
            answers_at_bridge,
            missed_packets: false,
        }
    }

    /// Notes that the capture missed packets because too many arrived.
    pub const fn note_overflow(&mut self) {
        self.missed_packets = true;
    }

    /// Evaluates a captured packet. Accepting an answer by its address alone is safe where anti-spoofing is
    /// on: the kernel drops another pod's answer for this address at that pod's port.
    pub fn on_packet(&mut self, packet: &Packet<'_>) {
        let Some((is_answer, address)) = parse_query_or_answer(packet) else { return };
        let Some(port) = self.ports.get(&address) else { return };
        match (packet.kind == PACKET_OUTGOING, is_answer) {
            (true, false) if packet.link == *port => _ = self.queries_sent.insert(address),
            (false, true) if packet.link == *port => _ = self.answers_at_port.insert(address),
            (false, true) if packet.link == self.bridge => {
                _ = self.answers_at_bridge.insert(address)
            }
            _ => {}
        }
    }

    /// Returns whether all queries are answered.
    pub fn is_over(&self) -> bool {
        self.answers_at_bridge.len() == self.ports.len()
    }

    /// Returns whether the query for `address` is answered.
    pub fn is_answered(&self, address: IpAddr) -> bool {
        self.answers_at_bridge.contains(&address)
    }

    /// Returns the result for `address`. `watched_ports`: the pods' interfaces were captured, not only the
    /// bridge.
    pub fn reply(&self, address: IpAddr, watched_ports: bool) -> QueryResult {
        if self.is_answered(address) {
            QueryResult::Answered
        } else if self.missed_packets {
            QueryResult::Unclear
        } else if !watched_ports {
            QueryResult::Unanswered
        } else if self.answers_at_port.contains(&address) {
            QueryResult::Lost(QueryLoss::Answer)
        } else if self.queries_sent.contains(&address) {
            QueryResult::Lost(QueryLoss::Pod)
        } else {
            QueryResult::Lost(QueryLoss::Query)
        }
    }
}

impl PodResults {
    /// Selects the pods of the next round: all suspect ones (at most `MAX_PODS_PER_ROUND`), and the next ones
    /// in turn.
    pub fn select_pods<'a>(
        &mut self,
        pods: impl Iterator<Item = &'a String> + Clone,
    ) -> BTreeSet<String> {
        let is_silent = |port: &&String| self.pods.get(*port).is_some_and(|pod| pod.silent > 0);
        let mut chosen: BTreeSet<String> =
            pods.clone().filter(is_silent).take(MAX_PODS_PER_ROUND).cloned().collect();
        let count = pods.clone().count();
        let after = pods.clone().filter(|port| **port > self.last).chain(pods).take(count);
        let next: Vec<&String> = after.take(MAX_PODS_PER_ROUND).collect();
        if let Some(last) = next.last() {
            self.last.clone_from(last);
        }
        chosen.extend(next.into_iter().cloned());
        chosen
    }

    /// Returns whether the pod missed the last answers, so that its interface has to be captured as well.
    pub fn is_suspect(&self, port: &str) -> bool {
        self.pods.get(port).is_some_and(|pod| pod.silent > 0)
    }

    /// Returns whether the pod has ever answered.
    pub fn has_answered(&self, port: &str) -> bool {
        self.pods.get(port).is_some_and(|pod| pod.answered)
    }

    /// Records the result of a round for a pod.
    pub fn note(&mut self, port: &str, reply: QueryResult) {
        let pod = self.pods.entry(port.to_owned()).or_default();
        match reply {
            QueryResult::Answered => *pod = PodResult { answered: true, ..PodResult::default() },
            QueryResult::Unclear => {}
            QueryResult::Unanswered => pod.silent = pod.silent.saturating_add(1),
            QueryResult::Lost(loss) => {
                pod.silent = pod.silent.saturating_add(1);
                pod.loss = Some(loss);
            }
        }
    }

    /// Clears the missed answers of a pod that cannot be queried now: its own interface is down, or its
    /// host-side interface is being repaired.
    pub fn clear_misses(&mut self, port: &str) {
        if let Some(pod) = self.pods.get_mut(port) {
            (pod.silent, pod.loss) = (0, None);
        }
    }

    /// Forgets pods that no longer exist.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.pods.retain(|port, _| exists(port));
    }

    /// Returns the interfaces of silent pods, each with the place of the loss.
    pub fn silent(&self) -> impl Iterator<Item = (&str, QueryLoss)> {
        self.pods.iter().filter_map(|(port, pod)| {
            let loss = pod.loss.filter(|_| pod.silent >= ROUNDS_UNTIL_SILENT)?;
            (loss != QueryLoss::Pod || pod.answered).then_some((port.as_str(), loss))
        })
    }

    /// Returns the number of pods that answered when they were last queried.
    pub fn answering(&self) -> usize {
        self.pods.values().filter(|pod| pod.answered && pod.silent == 0).count()
    }

    /// Returns the time until the next round.
    pub fn pause(&self) -> Duration {
        let is_suspect = |pod: &PodResult| (1..=ROUNDS_UNTIL_SILENT).contains(&pod.silent);
        if self.pods.values().any(is_suspect) {
            SUSPECT_ROUND_INTERVAL
        } else if self.silent().next().is_some() {
            SILENT_ROUND_INTERVAL
        } else {
            ROUND_INTERVAL
        }
    }
}

/// Parses an ARP or neighbor discovery message: whether it is an answer, and the address in question.
fn parse_query_or_answer(packet: &Packet<'_>) -> Option<(bool, IpAddr)> {
    let bytes = packet.bytes;
    match packet.protocol {
        // Ethernet and IPv4 (RFC 826): the target address of a query, the sender address of an answer.
        ARP if bytes.get(..6)? == [0, 1, 8, 0, 6, 4] => {
            let is_answer = bytes.get(6..8)? == [0, 2];
            let at = if is_answer { 14 } else { 24 };
            Some((is_answer, IpAddr::from(*bytes.get(at..)?.first_chunk::<4>()?)))
        }
        IPV6 if *bytes.get(6)? == ICMPV6 => {
            let message = bytes.get(40..)?;
            let is_answer = match *message.first()? {
                SOLICITATION => false,
                ADVERTISEMENT => true,
                _ => return None,
            };
            Some((is_answer, IpAddr::from(*message.get(8..)?.first_chunk::<16>()?)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIDGE: u32 = 3;
    const POD_PORT: u32 = 7;
    const POD: [u8; 4] = [10, 42, 1, 2];

    fn arp(kind: u8, link: u32, answers: bool) -> QueryResult {
        let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, if answers { 2 } else { 1 }];
        bytes.extend([0; 6]);
        bytes.extend(if answers { POD } else { [10, 42, 1, 1] });
        bytes.extend([0; 6]);
        bytes.extend(if answers { [10, 42, 1, 1] } else { POD });
        captured(&[(kind, link, ARP, bytes)])
    }

    fn captured(packets: &[(u8, u32, u16, Vec<u8>)]) -> QueryResult {
        let address = match packets {
            [(.., IPV6, _), ..] => "fd42::2".parse().expect("an address"),
            _ => IpAddr::from(POD),
        };
        let mut round = Round::new(BRIDGE, BTreeMap::from([(address, POD_PORT)]));
        for (kind, link, protocol, bytes) in packets {
            // Truncated packets must not panic.
            (0..=bytes.len()).for_each(|end| {
                let bytes = &bytes[..end];
                round.on_packet(&Packet { link: *link, kind: *kind, protocol: *protocol, bytes });
            });
        }
        assert_eq!(round.is_over(), round.reply(address, true) == QueryResult::Answered);
        round.reply(address, true)
    }

    #[test]
    fn packets_captured_at_interfaces_give_place_of_loss() {
        assert_eq!(captured(&[]), QueryResult::Lost(QueryLoss::Query));
        assert_eq!(arp(PACKET_OUTGOING, POD_PORT, false), QueryResult::Lost(QueryLoss::Pod));
        assert_eq!(arp(3, POD_PORT, true), QueryResult::Lost(QueryLoss::Answer));
        assert_eq!(arp(0, BRIDGE, true), QueryResult::Answered);
        // On another port, and on the bridge.
        assert_eq!(arp(PACKET_OUTGOING, POD_PORT + 1, false), QueryResult::Lost(QueryLoss::Query));
        assert_eq!(arp(PACKET_OUTGOING, BRIDGE, false), QueryResult::Lost(QueryLoss::Query));
        let target = "fd42::2".parse::<std::net::Ipv6Addr>().expect("an address").octets();
        let discovery = |kind| {
            let mut bytes = vec![0x60, 0, 0, 0, 0, 24, ICMPV6, 255];
            bytes.extend([0; 32]);
            bytes.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend(target);
            bytes
        };
        let query = (PACKET_OUTGOING, POD_PORT, IPV6, discovery(SOLICITATION));
        assert_eq!(captured(&[query]), QueryResult::Lost(QueryLoss::Pod));
        assert_eq!(captured(&[(0, BRIDGE, IPV6, discovery(ADVERTISEMENT))]), QueryResult::Answered);
        assert_eq!(
            captured(&[(0, BRIDGE, IPV6, discovery(1))]),
            QueryResult::Lost(QueryLoss::Query)
        );
    }

    #[test]
    fn pod_without_answers_for_three_rounds_is_silent_and_loss_at_pod_counts_only_after_an_answer()
    {
        let mut results = PodResults::default();
        let silent =
            |results: &PodResults| results.silent().map(|(_, loss)| loss).collect::<Vec<_>>();
        results.note("a", QueryResult::Unanswered);
        assert!(silent(&results).is_empty() && results.is_suspect("a"));
        assert_eq!(results.pause(), SUSPECT_ROUND_INTERVAL);
        results.note("a", QueryResult::Lost(QueryLoss::Answer));
        results.note("a", QueryResult::Unclear);
        assert!(silent(&results).is_empty(), "two rounds");
        results.note("a", QueryResult::Lost(QueryLoss::Pod));
        assert!(silent(&results).is_empty(), "it has never answered");
        results.note("a", QueryResult::Lost(QueryLoss::Answer));
        assert_eq!(silent(&results), [QueryLoss::Answer]);
        assert_eq!(results.pause(), SILENT_ROUND_INTERVAL);
        results.note("a", QueryResult::Answered);
        assert!(silent(&results).is_empty());
        assert_eq!((results.pause(), results.answering()), (ROUND_INTERVAL, 1));
        results.note("a", QueryResult::Unanswered);
        results.note("a", QueryResult::Lost(QueryLoss::Pod));
        results.note("a", QueryResult::Lost(QueryLoss::Pod));
        assert_eq!(silent(&results), [QueryLoss::Pod]);
        results.clear_misses("a");
        assert!(silent(&results).is_empty() && !results.is_suspect("a"));
        results.retain(|port| port != "a");
        (0..ROUNDS_UNTIL_SILENT).for_each(|_| results.note("a", QueryResult::Lost(QueryLoss::Pod)));
        assert!(silent(&results).is_empty(), "another pod");
    }

    #[test]
    fn capture_that_missed_packets_gives_no_result() {
        let address = IpAddr::from(POD);
        let mut round = Round::new(BRIDGE, BTreeMap::from([(address, POD_PORT)]));
        round.note_overflow();
        assert_eq!(round.reply(address, true), QueryResult::Unclear);
        assert_eq!(round.reply(address, false), QueryResult::Unclear);
    }

    #[test]
    fn pods_are_selected_in_turn_and_suspect_ones_in_each_round() {
        let pods: BTreeSet<String> = (0..50).map(|number| format!("gsm{number:02}")).collect();
        let mut results = PodResults::default();
        results.note("gsm07", QueryResult::Unanswered);
        let mut selected = BTreeMap::<String, u32>::new();
        for _ in 0..5 {
            let chosen = results.select_pods(pods.iter());
            assert!(chosen.len() <= MAX_PODS_PER_ROUND + 1 && chosen.contains("gsm07"));
            chosen.into_iter().for_each(|port| *selected.entry(port).or_default() += 1);
        }
        assert!(selected.len() == 50 && selected.values().all(|times| *times >= 2), "{selected:?}");
        let few: BTreeSet<String> = pods.iter().take(3).cloned().collect();
        assert_eq!(results.select_pods(few.iter()), few);
        assert!(results.select_pods([].iter()).is_empty());
    }
}

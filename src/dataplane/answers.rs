//! Whether each pod of this host answers ARP, or neighbor discovery: whom to ask next, what was seen of a
//! question and its answer, and what follows.
//!
//! Something between a pod and its host may drop all packets in silence: a queueing discipline, a filter or
//! an eBPF program of the pod's interface on this host. So every pod is asked by turns, on the bridge, for
//! its own address. Each answers, whatever its firewall drops and whether or not it runs: its kernel does so.
//!
//! Where no answer comes, packets at the interfaces tell the place. A question that does not leave by the
//! pod's interface, and an answer that comes in by it and not as far as the bridge, are lost on this host:
//! that is certain. A question that has left and is not answered is lost at the pod. That is a problem only
//! of a pod that has answered before. Pure: packets are sent and seen elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use super::silence::{ADVERTISEMENT, ARP, Packet, SOLICITATION};

/// Pods that are asked in one round: a question and an answer of each.
pub const BUDGET: usize = 20;
/// From one round to the next while all answer.
const CALM: Duration = Duration::from_secs(15);
/// The same while some may have fallen silent.
const ANXIOUS: Duration = Duration::from_secs(1);
/// The same while some are known to be silent.
const SILENT: Duration = Duration::from_secs(5);
/// So many rounds in a row without an answer make a verdict.
const VERDICT: u32 = 3;
/// Kinds of packets as packet sockets tell them (linux/if_packet.h).
pub const LEAVING: u8 = 4;
/// Ethernet's number, and that of ICMPv6 (IANA).
const IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;

/// Where a question to a pod, or its answer, was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// The question does not leave this host by the pod's interface.
    Question,
    /// The answer comes in by the pod's interface, and not as far as the bridge.
    Answer,
    /// The question leaves, and no answer arrives.
    Pod,
}

/// What came of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    Came,
    Lost(Loss),
    /// No answer came, and it was not looked where it was lost.
    Missing,
    /// No answer was seen, and not all packets were.
    Unclear,
}

/// What was seen of each question of one round.
#[derive(Debug)]
pub struct Round {
    /// Index of the bridge's interface.
    bridge: u32,
    /// Index of the interface of the pod with an address.
    ports: BTreeMap<IpAddr, u32>,
    left: BTreeSet<IpAddr>,
    came: BTreeSet<IpAddr>,
    taken: BTreeSet<IpAddr>,
    /// Packets have come that were not seen.
    missed: bool,
}

/// What is known of each pod, by the name of its interface on this host.
#[derive(Debug, Default)]
pub struct Roll {
    tallies: BTreeMap<String, Tally>,
    /// The last one whose turn it was.
    last: String,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    /// It has answered at some time.
    answered: bool,
    /// Rounds in a row without an answer.
    silent: u32,
    /// Where the last question or answer was lost.
    loss: Option<Loss>,
}

impl Round {
    pub fn new(bridge: u32, ports: BTreeMap<IpAddr, u32>) -> Self {
        let (left, came, taken) = Default::default();
        Self { bridge, ports, left, came, taken, missed: false }
    }

    /// Takes note that packets were not seen, for there were too many.
    pub const fn miss(&mut self) {
        self.missed = true;
    }

    /// Takes note of a packet. An answer of another pod for this address is dropped at that pod's port, where
    /// anti-spoofing is on.
    pub fn see(&mut self, packet: &Packet<'_>) {
        let Some((is_answer, address)) = question_or_answer(packet) else { return };
        let Some(port) = self.ports.get(&address) else { return };
        match (packet.kind == LEAVING, is_answer) {
            (true, false) if packet.link == *port => _ = self.left.insert(address),
            (false, true) if packet.link == *port => _ = self.came.insert(address),
            (false, true) if packet.link == self.bridge => _ = self.taken.insert(address),
            _ => {}
        }
    }

    pub fn is_over(&self) -> bool {
        self.taken.len() == self.ports.len()
    }

    pub fn is_answered(&self, address: IpAddr) -> bool {
        self.taken.contains(&address)
    }

    /// What came of the question for an address. Ports were watched as well, or the bridge alone.
    pub fn reply(&self, address: IpAddr, watched_ports: bool) -> Reply {
        if self.is_answered(address) {
            Reply::Came
        } else if self.missed {
            Reply::Unclear
        } else if !watched_ports {
            Reply::Missing
        } else if self.came.contains(&address) {
            Reply::Lost(Loss::Answer)
        } else if self.left.contains(&address) {
            Reply::Lost(Loss::Pod)
        } else {
            Reply::Lost(Loss::Question)
        }
    }
}

impl Roll {
    /// Whose turn it is among these: those that may be silent, and the next ones of the others.
    pub fn choose<'a>(
        &mut self,
        pods: impl Iterator<Item = &'a String> + Clone,
    ) -> BTreeSet<String> {
        let is_silent =
            |port: &&String| self.tallies.get(*port).is_some_and(|tally| tally.silent > 0);
        let mut chosen: BTreeSet<String> =
            pods.clone().filter(is_silent).take(BUDGET).cloned().collect();
        let count = pods.clone().count();
        let after = pods.clone().filter(|port| **port > self.last).chain(pods).take(count);
        let next: Vec<&String> = after.take(BUDGET).collect();
        if let Some(last) = next.last() {
            self.last.clone_from(last);
        }
        chosen.extend(next.into_iter().cloned());
        chosen
    }

    /// Whether the place is to be looked for where its questions or answers are lost.
    pub fn is_suspect(&self, port: &str) -> bool {
        self.tallies.get(port).is_some_and(|tally| tally.silent > 0)
    }

    pub fn has_answered(&self, port: &str) -> bool {
        self.tallies.get(port).is_some_and(|tally| tally.answered)
    }

    pub fn note(&mut self, port: &str, reply: Reply) {
        let tally = self.tallies.entry(port.to_owned()).or_default();
        match reply {
            Reply::Came => *tally = Tally { answered: true, ..Tally::default() },
            Reply::Unclear => {}
            Reply::Missing => tally.silent = tally.silent.saturating_add(1),
            Reply::Lost(loss) => {
                tally.silent = tally.silent.saturating_add(1);
                tally.loss = Some(loss);
            }
        }
    }

    /// The pod cannot be asked now: its own end is down, or its interface is being put right.
    pub fn pass_over(&mut self, port: &str) {
        if let Some(tally) = self.tallies.get_mut(port) {
            (tally.silent, tally.loss) = (0, None);
        }
    }

    /// Forgets pods that are gone.
    pub fn keep(&mut self, is_there: impl Fn(&str) -> bool) {
        self.tallies.retain(|port, _| is_there(port));
    }

    /// Interfaces of pods that do not answer, and where it is lost.
    pub fn silent(&self) -> impl Iterator<Item = (&str, Loss)> {
        self.tallies.iter().filter_map(|(port, tally)| {
            let loss = tally.loss.filter(|_| tally.silent >= VERDICT)?;
            (loss != Loss::Pod || tally.answered).then_some((port.as_str(), loss))
        })
    }

    /// How many have answered when they were last asked.
    pub fn answering(&self) -> usize {
        self.tallies.values().filter(|tally| tally.answered && tally.silent == 0).count()
    }

    /// Until the next round.
    pub fn pause(&self) -> Duration {
        let is_open = |tally: &Tally| (1..=VERDICT).contains(&tally.silent);
        if self.tallies.values().any(is_open) {
            ANXIOUS
        } else if self.silent().next().is_some() {
            SILENT
        } else {
            CALM
        }
    }
}

/// Whether it is an answer, and the address that is asked for or answered for.
fn question_or_answer(packet: &Packet<'_>) -> Option<(bool, IpAddr)> {
    let bytes = packet.bytes;
    match packet.protocol {
        // Ethernet and IPv4 (RFC 826): the target of a question, the sender of an answer.
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
    const PORT: u32 = 7;
    const POD: [u8; 4] = [10, 42, 1, 2];

    fn arp(kind: u8, link: u32, answers: bool) -> Reply {
        let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, if answers { 2 } else { 1 }];
        bytes.extend([0; 6]);
        bytes.extend(if answers { POD } else { [10, 42, 1, 1] });
        bytes.extend([0; 6]);
        bytes.extend(if answers { [10, 42, 1, 1] } else { POD });
        seen(&[(kind, link, ARP, bytes)])
    }

    fn seen(packets: &[(u8, u32, u16, Vec<u8>)]) -> Reply {
        let address = match packets {
            [(.., IPV6, _), ..] => "fd42::2".parse().expect("an address"),
            _ => IpAddr::from(POD),
        };
        let mut round = Round::new(BRIDGE, BTreeMap::from([(address, PORT)]));
        for (kind, link, protocol, bytes) in packets {
            // What is cut off is read as far as it goes.
            (0..=bytes.len()).for_each(|end| {
                let bytes = &bytes[..end];
                round.see(&Packet { link: *link, kind: *kind, protocol: *protocol, bytes });
            });
        }
        assert_eq!(round.is_over(), round.reply(address, true) == Reply::Came);
        round.reply(address, true)
    }

    #[test]
    fn place_of_a_loss_follows_from_where_question_and_answer_were_seen() {
        assert_eq!(seen(&[]), Reply::Lost(Loss::Question));
        assert_eq!(arp(LEAVING, PORT, false), Reply::Lost(Loss::Pod));
        assert_eq!(arp(3, PORT, true), Reply::Lost(Loss::Answer));
        assert_eq!(arp(0, BRIDGE, true), Reply::Came);
        // By another port, or on its way to the bridge.
        assert_eq!(arp(LEAVING, PORT + 1, false), Reply::Lost(Loss::Question));
        assert_eq!(arp(LEAVING, BRIDGE, false), Reply::Lost(Loss::Question));
        let target = "fd42::2".parse::<std::net::Ipv6Addr>().expect("an address").octets();
        let discovery = |kind| {
            let mut bytes = vec![0x60, 0, 0, 0, 0, 24, ICMPV6, 255];
            bytes.extend([0; 32]);
            bytes.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend(target);
            bytes
        };
        let question = (LEAVING, PORT, IPV6, discovery(SOLICITATION));
        assert_eq!(seen(&[question]), Reply::Lost(Loss::Pod));
        assert_eq!(seen(&[(0, BRIDGE, IPV6, discovery(ADVERTISEMENT))]), Reply::Came);
        assert_eq!(seen(&[(0, BRIDGE, IPV6, discovery(1))]), Reply::Lost(Loss::Question));
    }

    #[test]
    fn pod_is_silent_after_three_rounds_and_one_whose_own_end_drops_only_if_it_has_answered() {
        let mut roll = Roll::default();
        let silent = |roll: &Roll| roll.silent().map(|(_, loss)| loss).collect::<Vec<_>>();
        roll.note("a", Reply::Missing);
        assert!(silent(&roll).is_empty() && roll.is_suspect("a"));
        assert_eq!(roll.pause(), ANXIOUS);
        roll.note("a", Reply::Lost(Loss::Answer));
        roll.note("a", Reply::Unclear);
        assert!(silent(&roll).is_empty(), "two rounds");
        roll.note("a", Reply::Lost(Loss::Pod));
        assert!(silent(&roll).is_empty(), "it has never answered");
        roll.note("a", Reply::Lost(Loss::Answer));
        assert_eq!(silent(&roll), [Loss::Answer]);
        assert_eq!(roll.pause(), SILENT);
        roll.note("a", Reply::Came);
        assert!(silent(&roll).is_empty());
        assert_eq!((roll.pause(), roll.answering()), (CALM, 1));
        roll.note("a", Reply::Missing);
        roll.note("a", Reply::Lost(Loss::Pod));
        roll.note("a", Reply::Lost(Loss::Pod));
        assert_eq!(silent(&roll), [Loss::Pod]);
        roll.pass_over("a");
        assert!(silent(&roll).is_empty() && !roll.is_suspect("a"));
        roll.keep(|port| port != "a");
        (0..VERDICT).for_each(|_| roll.note("a", Reply::Lost(Loss::Pod)));
        assert!(silent(&roll).is_empty(), "another pod");
    }

    #[test]
    fn nothing_follows_where_packets_were_missed() {
        let address = IpAddr::from(POD);
        let mut round = Round::new(BRIDGE, BTreeMap::from([(address, PORT)]));
        round.miss();
        assert_eq!(round.reply(address, true), Reply::Unclear);
        assert_eq!(round.reply(address, false), Reply::Unclear);
    }

    #[test]
    fn pods_are_asked_by_turns_and_silent_ones_in_each_round() {
        let pods: BTreeSet<String> = (0..50).map(|number| format!("gsm{number:02}")).collect();
        let mut roll = Roll::default();
        roll.note("gsm07", Reply::Missing);
        let mut asked = BTreeMap::<String, u32>::new();
        for _ in 0..5 {
            let chosen = roll.choose(pods.iter());
            assert!(chosen.len() <= BUDGET + 1 && chosen.contains("gsm07"));
            chosen.into_iter().for_each(|port| *asked.entry(port).or_default() += 1);
        }
        assert!(asked.len() == 50 && asked.values().all(|times| *times >= 2), "{asked:?}");
        let few: BTreeSet<String> = pods.iter().take(3).cloned().collect();
        assert_eq!(roll.choose(few.iter()), few);
        assert!(roll.choose([].iter()).is_empty());
    }
}

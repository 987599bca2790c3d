//! Whether this host forwards what pods send and receive: what was seen of packets that had to be forwarded,
//! and what follows from it.
//!
//! Two proofs need a peer, and concern this host alone. *Out*: a packet of a pod to a peer's VTEP. It counts
//! as lost here only where it is not seen leaving, although that peer answers this host itself at the same
//! time. *In*: a packet as if it came through the tunnel. It counts as lost only where it was seen coming out
//! of the tunnel, and has not come to the pod.
//!
//! Two more need no peer. *Gateway*: this host answers a pod that asks for the MAC of its gateway.
//! *Between pods*: a packet to a second pod on the same bridge, where the kernel shows such packets to the
//! firewall of what is forwarded, or a firewall of bridges may drop them. *Neighbors*: by what such pods find
//! each other, ARP or neighbor discovery, where that is tried.
//!
//! *Too large*: a packet of a pod that does not fit into the tunnel. This host has to tell the pod so (ICMP),
//! or connections hang. It counts as lost only where one that just fits (*large out*) was seen leaving at the
//! same time.
//!
//! *Carried*: a packet of a pod that has entered the tunnel leaves this host inside a tunnel packet. It
//! counts as lost only where one of this host's own did so at the same time: output rules drop the ones and
//! not the others where they go by the program that sends.
//!
//! *To this host* and *from this host*: what pods say to the host they are on, and what it says to them.
//! Hosts may be closed to pods on purpose, so these are told as warnings.
//!
//! Some hosts accept connections in place of their destination (SYNPROXY): then the first segment goes no
//! further, and is answered. That is as good as if it had passed here.
//!
//! Each other way is tried with a UDP datagram and with the first segment of a TCP connection: rules often
//! drop the one or the other alone. Echoes are not: pods live without them. Pure: packets are made here, and
//! sent elsewhere.
//!
//! All of these see this host's part of the way alone. Whether packets come to a pod of another host, and
//! answers come back, is in [`FarPods`].

use std::{collections::BTreeMap, time::Duration};

mod far;
mod loss;
mod message;
mod packet;
mod witness;

pub use far::{FarLoss, FarOutput, FarPods, FarWay, Half, Subject};
use loss::Losses;
use message::SEES_DATA;
pub use message::{
    FAR_DATA_PORT, FAR_PORT, IS_SAID, Kind, SMALL, Said, Segment, Sort, answer, answers_segment,
    is_of_round, question, read, read_stream, segment as far_segment, stream_question,
};
pub use packet::{
    Field, IN_ANSWER, IN_DATAGRAM, IN_SEGMENT, MAGIC, NONCE_LEN, Probe, Tunnelled, UNUSED,
    UNUSED_OUT, destination, echo, inner, number, parse,
};
pub use witness::Witness;

/// Between two trials while all is well.
const CALM: Duration = Duration::from_secs(15);
/// The same while packets are lost.
const ANXIOUS: Duration = Duration::from_secs(1);
/// So many trials in a row that end alike make a verdict.
const VERDICT: u32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    Udp,
    Tcp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From pods to the overlay.
    Out(Transport),
    /// From the overlay to pods.
    In(Transport),
    /// From pods to the overlay, as large as the tunnel carries.
    LargeOut,
    /// From pods to the overlay, inside tunnel packets.
    Carried,
    /// From pods to this host itself, which is their gateway: ARP, or neighbour discovery.
    Gateway,
    /// From this host to a pod: that a packet of it is too large for the tunnel.
    TooLarge,
    /// From one pod of this host to another.
    Between(Transport),
    /// The same of ARP, or neighbor discovery, by which they find each other.
    Finding,
    /// From pods to this host itself, by whatever protocol.
    ToHost,
    /// From this host itself to pods of its own.
    FromHost(Transport),
}

/// Packets of one direction and family, which a host forwards by rules of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    pub direction: Direction,
    pub ipv4: bool,
}

/// How a trial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    Passed,
    /// This host dropped it.
    Lost,
    /// It does not tell anything about this host.
    Unclear,
}

/// What is known of each way.
#[derive(Debug)]
pub struct Trials<W = Way> {
    ways: BTreeMap<W, Tally>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    lost: u32,
    unclear: u32,
    passes: Option<bool>,
}

impl<W> Default for Trials<W> {
    fn default() -> Self {
        Self { ways: BTreeMap::new() }
    }
}

impl<W: Copy + Ord> Trials<W> {
    pub fn note(&mut self, way: W, seen: Seen) {
        let tally = self.ways.entry(way).or_default();
        match seen {
            Seen::Passed => *tally = Tally { passes: Some(true), ..Tally::default() },
            Seen::Lost => {
                (tally.lost, tally.unclear) = (tally.lost + 1, 0);
                if tally.lost >= VERDICT {
                    tally.passes = Some(false);
                }
            }
            Seen::Unclear => {
                tally.unclear += 1;
                if tally.unclear >= VERDICT {
                    *tally = Tally::default();
                }
            }
        }
    }

    /// Nothing can be tried any more, so nothing is known.
    pub fn forget(&mut self) {
        self.ways.clear();
    }

    /// Forgets ways that are not tried any more.
    pub fn keep(&mut self, is_tried: impl Fn(&W) -> bool) {
        self.ways.retain(|way, _| is_tried(way));
    }

    /// Ways that packets do not pass.
    pub fn closed(&self) -> Vec<W> {
        self.with(false)
    }

    /// Ways that packets pass.
    pub fn open(&self) -> Vec<W> {
        self.with(true)
    }

    fn with(&self, passes: bool) -> Vec<W> {
        let ways = self.ways.iter().filter(|(_, tally)| tally.passes == Some(passes));
        ways.map(|(way, _)| *way).collect()
    }

    /// Ways that packets were lost on when they were last tried, with or without a verdict.
    fn doubted(&self) -> impl Iterator<Item = &W> {
        self.ways.iter().filter(|(_, tally)| tally.lost > 0).map(|(way, _)| way)
    }
}

impl Trials<Way> {
    /// Until the next trial. A host may be closed to its pods for good, and on purpose.
    pub fn pause(&self) -> Duration {
        let is_open = |(way, tally): (&Way, &Tally)| {
            tally.lost > 0 && (tally.lost < VERDICT || !way.direction.is_of_host())
        };
        if self.ways.iter().any(is_open) { ANXIOUS } else { CALM }
    }
}

impl Transport {
    pub const ALL: [Self; 2] = [Self::Udp, Self::Tcp];
}

impl Direction {
    /// Between pods of this host and those of others.
    pub const fn is_through(self) -> bool {
        matches!(self, Self::Out(_) | Self::In(_) | Self::LargeOut)
    }

    pub const fn is_between(self) -> bool {
        matches!(self, Self::Between(_))
    }

    /// Between pods and their own host, which says nothing about packets that are forwarded.
    pub const fn is_of_host(self) -> bool {
        matches!(self, Self::ToHost | Self::FromHost(_))
    }

    const fn name(self) -> &'static str {
        match self {
            Self::ToHost => "to this host",
            Self::FromHost(_) => "from this host",
            Self::Out(_) => "out",
            Self::In(_) => "in",
            Self::LargeOut => "large out",
            Self::Carried => "in tunnel packets",
            Self::Gateway => "gateway",
            Self::TooLarge => "size errors",
            Self::Between(_) => "between pods",
            Self::Finding => "neighbors",
        }
    }

    const fn transport(self) -> Option<Transport> {
        match self {
            Self::Out(transport)
            | Self::In(transport)
            | Self::Between(transport)
            | Self::FromHost(transport) => Some(transport),
            Self::LargeOut
            | Self::Carried
            | Self::Gateway
            | Self::TooLarge
            | Self::ToHost
            | Self::Finding => None,
        }
    }
}

/// A list of ways, which names a transport only where the other is missing.
pub fn list(ways: &[Way]) -> String {
    let mut named: Vec<String> = Vec::new();
    for way in ways {
        let (family, name) = (if way.ipv4 { 4 } else { 6 }, way.direction.name());
        let is_same = |other: &&Way| other.ipv4 == way.ipv4 && other.direction.name() == name;
        let only = way.direction.transport().filter(|_| ways.iter().filter(is_same).count() == 1);
        let name = match only {
            Some(Transport::Udp) => format!("IPv{family} UDP {name}"),
            Some(Transport::Tcp) => format!("IPv{family} TCP {name}"),
            None => format!("IPv{family} {name}"),
        };
        if !named.contains(&name) {
            named.push(name);
        }
    }
    named.join(", ")
}

/// Packets of both families, for the fuzzer.
#[cfg(all(feature = "agent", any(test, feature = "sim")))]
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let ipv4 = [&[0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17][..], &[0; 10], &[1; 8]].concat();
    let ipv6 = [&[0x60, 0, 0, 0, 0, 8, 6, 64][..], &[1; 32], &[2; 20]].concat();
    vec![ipv4, ipv6, question(Kind::Small, 7, 0)]
}

/// Reads a packet and compares it with that of a trial, for the fuzzer.
#[cfg(all(feature = "agent", any(test, feature = "sim")))]
pub(crate) fn fuzz(packet: &[u8]) -> bool {
    let within = inner(packet).and_then(|packet| destination(packet).zip(echo(packet)));
    let is_far = read(packet).is_some() || far_segment(packet).is_some();
    parse(packet).is_some() || within.is_some() || is_far
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUT: Way = Way { direction: Direction::Out(Transport::Udp), ipv4: true };
    const IN: Way = Way { direction: Direction::In(Transport::Udp), ipv4: true };

    #[test]
    fn a_way_is_closed_when_three_trials_in_a_row_are_lost_and_open_by_one_that_passes() {
        let mut trials = Trials::default();
        trials.note(OUT, Seen::Passed);
        assert_eq!((trials.open(), trials.pause()), (vec![OUT], CALM));
        for seen in [Seen::Lost, Seen::Lost, Seen::Passed, Seen::Lost, Seen::Lost] {
            trials.note(OUT, seen);
            assert!(trials.closed().is_empty());
        }
        assert_eq!(trials.pause(), ANXIOUS);
        trials.note(IN, Seen::Passed);
        trials.note(OUT, Seen::Lost);
        assert_eq!((trials.closed(), trials.open()), (vec![OUT], vec![IN]));
        trials.note(OUT, Seen::Passed);
        assert_eq!((trials.closed(), trials.pause()), (vec![], CALM));
    }

    #[test]
    fn host_that_is_closed_to_its_pods_is_not_tried_all_the_time() {
        let way = Way { direction: Direction::ToHost, ipv4: true };
        let mut trials = Trials::default();
        (1..VERDICT).for_each(|_| trials.note(way, Seen::Lost));
        assert_eq!((trials.closed(), trials.pause()), (vec![], ANXIOUS));
        trials.note(way, Seen::Lost);
        assert_eq!((trials.closed(), trials.pause()), (vec![way], CALM));
    }

    #[test]
    fn what_is_unclear_for_long_is_not_known_any_more() {
        let mut trials = Trials::default();
        (0..VERDICT).for_each(|_| trials.note(OUT, Seen::Lost));
        (1..VERDICT).for_each(|_| trials.note(OUT, Seen::Unclear));
        assert_eq!(trials.closed(), [OUT]);
        trials.note(OUT, Seen::Unclear);
        assert!(trials.closed().is_empty() && trials.open().is_empty());
        trials.note(OUT, Seen::Passed);
        trials.note(IN, Seen::Passed);
        trials.keep(|way| *way == IN);
        assert_eq!(trials.open(), [IN]);
        trials.forget();
        assert!(trials.open().is_empty());
    }

    #[test]
    fn a_list_names_a_transport_only_where_the_other_is_missing() {
        let way = |direction, ipv4| Way { direction, ipv4 };
        let both = Transport::ALL.map(|transport| way(Direction::Out(transport), true));
        let tcp = way(Direction::In(Transport::Tcp), false);
        let gateway = way(Direction::Gateway, true);
        let ways = [&both[..], &[tcp, gateway]].concat();
        assert_eq!(list(&ways), "IPv4 out, IPv6 TCP in, IPv4 gateway");
    }
}

//! Whether this host forwards the packets of pods: evaluates trials with test packets.
//!
//! Each trial sends a packet in one direction and captures it where it must arrive. The result does
//! not depend on the rules that are found, because only packets show what all rules together do. The
//! directions:
//!
//! - *Out*: from a pod to a peer's VTEP. It counts as lost on this host only if it is not captured leaving
//!   although that peer answers this host itself at the same time.
//! - *In*: a packet as if it came through the tunnel, for a pod. It counts as lost only if it was captured
//!   coming out of the tunnel and did not reach the pod.
//! - *Gateway*: a pod's query for the MAC of its gateway, which this host answers.
//! - *Between pods*: to a second pod on the same bridge. Tried if the kernel passes such packets to the
//!   firewall for forwarded packets, or if a bridge firewall may drop them.
//! - *Neighbors*: ARP or neighbor discovery between such pods.
//! - *Size errors*: a packet of a pod that is too large for the tunnel. This host must report that to the pod
//!   by ICMP, or connections hang. It counts as lost only if a packet of the largest size that fits (*large
//!   out*) was captured leaving at the same time.
//! - *Carried*: a packet of a pod that entered the tunnel must leave this host inside a tunnel packet. It
//!   counts as lost only if a packet of this host itself did so at the same time: output rules that match the
//!   sending program can drop the one and not the other.
//! - *To this host* and *from this host*: between pods and their own host. A host may be closed to pods
//!   intentionally, so these are only warnings.
//!
//! *Out*, *in*, *between pods* and *from this host* are tried with a UDP datagram and with the first segment
//! of a TCP connection, because rules often drop only one of them. ICMP echoes are not tried: pods work
//! without them. Some hosts accept connections in place of the destination (SYNPROXY). The first segment then
//! gets an answer but goes no further; this counts as passed.
//!
//! *Out* and *in* need a peer, but each of these trials shows only what this host does. [`RemoteTrials`]
//! tries the whole path to pods of other hosts. Pure: this module only builds packets; the agent sends them.

use std::{collections::BTreeMap, time::Duration};

mod inward;
mod packet;
pub mod remote;
mod witness;

pub use inward::{InwardLosses, InwardWay};
pub use packet::{
    Field, IN_ANSWER, IN_DATAGRAM, IN_SEGMENT, MAGIC, NONCE_LEN, Probe, TunneledProbe, UNUSED,
    UNUSED_OUT, destination, echo, inner, number, parse,
};
pub use remote::{Half, RemoteLoss, RemoteOutput, RemotePeer, RemoteTrials, RemoteWay};
pub use witness::ArrivalLog;

/// Interval of trials while all packets pass.
const TRIAL_INTERVAL: Duration = Duration::from_secs(15);
/// Interval of trials while packets are lost and the cause may change soon.
const SUSPECT_TRIAL_INTERVAL: Duration = Duration::from_secs(1);
/// Consecutive trials with the same result after which that result is accepted.
const TRIALS_UNTIL_VERDICT: u32 = 3;

/// A transport protocol to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TrialProtocol {
    /// A UDP datagram.
    Udp,
    /// The first segment of a TCP connection.
    Tcp,
}

/// The direction of a test packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From a pod to the overlay.
    Out(TrialProtocol),
    /// From the overlay to a pod.
    In(TrialProtocol),
    /// From a pod to the overlay, of the largest size that fits into the tunnel.
    LargeOut,
    /// From a pod to the overlay, captured inside tunnel packets.
    Carried,
    /// From a pod to its gateway, which is this host: ARP or neighbor discovery.
    Gateway,
    /// From this host to a pod: the ICMP error for a packet that is too large for the tunnel.
    TooLarge,
    /// From one pod of this host to another.
    Between(TrialProtocol),
    /// From one pod of this host to another: ARP or neighbor discovery.
    NeighborDiscovery,
    /// From a pod to this host itself.
    ToHost,
    /// From this host itself to one of its pods.
    FromHost(TrialProtocol),
}

/// A direction in one address family; the host's rules for it are separate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrialWay {
    /// The direction.
    pub direction: Direction,
    /// The address family is IPv4, not IPv6.
    pub ipv4: bool,
}

/// The result of one trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrialResult {
    /// The packet arrived, or was answered.
    Passed,
    /// This host dropped the packet.
    Lost,
    /// The trial gives no information about this host.
    Unclear,
}

/// The results of all trials, by way.
#[derive(Debug)]
pub struct Trials<W = TrialWay> {
    ways: BTreeMap<W, WayResults>,
}

/// The results of one way.
#[derive(Clone, Copy, Debug, Default)]
struct WayResults {
    /// Consecutive losses.
    lost: u32,
    /// Consecutive unclear trials.
    unclear: u32,
    /// The accepted result; `None` if unknown.
    passes: Option<bool>,
}

impl<W> Default for Trials<W> {
    fn default() -> Self {
        Self { ways: BTreeMap::new() }
    }
}

impl<W: Copy + Ord> Trials<W> {
    /// Records the result of a trial.
    pub fn note(&mut self, way: W, result: TrialResult) {
        let results = self.ways.entry(way).or_default();
        match result {
            TrialResult::Passed => {
                *results = WayResults { passes: Some(true), ..WayResults::default() }
            }
            TrialResult::Lost => {
                (results.lost, results.unclear) = (results.lost + 1, 0);
                if results.lost >= TRIALS_UNTIL_VERDICT {
                    results.passes = Some(false);
                }
            }
            TrialResult::Unclear => {
                results.unclear += 1;
                if results.unclear >= TRIALS_UNTIL_VERDICT {
                    *results = WayResults::default();
                }
            }
        }
    }

    /// Forgets all results, because trials are no longer possible.
    pub fn clear(&mut self) {
        self.ways.clear();
    }

    /// Forgets the results of ways for which `is_tried` returns false.
    pub fn retain(&mut self, is_tried: impl Fn(&W) -> bool) {
        self.ways.retain(|way, _| is_tried(way));
    }

    /// Returns the ways that packets do not pass.
    pub fn closed(&self) -> Vec<W> {
        self.with_result(false)
    }

    /// Returns the ways that packets pass.
    pub fn open(&self) -> Vec<W> {
        self.with_result(true)
    }

    fn with_result(&self, passes: bool) -> Vec<W> {
        let ways = self.ways.iter().filter(|(_, results)| results.passes == Some(passes));
        ways.map(|(way, _)| *way).collect()
    }

    /// Returns the ways on which the last trial lost a packet, whether or not the result is accepted.
    fn last_lost(&self) -> impl Iterator<Item = &W> {
        self.ways.iter().filter(|(_, results)| results.lost > 0).map(|(way, _)| way)
    }
}

impl Trials<TrialWay> {
    /// Returns the time to the next trial. A host may be closed to its pods permanently and intentionally, so
    /// such losses do not shorten it once they are accepted.
    pub fn pause(&self) -> Duration {
        let is_recheck_due = |(way, results): (&TrialWay, &WayResults)| {
            results.lost > 0 && (results.lost < TRIALS_UNTIL_VERDICT || !way.direction.is_of_host())
        };
        if self.ways.iter().any(is_recheck_due) { SUSPECT_TRIAL_INTERVAL } else { TRIAL_INTERVAL }
    }
}

impl TrialProtocol {
    /// All transports.
    pub const ALL: [Self; 2] = [Self::Udp, Self::Tcp];
}

impl Direction {
    /// Returns whether packets of this direction are forwarded between pods of this host and of others.
    pub const fn is_through(self) -> bool {
        matches!(self, Self::Out(_) | Self::In(_) | Self::LargeOut)
    }

    /// Returns whether packets of this direction go between pods of this host.
    pub const fn is_between(self) -> bool {
        matches!(self, Self::Between(_))
    }

    /// Returns whether the direction is between a pod and its own host, so it shows nothing about forwarding.
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
            Self::NeighborDiscovery => "neighbors",
        }
    }

    const fn transport(self) -> Option<TrialProtocol> {
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
            | Self::NeighborDiscovery => None,
        }
    }
}

/// Formats a list of ways. A transport is only named if the other one is not in the list.
pub fn list(ways: &[TrialWay]) -> String {
    let mut named: Vec<String> = Vec::new();
    for way in ways {
        let (family, name) = (if way.ipv4 { 4 } else { 6 }, way.direction.name());
        let is_same = |other: &&TrialWay| other.ipv4 == way.ipv4 && other.direction.name() == name;
        let only = way.direction.transport().filter(|_| ways.iter().filter(is_same).count() == 1);
        let name = match only {
            Some(TrialProtocol::Udp) => format!("IPv{family} UDP {name}"),
            Some(TrialProtocol::Tcp) => format!("IPv{family} TCP {name}"),
            None => format!("IPv{family} {name}"),
        };
        if !named.contains(&name) {
            named.push(name);
        }
    }
    named.join(", ")
}

/// Returns packets of both families, for the fuzzer.
#[cfg(all(feature = "agent", any(test, feature = "sim")))]
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let ipv4 = [&[0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17][..], &[0; 10], &[1; 8]].concat();
    let ipv6 = [&[0x60, 0, 0, 0, 0, 8, 6, 64][..], &[1; 32], &[2; 20]].concat();
    vec![ipv4, ipv6, remote::message::question(remote::message::Kind::Small, 7, 0)]
}

/// Parses a packet with all parsers of this module, for the fuzzer. Returns whether any accepts it.
#[cfg(all(feature = "agent", any(test, feature = "sim")))]
pub(crate) fn fuzz(packet: &[u8]) -> bool {
    let within = inner(packet).and_then(|packet| destination(packet).zip(echo(packet)));
    let is_remote =
        remote::message::read(packet).is_some() || remote::message::segment(packet).is_some();
    parse(packet).is_some() || within.is_some() || is_remote
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUT: TrialWay = TrialWay { direction: Direction::Out(TrialProtocol::Udp), ipv4: true };
    const IN: TrialWay = TrialWay { direction: Direction::In(TrialProtocol::Udp), ipv4: true };

    #[test]
    fn way_is_closed_after_three_lost_trials_and_open_after_one_that_passes() {
        let mut trials = Trials::default();
        trials.note(OUT, TrialResult::Passed);
        assert_eq!((trials.open(), trials.pause()), (vec![OUT], TRIAL_INTERVAL));
        for result in [
            TrialResult::Lost,
            TrialResult::Lost,
            TrialResult::Passed,
            TrialResult::Lost,
            TrialResult::Lost,
        ] {
            trials.note(OUT, result);
            assert!(trials.closed().is_empty());
        }
        assert_eq!(trials.pause(), SUSPECT_TRIAL_INTERVAL);
        trials.note(IN, TrialResult::Passed);
        trials.note(OUT, TrialResult::Lost);
        assert_eq!((trials.closed(), trials.open()), (vec![OUT], vec![IN]));
        trials.note(OUT, TrialResult::Passed);
        assert_eq!((trials.closed(), trials.pause()), (vec![], TRIAL_INTERVAL));
    }

    #[test]
    fn host_closed_to_its_pods_is_tried_at_regular_interval() {
        let way = TrialWay { direction: Direction::ToHost, ipv4: true };
        let mut trials = Trials::default();
        (1..TRIALS_UNTIL_VERDICT).for_each(|_| trials.note(way, TrialResult::Lost));
        assert_eq!((trials.closed(), trials.pause()), (vec![], SUSPECT_TRIAL_INTERVAL));
        trials.note(way, TrialResult::Lost);
        assert_eq!((trials.closed(), trials.pause()), (vec![way], TRIAL_INTERVAL));
    }

    #[test]
    fn way_with_unclear_trials_becomes_unknown() {
        let mut trials = Trials::default();
        (0..TRIALS_UNTIL_VERDICT).for_each(|_| trials.note(OUT, TrialResult::Lost));
        (1..TRIALS_UNTIL_VERDICT).for_each(|_| trials.note(OUT, TrialResult::Unclear));
        assert_eq!(trials.closed(), [OUT]);
        trials.note(OUT, TrialResult::Unclear);
        assert!(trials.closed().is_empty() && trials.open().is_empty());
        trials.note(OUT, TrialResult::Passed);
        trials.note(IN, TrialResult::Passed);
        trials.retain(|way| *way == IN);
        assert_eq!(trials.open(), [IN]);
        trials.clear();
        assert!(trials.open().is_empty());
    }

    #[test]
    fn list_names_transport_only_if_the_other_is_missing() {
        let way = |direction, ipv4| TrialWay { direction, ipv4 };
        let both = TrialProtocol::ALL.map(|transport| way(Direction::Out(transport), true));
        let tcp = way(Direction::In(TrialProtocol::Tcp), false);
        let gateway = way(Direction::Gateway, true);
        let ways = [&both[..], &[tcp, gateway]].concat();
        assert_eq!(list(&ways), "IPv4 out, IPv6 TCP in, IPv4 gateway");
    }
}

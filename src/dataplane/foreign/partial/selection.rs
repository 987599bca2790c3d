//! The packets that are followed through foreign rules, and the part of them that a rule selects.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{model::list_at_most, netlink::attributes};

/// `RTN_UNICAST` and `RTN_LOCAL`.
pub const UNICAST: u32 = 1;
const LOCAL: u32 = 2;
/// States of connections as bits: new and established.
pub const NEW: u32 = 8;
pub const ESTABLISHED: u32 = 2;
/// TCP flags of packets of a working connection: SYN, SYN+ACK, ACK, PSH+ACK and FIN+ACK. A lost
/// reset does no harm.
const CONNECTION_FLAGS: [u8; 5] = [0x02, 0x12, 0x10, 0x18, 0x11];
/// Ports that traceroute sends to.
const TRACEROUTE_PORTS: std::ops::RangeInclusive<u16> = 33434..=33534;
/// Length of the smallest packet with content, in bytes.
const MIN_PACKET_BYTES: u16 = 60;
/// Upper limit of the ports or addresses that are listed for one rule.
const MAX_VALUES_NAMED: usize = 3;

/// First and last value of a range, of equal length.
pub type Range = (Vec<u8>, Vec<u8>);

/// The packets that are followed.
pub struct Traffic<'a> {
    /// Networks of their sources.
    pub sources: &'a [IpNet],
    /// Networks of their destinations.
    pub destinations: &'a [IpNet],
    /// Their ways through this host. The first way of pods' packets leads out.
    pub ways: &'a [Interfaces],
    /// The ways, as bits, that no trial covers: a rule that takes all packets of them counts, too.
    /// More bits than there are ways may be set.
    pub untested: u8,
    /// Names of the ports of single pods.
    pub ports: &'a [String],
    /// The UDP port, if they are tunnel packets.
    pub tunnel: Option<u16>,
}

/// The interfaces by which packets arrive and leave: index and name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// The input interface; `None` if this host sends them.
    pub input: Option<(u32, String)>,
    /// The output interface; `None` if they are for this host.
    pub output: Option<(u32, String)>,
}

impl Traffic<'_> {
    /// Whether the packets are of IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.sources.first().is_none_or(|network| network.addr().is_ipv4())
    }

    /// Whether this host sends the packets.
    pub(super) fn is_own(&self) -> bool {
        self.ways.iter().all(|way| way.input.is_none())
    }

    /// Whether this host forwards the packets.
    pub(super) fn is_forwarded(&self) -> bool {
        let is_through = |way: &Interfaces| way.input.is_some() && way.output.is_some();
        self.tunnel.is_none() || self.ways.iter().all(is_through)
    }

    /// Returns the type of the destination's address (`RTN_*`).
    pub(super) fn destination_type(&self) -> u32 {
        if self.is_forwarded() || self.is_own() { UNICAST } else { LOCAL }
    }

    /// Returns the ways, as bits, that use one of these interfaces on the given side.
    pub(super) fn ways_by(&self, side: Side, is_it: impl Fn(&(u32, String)) -> bool) -> u8 {
        let of_side = |way: &Interfaces| match side {
            Side::Input => way.input.as_ref().is_some_and(&is_it),
            Side::Output => way.output.as_ref().is_some_and(&is_it),
        };
        let bits = self.ways.iter().enumerate().filter(|(_, way)| of_side(way));
        bits.fold(0, |all, (at, _)| all | 1 << at)
    }

    /// Returns the input interfaces of these ways if no trial covers any of them.
    pub(super) fn untested_inputs(&self, ways: u8) -> Vec<&str> {
        let ways = if ways & !self.untested == 0 { ways } else { 0 };
        let of_ways = self.ways.iter().enumerate().filter(|(at, _)| ways & 1 << at != 0);
        of_ways.filter_map(|(_, way)| Some(way.input.as_ref()?.1.as_str())).collect()
    }

    /// Whether trials cover any way.
    pub(super) fn is_tested(&self) -> bool {
        self.all_ways() & !self.untested != 0
    }

    /// Returns all ways, as bits.
    pub(super) fn all_ways(&self) -> u8 {
        u8::MAX >> (8 - self.ways.len().min(8))
    }
}

/// The side of a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where packets arrive.
    Input,
    /// Where packets leave.
    Output,
}

/// A mark with the packets that have it, in words; no words means all packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MarkedPackets {
    /// The mark.
    pub mark: u32,
    /// The packets that have it.
    pub what: Vec<String>,
}

/// The packets that a rule selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Whether it selects only some packets, by something else than the connection's state.
    pub is_partial: bool,
    /// Whether it selects packets up to a rate or an amount, or by something unknown.
    pub is_limited: bool,
    /// Whether it selects packets up to a rate, so that all other packets are those above it.
    pub is_rated: bool,
    /// Whether it selects packets above a rate.
    pub is_above: bool,
    /// Whether it selects only packets that no connection begins with.
    pub is_late: bool,
    /// The only destination port.
    pub port: Option<u16>,
    /// In words, what it selects packets by that trials do not cover.
    pub what: Vec<String>,
    /// The ways, as bits.
    pub ways: u8,
    states: u32,
    flags: [bool; CONNECTION_FLAGS.len()],
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            is_partial: false,
            is_limited: false,
            is_rated: false,
            is_above: false,
            is_late: false,
            port: None,
            what: Vec::new(),
            ways: u8::MAX,
            states: u32::MAX,
            flags: [true; CONNECTION_FLAGS.len()],
        }
    }
}

impl Selection {
    /// Selects all packets of some ways.
    pub fn of_ways(ways: u8) -> Self {
        Self { ways, ..Self::default() }
    }

    /// Returns the packets that both select; `None` if there are none.
    pub fn and(&self, other: &Self) -> Option<Self> {
        let mut both = self.clone();
        both.is_partial |= other.is_partial;
        both.is_limited |= other.is_limited;
        both.is_rated |= other.is_rated;
        both.is_above |= other.is_above;
        both.is_late |= other.is_late;
        both.port = other.port.or(self.port);
        both.what.extend(other.what.iter().cloned());
        both.ways &= other.ways;
        both.states &= other.states;
        for (flag, others) in both.flags.iter_mut().zip(other.flags) {
            *flag &= others;
        }
        // The first packet of a connection is a SYN.
        let is_first = both.takes(NEW) && !both.takes(ESTABLISHED);
        let is_empty = both.flags.iter().all(|flag| !flag) || is_first && !both.flags[0];
        let is_empty = is_empty || both.ways == 0;
        (!is_empty && (both.takes(NEW) || both.takes(ESTABLISHED))).then_some(both)
    }

    /// Whether it selects packets of one of these states.
    pub const fn takes(&self, states: u32) -> bool {
        self.states & states != 0
    }

    /// Whether it selects all packets of its ways.
    pub const fn is_all(&self) -> bool {
        !self.is_partial && self.takes(NEW) && self.takes(ESTABLISHED)
    }

    /// Returns the ways of which it selects all packets of established connections.
    pub const fn settled(&self) -> u8 {
        if !self.is_partial && self.takes(ESTABLISHED) { self.ways } else { 0 }
    }

    /// Whether it selects only packets that begin connections.
    pub fn is_of_beginnings(&self) -> bool {
        !self.takes(ESTABLISHED) || !self.flags[2..].contains(&true)
    }

    /// Returns the packets that any of `several` selects; `None` if none selects any.
    pub fn any(several: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut several = several.into_iter();
        let mut any = several.next()?;
        let mut more = 0;
        for other in several {
            if any.is_everything() {
                return Some(any);
            }
            if other.is_everything() {
                return Some(other);
            }
            // Which of the selections applies depends on the packet.
            any.is_partial = true;
            any.is_limited |= other.is_limited;
            any.is_rated &= other.is_rated;
            any.is_above |= other.is_above;
            any.is_late &= other.is_late;
            any.port = any.port.filter(|port| other.port == Some(*port));
            any.ways |= other.ways;
            any.states |= other.states;
            for (flag, others) in any.flags.iter_mut().zip(other.flags) {
                *flag |= others;
            }
            more += usize::from(!other.what.is_empty());
        }
        if more > 0 && !any.what.is_empty() {
            any.what = vec![format!("{} and {more} more", any.what.join(" "))];
        }
        Some(any)
    }

    /// Whether it selects all packets of all ways.
    fn is_everything(&self) -> bool {
        let is_of_all = self.ways == u8::MAX && self.states == u32::MAX;
        !self.is_partial && is_of_all && self.what.is_empty()
    }

    /// Narrows the selection, with a description in words.
    fn narrow(&mut self, what: String) {
        self.is_partial = true;
        self.what.push(what);
    }

    /// Narrows the selection to packets of connections in these states.
    pub(super) const fn limit_states(&mut self, states: u32) {
        self.states &= states;
    }

    /// Narrows the selection to packets with some TCP flags.
    pub(super) fn limit_flags(&mut self, mask: u8, is_taken: impl Fn(u8) -> bool) {
        self.is_partial = true;
        for (flag, flags) in self.flags.iter_mut().zip(CONNECTION_FLAGS) {
            *flag &= is_taken(flags & mask);
        }
    }

    /// Narrows the selection to packets of one side's ports.
    pub(super) fn limit_ports(
        &mut self,
        traffic: &Traffic<'_>,
        to: bool,
        ports: &[(u16, u16)],
        is_inverted: bool,
    ) -> Option<()> {
        let all = |ports: &[(u16, u16)]| {
            ports.iter().any(|(first, last)| *first <= 1 && *last == u16::MAX)
        };
        if let Some(port) = traffic.tunnel {
            // The sender chooses the source port of a tunnel packet.
            let is_in = ports.iter().any(|(first, last)| (*first..=*last).contains(&port));
            return (to && is_in != is_inverted || !to && all(ports) && !is_inverted).then_some(());
        }
        if all(ports) {
            return (!is_inverted).then_some(());
        }
        self.is_partial = true;
        if is_inverted {
            return Some(());
        }
        let in_traceroute = |(first, last): &(u16, u16)| {
            TRACEROUTE_PORTS.contains(first) && TRACEROUTE_PORTS.contains(last)
        };
        if ports.is_empty() || to && ports.iter().all(in_traceroute) {
            return None;
        }
        if let ([(first, last)], true) = (ports, to)
            && first == last
        {
            self.port = Some(*first);
        }
        let shown = ports.iter().map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        });
        self.narrow(format!("{} port {}", side(to), list_at_most(shown, MAX_VALUES_NAMED)));
        Some(())
    }

    /// Narrows the selection to packets of one side's addresses.
    pub(super) fn limit_addresses(
        &mut self,
        traffic: &Traffic<'_>,
        to: bool,
        ranges: &[Range],
        is_inverted: bool,
    ) -> Option<()> {
        let networks = if to { traffic.destinations } else { traffic.sources };
        let bounds: Vec<Range> = networks.iter().map(bounds).collect();
        let contains = |range: &Range, other: &Range| range.0 <= other.0 && other.1 <= range.1;
        let takes_all = bounds.iter().all(|of| ranges.iter().any(|range| contains(range, of)));
        let overlaps = |range: &&Range| {
            let is_it =
                |of: &Range| range.0.len() == of.0.len() && range.0 <= of.1 && of.0 <= range.1;
            bounds.iter().any(is_it)
        };
        let taken: Vec<&Range> = ranges.iter().filter(overlaps).collect();
        match (is_inverted, taken.is_empty()) {
            (false, true) => return None,
            (true, true) => return Some(()),
            (true, false) if takes_all => return None,
            (false, false) if takes_all => return Some(()),
            _ => self.is_partial = true,
        }
        if !is_inverted {
            let shown = taken.iter().filter_map(|(first, last)| {
                let [first, last] = [first, last].map(|bytes| attributes::address(bytes));
                let (first, last) = (first?, last?);
                Some(if first == last { first.to_string() } else { format!("{first}-{last}") })
            });
            self.narrow(format!("{} {}", side(to), list_at_most(shown, MAX_VALUES_NAMED)));
        }
        Some(())
    }

    /// Narrows the selection to packets of a length in bytes.
    pub(super) fn limit_length(&mut self, first: u16, last: u16, is_inverted: bool) -> Option<()> {
        let (first, last) = match (is_inverted, first) {
            (true, 0) => (last.checked_add(1)?, u16::MAX),
            (true, first) if last == u16::MAX => (0, first - 1),
            (true, _) => (0, u16::MAX),
            (false, first) => (first, last),
        };
        if last < MIN_PACKET_BYTES {
            return None;
        }
        if first > MIN_PACKET_BYTES || last < u16::MAX {
            self.is_late |= first > MIN_PACKET_BYTES;
            self.narrow(format!("of {first} to {last} bytes"));
        }
        Some(())
    }

    /// Narrows the selection to packets that use some interfaces.
    pub(super) fn limit_ways(
        &mut self,
        traffic: &Traffic<'_>,
        side: Side,
        is_inverted: bool,
        is_it: impl Fn(&(u32, String)) -> bool,
    ) -> Option<()> {
        let ways = traffic.ways_by(side, |known| is_it(known) != is_inverted);
        self.ways &= ways;
        (ways != 0).then_some(())
    }

    /// Narrows the selection to packets of TCP, of UDP, or of both.
    pub(super) fn limit_protocol(
        &mut self,
        traffic: &Traffic<'_>,
        tcp: bool,
        udp: bool,
    ) -> Option<()> {
        self.is_partial |= !(tcp && udp) && traffic.tunnel.is_none();
        (udp || tcp && traffic.tunnel.is_none()).then_some(())
    }

    /// Narrows the selection to packets with some mark. Packets without a known mark have mark 0.
    pub(super) fn limit_mark(
        &mut self,
        known: &[MarkedPackets],
        is_it: impl Fn(u32) -> bool,
    ) -> Option<()> {
        if is_it(0) {
            self.is_partial |= known.iter().any(|known| !is_it(known.mark));
            return Some(());
        }
        let marked = known.iter().find(|known| is_it(known.mark))?;
        self.is_partial |= !marked.what.is_empty();
        self.what.extend(marked.what.iter().cloned());
        Some(())
    }

    /// Narrows the selection to some classes of service (DSCP, RFC 2474). Most packets have class
    /// 0.
    pub(super) fn limit_classes(&mut self, is_it: impl Fn(u8) -> bool) {
        match is_it(0) {
            true => self.is_partial = true,
            false => self.narrow("with a certain DSCP".to_owned()),
        }
    }

    /// Narrows the selection to packets up to a rate, or above it.
    pub(super) const fn limit_rate(&mut self, is_above: bool) {
        self.is_partial = true;
        self.is_limited |= !is_above;
        self.is_rated |= !is_above;
        self.is_above |= is_above;
    }

    /// Narrows the selection to some packets, and nothing says that the others are lost.
    pub(super) const fn limit_otherwise(&mut self) {
        self.is_partial = true;
        self.is_limited = true;
    }

    /// Returns the packets that `self` selects up to a rate and `dropped`, a later selection, selects
    /// without one: those that are above the rate.
    pub(super) fn above_rate(&self, dropped: &Self) -> Option<Self> {
        let is_same = self.what.is_empty() || self.what == dropped.what;
        let rest = Self { is_limited: false, is_rated: false, what: Vec::new(), ..self.clone() };
        let rest = rest.and(dropped).filter(|_| is_same && !dropped.is_limited)?;
        Some(Self { is_above: true, ..rest })
    }

    /// Narrows the selection to packets at some times.
    pub(super) fn limit_times(&mut self) {
        self.narrow("at some times".to_owned());
    }

    /// Narrows the selection to packets with some content.
    pub(super) fn limit_content(&mut self) {
        self.narrow("with some content".to_owned());
    }

    /// Narrows the selection to connections that have carried some amount.
    pub(super) fn limit_amount(&mut self) {
        self.is_late = true;
        self.narrow("of connections that have carried a certain amount".to_owned());
    }

    /// Narrows the selection to connections above a number.
    pub(super) fn limit_connections(&mut self) {
        self.narrow("of connections above a number of them".to_owned());
    }

    /// Narrows the selection to a random share.
    pub(super) fn limit_share(&mut self) {
        self.narrow("taken by chance".to_owned());
    }
}

/// Returns the first and last address of a network.
pub fn bounds(network: &IpNet) -> Range {
    let octets = |address: IpAddr| attributes::octets(address);
    (octets(network.network()), octets(network.broadcast()))
}

const fn side(to: bool) -> &'static str {
    if to { "to" } else { "from" }
}

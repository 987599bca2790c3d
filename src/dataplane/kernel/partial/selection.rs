//! Packets that matter, and those of them that a rule takes.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::netlink::attributes;

/// `RTN_UNICAST` and `RTN_LOCAL`
pub const UNICAST: u32 = 1;
const LOCAL: u32 = 2;
/// States of connections as bits: new and established.
const NEW: u32 = 8;
pub const ESTABLISHED: u32 = 2;
/// Flags of TCP that packets of a working connection have; a reset is no loss.
const FLAGS: [u8; 5] = [0x02, 0x12, 0x10, 0x18, 0x11];
/// Ports to which traceroute sends.
const TRACEROUTE: std::ops::RangeInclusive<u16> = 33434..=33534;
/// The smallest packet that carries something.
const SMALL: u16 = 60;
/// Ports or addresses that are named of one rule.
const NAMED: usize = 3;

/// First and last of what is matched, of equal length.
pub type Range = (Vec<u8>, Vec<u8>);

/// Packets that matter.
pub struct Traffic<'a> {
    pub sources: &'a [IpNet],
    pub destinations: &'a [IpNet],
    /// Index and name of the interfaces by which they come in and leave.
    pub interfaces: &'a [(u32, String)],
    /// The UDP port, if they are tunnel packets to this host.
    pub tunnel: Option<u16>,
}

impl Traffic<'_> {
    pub fn is_ipv4(&self) -> bool {
        self.sources.first().is_none_or(|network| network.addr().is_ipv4())
    }

    pub(super) const fn destination_type(&self) -> u32 {
        if self.tunnel.is_some() { LOCAL } else { UNICAST }
    }
}

/// Packets of them that a rule takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// It takes some alone, by something else than their connection's state.
    pub is_partial: bool,
    /// By how many they are.
    pub is_limited: bool,
    /// Only those of connections that have been made.
    pub is_late: bool,
    /// The only destination port.
    pub port: Option<u16>,
    /// By what it takes some alone that no trial has: in words.
    pub what: Vec<String>,
    states: u32,
    flags: [bool; FLAGS.len()],
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            is_partial: false,
            is_limited: false,
            is_late: false,
            port: None,
            what: Vec::new(),
            states: u32::MAX,
            flags: [true; FLAGS.len()],
        }
    }
}

impl Selection {
    /// Packets that both take; none, if no packet is left.
    pub fn and(&self, other: &Self) -> Option<Self> {
        let mut both = self.clone();
        both.is_partial |= other.is_partial;
        both.is_limited |= other.is_limited;
        both.is_late |= other.is_late;
        both.port = other.port.or(self.port);
        both.what.extend(other.what.iter().cloned());
        both.states &= other.states;
        for (flag, others) in both.flags.iter_mut().zip(other.flags) {
            *flag &= others;
        }
        // The first packet of a connection is a SYN.
        let is_first = both.takes(NEW) && !both.takes(ESTABLISHED);
        let is_empty = both.flags.iter().all(|flag| !flag) || is_first && !both.flags[0];
        (!is_empty && (both.takes(NEW) || both.takes(ESTABLISHED))).then_some(both)
    }

    pub const fn takes(&self, states: u32) -> bool {
        self.states & states != 0
    }

    /// Whether it takes all packets that matter.
    pub const fn is_all(&self) -> bool {
        !self.is_partial && self.takes(NEW) && self.takes(ESTABLISHED)
    }

    fn narrow(&mut self, what: String) {
        self.is_partial = true;
        self.what.push(what);
    }

    pub(super) const fn limit_states(&mut self, states: u32) {
        self.states &= states;
    }

    pub(super) fn limit_flags(&mut self, mask: u8, is_taken: impl Fn(u8) -> bool) {
        self.is_partial = true;
        for (flag, flags) in self.flags.iter_mut().zip(FLAGS) {
            *flag &= is_taken(flags & mask);
        }
    }

    /// Takes packets of one side's ports.
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
            // The sender chooses the other one.
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
        let in_traceroute =
            |(first, last): &(u16, u16)| TRACEROUTE.contains(first) && TRACEROUTE.contains(last);
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
        self.narrow(format!("{} port {}", side(to), some(shown)));
        Some(())
    }

    /// Takes packets of one side's addresses.
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
            self.narrow(format!("{} {}", side(to), some(shown)));
        }
        Some(())
    }

    pub(super) fn limit_length(&mut self, first: u16, last: u16, is_inverted: bool) -> Option<()> {
        let (first, last) = match (is_inverted, first) {
            (true, 0) => (last.checked_add(1)?, u16::MAX),
            (true, first) if last == u16::MAX => (0, first - 1),
            (true, _) => (0, u16::MAX),
            (false, first) => (first, last),
        };
        if last < SMALL {
            return None;
        }
        if first > SMALL || last < u16::MAX {
            self.is_late |= first > SMALL;
            self.narrow(format!("of {first} to {last} bytes"));
        }
        Some(())
    }

    pub(super) fn limit_content(&mut self) {
        self.narrow("with some content".to_owned());
    }

    pub(super) fn limit_amount(&mut self) {
        self.is_late = true;
        self.narrow("of connections that have carried a certain amount".to_owned());
    }

    pub(super) fn limit_connections(&mut self) {
        self.narrow("of connections above a number of them".to_owned());
    }

    pub(super) fn limit_share(&mut self) {
        self.narrow("taken by chance".to_owned());
    }
}

fn bounds(network: &IpNet) -> Range {
    let octets = |address: IpAddr| attributes::octets(address);
    (octets(network.network()), octets(network.broadcast()))
}

const fn side(to: bool) -> &'static str {
    if to { "to" } else { "from" }
}

/// The first of them, and how many more there are.
fn some(shown: impl Iterator<Item = String>) -> String {
    let mut shown: Vec<String> = shown.collect();
    let more = shown.len().saturating_sub(NAMED);
    shown.truncate(NAMED);
    let first = shown.join(", ");
    if more == 0 { first } else { format!("{first} and {more} more") }
}

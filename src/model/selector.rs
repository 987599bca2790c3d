//! Which packets a policy rule or a route of the kernel matches.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;

/// `IPPROTO_TCP`.
const TCP: u8 = 6;
/// `IPPROTO_UDP`.
const UDP: u8 = 17;

/// Protocol and ports of a packet, as far as a route lookup specifies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PacketSelector {
    /// IP protocol number.
    pub protocol: u8,
    /// Source port; `None` for any.
    pub source: Option<u16>,
    /// Destination port; `None` for any.
    pub destination: Option<u16>,
}

impl PacketSelector {
    /// Returns a UDP datagram to a port.
    pub const fn udp_to(port: u16) -> Self {
        Self { protocol: UDP, source: None, destination: Some(port) }
    }

    /// Returns a packet with this protocol and these ports, or `None` if nothing is specified. Ports without
    /// a protocol imply TCP.
    pub fn new(
        protocol: Option<u8>,
        source: Option<u16>,
        destination: Option<u16>,
    ) -> Option<Self> {
        let is_any = protocol.is_none() && source.is_none() && destination.is_none();
        (!is_any).then_some(Self { protocol: protocol.unwrap_or(TCP), source, destination })
    }
}

/// A range of ports, including both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self { first, last } if first == last => write!(f, "{first}"),
            Self { first, last } => write!(f, "{first}-{last}"),
        }
    }
}

/// The properties by which a policy rule selects packets (`ip rule`, `linux/fib_rules.h`), except marks
/// and interfaces. A route that requires more than a destination also has a selector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    /// Priority of the rule; `None` for a route.
    pub priority: Option<u32>,
    /// Source network; `None` for any.
    pub from: Option<IpNet>,
    /// Destination network; `None` for any.
    pub to: Option<IpNet>,
    /// IP protocol number; `None` for any.
    pub protocol: Option<u8>,
    /// Source ports; `None` for any.
    pub source: Option<Ports>,
    /// Destination ports; `None` for any.
    pub destination: Option<Ports>,
    /// Type of service; 0 for any.
    pub tos: u8,
}

impl Selector {
    /// Returns protocol and ports of a packet that is selected, with the first port of each range;
    /// `None` if the selector contains neither.
    pub fn transport(&self) -> Option<PacketSelector> {
        let first = |ports: Option<Ports>| ports.map(|ports| ports.first);
        PacketSelector::new(self.protocol, first(self.source), first(self.destination))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut write = |name: &str, value: &dyn fmt::Display| {
            write!(f, "{separator}{name} {value}")?;
            separator = " ";
            Ok(())
        };
        if let Some(from) = self.from {
            write("from", &from)?;
        }
        if let Some(to) = self.to {
            write("to", &to)?;
        }
        match self.protocol {
            Some(TCP) => write("ipproto", &"tcp")?,
            Some(UDP) => write("ipproto", &"udp")?,
            Some(other) => write("ipproto", &other)?,
            None => {}
        }
        if let Some(ports) = self.source {
            write("sport", &ports)?;
        }
        if let Some(ports) = self.destination {
            write("dport", &ports)?;
        }
        if self.tos != 0 {
            write("tos", &format_args!("{:#x}", self.tos))?;
        }
        Ok(())
    }
}

/// What a route requires of a packet besides its destination. Displayed in the syntax of `ip
/// route`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Condition {
    /// Source network; only routes of IPv6 have one.
    pub from: Option<IpNet>,
    /// Type of service, 0 for any; only routes of IPv4 have one.
    pub tos: u8,
}

impl Condition {
    /// Whether it accepts all packets to the destination.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Returns whether a packet with this source and type of service meets it.
    pub fn takes(&self, from: Option<IpAddr>, tos: u8) -> bool {
        let is_from = self.from.is_none_or(|network| from.is_some_and(|ip| network.contains(&ip)));
        is_from && (self.tos == 0 || self.tos == tos)
    }

    /// Returns the selector of a route to this destination.
    pub fn of_route_to(self, to: IpNet) -> Selector {
        let Self { from, tos } = self;
        Selector { from, tos, to: Some(to), ..Selector::default() }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(from) = self.from {
            write!(f, " from {from}")?;
        }
        if self.tos != 0 {
            write!(f, " tos {:#x}", self.tos)?;
        }
        Ok(())
    }
}

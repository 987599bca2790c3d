//! Which packets a policy rule or a route of the kernel concerns.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;

/// `IPPROTO_TCP`
const TCP: u8 = 6;
/// `IPPROTO_UDP`
const UDP: u8 = 17;

/// Protocol and ports of a packet, as far as a lookup of its route is told them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transport {
    pub protocol: u8,
    pub source: Option<u16>,
    pub destination: Option<u16>,
}

impl Transport {
    /// A UDP datagram to a port.
    pub const fn udp_to(port: u16) -> Self {
        Self { protocol: UDP, source: None, destination: Some(port) }
    }

    /// A packet of a protocol and from and to ports, where given: TCP where only ports are.
    pub fn new(
        protocol: Option<u8>,
        source: Option<u16>,
        destination: Option<u16>,
    ) -> Option<Self> {
        let is_any = protocol.is_none() && source.is_none() && destination.is_none();
        (!is_any).then_some(Self { protocol: protocol.unwrap_or(TCP), source, destination })
    }
}

/// The first and the last of a range of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    pub first: u16,
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

/// What a policy rule selects packets by (`ip rule`, linux/fib_rules.h), marks and interfaces apart; or what
/// a route does that selects by more than the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    /// Of the rule; none if it is a route.
    pub priority: Option<u32>,
    pub from: Option<IpNet>,
    pub to: Option<IpNet>,
    pub protocol: Option<u8>,
    pub source: Option<Ports>,
    pub destination: Option<Ports>,
    /// The type of service; 0 for any.
    pub tos: u8,
}

impl Selector {
    /// Protocol and ports of a packet that is selected; none where any is. Of a range it has the first port.
    pub fn transport(&self) -> Option<Transport> {
        let first = |ports: Option<Ports>| ports.map(|ports| ports.first);
        Transport::new(self.protocol, first(self.source), first(self.destination))
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

/// What a route selects packets by beside their destination; shown as `ip route` takes it behind that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Condition {
    /// Of the sender: IPv6 has such routes.
    pub from: Option<IpNet>,
    /// The type of service: IPv4 has such routes.
    pub tos: u8,
}

impl Condition {
    /// Whether it selects all packets to the destination.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a packet meets it.
    pub fn takes(&self, from: Option<IpAddr>, tos: u8) -> bool {
        let is_from = self.from.is_none_or(|network| from.is_some_and(|ip| network.contains(&ip)));
        is_from && (self.tos == 0 || self.tos == tos)
    }

    /// What a route to this destination selects.
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

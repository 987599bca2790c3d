//! Which packets a policy rule of the kernel concerns.

use std::fmt;

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

/// What a policy rule selects packets by (`ip rule`, linux/fib_rules.h), marks and interfaces apart. Of a
/// range of ports it has the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    pub priority: u32,
    pub from: Option<IpNet>,
    pub to: Option<IpNet>,
    pub transport: Option<Transport>,
    /// The type of service; 0 for any.
    pub tos: u8,
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
        if let Some(Transport { protocol, source, destination }) = self.transport {
            match protocol {
                TCP => write("ipproto", &"tcp")?,
                UDP => write("ipproto", &"udp")?,
                other => write("ipproto", &other)?,
            }
            if let Some(port) = source {
                write("sport", &port)?;
            }
            if let Some(port) = destination {
                write("dport", &port)?;
            }
        }
        if self.tos != 0 {
            write("tos", &format_args!("{:#x}", self.tos))?;
        }
        Ok(())
    }
}

//! Which packets a policy rule of the kernel selects.

use std::fmt;

use ipnet::IpNet;

/// `IPPROTO_TCP`.
const TCP: u8 = 6;
/// `IPPROTO_UDP`.
const UDP: u8 = 17;

/// Protocol and ports of a packet, as far as a route lookup specifies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transport {
    /// IP protocol number.
    pub protocol: u8,
    /// Source port; `None` for any.
    pub source: Option<u16>,
    /// Destination port; `None` for any.
    pub destination: Option<u16>,
}

impl Transport {
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

/// The selector of a policy rule (ip-rule(8), linux/fib_rules.h), without marks and interfaces. Of a range of
/// ports it holds the first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    /// Priority of the rule.
    pub priority: u32,
    /// Source network; `None` for any.
    pub from: Option<IpNet>,
    /// Destination network; `None` for any.
    pub to: Option<IpNet>,
    /// Protocol and ports; `None` for any.
    pub transport: Option<Transport>,
    /// Type of service; 0 for any.
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

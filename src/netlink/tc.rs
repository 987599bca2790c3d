//! Filters and programs that hang on interfaces: read, to name what may drop packets.

use std::{collections::BTreeSet, io};

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkXdp, XdpAttached},
    tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};

use super::{Netlink, link::Link};

impl Netlink {
    /// Filters at one side of an interface: kind, and name if it is an eBPF program.
    ///
    /// # Errors
    /// `EINVAL` where nothing can hang on it.
    pub fn filters(&mut self, link: u32, egress: bool) -> io::Result<BTreeSet<String>> {
        let mut wanted = TcMessage::default();
        wanted.header.index = link.cast_signed();
        let side = if egress { TcHandle::MIN_EGRESS } else { TcHandle::MIN_INGRESS };
        wanted.header.parent = TcHandle { major: u16::MAX, minor: side };
        let found = self.dump(&RouteNetlinkMessage::GetTrafficFilter(wanted))?;
        Ok(found
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewTrafficFilter(filter) => name(&filter.attributes),
                _ => None,
            })
            .collect())
    }
}

impl Link {
    /// Whether an eBPF program sees packets before all else (XDP).
    pub fn has_xdp(&self) -> bool {
        let is_attached =
            |xdp: &LinkXdp| matches!(xdp, LinkXdp::Attached(kind) if *kind != XdpAttached::None);
        self.message.attributes.iter().any(|attribute| match attribute {
            LinkAttribute::Xdp(parts) => parts.iter().any(is_attached),
            _ => false,
        })
    }
}

fn name(attributes: &[TcAttribute]) -> Option<String> {
    let kind = attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.clone()),
        _ => None,
    })?;
    let options = attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let program = options.flatten().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
        _ => None,
    });
    Some(program.map_or(kind.clone(), |program| format!("{kind} {program}")))
}

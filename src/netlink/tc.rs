//! Queueing disciplines, filters and programs that hang on interfaces: read, to name what may drop packets.

use std::{collections::BTreeSet, io};

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkXdp, XdpAttached},
    tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption, TcStats2},
};

use super::{Netlink, link::Link};

/// A queueing discipline of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qdisc {
    pub kind: String,
    /// It is the first for all that leaves.
    pub is_root: bool,
    /// Packets that it has dropped.
    pub drops: u32,
}

impl Netlink {
    /// Queueing disciplines of an interface.
    pub fn qdiscs(&mut self, link: u32) -> io::Result<Vec<Qdisc>> {
        let mut wanted = TcMessage::default();
        wanted.header.index = link.cast_signed();
        let found = self.dump(&RouteNetlinkMessage::GetQueueDiscipline(wanted))?;
        Ok(found
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewQueueDiscipline(qdisc)
                    if qdisc.header.index == link.cast_signed() =>
                {
                    Qdisc::new(qdisc)
                }
                _ => None,
            })
            .collect())
    }

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
        self.xdp().any(is_attached)
    }

    /// The number of that program; none where there are several, or none.
    pub fn xdp_program(&self) -> Option<u32> {
        self.xdp().find_map(|xdp| match xdp {
            LinkXdp::ProgId(id) => Some(*id),
            _ => None,
        })
    }

    fn xdp(&self) -> impl Iterator<Item = &LinkXdp> {
        let xdp = self.message.attributes.iter().filter_map(|attribute| match attribute {
            LinkAttribute::Xdp(parts) => Some(parts),
            _ => None,
        });
        xdp.flatten()
    }
}

impl Qdisc {
    fn new(message: &TcMessage) -> Option<Self> {
        let stats = message.attributes.iter().filter_map(|attribute| match attribute {
            TcAttribute::Stats2(stats) => Some(stats),
            _ => None,
        });
        let drops = stats.flatten().find_map(|stats| match stats {
            TcStats2::Queue(queue) => Some(queue.drops),
            _ => None,
        });
        Some(Self {
            kind: kind(&message.attributes)?,
            is_root: message.header.parent == TcHandle::ROOT,
            drops: drops.unwrap_or(0),
        })
    }
}

fn kind(attributes: &[TcAttribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.clone()),
        _ => None,
    })
}

fn name(attributes: &[TcAttribute]) -> Option<String> {
    let kind = kind(attributes)?;
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

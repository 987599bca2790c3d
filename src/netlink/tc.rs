//! Reads queueing disciplines, filters and eBPF programs of interfaces, to name what may drop packets.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use rtnetlink::{
    packet_core::Nla as _,
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkAttribute, LinkXdp, XdpAttached},
        tc::{
            TcAction, TcActionAttribute, TcActionOption, TcAttribute, TcFilterBpfOption,
            TcFilterFlowerOption, TcFilterMatchAllOption, TcFilterU32Option, TcHandle, TcMessage,
            TcOption, TcStats2,
        },
    },
};

/// `TCA_GACT_PARMS` (`linux/tc_act/tc_gact.h`).
const GACT_PARAMETERS: u16 = 2;
/// Offset of `action` in `struct tc_gact`, in bytes.
const VERDICT_AT: usize = 8;
/// `TC_ACT_SHOT` (`linux/pkt_cls.h`).
const DROP: i32 = 2;

use super::{Netlink, link::Link};

/// A queueing discipline of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qdisc {
    /// Kind, such as `fq_codel`.
    pub kind: String,
    /// Whether it is the root for outgoing packets.
    pub is_root: bool,
    /// Major number of its handle. The kernel assigns numbers from 0x8000 on.
    pub handle: u16,
    /// Number of packets that it has dropped.
    pub drops: u32,
}

impl Netlink {
    /// Returns the queueing disciplines of an interface.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn qdiscs(&mut self, link: u32) -> io::Result<Vec<Qdisc>> {
        Ok(self.all_qdiscs()?.remove(&link).unwrap_or_default())
    }

    /// Returns the queueing disciplines of all interfaces, by the interfaces' indices.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn all_qdiscs(&mut self) -> io::Result<BTreeMap<u32, Vec<Qdisc>>> {
        let wanted = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        let mut all: BTreeMap<u32, Vec<Qdisc>> = BTreeMap::new();
        for message in self.dump(&wanted)? {
            let RouteNetlinkMessage::NewQueueDiscipline(message) = message else { continue };
            let index = message.header.index.cast_unsigned();
            all.entry(index).or_default().extend(Qdisc::new(&message));
        }
        Ok(all)
    }

    /// Returns the filters at one side of an interface: the kind, followed by the program's name for an eBPF
    /// program.
    ///
    /// # Errors
    /// If the kernel does not answer; `EINVAL` if the interface has no place for filters.
    pub fn filters(&mut self, link: u32, egress: bool) -> io::Result<BTreeSet<String>> {
        let found = self.filter_messages(link, egress)?;
        Ok(found.iter().filter_map(|filter| name(&filter.attributes)).collect())
    }

    /// Returns whether a filter at one side of an interface drops packets by an action. The effect of eBPF
    /// programs is unknown.
    ///
    /// # Errors
    /// As for [`Self::filters`].
    pub fn has_dropping_filter(&mut self, link: u32, egress: bool) -> io::Result<bool> {
        let found = self.filter_messages(link, egress)?;
        Ok(found.iter().flat_map(|filter| actions(&filter.attributes)).any(drops))
    }

    fn filter_messages(&mut self, link: u32, egress: bool) -> io::Result<Vec<TcMessage>> {
        let mut wanted = TcMessage::default();
        wanted.header.index = link.cast_signed();
        let side = if egress { TcHandle::MIN_EGRESS } else { TcHandle::MIN_INGRESS };
        wanted.header.parent = TcHandle { major: u16::MAX, minor: side };
        let found = self.dump(&RouteNetlinkMessage::GetTrafficFilter(wanted))?;
        Ok(found
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter),
                _ => None,
            })
            .collect())
    }
}

impl Link {
    /// Returns whether an eBPF program processes packets before everything else (XDP).
    pub fn has_xdp(&self) -> bool {
        let is_attached =
            |xdp: &LinkXdp| matches!(xdp, LinkXdp::Attached(kind) if *kind != XdpAttached::None);
        self.xdp().any(is_attached)
    }

    /// Returns the id of the XDP program. `None` if there are several, or none.
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
            handle: message.header.handle.major,
            drops: drops.unwrap_or(0),
        })
    }
}

/// Returns the kind of an object.
fn kind(attributes: &[TcAttribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.clone()),
        _ => None,
    })
}

/// Returns the kind of a filter, followed by the name of its eBPF program.
fn name(attributes: &[TcAttribute]) -> Option<String> {
    let kind = kind(attributes)?;
    let program = options(attributes).find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
        _ => None,
    });
    Some(program.map_or(kind.clone(), |program| format!("{kind} {program}")))
}

fn options(attributes: &[TcAttribute]) -> impl Iterator<Item = &TcOption> {
    let options = attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten()
}

/// Returns the actions of a filter, for the supported kinds of filters.
fn actions(attributes: &[TcAttribute]) -> impl Iterator<Item = &TcAction> {
    let actions = options(attributes).filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions))
        | TcOption::MatchAll(TcFilterMatchAllOption::Action(actions))
        | TcOption::Flower(TcFilterFlowerOption::Actions(actions)) => Some(actions),
        _ => None,
    });
    actions.flatten()
}

/// Returns whether an action drops packets: all, or those above a rate.
fn drops(action: &TcAction) -> bool {
    action.attributes.iter().any(|attribute| match attribute {
        TcActionAttribute::Kind(kind) => kind == "police",
        TcActionAttribute::Options(options) => options.iter().any(|option| match option {
            TcActionOption::Other(other) if other.kind() == GACT_PARAMETERS => {
                let mut value = vec![0; other.value_len()];
                other.emit_value(&mut value);
                let verdict = value.get(VERDICT_AT..).and_then(<[u8]>::first_chunk);
                verdict.is_some_and(|verdict| i32::from_ne_bytes(*verdict) == DROP)
            }
            _ => false,
        }),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::DefaultNla;

    use super::*;

    fn filter(kind: &str, verdict: i32) -> Vec<TcAttribute> {
        let mut value = vec![0; 20];
        value[VERDICT_AT..VERDICT_AT + 4].copy_from_slice(&verdict.to_ne_bytes());
        let other = TcActionOption::Other(DefaultNla::new(GACT_PARAMETERS, value));
        let mut action = TcAction::default();
        action.attributes =
            vec![TcActionAttribute::Kind(kind.to_owned()), TcActionAttribute::Options(vec![other])];
        let option = TcOption::U32(TcFilterU32Option::Action(vec![action]));
        vec![TcAttribute::Kind("u32".to_owned()), TcAttribute::Options(vec![option])]
    }

    #[test]
    fn filter_drops_by_action_and_by_rate_limit() {
        let drops = |filter: Vec<TcAttribute>| actions(&filter).any(drops);
        assert!(drops(filter("gact", DROP)) && drops(filter("police", 0)));
        assert!(!drops(filter("gact", 0)) && !drops(filter("mirred", 4)));
        assert!(!drops(vec![TcAttribute::Kind("bpf".to_owned())]));
    }
}

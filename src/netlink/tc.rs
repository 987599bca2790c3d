//! Queueing disciplines, filters and programs that hang on interfaces: read, to name what may drop packets.

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

/// Parameters of the action `gact`, where in them its verdict is, and the verdict that drops
/// (linux/tc_act/tc_gact.h, linux/pkt_cls.h).
const GACT_PARAMETERS: u16 = 2;
const VERDICT_AT: usize = 8;
const DROP: i32 = 2;

use super::{Netlink, link::Link};

/// A queueing discipline of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qdisc {
    pub kind: String,
    /// It is the first for all that leaves.
    pub is_root: bool,
    /// The number that it was given, or that the kernel has chosen: from 0x8000 on.
    pub handle: u16,
    /// Packets that it has dropped.
    pub drops: u32,
}

impl Netlink {
    /// Queueing disciplines of an interface.
    pub fn qdiscs(&mut self, link: u32) -> io::Result<Vec<Qdisc>> {
        Ok(self.all_qdiscs()?.remove(&link).unwrap_or_default())
    }

    /// Those of all interfaces, by their indices.
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

    /// Filters at one side of an interface: kind, and name if it is an eBPF program.
    ///
    /// # Errors
    /// `EINVAL` where nothing can hang on it.
    pub fn filters(&mut self, link: u32, egress: bool) -> io::Result<BTreeSet<String>> {
        let found = self.filter_messages(link, egress)?;
        Ok(found.iter().filter_map(|filter| name(&filter.attributes)).collect())
    }

    /// Whether one of them drops packets by an action of its own. What an eBPF program does is not known.
    ///
    /// # Errors
    /// `EINVAL` where nothing can hang on it.
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
            handle: message.header.handle.major,
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

/// What a filter does with packets, of the kinds of filters that are known here.
fn actions(attributes: &[TcAttribute]) -> impl Iterator<Item = &TcAction> {
    let actions = options(attributes).filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions))
        | TcOption::MatchAll(TcFilterMatchAllOption::Action(actions))
        | TcOption::Flower(TcFilterFlowerOption::Actions(actions)) => Some(actions),
        _ => None,
    });
    actions.flatten()
}

/// Whether an action drops packets: all, or those above a rate.
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
    fn filter_drops_by_the_action_drop_and_by_a_limit_of_rate() {
        let drops = |filter: Vec<TcAttribute>| actions(&filter).any(drops);
        assert!(drops(filter("gact", DROP)) && drops(filter("police", 0)));
        assert!(!drops(filter("gact", 0)) && !drops(filter("mirred", 4)));
        assert!(!drops(vec![TcAttribute::Kind("bpf".to_owned())]));
    }
}

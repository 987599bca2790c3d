//! Evidence beyond captured packets and the kernel's trace: hooks of the VXLAN device, rules at the port of
//! gossip, and tracked connections.

use std::{collections::BTreeMap, net::IpAddr};

use super::{Diagnoser, SilenceFindings, kernel_queries};
use crate::{
    dataplane::{
        foreign::{ClosedPort, Extent, ForeignTables},
        silence::{Facts, IN, Kept, OUT, Place, Suspect, Watch},
    },
    model::NodeId,
    netlink::conntrack::{self, Translated},
};

impl<F: Fn(SilenceFindings)> Diagnoser<F> {
    /// Reads what may drop packets at the VXLAN device, if packets may be lost there.
    pub(super) fn read_device_hints(
        &mut self,
        place: &Place,
        diagnosed: &[Suspect],
        watch: &Watch,
        facts: &mut BTreeMap<NodeId, Facts>,
    ) {
        let mut known_hints = [None, None];
        for suspect in diagnosed {
            let Some(facts) = facts.get_mut(&suspect.node) else { continue };
            let carried = watch.traces[&suspect.node].carried;
            for (way, may_be_lost) in [(OUT, facts.entered && !carried[OUT]), (IN, carried[IN])] {
                if may_be_lost {
                    let hints = known_hints[way].get_or_insert_with(|| {
                        kernel_queries::at_device(&mut self.netlink, place, way)
                    });
                    facts.device_hints[way].clone_from(hints);
                }
            }
        }
    }
}

/// Returns a chain that drops packets to the port of gossip, preferably all of them.
pub fn closed_gossip(place: &Place) -> Option<ClosedPort> {
    let read = |mut tables: ForeignTables| tables.closed_ports(&[place.gossip]);
    let closed = ForeignTables::open().and_then(read);
    let closed = closed.inspect_err(|error| tracing::debug!(%error, "nftables not read"));
    let is_closed = |closed: &ClosedPort| closed.extent != Extent::AboveRate;
    closed.ok()?.into_iter().filter(is_closed).min_by_key(|closed| closed.extent)
}

/// Returns connections of tunnel packets whose addresses are translated.
pub fn translated_connections(place: &Place) -> Vec<Translated> {
    let found = conntrack::translated(place.local.is_ipv4(), place.port);
    found.inspect_err(|error| tracing::debug!(%error, "connections not read")).unwrap_or_default()
}

/// Returns the address translation that connections of tunnel packets to or from a peer keep, where no rule
/// was found that does it.
pub fn kept_translation(
    connections: &[Translated],
    place: &Place,
    peer: IpAddr,
    facts: &Facts,
) -> Option<Kept> {
    let own = [place.local, place.source];
    let kept = connections.iter().find_map(|found| {
        let outgoing = own.contains(&found.from) && found.to == peer;
        let incoming = found.from == peer && own.contains(&found.to);
        let is_source = found.new_from != found.from;
        let address = if is_source { found.new_from } else { found.new_to };
        (outgoing || incoming).then_some(Kept { outgoing, is_source, address })
    })?;
    let has_rule = match kept.outgoing {
        true => facts.translating.is_some() || facts.translating_legacy.is_some(),
        false => !kernel_queries::redirecting(place.local.is_ipv4(), place.port).is_empty(),
    };
    (!has_rule).then_some(kept)
}

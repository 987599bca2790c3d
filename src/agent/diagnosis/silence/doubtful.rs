//! Silent peers whose packets this host may have dropped: which rules did so.

use std::{collections::BTreeMap, io, net::IpAddr};

use super::{
    Case, Diagnoser, SilenceFindings, hints,
    kernel_queries::{PeerRoutes, SentPackets, nothing_found},
};
use crate::{
    agent::diagnosis::iptables_legacy,
    dataplane::{
        foreign::trace::Trace,
        silence::{Facts, IN, OUT, Place, Suspect, Watch},
    },
    model::NodeId,
};

/// What was captured and found out so far.
type Known<'a> = (&'a mut Watch, &'a mut BTreeMap<NodeId, Facts>);

/// Returns the suspects for which rules are read: their packets are, or may be, lost on this host.
pub(super) fn suspects(
    place: &Place,
    diagnosed: &[Suspect],
    watch: &Watch,
    facts: &BTreeMap<NodeId, Facts>,
    sent: &SentPackets,
) -> Vec<Suspect> {
    let is_doubtful = |suspect: &&Suspect| {
        let (traces, facts) = (&watch.traces[&suspect.node], &facts[&suspect.node]);
        let is_translated = traces.left.iter().any(|(_, from)| *from != place.source);
        let is_unresolved = facts.unresolved.is_some() && !facts.is_shared;
        let is_known = is_unresolved || facts.filtered.is_some();
        let is_known = is_known || facts.pinned.is_some();
        let is_lost_here = facts.sent && traces.left.is_empty() || is_translated;
        let is_lost_here = is_lost_here || sent.forbidden.contains(&suspect.node);
        // Packets of a live peer may arrive another way, without a tunnel.
        !is_known && (is_lost_here || !traces.came.is_empty() || suspect.lives)
    };
    diagnosed.iter().filter(is_doubtful).cloned().collect()
}

impl<F: Fn(SilenceFindings)> Diagnoser<F> {
    /// Traces the packets of these suspects, and completes the facts. Returns `None` if the case changed or
    /// the agent ended meanwhile.
    pub(super) fn trace(
        &mut self,
        case: &Case,
        doubtful: &[Suspect],
        routes: &PeerRoutes,
        sent: &SentPackets,
        (watch, facts): Known<'_>,
    ) -> io::Result<Option<()>> {
        let place = &case.place;
        let addresses: Vec<IpAddr> = doubtful.iter().map(|suspect| suspect.address).collect();
        let overlay: Vec<IpAddr> = doubtful.iter().map(|suspect| suspect.vtep).collect();
        let carriers: Vec<&str> =
            routes.carriers(place).iter().map(|link| link.name.as_str()).collect();
        let started = Trace::begin(&place.device, &carriers, place.port, &addresses, &overlay);
        let trace = started.inspect_err(|error| tracing::debug!(%error, "packets not traced"));
        let mut trace = trace.ok();
        if trace.is_some() && self.capture(case, doubtful, None, trace.as_mut(), watch)?.is_none() {
            return Ok(None);
        }
        // Without a trace, it is unknown whether a rule translates packets.
        let connections = match &trace {
            Some(_) => hints::translated_connections(place),
            None => Vec::new(),
        };
        for suspect in doubtful {
            let Some(facts) = facts.get_mut(&suspect.node) else { continue };
            if let Some(trace) = &trace {
                facts.dropped = trace.report().dropped(place.local, suspect.address);
                facts.translating = trace.report().translating(suspect.address);
                let diverted = trace.report().dropped_at(suspect.vtep);
                facts.diverted = diverted
                    .and_then(|(by, at)| routes.diverted(&mut self.netlink, suspect.vtep, by, at));
            }
            let left = &watch.traces[&suspect.node].left;
            if facts.translating.is_none() && left.iter().any(|(_, from)| *from != place.source) {
                facts.translating_legacy =
                    iptables_legacy::translating(place.local.is_ipv4(), place.port);
            }
            facts.kept = hints::kept_translation(&connections, place, suspect.address, facts);
            for way in [OUT, IN] {
                facts.hints[way] = routes.hints(&mut self.netlink, place, way);
            }
            let is_unexplained = trace.is_some() && facts.hints[OUT].is_empty();
            facts.forbidden = is_unexplained && sent.forbidden.contains(&suspect.node);
            for way in [OUT, IN] {
                if facts.hints[way].is_empty() {
                    facts.hints[way].push(nothing_found(&place.interface, way, place.port));
                }
            }
        }
        Ok(Some(()))
    }
}

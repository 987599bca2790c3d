//! What is told where no other member answers: that this host has another address than they knew, that the
//! seeds are this host itself, or that all are down.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use super::{Agent, knock::own_sentence};
use crate::model::{NodeId, PathState};

/// Gossip finds members again within some seconds after a start, or after a network was away.
const ALONE: Duration = Duration::from_secs(10);
/// Gossip holds members as alive for less than this after the last packet of theirs.
const FRESH: Duration = Duration::from_secs(60);
/// Members that are named in one sentence.
const NAMED: usize = 3;

/// Whether other members answer.
#[derive(Debug, Default)]
pub(super) struct Company {
    /// Since when none does, although there are some.
    none_since: Option<Instant>,
    /// The address under which members knew this host, and when it had another one.
    moved: Option<(IpAddr, Instant)>,
}

impl Company {
    /// This host has had one address, and has another now.
    pub(super) fn on_move(&mut self, before: IpAddr, now: IpAddr) {
        let (known, _) = *self.moved.get_or_insert((before, Instant::now()));
        self.moved = (known != now).then_some((known, Instant::now()));
    }

    /// The address under which members know this host, if it is not the present one.
    pub(super) fn known_as(&self) -> Option<IpAddr> {
        self.moved.map(|(known, _)| known)
    }
}

impl Agent {
    pub(super) fn watch_company(&mut self, now: Instant) {
        if self.node.is_alone() || self.node.has_active_peer() {
            self.company.none_since = None;
            let is_known = |(_, at): &mut (IpAddr, Instant)| now.duration_since(*at) >= FRESH;
            if self.company.moved.take_if(is_known).is_some() {
                self.save_underlay();
            }
        } else {
            self.company.none_since.get_or_insert(now);
        }
    }

    /// That no other member answers, unless each of them is told about by its path; or why there is none yet.
    pub(super) fn company_problem(&self) -> Option<String> {
        self.own_seeds_problem().or_else(|| self.moved_problem()).or_else(|| self.alone_problem())
    }

    fn own_seeds_problem(&self) -> Option<String> {
        let seeds = self.node.own_seeds().filter_map(|seed| self.config.seeds.get(seed));
        let seeds: Vec<&str> = seeds.map(String::as_str).collect();
        let token = self.config.token.as_ref().or(self.saved_token.as_ref());
        let is_of_token =
            |seed: &&str| token.is_some_and(|token| token.seeds.iter().any(|s| s == seed));
        (!seeds.is_empty()).then(|| own_sentence(&seeds, seeds.iter().all(is_of_token)))
    }

    fn is_without_company(&self) -> bool {
        self.company.none_since.is_some_and(|since| since.elapsed() >= ALONE)
            && self.kernel.underlay_problem.is_none()
    }

    /// That no member answers where it was, and that this host is not where it was either.
    pub(super) fn moved_problem(&self) -> Option<String> {
        let known = self.company.known_as().filter(|_| self.is_without_company())?;
        let now = self.underlay.local;
        let members = self.named(self.node.peers());
        Some(format!(
            "the address of this host has changed from {known} to {now}, and no known member answers at its \
             own ({members}): if they have other addresses now, too, no host knows another's; restart the \
             agent of one host with --join ADDRESS, where ADDRESS is the present one of another host (there: \
             gossamer status, `underlay`)"
        ))
    }

    fn alone_problem(&self) -> Option<String> {
        if !self.is_without_company() {
            return None;
        }
        let paths: Vec<_> = self.path_states().map(|(node, state, _)| (node, state)).collect();
        let state =
            |node: NodeId| paths.iter().find(|(of, _)| *of == node).map(|(_, state)| *state);
        let is_told = |node: &NodeId| {
            state(*node).is_some_and(|state| self.path_problem(*node, state).is_some())
        };
        let untold: Vec<NodeId> = self.node.peers().filter(|node| !is_told(node)).collect();
        let first = *untold.first()?;
        let gossip = self.node.address_of(first)?.port();
        let tunnels = self.kernel.wanted.as_ref().map(|view| view.settings.vxlan_port);
        let both = tunnels.map_or(gossip.to_string(), |port| format!("{port} and {gossip}"));
        let why = match state(first) {
            Some(
                PathState::Ok
                | PathState::Asymmetric
                | PathState::MtuTooLarge
                | PathState::PartlyLost,
            ) => {
                format!(
                    "what is asked through the tunnel is answered there, so the host runs: either its agent \
                     is stopped (there: systemctl status gossamer), or UDP {gossip} is closed between the \
                     two, in one of the firewalls or by the network"
                )
            }
            Some(PathState::OneWay) => format!(
                "its tunnel packets arrive here, so the host runs: UDP {both} from this host are dropped \
                 there or on the way (there: gossamer status), or its agent is stopped as well"
            ),
            _ => format!(
                "either the host is off or its agent is stopped, or the two do not hear each other: where it \
                 runs, its own status may name why (there: gossamer status); or this host is cut off: look \
                 at its network, routes (ip route get ADDRESS; ip neigh), and whether firewalls let UDP \
                 {both} pass"
            ),
        };
        Some(format!(
            "no other member answers this host: {} down; {why}",
            self.named(untold.into_iter())
        ))
    }

    /// Some members with their addresses.
    fn named(&self, members: impl Iterator<Item = NodeId>) -> String {
        let members: Vec<NodeId> = members.collect();
        let shown = |node: &NodeId| {
            let name = self.node.name_of(*node);
            self.node.address_of(*node).map_or(name.to_owned(), |at| format!("{name} ({at})"))
        };
        let mut named: Vec<String> = members.iter().take(NAMED).map(shown).collect();
        if members.len() > NAMED {
            named.push(format!("{} more", members.len() - NAMED));
        }
        named.join(", ")
    }
}

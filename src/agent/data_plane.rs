//! The loop's side of the data plane: what the kernel is to be made equal to, and what it said.
//!
//! The kernel's own thread does the work and repeats it (`programmer`); here goals are numbered, failures
//! become problems, repairs are counted, and the core hears what is in use and where this host is.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;

use super::{
    Agent, Ending,
    answers::Answers,
    archive::Saved,
    auditor::Routing,
    far::FarState,
    forwarder::{ForwarderNews, Forwarding},
    programmer::{Goal, State},
    subnet_env::SubnetFile,
    surroundings::HostState,
    told::{DemandState, Outcome, Told},
    underlay::{Chosen, UnderlayError},
};
use crate::{
    config::Config,
    core::{Command, Input, Peer, View},
    dataplane::{
        desired::{Desired, device_name},
        firewall::Firewall,
        kernel::{
            FirewallTable, Kernel, KernelError, RefusedEntry, pod_tables::PodTables,
            users::UsersRule,
        },
        plan::Op,
    },
    model::{NodeId, Pool},
    pods::wiring::Wiring,
};

/// A node that cannot use the kernel gives its new subnet back within this time, or just goes.
const GIVE_BACK: Duration = Duration::from_secs(5);

/// What the loop knows of the kernel.
#[derive(Default)]
pub(super) struct KernelState {
    pub(super) wanted: Option<View>,
    /// What the core was last told that the kernel uses.
    pub(super) in_use: Option<Option<IpNet>>,
    pub(super) withdrawn: bool,
    /// Peers whose subnets are unreachable: neither gossip nor their kernels have answered for long.
    pub(super) withdrawn_peers: BTreeSet<NodeId>,
    /// MTU of the packets to each peer whose path carries less than the overlay device.
    pub(super) narrow: BTreeMap<NodeId, u32>,
    pub(super) goals: u64,
    pub(super) answered: u64,
    /// Its index, as long as there is one.
    pub(super) device: Option<u32>,
    /// Whether checksums are left to it, as far as is known.
    pub(super) checksum_offload: Option<bool>,
    /// The device has been made equal to the view at least once.
    pub(super) programmed_once: bool,
    pub(super) problem: Option<String>,
    /// Peers to which packets do not get for want of an entry, as sentences.
    pub(super) peer_problems: Vec<String>,
    /// Why the underlay cannot be used as it is.
    pub(super) underlay_problem: Option<String>,
    /// The carrier of the underlay's interface comes and goes, as a sentence.
    pub(super) flapping: Option<String>,
    /// Addresses of this host inside the overlay's networks, as sentences.
    pub(super) overlaps: Vec<String>,
    /// Where the kernel sends packets.
    pub(super) routing: Routing,
    /// Whether packets of pods are forwarded.
    pub(super) forwarding: Forwarding,
    /// Whether they come to pods of other hosts, and answers come back.
    pub(super) far: FarState,
    /// Whether pods of this host answer.
    pub(super) answers: Answers,
    pub(super) demand: DemandState,
    /// Firewall and sysctls.
    pub(super) host: HostState,
    pub(super) operations: u64,
    /// What other programs had changed and was put right, by kind.
    pub(super) repairs: BTreeMap<&'static str, u64>,
    /// When a repair of each kind was last logged, and how many since.
    pub(super) logged: BTreeMap<&'static str, (Option<Instant>, u64)>,
}

impl Agent {
    pub(super) fn program(&mut self) {
        let state = match (&self.kernel.wanted, self.node.cluster()) {
            (Some(view), _) => {
                let mut underlay = self.underlay.with_mode(self.config.mode);
                underlay.narrow.clone_from(&self.kernel.narrow);
                let mut desired = Desired::new(view, &underlay, &self.kernel.withdrawn_peers);
                desired.device.checksum_offload = self.prober.wanted_offload();
                let mut usable = Cow::Borrowed(view);
                if view
                    .peers
                    .values()
                    .any(|peer| underlay.unusable_peer(peer.vtep.underlay).is_some())
                {
                    let is_usable =
                        |peer: &Peer| underlay.unusable_peer(peer.vtep.underlay).is_none();
                    usable.to_mut().peers.retain(|_, peer| is_usable(peer));
                }
                let bridge = self.config.bridge_name(view.settings.vni);
                let firewall = Firewall::new(&usable, &self.config.firewall, &bridge);
                State::Overlay(Box::new(desired), Box::new(firewall))
            }
            (None, Some(cluster)) if self.kernel.withdrawn => State::Nothing {
                device: device_name(cluster.settings.vni),
                pool: cluster.settings.pool,
            },
            _ => return,
        };
        self.update_forwarder();
        self.expect_bridge();
        self.kernel.goals += 1;
        self.programmer.program(Goal { number: self.kernel.goals, state });
    }

    pub(super) fn on_told(&mut self, told: Told) {
        match told {
            Told::Outcome(outcome) => self.on_kernel(outcome),
            Told::Underlay(underlay) => self.on_underlay(underlay),
            Told::Routing(routing) => {
                let known = &self.kernel.routing.problems;
                let new = routing.problems.iter().filter(|problem| !known.contains(problem));
                new.for_each(|problem| tracing::warn!("{problem}"));
                self.kernel.routing = routing;
                self.follow_path_mtus();
            }
            Told::Flapping(flapping) => {
                if let (None, Some(problem)) = (&self.kernel.flapping, &flapping) {
                    tracing::warn!("{problem}");
                }
                self.kernel.flapping = flapping;
            }
            Told::Overlaps(overlaps) => {
                overlaps.iter().for_each(|overlap| tracing::warn!("{overlap}"));
                self.kernel.overlaps = overlaps;
            }
            Told::Host(state) => self.on_host(state),
            Told::Demand(state) => self.on_demand(state),
            Told::Counted(counted) => self.on_counted(counted),
        }
    }

    fn on_kernel(&mut self, Outcome { number, repair, result }: Outcome) {
        self.kernel.answered = number;
        match result {
            Ok(report) => {
                self.kernel.device = report.device;
                self.kernel.checksum_offload = report.checksum_offload;
                let operations: u64 = report.done.values().sum();
                self.kernel.operations += operations;
                if repair && operations > 0 {
                    for (kind, count) in &report.done {
                        self.note_repair(kind, *count);
                    }
                } else if operations > 0 {
                    tracing::debug!(operations, "kernel programmed");
                }
                self.note_kernel_failures(&report.failed);
                self.tell_what_is_in_use();
                if self.kernel.withdrawn {
                    let _ = std::fs::remove_file(&self.config.subnet_file);
                    return;
                }
                if !self.kernel.programmed_once {
                    self.kernel.programmed_once = true;
                    tracing::info!("data plane ready");
                }
                self.write_subnet_env();
                self.keep_bridge();
            }
            Err(error) => self.on_kernel_error(&error),
        }
    }

    pub(super) fn on_forwarding(&mut self, news: ForwarderNews) {
        let state = match news {
            ForwarderNews::State(state) => state,
            ForwarderNews::Room(room) => return self.far.set_room(room),
        };
        let before = &self.kernel.forwarding;
        let of = |state: &Forwarding| {
            let Forwarding { problems, input, warnings, .. } = state.clone();
            [problems, input, warnings].concat()
        };
        let (before, told) = (of(before), of(&state));
        let known = |problem: &&String| before.contains(problem);
        told.iter()
            .filter(|problem| !known(problem))
            .for_each(|problem| tracing::warn!("{problem}"));
        self.kernel.forwarding = state;
        self.update_far();
    }

    fn on_demand(&mut self, state: DemandState) {
        let before = std::mem::replace(&mut self.kernel.demand, state);
        let now = &self.kernel.demand;
        let missed = now.answered.saturating_sub(before.answered);
        if now.in_use.is_none() && missed > 0 {
            // All peers are programmed, so an entry was gone and nobody had told.
            self.count_repair("miss", missed);
        }
        if self.kernel.demand.in_use != before.in_use {
            self.update_paths();
        }
    }

    fn on_host(&mut self, state: HostState) {
        let known = &self.kernel.host.problems;
        state.problems.iter().filter(|p| !known.contains(p)).for_each(|p| tracing::error!("{p}"));
        for kind in &state.repaired {
            self.note_repair(kind, 1);
        }
        self.kernel.host = state;
    }

    /// The interface that carries the tunnels has changed, or what makes it the chosen one.
    fn on_underlay(&mut self, underlay: Result<Chosen, UnderlayError>) {
        let chosen = match underlay {
            Ok(chosen) => chosen,
            Err(error) => {
                let why = match error {
                    // Routes lead tunnel packets by the interface that has the address.
                    UnderlayError::Moved { .. } => format!(
                        "no underlay: {error}; until then the tunnels stay as they were, whether packets \
                         of pods pass or not"
                    ),
                    error => format!(
                        "no underlay: {error}; pods of this host reach each other, and those of other \
                         hosts once the network is back"
                    ),
                };
                if self.kernel.underlay_problem.as_ref() != Some(&why) {
                    tracing::error!("{why}");
                }
                self.kernel.underlay_problem = Some(why);
                return;
            }
        };
        self.kernel.underlay_problem = None;
        let before = std::mem::replace(&mut self.underlay, chosen);
        let now = &self.underlay;
        if before == *now {
            return;
        }
        let what =
            |chosen: &Chosen| format!("{} ({}, MTU {})", chosen.local, chosen.name, chosen.mtu);
        if before.is_present() && what(&before) == what(now) {
            tracing::debug!(?before, ?now, "the underlay's interface has changed");
        } else if before.is_present() {
            tracing::warn!(before = what(&before), now = what(now), "the underlay has changed");
        } else {
            tracing::info!(underlay = what(now), "the network is there");
        }
        if before.local != now.local && self.config.advertise.is_none() {
            self.company.on_move(before.local, now.local);
        }
        self.save_underlay();
        let now = &self.underlay;
        if before.local != now.local && self.config.advertise.is_none() {
            let input = Input::Moved { underlay: now.local };
            self.transport.moved();
            self.input(input);
        } else {
            self.input(Input::Command(Command::Sync));
        }
        self.program();
    }

    /// A host that starts without a network serves its pods by what is saved here. The address is the one
    /// that members know, so that a start under another one is noticed.
    pub(super) fn save_underlay(&mut self) {
        let Chosen { local, mtu, .. } = self.underlay;
        let local = self.company.known_as().unwrap_or(local);
        self.archive.save(Saved::Underlay(local, mtu));
    }

    /// The core gives a subnet away only when the kernel does not use it any more.
    fn tell_what_is_in_use(&mut self) {
        if self.kernel.answered != self.kernel.goals {
            return;
        }
        let in_use = self.kernel.wanted.as_ref().map(|view| view.own.subnets.first);
        if self.kernel.in_use.replace(in_use) != Some(in_use) {
            self.input(Input::InUse(in_use));
        }
    }

    /// What is refused of one peer's entries is a problem of that peer. What is about this host, about its
    /// own entries, or about all of several peers is a problem of the kernel as a whole.
    fn note_kernel_failures(&mut self, failed: &[RefusedEntry]) {
        let peers = self.kernel.wanted.as_ref().map(|view| &view.peers);
        let owner = |entry: &RefusedEntry| {
            let mut peers = peers.into_iter().flatten();
            let found = peers.find(|(_, peer)| concerns(&entry.op, peer)).map(|(node, _)| *node);
            found.filter(|_| !entry.is_of_host())
        };
        let owned: Vec<_> = failed.iter().map(|entry| (owner(entry), entry)).collect();
        let refused: BTreeSet<NodeId> = owned.iter().filter_map(|(node, _)| *node).collect();
        let is_of_all = refused.len() > 1 && Some(refused.len()) == peers.map(BTreeMap::len);
        let is_whole = |node: &Option<NodeId>| node.is_none() || is_of_all;
        let whole: Vec<_> = owned.iter().filter(|(node, _)| is_whole(node)).collect();
        let problem = whole.first().map(|(_, first)| match whole.len() {
            1 => format!("a kernel entry was refused: {first}"),
            count => format!("{count} kernel entries were refused, the first: {first}"),
        });
        let mut told = BTreeSet::new();
        let of_peers = owned.iter().filter(|(node, _)| !is_whole(node) && told.insert(*node));
        let of_peers: Vec<String> = of_peers
            .filter_map(|(node, entry)| {
                Some(format!("packets to {}: {entry}", self.node.name_of((*node)?)))
            })
            .collect();
        let new = of_peers.iter().filter(|problem| !self.kernel.peer_problems.contains(problem));
        new.for_each(|problem| tracing::warn!("{problem}"));
        if let Some(problem) = problem.as_ref().filter(|p| self.kernel.problem.as_ref() != Some(p))
        {
            tracing::error!("{problem}");
        }
        self.kernel.peer_problems = of_peers;
        self.kernel.problem = problem;
    }

    /// Peers to whose underlay addresses nothing can be sent from this host, as sentences.
    pub(super) fn unusable_peers(&self) -> Vec<String> {
        let underlay = self.underlay.with_mode(self.config.mode);
        let peers = self.kernel.wanted.iter().flat_map(|view| &view.peers);
        let problem = |(node, peer): (&NodeId, &Peer)| {
            let address = peer.vtep.underlay;
            let why = underlay.unusable_peer(address)?;
            let name = self.node.name_of(*node);
            Some(format!(
                "packets to {name}: its tunnels end at {address}, {why}: correct its underlay address"
            ))
        };
        peers.filter_map(problem).collect()
    }

    /// Before the first success this host cannot be a member: say why and go. Later on, and while the kernel
    /// is merely busy, keep trying.
    fn on_kernel_error(&mut self, error: &KernelError) {
        let why = error.to_string();
        if self.kernel.problem.as_ref() != Some(&why) {
            tracing::error!("{why}");
        }
        self.kernel.problem = Some(why.clone());
        if self.kernel.programmed_once || self.giving_up.is_some() || error.is_transient() {
            return;
        }
        if self.fresh {
            tracing::info!("giving the subnet back");
            self.giving_up = Some((why, Instant::now() + GIVE_BACK));
            // What was refused is not there.
            self.input(Input::InUse(None));
            self.input(Input::Command(Command::Leave));
        } else {
            self.ending = Some(Ending::Failed(why));
        }
    }

    fn write_subnet_env(&mut self) {
        let Some(view) = &self.kernel.wanted else { return };
        let networks = view.settings.pool.networks();
        let subnets = self.subnets_of_pods(view.own.subnets);
        let (mtu, masquerade) = (self.underlay.mtu, self.config.firewall.masquerade);
        let file = SubnetFile::new(networks, subnets, mtu, masquerade);
        self.archive.save(Saved::Subnet(self.config.subnet_file.clone(), file));
    }
}

/// Whether an entry leads to a peer.
fn concerns(op: &Op, peer: &Peer) -> bool {
    let contains = |address: IpAddr| {
        let mut subnets = peer.leases.iter().flat_map(|(_, subnets)| subnets.iter());
        subnets.any(|subnet| subnet.contains(&address))
    };
    match op {
        Op::SetFdb(mac, _) | Op::RemoveFdb(mac, _) => *mac == peer.vtep.mac,
        Op::SetNeighbour(address, _) | Op::Resolve(address, _) | Op::RemoveNeighbour(address) => {
            contains(*address)
        }
        Op::AddRoute(subnet, _) | Op::ReplaceRoute(subnet, _) | Op::RemoveRoute(subnet, _) => {
            contains(subnet.network())
        }
        _ => false,
    }
}

/// Takes away the device of a VNI with every entry on it, routes into the pool's networks, the pods' bridge
/// with their cables, and the file.
pub(super) fn remove_traces(traces: Option<(u32, Pool)>, config: &Config) {
    let Some((vni, pool)) = traces else { return };
    let device = device_name(vni);
    let removed = Kernel::open()
        .map_err(KernelError::from)
        .and_then(|mut kernel| kernel.remove(&device, &pool));
    if let Err(error) = removed {
        tracing::error!(%error, "the device was not removed");
    }
    let removed = FirewallTable::open().and_then(|mut table| table.remove(&device));
    if let Err(error) = removed {
        tracing::debug!(%error, "no table of nftables removed");
    }
    if let Err(error) = UsersRule::open().remove() {
        tracing::error!(%error, "the policy rules about the VXLAN port were not removed");
    }
    if let Err(error) = PodTables::open().remove(&device) {
        tracing::debug!(%error, "no tables of nftables about pods removed");
    }
    let bridge = config.bridge_name(vni);
    let removed = Wiring::open().and_then(|mut wiring| wiring.remove(&bridge));
    if let Err(error) = removed {
        tracing::error!(%error, "the pods' bridge was not removed");
    }
    let _ = std::fs::remove_file(&config.subnet_file);
}

//! How a node begins: from what its disk remembers, or as the first of a new cluster, or as a non-member.

use std::{
    collections::{BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{
    model::{
        BootId, ClusterId, ClusterRecord, ClusterSettings, Difference, Identity, Incarnation,
        MemberRecord, NodeId, NodeName, Quorum, Run, SettingsWish, Slot, Time, Version, Vtep,
    },
    wire::{Key, Record},
};

use super::{
    Asked, Calls, Counters, Directory, Dirty, FIRST_WRITE, Home, InUse, Membership, Node, Output,
    SlotTable,
    forget::Forgetting,
    horizon::{Horizons, is_sound_epoch, is_sound_member},
    introduce::Introductions,
    join::Joining,
    lease::LeaseSearch,
    leave::Leaving,
    malformed::Notes,
    planted::{Bug, planted},
    push::PushQueue,
    sync::{Doubt, SyncRound},
    vote::Voting,
};

/// What a node is told from outside. Nothing in it is remembered; the disk has the rest.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    pub node: NodeId,
    pub boot: BootId,
    pub name: NodeName,
    /// Where peers reach this node's QUIC endpoint.
    pub address: SocketAddr,
    pub vtep: Vtep,
    pub bootstrap: Bootstrap,
    /// How many seeds there are; the shell knows their names.
    pub seeds: usize,
    /// The cluster that the join token names.
    pub cluster: Option<ClusterId>,
    /// What the operator wrote down about the cluster.
    pub wish: SettingsWish,
    /// First address of the subnet this node would like.
    pub prefer_subnet: Option<IpAddr>,
    /// First address of the subnet that this node has been given from outside (Kubernetes). It leases that
    /// one and no other, as all nodes of its cluster do; nobody grants anything, and the cluster needs no
    /// creator: its id is `cluster`, which all of them know.
    pub assigned: Option<IpAddr>,
    /// Networks that this host uses for something else. It takes no subnet in them, if it has another.
    pub occupied: Vec<IpNet>,
    /// Names are unique by construction: a down member of this node's name is its predecessor, and gone.
    pub replace_by_name: bool,
    /// By time alone nobody is forgotten otherwise.
    pub quorum: Option<Quorum>,
    /// Seed of all randomness in the node: from the OS in production, from the run's seed in simulation.
    pub rng_seed: [u8; 32],
}

/// What to do where the disk remembers no cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bootstrap {
    Create(ClusterSettings),
    Join,
}

/// Why a node cannot begin. Nothing has been written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    #[error(
        "this host is in no cluster: start the first node of a new one with --init, \
         or join one with --join HOST and its token"
    )]
    NoCluster,
    #[error(
        "the token is for cluster {token}, but this host's state belongs to cluster {state}: \
         use that cluster's token, or remove the state directory to restart"
    )]
    OtherCluster { token: ClusterId, state: ClusterId },
    #[error("{0}: the settings of a cluster cannot be changed; correct or leave out that setting")]
    Settings(Difference),
    #[error("pod_cidr: {address} is outside the cluster's network {network}: set network")]
    Assigned { address: IpAddr, network: IpNet },
    #[error(
        "this host left its cluster, and of that cluster nothing is known here any more: \
         remove the state directory to join as a new node"
    )]
    HasLeft,
}

impl Node {
    /// Begins with the records that the database holds, in any order.
    pub fn start(
        now: Time,
        config: NodeConfig,
        saved: Vec<(Key, Record)>,
    ) -> Result<Self, StartError> {
        let mut memory = Memory::new(now, config.node, &saved);
        saved.into_iter().for_each(|(_, record)| memory.recall(record));
        let starts = if planted(Bug::ForgetStarts) { 1 } else { memory.starts.saturating_add(1) };
        let mut rng = StdRng::from_seed(config.rng_seed);
        let left_to = memory.directory.get(config.node).and_then(|record| record.left_to);
        if left_to.is_some() && memory.cluster.is_none() {
            return Err(StartError::HasLeft);
        }
        let me = MemberRecord {
            node: config.node,
            version: Version { starts, change: 0 },
            boot: config.boot,
            name: config.name.clone(),
            address: config.address,
            vtep: config.vtep,
            left_to,
        };
        let home = match (memory.cluster, config.bootstrap) {
            (Some(cluster), _) => Some(resume(now, cluster, &memory.runs, &config)?),
            (None, Bootstrap::Create(settings)) => {
                Some(found(now, settings, me.node, &config, &mut rng))
            }
            (None, Bootstrap::Join) if config.seeds == 0 => return Err(StartError::NoCluster),
            (None, Bootstrap::Join) => None,
        };
        if let (Some(address), Some(home)) = (config.assigned, &home) {
            let pool = home.cluster.settings.pool;
            pool.slot_at(address)
                .ok_or(StartError::Assigned { address, network: pool.network() })?;
        }
        let created = home.is_some() && memory.cluster.is_none();
        let leaving = (home.is_some() && left_to.is_some()).then(|| Leaving::resumed(now));
        let identity = Identity { node: me.node, incarnation: Incarnation { starts, renewals: 0 } };
        let mut node = Self {
            membership: Membership::new(identity, StdRng::from_rng(&mut rng)),
            joining: Joining::new(now, config.seeds),
            sync: SyncRound::new(now, config.seeds, memory.doubt(me.node)),
            push: PushQueue::default(),
            directory: memory.directory,
            counters: Counters::default(),
            calls: Calls::default(),
            dirty: Dirty::default(),
            outputs: VecDeque::new(),
            leaving,
            forgetting: Forgetting::default(),
            clock: now,
            horizons: memory.horizons,
            notes: Notes::default(),
            introductions: Introductions::default(),
            outbid_at: None,
            voting: Voting::new(now),
            in_use: InUse::Unknown,
            asked: Asked::Nothing,
            duplicate: None,
            could_write: false,
            outranked: BTreeSet::new(),
            view_stale: true,
            moved: BTreeSet::new(),
            identity_write: FIRST_WRITE,
            lease_write: 0,
            writes: 0,
            needed_write: 0,
            home,
            me,
            config,
            rng,
        };
        node.begin(now, created);
        Ok(node)
    }

    /// The first outputs: the start itself is on disk before anything is said.
    fn begin(&mut self, now: Time, created: bool) {
        let starts = Record::Starts(self.me.version.starts).encode();
        self.writes = FIRST_WRITE;
        self.needed_write = self.writes;
        let records = vec![(Key::Starts, starts)];
        self.outputs.push_back(Output::Write { records, seq: self.writes });
        if created && let Some(home) = &self.home {
            let everything = home.slots.runs().to_vec();
            let changed: Vec<_> = everything.into_iter().map(|run| (run, None)).collect();
            self.dirty.mark(Key::Cluster, true);
            self.note_slots(&changed);
        }
        if self.home.is_some() {
            self.publish_self(now);
        }
        self.advance(now);
    }
}

/// What the records of a database add up to.
struct Memory {
    me: NodeId,
    horizons: Horizons,
    starts: u32,
    cluster: Option<ClusterRecord>,
    directory: Directory,
    runs: Vec<Run>,
}

impl Memory {
    fn new(now: Time, me: NodeId, saved: &[(Key, Record)]) -> Self {
        let cluster = saved.iter().find_map(|(_, record)| match record {
            Record::Cluster(cluster) => Some(*cluster),
            _ => None,
        });
        let (directory, runs) = (Directory::default(), Vec::new());
        Self { me, horizons: Horizons::new(now), starts: 0, cluster, directory, runs }
    }

    /// Leaves out what an earlier release took and this one refuses.
    fn recall(&mut self, record: Record) {
        match record {
            Record::Starts(starts) => self.starts = starts,
            Record::Cluster(_) => {}
            Record::Slots(runs) => {
                let sound = runs.iter().filter(|run| is_sound_epoch(run.record.epoch));
                for run in sound {
                    self.horizons.begin_with_run(run);
                    self.runs.push(*run);
                }
            }
            Record::Member(record) if is_sound_member(&record, self.me, self.cluster.as_ref()) => {
                self.horizons.begin_with_member(&record);
                self.directory.merge(&record);
            }
            Record::Member(record) => {
                tracing::warn!(node = %record.node, "a saved record that no node can use is left out");
            }
            Record::Forget(forget) => {
                self.horizons.begin_with_forget(&forget);
                self.directory.merge_forget(&forget);
            }
            // Of this host alone, and the shell's.
            Record::Pod(_) => {}
        }
    }
}

impl Memory {
    /// Who could know of something that this memory lacks: any member that owned slots by it, or else all
    /// there are.
    fn doubt(&self, me: NodeId) -> Doubt {
        let owners: BTreeSet<_> = self.runs.iter().map(|run| run.record.owner).collect();
        let members: BTreeSet<_> = self.directory.peers(me).map(|record| record.node).collect();
        let witnesses = &members & &owners;
        match (witnesses.is_empty(), members.is_empty()) {
            (false, _) => Doubt::AnyOf(witnesses),
            (true, false) => Doubt::AllOf(members),
            (true, true) => Doubt::None,
        }
    }
}

fn resume(
    now: Time,
    cluster: ClusterRecord,
    runs: &[Run],
    config: &NodeConfig,
) -> Result<Home, StartError> {
    if let Some(token) = config.cluster.filter(|token| *token != cluster.id) {
        return Err(StartError::OtherCluster { token, state: cluster.id });
    }
    if let Some(difference) = config.wish.difference(&cluster.settings) {
        return Err(StartError::Settings(difference));
    }
    let mut slots = SlotTable::empty(cluster.settings.pool);
    slots.merge(runs);
    let search = LeaseSearch::new(now, &cluster, config);
    Ok(Home { cluster, slots, search })
}

fn found(
    now: Time,
    settings: ClusterSettings,
    creator: NodeId,
    config: &NodeConfig,
    rng: &mut StdRng,
) -> Home {
    let id = ClusterId::from_bytes(rng.random());
    if config.assigned.is_some() {
        let cluster = ClusterRecord { id: config.cluster.unwrap_or(id), settings };
        let search = LeaseSearch::new(now, &cluster, config);
        return Home { cluster, slots: SlotTable::empty(settings.pool), search };
    }
    let cluster = ClusterRecord { id, settings };
    let mut slots = SlotTable::created_by(settings.pool, creator);
    let search = LeaseSearch::new(now, &cluster, config);
    search.lease_own(&mut slots, creator);
    Home { cluster, slots, search }
}

pub(super) fn preferred(cluster: &ClusterRecord, config: &NodeConfig) -> Option<Slot> {
    config
        .assigned
        .or(config.prefer_subnet)
        .and_then(|address| cluster.settings.pool.slot_at(address))
}

//! Starts a node: from saved records, as the creator of a cluster, or as a non-member.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{
    model::{
        ClusterId, ClusterRecord, ClusterSettings, Difference, Identity, Incarnation, MemberRecord,
        NodeId, Run, Time, Version,
    },
    wire::{Key, Record},
};

use super::{
    Bootstrap, ClusterState, Counters, Membership, Node, NodeConfig, RunningHosts, SlotTable,
    acknowledgements::Forgetting,
    comparisons::{NeededWitnesses, SyncRound},
    directory::Directory,
    horizon::{Horizons, is_sound_epoch, is_sound_member},
    introduce::Introductions,
    join::Joining,
    key_use::KeyUse,
    lease::LeaseSearch,
    leave::Leaving,
    lifecycle::Lifecycle,
    log_budget::LogBudget,
    lookup::Successions,
    malformed::Notes,
    outbox::Outbox,
    push::PushQueue,
    replica::Replica,
    vote::Voting,
};

/// The reason for which a node cannot start. Nothing has been written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// No cluster is saved and there are no seeds.
    #[error(
        "this host is in no cluster: create one with `gossamer init`, or join one with `gossamer join TOKEN` \
         (as flags of the agent: --init, or --join HOST and a token)"
    )]
    NoCluster,
    /// The token and the saved records name different clusters.
    #[error(
        "the token is for cluster {token}, but this host's state belongs to cluster {state}: \
         use that cluster's token, or, to move this host, run `gossamer cleanup` first"
    )]
    OtherCluster {
        /// The cluster id in the token.
        token: ClusterId,
        /// The saved cluster id.
        state: ClusterId,
    },
    /// The configured settings differ from those of the saved cluster.
    #[error("{0}: the settings of a cluster cannot be changed; correct or leave out that setting")]
    Settings(Difference),
    /// The assigned subnet is outside the cluster's network.
    #[error("pod_cidr: {address} is outside the cluster's network {network}: set network")]
    Assigned {
        /// The assigned address.
        address: IpAddr,
        /// The cluster's network.
        network: IpNet,
    },
    /// The node has left, and the record of its cluster is missing.
    #[error(
        "this host has left its cluster, and its state directory holds no record of that cluster: \
         remove the state directory to join as a new node"
    )]
    HasLeft,
}

impl Node {
    /// Starts a node from the saved records, which may come in any order.
    ///
    /// # Errors
    /// Fails if the configuration and the saved records contradict each other, or if there is neither a saved
    /// cluster nor a way into one.
    pub fn start(
        now: Time,
        config: NodeConfig,
        saved: Vec<(Key, Record)>,
    ) -> Result<Self, StartError> {
        let mut memory = Memory::new(now, config.node, &saved);
        saved.into_iter().for_each(|(_, record)| memory.recall(record));
        let starts = memory.starts.saturating_add(1);
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
        let cluster_state = match (memory.cluster, config.bootstrap) {
            (Some(cluster), _) => Some(resume(now, cluster, &memory.runs, &config)?),
            (None, Bootstrap::Create(settings)) => {
                Some(found(now, settings, me.node, &config, &mut rng))
            }
            (None, Bootstrap::Join) if config.seeds == 0 => return Err(StartError::NoCluster),
            (None, Bootstrap::Join) => None,
        };
        if let (Some(address), Some((cluster_state, _))) = (config.assigned, &cluster_state) {
            let pool = cluster_state.cluster.settings.pool;
            pool.slot_at(address)
                .ok_or(StartError::Assigned { address, network: pool.network() })?;
        }
        let (cluster_state, search) = cluster_state.unzip();
        let created = cluster_state.is_some() && memory.cluster.is_none();
        let leaving = (cluster_state.is_some() && left_to.is_some()).then(|| Leaving::resumed(now));
        let identity = Identity { node: me.node, incarnation: Incarnation { starts, renewals: 0 } };
        let mut node = Self {
            membership: Membership::new(identity, StdRng::from_rng(&mut rng)),
            lifecycle: Lifecycle::new(Joining::new(now, config.seeds), search, leaving),
            key_use: KeyUse::default(),
            replica: Replica {
                sync: SyncRound::new(now, config.seeds, memory.needed_witnesses(me.node)),
                push: PushQueue::default(),
                directory: memory.directory,
                forgetting: Forgetting::default(),
                horizons: memory.horizons,
                reassigned: BTreeSet::new(),
                cluster_state,
                me,
            },
            counters: Counters::default(),
            outbox: Outbox::new(starts),
            clock: now,
            notes: Notes::default(),
            introductions: Introductions::default(),
            last_roots: None,
            voting: Voting::new(now),
            running_hosts: RunningHosts::default(),
            log_budget: LogBudget::new(now),
            refusal_log_budget: LogBudget::new(now),
            successions: Successions::default(),
            may_write_before: false,
            config,
            rng,
        };
        node.begin(now, created);
        Ok(node)
    }

    /// Queues the first outputs.
    fn begin(&mut self, now: Time, created: bool) {
        if created && let Some(cluster_state) = &self.replica.cluster_state {
            tracing::info!(cluster = %cluster_state.cluster.id, "cluster created");
            let everything = cluster_state.slots.runs().to_vec();
            let changed: Vec<_> = everything.into_iter().map(|run| (run, None)).collect();
            self.outbox.mark_urgent(Key::Cluster);
            self.replica.note_slots(&mut self.outbox, &changed);
        }
        if self.replica.cluster_state.is_some() {
            self.replica.publish_self(&mut self.outbox, now);
        }
        self.advance(now);
    }
}

/// The state that the saved records describe.
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

    /// Adds a saved record. Leaves out records that an earlier release accepted and this one refuses.
    fn recall(&mut self, record: Record) {
        match record {
            Record::Starts(starts) => self.starts = starts,
            Record::Cluster(_) => {}
            Record::Slots(runs) => {
                let sound = runs.iter().filter(|run| is_sound_epoch(run.record.epoch));
                for run in sound {
                    self.horizons.include_run(run);
                    self.runs.push(*run);
                }
            }
            Record::Member(record) if is_sound_member(&record, self.me, self.cluster.as_ref()) => {
                self.horizons.include_member(&record);
                self.directory.merge(&record);
            }
            Record::Member(record) => {
                tracing::warn!(node = %record.node, "saved member record is invalid, ignored");
            }
            Record::Forget(forget) => {
                self.horizons.include_forget(&forget);
                self.directory.merge_forget(&forget);
            }
            // Pod records belong to the agent.
            Record::Pod(_) => {}
        }
    }
}

impl Memory {
    /// Returns which peers must confirm this memory, because they may know records that it lacks: any one
    /// member that owned slots, or all members if none of them did.
    fn needed_witnesses(&self, me: NodeId) -> NeededWitnesses {
        let owners: BTreeSet<_> = self.runs.iter().map(|run| run.record.owner).collect();
        let members: BTreeSet<_> = self.directory.peers(me).map(|record| record.node).collect();
        let witnesses = &members & &owners;
        match (witnesses.is_empty(), members.is_empty()) {
            (false, _) => NeededWitnesses::AnyOf(witnesses),
            (true, false) => NeededWitnesses::AllOf(members),
            (true, true) => NeededWitnesses::None,
        }
    }
}

fn resume(
    now: Time,
    cluster: ClusterRecord,
    runs: &[Run],
    config: &NodeConfig,
) -> Result<(ClusterState, LeaseSearch), StartError> {
    if let Some(token) = config.cluster.filter(|token| *token != cluster.id) {
        return Err(StartError::OtherCluster { token, state: cluster.id });
    }
    if let Some(difference) = config.wish.difference(&cluster.settings) {
        return Err(StartError::Settings(difference));
    }
    let mut slots = SlotTable::empty(cluster.settings.pool);
    slots.merge(runs);
    let search = LeaseSearch::new(now, &cluster, config);
    Ok((ClusterState { cluster, slots }, search))
}

fn found(
    now: Time,
    settings: ClusterSettings,
    creator: NodeId,
    config: &NodeConfig,
    rng: &mut StdRng,
) -> (ClusterState, LeaseSearch) {
    let id = ClusterId::from_bytes(rng.random());
    if config.assigned.is_some() {
        let cluster = ClusterRecord { id: config.cluster.unwrap_or(id), settings };
        let search = LeaseSearch::new(now, &cluster, config);
        return (ClusterState { cluster, slots: SlotTable::empty(settings.pool) }, search);
    }
    let cluster = ClusterRecord { id, settings };
    let mut slots = SlotTable::created_by(settings.pool, creator);
    let search = LeaseSearch::new(now, &cluster, config);
    search.lease_own(&mut slots, creator);
    (ClusterState { cluster, slots }, search)
}

//! Status of a node and its view of the cluster, for operators and tests. No decision depends on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use crate::model::{
    ClusterId, ClusterSettings, Mac, MemberRecord, NodeId, NodeName, Problem, ProblemCode, Run,
    Slot, SlotState,
};
use ipnet::IpNet;

use super::{Counters, Liveness, Node, Reclaiming};

/// The phase of a node's membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waiting to start: for a network to join over, or for Kubernetes to assign a subnet.
    Waiting,
    /// Searching for a member that admits it.
    Joining,
    /// In the cluster, searching for a subnet.
    Leaseless,
    /// In the cluster with a subnet.
    Member,
    /// Handing over its slots.
    Leaving,
}

/// The status of a node.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    /// This node's id.
    pub node: NodeId,
    /// This node's name.
    pub name: NodeName,
    /// The phase of its membership.
    pub phase: Phase,
    /// The id of its cluster.
    pub cluster: Option<ClusterId>,
    /// The settings of its cluster.
    pub settings: Option<ClusterSettings>,
    /// Its subnet.
    pub subnet: Option<IpNet>,
    /// Its IPv6 subnet in a dual-stack overlay.
    pub subnet6: Option<IpNet>,
    /// Numbers of slots.
    pub slots: SlotCounts,
    /// Whether the last comparison found no difference, or there is no member to compare with.
    pub settled: bool,
    /// Whether memory is verified, or there is no other member.
    pub synced: bool,
    /// All known members, also those that left or were forgotten, by name.
    pub members: Vec<MemberStatus>,
    /// Free subnets, as ranges.
    pub free_slots: Vec<FreeRange>,
    /// Forgotten nodes whose subnets are not reclaimed yet.
    pub reclaiming: Vec<Reclaiming>,
    /// Problems and what to do about them.
    pub problems: Vec<Problem>,
    /// Counts since the start.
    pub counters: Counters,
}

/// Numbers of slots in the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// Slots of the pool.
    pub total: u32,
    /// Leased slots.
    pub leased: u32,
    /// Free slots.
    pub free: u32,
    /// Free slots of this node.
    pub own_free: u32,
}

/// Consecutive free subnets of one owner.
#[derive(Clone, Debug)]
pub struct FreeRange {
    /// The first subnet.
    pub first: IpNet,
    /// The last subnet.
    pub last: IpNet,
    /// Number of subnets.
    pub count: u32,
    /// The owner.
    pub node: NodeId,
    /// The owner's name, or "?".
    pub name: String,
    /// The owner's liveness, as in [`MemberStatus`].
    pub liveness: Option<Liveness>,
}

/// The status of a member.
#[derive(Clone, Debug)]
pub struct MemberStatus {
    /// The member's id.
    pub node: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Name that is unique among the present members: its name, or its name and the beginning of its id.
    pub label: String,
    /// Whether it is an earlier identity of a living member with its name and address.
    pub former_self: bool,
    /// Whether it is this node.
    pub me: bool,
    /// Its liveness; `None` if gossip does not know it: not seen since the start, or down for a day.
    pub liveness: Option<Liveness>,
    /// Whether it left.
    pub left: bool,
    /// Whether it was forgotten.
    pub forgotten: bool,
    /// Whether kernel entries of its slots stay until this node has compared its state with it.
    pub awaited: bool,
    /// The address of its QUIC endpoint.
    pub address: SocketAddr,
    /// The underlay address of its VTEP.
    pub underlay: IpAddr,
    /// The MAC of its VTEP.
    pub vtep_mac: Mac,
    /// The subnets that it leases.
    pub subnets: Vec<IpNet>,
    /// Number of free slots that it owns.
    pub free: u32,
}

impl NodeStatus {
    /// Returns the status of a node that cannot start yet; `problem` says what it waits for.
    pub fn waiting(node: NodeId, name: NodeName, problem: Problem) -> Self {
        Self {
            node,
            name,
            phase: Phase::Waiting,
            cluster: None,
            settings: None,
            subnet: None,
            subnet6: None,
            slots: SlotCounts::default(),
            settled: false,
            synced: false,
            members: Vec::new(),
            free_slots: Vec::new(),
            reclaiming: Vec::new(),
            problems: vec![problem],
            counters: Counters::default(),
        }
    }
}

impl Node {
    /// Returns whether gossip considers a member alive or suspect.
    pub fn is_active(&self, node: NodeId) -> bool {
        self.membership.is_active(node)
    }

    /// Returns whether gossip considers any other member alive or suspect.
    pub fn has_active_peer(&self) -> bool {
        !self.membership.identities().is_empty()
    }

    /// Returns the liveness of all members that gossip knows, without this node.
    pub fn opinions(&self) -> BTreeMap<NodeId, Liveness> {
        self.membership.opinions()
    }

    /// Returns a hash that differs whenever a member's identity or liveness has changed.
    pub fn opinions_hash(&self) -> u64 {
        self.membership.opinions_hash()
    }

    /// Returns the node's status.
    pub fn status(&self) -> NodeStatus {
        let me = self.replica.me.node;
        let pool = self
            .replica
            .cluster_state
            .as_ref()
            .map(|cluster_state| cluster_state.cluster.settings.pool);
        let subnets = self.lifecycle.own_subnets(&self.replica);
        let census = self
            .replica
            .cluster_state
            .as_ref()
            .map(|cluster_state| cluster_state.slots.census())
            .unwrap_or_default();
        NodeStatus {
            node: me,
            name: self.replica.me.name.clone(),
            phase: self.phase(),
            cluster: self.replica.cluster_id(),
            settings: self
                .replica
                .cluster_state
                .as_ref()
                .map(|cluster_state| cluster_state.cluster.settings),
            subnet: subnets.map(|subnets| subnets.first),
            subnet6: subnets.and_then(|subnets| subnets.second),
            slots: SlotCounts {
                total: pool.map_or(0, |pool| pool.slot_count()),
                leased: census.leased,
                free: census.free.values().sum(),
                own_free: census.free.get(&me).copied().unwrap_or(0),
            },
            settled: self.is_settled(),
            synced: self.is_alone() || self.replica.sync.synced(),
            members: self.member_statuses(),
            free_slots: self.free_slots(),
            reclaiming: self.reclaiming(),
            problems: self.problems(),
            counters: self.counters,
        }
    }

    /// Returns the phase of the node's membership.
    pub fn phase(&self) -> Phase {
        self.lifecycle.phase(&self.replica)
    }

    /// Returns whether the last comparison found no difference or there is no member to compare with: the
    /// cluster has no other member, or all of them went down after this node was settled once.
    pub fn is_settled(&self) -> bool {
        let has_lost_all = self.replica.sync.settled_once() && !self.has_active_peer();
        self.is_alone() || self.replica.sync.settled() || has_lost_all
    }

    fn member_statuses(&self) -> Vec<MemberStatus> {
        let labels = self.labels();
        let opinions = self.membership.opinions();
        let awaited = self.replica.awaited_owners();
        let cluster_state = self.replica.cluster_state.as_ref();
        let pool = cluster_state.map(|cluster_state| cluster_state.cluster.settings.pool);
        // Members and runs are many, so the runs are read once.
        let mut owned: BTreeMap<NodeId, Vec<&Run>> = BTreeMap::new();
        for run in cluster_state.iter().flat_map(|cluster_state| cluster_state.slots.runs()) {
            owned.entry(run.record.owner).or_default().push(run);
        }
        let member = |record: &MemberRecord| {
            let is_me = record.node == self.replica.me.node;
            let runs = owned.get(&record.node).into_iter().flatten().copied();
            let (leased, free): (Vec<&Run>, Vec<&Run>) =
                runs.partition(|run| run.record.state == SlotState::Leased);
            let subnets = leased.into_iter().flat_map(Run::slots);
            MemberStatus {
                node: record.node,
                name: record.name.clone(),
                label: labels.of(record.node),
                former_self: labels.is_former_self(record.node),
                me: is_me,
                liveness: if is_me {
                    Some(Liveness::Alive)
                } else {
                    opinions.get(&record.node).copied()
                },
                left: record.has_left(),
                forgotten: self.replica.directory.forgotten(record.node).is_some(),
                awaited: awaited.contains(&record.node),
                address: record.address,
                underlay: record.vtep.underlay,
                vtep_mac: record.vtep.mac,
                subnets: pool
                    .map(|pool| subnets.flat_map(|slot| pool.subnets(slot).iter()).collect())
                    .unwrap_or_default(),
                free: free.iter().map(|run| run.len).sum(),
            }
        };
        let mut members: Vec<_> = self.replica.directory.iter().map(member).collect();
        members.sort_by(|a, b| (&a.name, a.node).cmp(&(&b.name, b.node)));
        members
    }

    fn free_slots(&self) -> Vec<FreeRange> {
        let Some(cluster_state) = &self.replica.cluster_state else { return Vec::new() };
        let pool = cluster_state.cluster.settings.pool;
        let opinions = self.membership.opinions();
        let liveness = |node: NodeId| match node == self.replica.me.node {
            true => Some(Liveness::Alive),
            false => opinions.get(&node).copied(),
        };
        let free_slots =
            cluster_state.slots.runs().iter().filter(|run| run.record.state == SlotState::Free);
        free_slots
            .map(|run| FreeRange {
                first: pool.subnet(run.start),
                last: pool.subnet(Slot(run.end().saturating_sub(1))),
                count: run.len,
                node: run.record.owner,
                name: self.name_of(run.record.owner).to_owned(),
                liveness: liveness(run.record.owner),
            })
            .collect()
    }

    /// Returns a problem if all free slots belong to members that do not answer.
    fn stranded(&self) -> Option<Problem> {
        let free_slots = self.free_slots();
        let count = |alive: bool| -> u32 {
            let reachable = |free: &&FreeRange| (free.liveness == Some(Liveness::Alive)) == alive;
            free_slots.iter().filter(reachable).map(|free| free.count).sum()
        };
        let (reachable, stranded) = (count(true), count(false));
        if reachable > 0 || stranded == 0 {
            return None;
        }
        let labels = self.labels();
        let away: BTreeSet<String> = free_slots.iter().map(|free| labels.of(free.node)).collect();
        let names = away.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let example = away.first().map_or("", String::as_str);
        Some(Problem::new(
            ProblemCode::NoSubnet,
            Problem::HOST,
            format!(
                "no reachable member has a free subnet, but members that do not answer own {stranded} free \
                 ones ({names})"
            ),
            format!(
                "restart one of them, or if it is lost for good, run `gossamer forget {example}`"
            ),
        ))
    }

    /// Returns the present problems and what to do about them.
    #[expect(clippy::too_many_lines, reason = "one block for each problem")]
    pub fn problems(&self) -> Vec<Problem> {
        let phase = self.phase();
        let mut problems = Vec::new();
        if let (Phase::Leaseless, Some(search)) = (phase, &self.lifecycle.search) {
            problems.extend(search.refusal.iter().map(|refusal| {
                let what = format!("no subnet yet: {refusal}");
                Problem::new(ProblemCode::NoSubnet, "refusal", what, "")
            }));
            if search.rival.is_none() {
                problems.extend(self.stranded());
            }
        }
        if let Some((cluster_state, rival)) = self
            .replica
            .cluster_state
            .as_ref()
            .zip(self.lifecycle.search.as_ref().and_then(|search| search.rival))
        {
            let subnet = self.config.assigned.and_then(|address| {
                let pool = cluster_state.cluster.settings.pool;
                Some(pool.subnet(pool.slot_at(address)?))
            });
            let subnet = subnet.map_or_else(String::new, |subnet| subnet.to_string());
            let rival = self.label(rival);
            problems.push(Problem::new(
                ProblemCode::SubnetAssignedTwice,
                rival.as_str(),
                format!("{subnet} was assigned to this node and to {rival}, which uses it"),
                "assign another one to one of the two (in Kubernetes: delete the Node object of one, and \
                 restart its kubelet)",
            ));
        }
        if let Some(duplicate) = self.key_use.duplicate() {
            problems.push(Problem::new(
                ProblemCode::DuplicateIdentity,
                duplicate,
                format!(
                    "this node's key is in use twice, at {} and at {}: its state directory was copied",
                    self.replica.me.address, duplicate
                ),
                "run `gossamer reset-identity` on one of the two; until then, neither grants subnets",
            ));
        }
        if self.counters.rollbacks > 0 {
            problems.push(Problem::new(
                ProblemCode::RolledBack,
                Problem::HOST,
                format!(
                    "peers hold {} records that this node wrote and no longer has: its state directory \
                     was rolled back to an older copy{}",
                    self.counters.rollbacks,
                    if self.may_write() {
                        "; it has compared its state with all members since and is up to date"
                    } else {
                        "; it grants nothing until it has compared with all members"
                    }
                ),
                if self.may_write() {
                    "no action is needed"
                } else {
                    "start the members that are down, or run `gossamer forget` for those that are gone"
                },
            ));
        }
        if self.counters.ownership_conflicts > 0 && self.config.assigned.is_none() {
            problems.push(Problem::new(
                ProblemCode::OwnershipConflict,
                Problem::HOST,
                format!(
                    "{} subnets have two different records of one epoch: a state directory was copied or \
                     rolled back, or a member is faulty",
                    self.counters.ownership_conflicts
                ),
                "run `gossamer doctor` on all members, and `gossamer reset-identity` on a host with a copied \
                 state directory",
            ));
        }
        if self.counters.forged > 0 {
            problems.push(Problem::new(
                ProblemCode::ForgedRecords,
                Problem::HOST,
                format!(
                    "{} records of this node were received that it never wrote: a member is faulty or lies; \
                     this node has published newer ones",
                    self.counters.forged
                ),
                "run `gossamer doctor` on all members, and `gossamer reset-identity` on a host with a copied \
                 state directory; if the number grows, remove the faulty member (docs/SECURITY.md)",
            ));
        }
        problems.extend(self.refused_problems());
        let irreconcilable = self.replica.sync.partners.irreconcilable();
        // Two processes with one key change its record in turn, which is reported above.
        let irreconcilable =
            irreconcilable.filter(|node| !self.replica.is_gone(*node) && self.key_use.is_unique());
        problems.extend(irreconcilable.map(|node| {
            let name = self.label(node);
            let what = format!(
                "{name} ({node}): its state still differs after several comparisons; other nodes are not \
                 affected"
            );
            let fix = format!(
                "restart the agent of {name} if it lasts for minutes; if it remains, report it with the logs \
                 of both agents"
            );
            Problem::new(ProblemCode::StateDiffers, name, what, fix)
        }));
        problems.extend(self.vote_problems());
        problems
    }
}

//! What a node can say about itself and the cluster: a picture for people and tests, never for decisions.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use serde::Serialize;

use crate::model::{
    ClusterId, ClusterSettings, Mac, MemberRecord, NodeId, NodeName, Run, Slot, SlotState,
};

use super::{Counters, Liveness, Node, Reclaiming};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It waits for a network over which it could join, or for Kubernetes to say which subnet it has.
    Waiting,
    /// Looking for a member that lets it in.
    Joining,
    /// In the cluster, and looking for a subnet.
    Leaseless,
    /// In the cluster with a subnet.
    Member,
    /// Handing over.
    Leaving,
}

#[derive(Clone, Debug, Serialize)]
pub struct NodeStatus {
    pub node: NodeId,
    pub name: NodeName,
    pub phase: Phase,
    pub cluster: Option<ClusterId>,
    pub settings: Option<ClusterSettings>,
    pub subnet: Option<IpNet>,
    /// In a dual-stack overlay the IPv6 subnet beside it.
    pub subnet6: Option<IpNet>,
    pub slots: SlotCounts,
    /// The last comparison with a peer found no difference (or there is no peer).
    pub settled: bool,
    /// A comparison with a peer has succeeded since the start (or there is no peer).
    pub synced: bool,
    pub members: Vec<MemberStatus>,
    /// Free subnets, as ranges.
    pub free_slots: Vec<FreeRange>,
    /// Forgotten nodes whose subnets are not back in the pool yet.
    pub reclaiming: Vec<Reclaiming>,
    /// What stands in the way, as sentences.
    pub problems: Vec<String>,
    pub counters: Counters,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SlotCounts {
    pub total: u32,
    pub leased: u32,
    pub free: u32,
    pub own_free: u32,
}

/// Free subnets in a row, of one owner.
#[derive(Clone, Debug, Serialize)]
pub struct FreeRange {
    pub first: IpNet,
    pub last: IpNet,
    pub count: u32,
    pub node: NodeId,
    pub name: String,
    pub liveness: Option<Liveness>,
}

#[derive(Clone, Debug, Serialize)]
pub struct MemberStatus {
    pub node: NodeId,
    pub name: NodeName,
    pub me: bool,
    /// None: gossip knows nothing of it (any more): not met since the start, or down for a day.
    pub liveness: Option<Liveness>,
    pub left: bool,
    pub forgotten: bool,
    /// It was compared with since the start of this agent: what is known of its slots is its own word.
    pub heard: bool,
    pub address: SocketAddr,
    pub underlay: IpAddr,
    pub vtep_mac: Mac,
    pub subnets: Vec<IpNet>,
    pub free: u32,
}

impl NodeStatus {
    /// The status of a node that cannot begin yet, and what it waits for.
    pub fn waiting(node: NodeId, name: NodeName, problem: String) -> Self {
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
    /// Whether gossip holds a member as alive or suspect.
    pub fn is_active(&self, node: NodeId) -> bool {
        self.membership.is_active(node)
    }

    /// Whether gossip holds any other member as alive or suspect.
    pub fn has_company(&self) -> bool {
        self.membership.others().next().is_some()
    }

    /// Gossip's opinion on everybody it has heard of.
    pub fn opinions(&self) -> BTreeMap<NodeId, Liveness> {
        self.membership.opinions()
    }

    /// Another one whenever an opinion has changed.
    pub fn opinions_hash(&self) -> u64 {
        self.membership.opinions_hash()
    }

    pub fn status(&self) -> NodeStatus {
        let me = self.me.node;
        let pool = self.home.as_ref().map(|home| home.cluster.settings.pool);
        let subnets = self.own_subnets();
        let census = self.home.as_ref().map(|home| home.slots.census()).unwrap_or_default();
        NodeStatus {
            node: me,
            name: self.me.name.clone(),
            phase: self.phase(),
            cluster: self.cluster_id(),
            settings: self.home.as_ref().map(|home| home.cluster.settings),
            subnet: subnets.map(|subnets| subnets.first),
            subnet6: subnets.and_then(|subnets| subnets.second),
            slots: SlotCounts {
                total: pool.map_or(0, |pool| pool.slot_count()),
                leased: census.leased,
                free: census.free.values().sum(),
                own_free: census.free.get(&me).copied().unwrap_or(0),
            },
            settled: self.is_settled(),
            synced: self.is_alone() || self.sync.synced(),
            members: self.member_statuses(),
            free_slots: self.free_slots(),
            reclaiming: self.reclaiming(),
            problems: self.problems(),
            counters: self.counters,
        }
    }

    pub fn phase(&self) -> Phase {
        match (&self.home, &self.leaving, self.own_subnets()) {
            (_, Some(_), _) => Phase::Leaving,
            (None, _, _) => Phase::Joining,
            (_, _, None) => Phase::Leaseless,
            _ => Phase::Member,
        }
    }

    /// Whether the last comparison with a peer found no difference, or there is no peer to compare with: the
    /// cluster has no other member, or all of them went down after this node had settled once.
    pub fn is_settled(&self) -> bool {
        let has_lost_all = self.sync.settled_once() && !self.has_company();
        self.is_alone() || self.sync.settled() || has_lost_all
    }

    fn member_statuses(&self) -> Vec<MemberStatus> {
        let opinions = self.membership.opinions();
        let slots = self.home.as_ref().map(|home| (home, home.cluster.settings.pool));
        let member = |record: &MemberRecord| {
            let is_me = record.node == self.me.node;
            let runs = slots.iter().flat_map(|(home, _)| home.slots.runs_of(record.node));
            let (leased, free): (Vec<_>, Vec<_>) =
                runs.partition(|run| run.record.state == SlotState::Leased);
            let subnets = leased.into_iter().flat_map(|run: &Run| run.slots());
            MemberStatus {
                node: record.node,
                name: record.name.clone(),
                me: is_me,
                liveness: if is_me {
                    Some(Liveness::Alive)
                } else {
                    opinions.get(&record.node).copied()
                },
                left: record.has_left(),
                forgotten: self.directory.forgotten(record.node).is_some(),
                heard: is_me || self.sync.heard(record.node),
                address: record.address,
                underlay: record.vtep.underlay,
                vtep_mac: record.vtep.mac,
                subnets: slots
                    .map(|(_, pool)| subnets.flat_map(|slot| pool.subnets(slot).iter()).collect())
                    .unwrap_or_default(),
                free: free.iter().map(|run| run.len).sum(),
            }
        };
        let mut members: Vec<_> = self.directory.iter().map(member).collect();
        members.sort_by(|a, b| (&a.name, a.node).cmp(&(&b.name, b.node)));
        members
    }

    fn free_slots(&self) -> Vec<FreeRange> {
        let Some(home) = &self.home else { return Vec::new() };
        let pool = home.cluster.settings.pool;
        let opinions = self.membership.opinions();
        let liveness = |node: NodeId| match node == self.me.node {
            true => Some(Liveness::Alive),
            false => opinions.get(&node).copied(),
        };
        let free_slots = home.slots.runs().iter().filter(|run| run.record.state == SlotState::Free);
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

    /// Who has free slots that this node cannot have, and what helps.
    fn stranded(&self) -> Option<String> {
        let free_slots = self.free_slots();
        let count = |alive: bool| -> u32 {
            let reachable = |free: &&FreeRange| (free.liveness == Some(Liveness::Alive)) == alive;
            free_slots.iter().filter(reachable).map(|free| free.count).sum()
        };
        let (reachable, stranded) = (count(true), count(false));
        if reachable > 0 || stranded == 0 {
            return None;
        }
        let away: BTreeSet<&str> = free_slots.iter().map(|free| free.name.as_str()).collect();
        let names = away.iter().copied().collect::<Vec<_>>().join(", ");
        let example = away.first().copied().unwrap_or_default();
        Some(format!(
            "no reachable member has a free subnet, and {stranded} are free at members that do not answer \
             ({names}): bring one back, or if it is gone for good, run `gossamer forget {example}`"
        ))
    }

    /// What stands in the way, as sentences.
    pub fn problems(&self) -> Vec<String> {
        let phase = self.phase();
        let mut problems = Vec::new();
        if phase == Phase::Joining {
            // Which address its own is, the shell knows and tells.
            let words = self.joining.words().filter(|(_, word)| !word.is_own());
            problems.extend(words.map(|(seed, word)| format!("seed {}: {word}", seed + 1)));
        }
        if let (Phase::Leaseless, Some(home)) = (phase, &self.home) {
            problems.extend(home.search.refusal.iter().map(|r| format!("no subnet yet: {r}")));
            if home.search.rival.is_none() {
                problems.extend(self.stranded());
            }
        }
        if let Some((home, rival)) = self.home.as_ref().and_then(|h| Some((h, h.search.rival?))) {
            let subnet = self.config.assigned.and_then(|address| {
                let pool = home.cluster.settings.pool;
                Some(pool.subnet(pool.slot_at(address)?))
            });
            problems.push(format!(
                "{} was given to this node and to {}, which uses it: give one of the two another (in \
                 Kubernetes: delete the Node object of one, and restart its kubelet)",
                subnet.map_or_else(String::new, |subnet| subnet.to_string()),
                self.name_of(rival)
            ));
        }
        if let Some(duplicate) = &self.duplicate {
            problems.push(format!(
                "this node's key is in use twice, at {} and at {}: its state directory was copied. Neither \
                 grants subnets until you run `gossamer reset-identity` on one of the two",
                self.me.address, duplicate.address
            ));
        }
        if self.counters.rollbacks > 0 {
            problems.push(format!(
                "peers hold {} records that this node wrote and does not remember: its state directory \
                 was rolled back to an older copy{}",
                self.counters.rollbacks,
                if self.may_write() {
                    "; all members were asked since, and it has caught up"
                } else {
                    "; it grants nothing until it has compared with all members"
                }
            ));
        }
        if self.counters.ownership_conflicts > 0 && self.config.assigned.is_none() {
            problems.push(format!(
                "{} slots had two owners at one epoch: a state directory was copied or rolled back",
                self.counters.ownership_conflicts
            ));
        }
        if self.counters.forged > 0 {
            problems.push(format!(
                "{} records of this node were told that it never wrote: a member errs or lies; this \
                 node went above them",
                self.counters.forged
            ));
        }
        problems.extend(self.refused_problems());
        problems.extend(self.sync.partners.odd().filter(|node| !self.is_gone(*node)).map(|node| {
            format!(
                "{} ({node}): its state differs however often it is compared; this stops no other node",
                self.name_of(node)
            )
        }));
        problems.extend(self.vote_problems());
        problems
    }
}

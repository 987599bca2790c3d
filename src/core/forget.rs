//! Reclaims the slots of a node that is lost for good.
//!
//! A member declares a node gone and becomes its successor. This forget record spreads like any fact, and
//! members ignore the forgotten node from then on. The node may have granted slots to nodes that the
//! successor does not know. So the successor asks every member for an acknowledgement: the member makes the
//! forget record durable and responds with all facts that the successor lacks. Members that the successor
//! learns of this way have to acknowledge as well. Once all have acknowledged, the successor knows every
//! grant, and it alone reclaims the remaining slots. A node that left counts as gone without a forget record.
//!
//! Liveness has one use: an operator may forget a node that appears alive only with `--force`. The same
//! holds for a node whose kernel answers the agent's probes.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    model::{Forget, MemberRecord, NodeId, Run, Slot, Time},
    wire::{Facts, Key, Request, Response},
};

use super::{
    Answer, Liveness, Node, Purpose, RunningHosts, Stop, acknowledgements::Forgetting,
    outbox::Outbox, rank::peer_score, replica::Replica,
};

/// Pause before missing acknowledgements are requested again.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Least time between two steps that reclaim slots.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(250);
/// Limit of unanswered acknowledgement requests.
const MAX_PENDING: usize = 16;
/// Limit of nodes that one step reclaims from, or declares gone.
pub(super) const MAX_PER_STEP: usize = 64;
/// Limit of forgotten nodes whose progress is listed.
const MAX_LISTED: usize = 100;
/// Limit of members named that have not acknowledged one forget record.
const MAX_NAMED: usize = 20;

/// The reason for which a node is not forgotten.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotForget {
    /// No member has this name or id.
    #[error(
        "no member is called {0}: `gossamer members` lists them; name, id, beginning of the id and address \
         are accepted"
    )]
    Unknown(String),
    /// Several members match: their number, what was asked for, and their labels.
    #[error("{0} members match {1}: use one of {2}")]
    Ambiguous(usize, String, String),
    /// The member is this node.
    #[error("a node cannot forget itself: use `gossamer leave`")]
    Myself,
    /// The member is not held as down.
    #[error(
        "{0} appears to be alive: stop its agent first, or run `gossamer leave` on it. If that host is \
         out of reach, --force forgets it anyway; its pods then keep addresses that other nodes may use \
         as well"
    )]
    Alive(String),
    /// The member is down, but its host runs: the member, and what shows it.
    #[error(
        "{0} is down for gossip, but {1}: that host runs, and its pods use its subnet. Stop the host, or \
         start its agent there and run `gossamer leave`. If its pods are stopped and stay stopped, use \
         --force; otherwise two hosts get one subnet"
    )]
    Runs(String, String),
    /// This node is in no cluster.
    #[error("this node is in no cluster yet")]
    NoCluster,
    /// This node is leaving.
    #[error("this node is leaving: run the command on another member")]
    Leaving,
}

/// The progress of reclaiming a forgotten node's slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reclaiming {
    /// The forgotten node.
    pub node: NodeId,
    /// Its label, see [`super::Labels::of`].
    pub name: String,
    /// The member that reclaims its slots.
    pub successor: NodeId,
    /// Number of slots not reclaimed yet.
    pub slots: u32,
    /// Labels of members that have not acknowledged, up to [`MAX_NAMED`], and the number of the others;
    /// `None` except on the successor.
    pub waits_for: Option<Vec<String>>,
}

/// Says what shows that the host of a silent agent runs.
pub fn sign_of_host(round_trip: Option<Duration>) -> String {
    match round_trip {
        Some(time) => format!("its kernel answers ({:.1} ms)", time.as_secs_f64() * 1_000.0),
        None => "its packets arrive".to_owned(),
    }
}

impl Replica {
    /// Returns whether a node left or was forgotten, so that it writes no more records.
    pub(super) fn is_gone(&self, node: NodeId) -> bool {
        self.directory.forgotten(node).is_some()
            || self.directory.get(node).is_some_and(MemberRecord::has_left)
    }

    /// Returns whether a node owns slots.
    pub(super) fn owns_slots(&self, node: NodeId) -> bool {
        let mut clusters = self.cluster_state.iter();
        clusters.any(|cluster_state| cluster_state.slots.runs_of(node).next().is_some())
    }

    /// Returns whether a node without a member record is still referenced: it owns slots, is the successor
    /// of a forgotten node, or received the records of a node that left.
    pub(super) fn is_referenced(&self, node: NodeId) -> bool {
        let is_successor = self.directory.forgets().any(|forget| forget.successor == node);
        let is_keeper = self.directory.iter().any(|record| record.left_to == Some(node));
        is_successor || is_keeper || self.owns_slots(node)
    }

    /// Returns the nodes that have to acknowledge a forget record: members, and nodes that are known only as
    /// owners of slots or as receivers of the records of a node that left. They may know grants that no
    /// other node knows.
    fn acknowledgers(&self) -> BTreeSet<NodeId> {
        let members = self.directory.peers(self.me.node).map(|record| record.node);
        let keepers = self.directory.iter().filter_map(|record| record.left_to);
        members
            .chain(keepers)
            .chain(self.owners())
            .filter(|node| *node != self.me.node && !self.is_gone(*node))
            .collect()
    }

    /// Returns those of `acknowledgers` that have not acknowledged a forget record.
    fn missing<'a>(
        &'a self,
        acknowledgers: &'a BTreeSet<NodeId>,
        forget: &Forget,
    ) -> impl Iterator<Item = NodeId> + 'a {
        let forget = *forget;
        let has_acknowledged =
            move |node: &NodeId| self.forgetting.has_acknowledged(&forget, *node);
        acknowledgers.iter().filter(move |node| !has_acknowledged(node)).copied()
    }

    /// Returns the owners of slots.
    fn owners(&self) -> BTreeSet<NodeId> {
        let runs = self.cluster_state.iter().flat_map(|cluster_state| cluster_state.slots.runs());
        runs.map(|run| run.record.owner).collect()
    }

    /// Returns the forget records with this node as successor whose nodes still own slots.
    fn pending_reclaims(&self) -> Vec<Forget> {
        let owners = self.owners();
        let is_pending =
            |forget: &&Forget| forget.successor == self.me.node && owners.contains(&forget.node);
        self.directory.forgets().filter(is_pending).copied().collect()
    }

    /// Merges the forget record of another node. Returns whether it was new.
    fn merge_forget(&mut self, outbox: &mut Outbox, now: Time, forget: &Forget) -> bool {
        let was_gone = self.is_gone(forget.node);
        let new = self.directory.merge_forget(forget);
        if new {
            outbox.mark(Key::Forget(forget.node));
            outbox.invalidate_view();
            self.forgetting.retry_at = Some(now);
            self.forgetting.drop_acknowledgements(forget.node);
            if !was_gone {
                self.note_departure(forget.node);
            }
        }
        new
    }
}

impl Node {
    /// Forgets a member that an operator declares gone for good; `whom` names it, see [`Self::find`]. This
    /// node becomes its successor. `force` also forgets a member that appears alive, and reclaims without
    /// acknowledgements.
    ///
    /// # Errors
    /// Fails if no or several members match, if the member appears alive or its host runs and `force` is
    /// false, or if this node is leaving or in no cluster.
    pub fn forget(&mut self, now: Time, whom: &str, force: bool) -> Result<NodeId, CannotForget> {
        if self.replica.cluster_state.is_none() {
            return Err(CannotForget::NoCluster);
        }
        if self.lifecycle.is_leaving() {
            return Err(CannotForget::Leaving);
        }
        let node = self.member_named(whom)?;
        let gone = match self.membership.opinions().get(&node) {
            Some(liveness) => *liveness == Liveness::Down,
            // After a start liveness is unknown until a member has sent the identities that it considers
            // alive.
            None => self.replica.sync.has_confirmed(),
        };
        if !gone && !force {
            return Err(CannotForget::Alive(self.name_of(node).to_owned()));
        }
        if let Some(round_trip) = self.running_hosts.get(&node).filter(|_| !force) {
            return Err(CannotForget::Runs(self.labels().of(node), sign_of_host(*round_trip)));
        }
        self.declare_gone(now, node, force);
        self.advance(now);
        Ok(node)
    }

    /// Returns the members whose hosts run, as last reported.
    pub const fn running_hosts(&self) -> &RunningHosts {
        &self.running_hosts
    }

    /// Returns whether a node was forgotten.
    pub fn is_forgotten(&self, node: NodeId) -> bool {
        self.replica.directory.forgotten(node).is_some()
    }

    /// Writes a forget record with this node as successor. It replaces an earlier one only if its successor
    /// is gone as well, or if this one is forced and that one is not.
    pub(super) fn declare_gone(&mut self, now: Time, node: NodeId, forced: bool) {
        let earlier = self.replica.directory.forgotten(node);
        if earlier.is_some_and(|earlier| {
            !self.replica.is_gone(earlier.successor) && (earlier.forced || !forced)
        }) {
            return;
        }
        let round = earlier.map_or(0, |earlier| earlier.round) + 1;
        let forget = Forget { node, round, forced, successor: self.replica.me.node };
        if self.log_budget.take(now) {
            tracing::info!(%node, name = self.name_of(node), round, forced, "forgetting");
        }
        self.outbox.mark_urgent(Key::Forget(node));
        self.learn(now, &Facts { forgets: vec![forget], ..Facts::default() }, None);
    }

    /// Merges a forget record. Returns whether it was new.
    pub(super) fn merge_forget(&mut self, now: Time, forget: &Forget) -> bool {
        if forget.node == self.replica.me.node {
            if !self.lifecycle.is_leaving() {
                self.outbox.stop(Stop::Expelled { successor: Some(forget.successor) });
            }
            return false;
        }
        self.replica.merge_forget(&mut self.outbox, now, forget)
    }

    pub(super) fn next_forget_step(&self) -> Option<Time> {
        let Forgetting { retry_at, not_before, .. } = self.replica.forgetting;
        let due = retry_at.map(|at| at.max(not_before));
        due.filter(|_| self.replica.cluster_state.is_some())
    }

    pub(super) fn step_forget(&mut self, now: Time) {
        if self.next_forget_step().is_none_or(|at| now < at) {
            return;
        }
        self.replica.forgetting.retry_at = None;
        if self.lifecycle.is_leaving() {
            return;
        }
        self.adopt_orphans(now);
        let mine = self.replica.pending_reclaims();
        if mine.is_empty() {
            return;
        }
        self.replica.forgetting.retry_at = Some(now + RETRY_INTERVAL);
        let acknowledgers = self.replica.acknowledgers();
        let mut reclaimed: Vec<(NodeId, u32)> = Vec::new();
        for forget in &mine {
            let is_complete = self.replica.missing(&acknowledgers, forget).next().is_none();
            if is_complete || forget.forced {
                reclaimed.extend(self.reclaim(now, forget).map(|slots| (forget.node, slots)));
            }
            if reclaimed.len() == MAX_PER_STEP {
                self.replica.forgetting.retry_at = Some(now);
                break;
            }
        }
        if let Some((first, _)) = reclaimed.first() {
            let (nodes, slots) =
                (reclaimed.len(), reclaimed.iter().map(|(_, slots)| slots).sum::<u32>());
            if self.log_budget.take(now) {
                tracing::info!(nodes, %first, slots, "reclaimed the slots of forgotten nodes");
            }
            // Further slots of forgotten nodes are reclaimed together.
            self.replica.forgetting.not_before = now + RECLAIM_INTERVAL;
        }
        self.request_acknowledgements(&mine, &acknowledgers);
    }

    /// Makes the next step check pending reclaims, because something that they wait for may have changed.
    pub(super) fn recheck_forgets(&mut self, now: Time) {
        self.replica.forgetting.retry_at = Some(now);
    }

    /// Declares nodes gone whose slots have no active owner or successor: nodes that left and received slots
    /// later, and forgotten nodes whose successor is gone as well. Of all active members the best suited
    /// does it.
    fn adopt_orphans(&mut self, now: Time) {
        let Some(cluster_state) =
            self.replica.cluster_state.as_ref().filter(|_| self.replica.sync.settled())
        else {
            return;
        };
        let orphaned = |node: &NodeId| match self.replica.directory.forgotten(*node) {
            Some(forget) => self.replica.is_gone(forget.successor),
            None => self.replica.is_gone(*node),
        };
        let owners = cluster_state.slots.runs().iter().map(|run| run.record.owner);
        let orphans: BTreeSet<NodeId> = owners.filter(orphaned).collect();
        if orphans.is_empty() {
            return;
        }
        let active = self.active();
        let is_mine = |node: &NodeId| {
            let best = active.keys().max_by_key(|successor| peer_score(*node, **successor));
            best == Some(&self.replica.me.node)
        };
        let mine: Vec<NodeId> = orphans.into_iter().filter(is_mine).take(MAX_PER_STEP).collect();
        for node in mine {
            self.declare_gone(now, node, false);
        }
    }

    fn request_acknowledgements(&mut self, mine: &[Forget], acknowledgers: &BTreeSet<NodeId>) {
        for node in acknowledgers {
            let Forgetting { pending, .. } = &self.replica.forgetting;
            if pending.len() >= MAX_PENDING {
                return;
            }
            let has_acknowledged =
                |forget: &Forget| self.replica.forgetting.has_acknowledged(forget, *node);
            if pending.contains(node) || mine.iter().all(has_acknowledged) {
                continue;
            }
            let request = Request::Acknowledge {
                forgets: mine.to_vec(),
                buckets: Box::new(self.replica.buckets(&self.membership)),
            };
            let (forgets, era) = (mine.to_vec(), self.replica.forgetting.era);
            let purpose = Purpose::Acknowledge { node: *node, forgets, era };
            if self.call_member(*node, purpose, &request) {
                self.replica.forgetting.pending.insert(*node);
            }
        }
    }

    pub(super) fn handle_acknowledgement(
        &mut self,
        now: Time,
        node: NodeId,
        forgets: &[Forget],
        era: u64,
        answer: Answer,
    ) {
        self.replica.forgetting.pending.remove(&node);
        match answer {
            Ok((from, Response::Acknowledged(facts))) if from == node => {
                self.learn(now, &facts, Some(from));
                if era == self.replica.forgetting.era {
                    // A greater record may have replaced one meanwhile.
                    let is_present = |forget: &&Forget| {
                        self.replica.directory.forgotten(forget.node) == Some(*forget)
                    };
                    for forget in forgets.iter().filter(is_present) {
                        self.replica.forgetting.acknowledge(forget, node);
                    }
                }
                self.recheck_forgets(now);
            }
            Ok((from, other)) => {
                self.note_unexpected(
                    from,
                    &other,
                    "unexpected response to an acknowledgement request",
                );
            }
            Err(error) => tracing::debug!(%node, %error, "member did not acknowledge"),
        }
    }

    /// Reclaims the slots of the forgotten node, and returns their number; `None` while this node may not
    /// write.
    fn reclaim(&mut self, now: Time, forget: &Forget) -> Option<u32> {
        let me = self.replica.me.node;
        // A node with an assigned subnet needs no other.
        let replaces = self.config.replace_by_name
            && self.config.assigned.is_none()
            && self
                .replica
                .directory
                .get(forget.node)
                .is_some_and(|record| record.name == self.replica.me.name);
        let may_write = self.may_write();
        let cluster_state = self.replica.cluster_state.as_mut().filter(|_| may_write)?;
        let leased: Option<Slot> = cluster_state.slots.leased_by(forget.node).next();
        let mut changes = cluster_state.slots.reclaim(me, forget.node, forget.round);
        if let Some(slot) = leased.filter(|_| replaces) {
            // Takes over the predecessor's subnet. The present one is given back once the kernel has
            // switched.
            changes.extend(cluster_state.slots.lease_own(me, Some(slot)));
            if let Some(search) = &mut self.lifecycle.search {
                search.prefer_from_now(slot);
            }
        }
        self.counters.reclaims += 1;
        self.replica.forgetting.drop_acknowledgements(forget.node);
        self.note_own_change(now, &changes);
        Some(changes.iter().map(|(run, _)| run.len).sum())
    }

    /// Passes slots that a forgotten node granted to this one on to the successor. This node had acknowledged
    /// before it learned of the grant, so the successor may have reclaimed them already. This node never
    /// uses them.
    pub(super) fn decline_late_grants(&mut self, now: Time, news: &[Run]) {
        let me = self.replica.me.node;
        let late = news.iter().filter(|run| run.record.owner == me).filter_map(|run| {
            let forget = self.replica.directory.forgotten(run.record.granter)?;
            (forget.successor != me).then_some((*run, forget.successor))
        });
        let late: Vec<(Run, NodeId)> = late.collect();
        let Some(cluster_state) = &mut self.replica.cluster_state else { return };
        self.counters.declined += late.len() as u64;
        let changes = cluster_state.slots.pass_on(&late, me);
        self.note_own_change(now, &changes);
    }

    /// Declares the predecessor gone, if this node was re-created under its name.
    pub(super) fn replace_predecessor(&mut self, now: Time) {
        // `agreed`: a peer holds the same members as alive, so liveness is reliable.
        if !self.config.replace_by_name
            || self.lifecycle.is_leaving()
            || !self.replica.sync.agreed()
        {
            return;
        }
        let predecessors: Vec<NodeId> = self
            .replica
            .directory
            .peers(self.replica.me.node)
            .filter(|record| record.name == self.replica.me.name)
            .map(|record| record.node)
            .filter(|node| !self.membership.is_active(*node))
            .take(MAX_PER_STEP)
            .collect();
        for node in predecessors {
            self.declare_gone(now, node, false);
        }
    }

    /// Returns forgotten nodes whose slots are not reclaimed yet, up to [`MAX_LISTED`]: a member may invent
    /// thousands of members and of forget records.
    pub fn reclaiming(&self) -> Vec<Reclaiming> {
        let Some(cluster_state) = &self.replica.cluster_state else { return Vec::new() };
        let mut slots: BTreeMap<NodeId, u32> = BTreeMap::new();
        for run in cluster_state.slots.runs() {
            *slots.entry(run.record.owner).or_default() += run.len;
        }
        let forgets = self.replica.directory.forgets();
        let owned = forgets.filter_map(|forget| Some((forget, *slots.get(&forget.node)?)));
        let owned: Vec<(&Forget, u32)> = owned.take(MAX_LISTED).collect();
        if owned.is_empty() {
            return Vec::new();
        }
        let (labels, acknowledgers) = (self.labels(), self.replica.acknowledgers());
        let reclaiming = |(forget, slots): (&Forget, u32)| {
            let waits_for = (forget.successor == self.replica.me.node).then(|| {
                let mut missing = self.replica.missing(&acknowledgers, forget);
                let named = missing.by_ref().take(MAX_NAMED).map(|node| labels.of(node));
                let mut named: Vec<String> = named.collect();
                if let more @ 1.. = missing.count() {
                    named.push(format!("{more} more"));
                }
                named
            });
            let (node, successor) = (forget.node, forget.successor);
            Reclaiming { node, name: labels.of(node), successor, slots, waits_for }
        };
        owned.into_iter().map(reclaiming).collect()
    }
}

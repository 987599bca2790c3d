//! Responses to peers. Each request gets exactly one response, which may be a refusal with its reason.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    model::{
        ClusterId, Difference, Identity, MemberRecord, NodeId, Run, Text, Time,
        bounded::MAX_MEMBERS,
    },
    wire::{Facts, Frame, GrantWish, Hello, Key, Refusal, Request, Response, Welcome},
};

use super::{
    ClusterState, Node, ReplyId,
    malformed::Kind,
    outbox::Outbox,
    replica::Replica,
    slots::{Change, Grant},
};

impl Replica {
    /// Returns the refusal of a frame with this cluster id, if any.
    pub(super) fn cluster_refusal(&self, cluster: ClusterId) -> Option<Refusal> {
        match self.cluster_id() {
            None => Some(Refusal::NotReady),
            Some(ours) if cluster != ours && cluster != ClusterId::UNKNOWN => {
                Some(Refusal::OtherCluster { ours: cluster, theirs: ours })
            }
            Some(_) => None,
        }
    }

    /// Returns all facts of this node, with these active members.
    pub(super) fn everything(&self, active: BTreeMap<NodeId, Identity>) -> Facts {
        let slots = self.cluster_state.iter().flat_map(|cluster_state| cluster_state.slots.runs());
        Facts {
            members: self.directory.iter().cloned().collect(),
            slots: slots.copied().collect(),
            active: active.into_values().collect(),
            forgets: self.directory.forgets().copied().collect(),
        }
    }

    /// Writes and pushes slot records that this node has changed itself.
    pub(super) fn note_own_change(&mut self, outbox: &mut Outbox, now: Time, changes: &[Change]) {
        self.note_slots(outbox, changes);
        // The present records, because of two changes of one slot only the last is written.
        let Some(cluster_state) = &self.cluster_state else { return };
        let slots =
            changes.iter().flat_map(|(run, _)| cluster_state.slots.range(run.start.0, run.end()));
        let slots = slots.collect();
        self.push.add(now, &Facts { slots, ..Facts::default() }, None);
        self.sync.unsettle(now);
    }
}

impl Node {
    pub(super) fn serve(&mut self, now: Time, from: NodeId, reply: ReplyId, bytes: &[u8]) {
        let response = match Frame::decode(bytes) {
            Ok((cluster, Frame::Request(payload))) => match Request::decode(payload) {
                Ok(request) => match self.request_refusal(from, cluster, &request) {
                    Some(refusal) => Response::Refused(refusal),
                    None => self.respond(now, from, request),
                },
                Err(error) => self.unreadable(from, &error),
            },
            Ok(_) => self.unreadable(from, &"a stream has to begin with a request"),
            Err(error) => self.unreadable(from, &error),
        };
        self.reply(reply, &response);
    }

    pub(super) fn reply(&mut self, reply: ReplyId, response: &Response) {
        let cluster = self.replica.cluster_id().unwrap_or(ClusterId::UNKNOWN);
        let bytes = Frame::Response(&response.encode()).encode(cluster);
        self.outbox.reply(reply, bytes);
    }

    /// Returns the refusal that a node gets whatever it requests, if any.
    pub fn refusal(&self, from: NodeId, cluster: ClusterId) -> Option<Refusal> {
        self.replica.cluster_refusal(cluster).or_else(|| {
            if self.replica.directory.get(from).is_some_and(MemberRecord::has_left) {
                return Some(Refusal::Left);
            }
            let forget = self.replica.directory.forgotten(from);
            forget.map(|forget| Refusal::Forgotten { successor: forget.successor })
        })
    }

    fn request_refusal(
        &self,
        from: NodeId,
        cluster: ClusterId,
        request: &Request,
    ) -> Option<Refusal> {
        match request {
            // A member that left may still have to hand over its records.
            Request::Handover(_) => self.replica.cluster_refusal(cluster),
            _ => self.refusal(from, cluster),
        }
    }

    fn respond(&mut self, now: Time, from: NodeId, request: Request) -> Response {
        match request {
            Request::Hello(hello) => self.respond_to_hello(now, from, hello),
            Request::AreYouThere(suspicion) => {
                Response::Here(self.membership.refute(now, &suspicion))
            }
            Request::Compare(roots) => {
                let ours = self.replica.buckets(&self.membership);
                if ours.roots() == roots {
                    Response::Same
                } else {
                    Response::Differ(Box::new(ours))
                }
            }
            Request::Exchange { buckets, identity, facts } => {
                self.respond_to_exchange(now, from, buckets, identity, &facts)
            }
            Request::Grant(wish) => match self.grant(now, from, wish) {
                Ok(facts) => Response::Granted(facts),
                Err(refusal) => Response::Refused(refusal),
            },
            Request::Acknowledge { forgets, buckets } => {
                let differing = buckets.differing(&self.replica.buckets(&self.membership));
                let lacks = self.replica.facts_in(differing, self.active());
                self.learn(now, &Facts { forgets, ..Facts::default() }, Some(from));
                // The sender's record may be known already but not flushed yet.
                self.outbox.mark_urgent(Key::Member(from));
                Response::Acknowledged(lacks)
            }
            Request::Supply => match self.supply(now, from) {
                Ok(facts) => Response::Granted(facts),
                Err(refusal) => Response::Refused(refusal),
            },
            Request::HaveYouMissed { node, quorum } => Response::Vote(self.vote(node, &quorum)),
            _ if self.lifecycle.is_leaving() => Response::Refused(Refusal::Leaving),
            Request::BeMySuccessor => Response::Accepted,
            Request::Handover(facts) => {
                self.learn(now, &facts, Some(from));
                // The sender deletes its own copy next, so these facts must be durable, including those that
                // were known before but not flushed yet.
                self.outbox.mark_urgent(Key::Member(from));
                Response::Accepted
            }
        }
    }

    fn respond_to_hello(&mut self, now: Time, from: NodeId, hello: Hello) -> Response {
        let Some(cluster_state) = &self.replica.cluster_state else {
            return Response::Refused(Refusal::NotReady);
        };
        if let Some(difference) = hello.settings.difference(&cluster_state.cluster.settings) {
            return Response::Refused(Refusal::Settings(difference));
        }
        if self.config.assigned.is_some() {
            let [field, joiner, cluster] = ["lease_source", "gossip", "podcidr"].map(Text::from);
            return Response::Refused(Refusal::Settings(Difference { field, joiner, cluster }));
        }
        if hello.member.node != from || hello.identity.node != from {
            let why = "a hello must describe the node that sends it";
            return Response::Refused(Refusal::Malformed(why.into()));
        }
        if let Some(why) = self.unusable(&hello.member) {
            self.note_refused(from, 1, &why);
            return Response::Refused(Refusal::UnusableRecord(why.into()));
        }
        if !self.replica.directory.has_room_for(from) {
            return Response::Refused(Refusal::Full { limit: MAX_MEMBERS as u32 });
        }
        let MemberRecord { name, address, .. } = &hello.member;
        if let Some(count) = self.note(from, Kind::SendsHello, 1, "") {
            tracing::info!(node = %from, %name, %address, count, "joining");
        }
        let known = self.replica.directory.get(from);
        let returning = known.is_some_and(|record| record.boot != hello.member.boot);
        let facts =
            Facts { members: vec![hello.member], active: vec![hello.identity], ..Facts::default() };
        if self.learn(now, &facts, Some(from)).refused {
            let why = "its version is higher than any node can have reached";
            return Response::Refused(Refusal::UnusableRecord(why.into()));
        }
        let no_slot = self.grant(now, from, hello.grant).err();
        match &self.replica.cluster_state {
            Some(cluster_state) => {
                let facts = self.replica.everything(self.active());
                let cluster = cluster_state.cluster;
                Response::Welcome(Box::new(Welcome { cluster, facts, returning, no_slot }))
            }
            None => Response::Refused(Refusal::NotReady),
        }
    }

    /// Returns the reason for which a joiner's record cannot be used, if any. Besides the general rules, its
    /// underlay address must differ from this node's and be of the same family.
    fn unusable(&self, record: &MemberRecord) -> Option<String> {
        let pool = &self.replica.cluster_state.as_ref()?.cluster.settings.pool;
        let (theirs, ours) = (record.vtep.underlay, self.replica.me.vtep.underlay);
        match record.why_unusable(pool) {
            Some(unfit) => Some(unfit.to_string()),
            None if theirs == ours => Some(format!("its underlay address {theirs} is this node's")),
            None if theirs.is_ipv4() != ours.is_ipv4() => Some(format!(
                "its underlay address {theirs} is of another family than {ours}, so no tunnel is possible"
            )),
            None => None,
        }
    }

    /// Returns the slots if this node may give some away.
    ///
    /// # Errors
    /// Fails with the reason for which it may not.
    pub(super) fn slots_to_give(&mut self) -> Result<&mut ClusterState, Refusal> {
        if !self.replica.sync.synced() {
            return Err(Refusal::NotSynced);
        }
        if !self.key_use.is_unique() {
            return Err(Refusal::DuplicateIdentity);
        }
        let is_leaving = self.lifecycle.is_leaving();
        self.replica.cluster_state.as_mut().filter(|_| !is_leaving).ok_or(Refusal::NotReady)
    }

    /// Grants a slot of this node to `to`. The response waits for the write.
    fn grant(&mut self, now: Time, to: NodeId, wish: GrantWish) -> Result<Facts, Refusal> {
        let me = self.replica.me.node;
        let cluster_state = self.slots_to_give()?;
        let prefer =
            wish.prefer.and_then(|address| cluster_state.cluster.settings.pool.slot_at(address));
        let changes = match cluster_state.slots.grant(me, to, prefer)? {
            Grant::Again(slots) => return Ok(Facts { slots, ..Facts::default() }),
            Grant::New(changes) => changes,
        };
        let slots: Vec<Run> = changes.iter().map(|(run, _)| *run).collect();
        let count: u32 = slots.iter().map(|run| run.len).sum();
        if self.log_budget.take(now) {
            tracing::info!(%to, name = self.name_of(to), slots = count, "granted");
        }
        self.counters.grants += 1;
        self.note_own_change(now, &changes);
        self.lifecycle.supplies.note_grant(now);
        Ok(Facts { slots, ..Facts::default() })
    }

    fn respond_to_exchange(
        &mut self,
        now: Time,
        from: NodeId,
        buckets: u32,
        identity: Identity,
        theirs: &Facts,
    ) -> Response {
        if identity.node != from {
            let why = "an exchange must carry the identity of the node that sends it";
            return Response::Refused(Refusal::Malformed(why.into()));
        }
        self.learn(now, theirs, Some(from));
        self.replica.sync.verify_memory(from);
        let sender = self.credible_identities(now, &[identity]);
        self.introduce(now, sender);
        let mut facts = self.replica.facts_in(buckets, self.active());
        // Version and boot are compared: two processes with one key may publish the same version.
        let known: BTreeSet<_> =
            theirs.members.iter().map(|r| (r.node, r.version, r.boot)).collect();
        facts.members.retain(|r| !known.contains(&(r.node, r.version, r.boot)));
        let known: BTreeSet<_> = theirs.active.iter().collect();
        facts.active.retain(|identity| !known.contains(identity));
        let known: BTreeSet<_> =
            theirs.slots.iter().map(|run| (run.start, run.len, run.record)).collect();
        facts.slots.retain(|run| !known.contains(&(run.start, run.len, run.record)));
        let down = self.membership.held_down(&theirs.active);
        let down_as =
            (!self.membership.is_active(from)).then(|| self.membership.newest_incarnation(from));
        Response::Facts { facts, down, down_as }
    }

    /// Writes and pushes slot records that this node has changed itself, and looks at its lease again.
    pub(super) fn note_own_change(&mut self, now: Time, changes: &[Change]) {
        if !changes.is_empty() {
            self.replica.note_own_change(&mut self.outbox, now, changes);
            self.lifecycle.recheck_lease(now);
        }
    }

    fn unreadable(&mut self, from: NodeId, error: &dyn std::fmt::Display) -> Response {
        self.note_malformed(from, error);
        Response::Refused(Refusal::Malformed(error.to_string().into()))
    }
}

//! Responses to peers. Each request gets exactly one response, which may be a refusal with its reason.

use std::collections::BTreeSet;

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
    slots::{Change, Grant},
};

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
        let cluster = self.cluster_id().unwrap_or(ClusterId::UNKNOWN);
        let bytes = Frame::Response(&response.encode()).encode(cluster);
        self.outbox.reply(reply, bytes);
    }

    /// Returns the refusal that a node gets whatever it requests, if any.
    pub fn refusal(&self, from: NodeId, cluster: ClusterId) -> Option<Refusal> {
        self.cluster_refusal(cluster).or_else(|| {
            if self.directory.get(from).is_some_and(MemberRecord::has_left) {
                return Some(Refusal::Left);
            }
            let forget = self.directory.forgotten(from);
            forget.map(|forget| Refusal::Forgotten { successor: forget.successor })
        })
    }

    /// Returns the refusal of a frame with this cluster id, if any.
    fn cluster_refusal(&self, cluster: ClusterId) -> Option<Refusal> {
        match self.cluster_id() {
            None => Some(Refusal::NotReady),
            Some(ours) if cluster != ours && cluster != ClusterId::UNKNOWN => {
                Some(Refusal::OtherCluster { ours: cluster, theirs: ours })
            }
            Some(_) => None,
        }
    }

    fn request_refusal(
        &self,
        from: NodeId,
        cluster: ClusterId,
        request: &Request,
    ) -> Option<Refusal> {
        match request {
            // A member that left may still have to hand over its records.
            Request::Handover(_) => self.cluster_refusal(cluster),
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
                let ours = self.buckets();
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
                let lacks = self.facts_in(buckets.differing(&self.buckets()));
                self.learn(now, &Facts { forgets, ..Facts::default() }, Some(from));
                // The sender's record may be known already but not flushed yet.
                self.outbox.mark_urgent(Key::Member(from));
                Response::Acknowledged(lacks)
            }
            Request::HaveYouMissed { node, quorum } => Response::Vote(self.vote(node, &quorum)),
            _ if self.leaving.is_some() => Response::Refused(Refusal::Leaving),
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
        let Some(cluster_state) = &self.cluster_state else {
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
        if !self.directory.has_room_for(from) {
            return Response::Refused(Refusal::Full { limit: MAX_MEMBERS as u32 });
        }
        let MemberRecord { name, address, .. } = &hello.member;
        if let Some(count) = self.note(from, Kind::SendsHello, 1, "") {
            tracing::info!(node = %from, %name, %address, count, "joining");
        }
        let known = self.directory.get(from);
        let returning = known.is_some_and(|record| record.boot != hello.member.boot);
        let facts =
            Facts { members: vec![hello.member], active: vec![hello.identity], ..Facts::default() };
        if self.learn(now, &facts, Some(from)).refused {
            let why = "its version is higher than any node can have reached";
            return Response::Refused(Refusal::UnusableRecord(why.into()));
        }
        let no_slot = self.grant(now, from, hello.grant).err();
        match &self.cluster_state {
            Some(cluster_state) => {
                let facts = self.everything(cluster_state);
                let cluster = cluster_state.cluster;
                Response::Welcome(Box::new(Welcome { cluster, facts, returning, no_slot }))
            }
            None => Response::Refused(Refusal::NotReady),
        }
    }

    /// Returns the reason for which a joiner's record cannot be used, if any. Besides the general rules, its
    /// underlay address must differ from this node's and be of the same family.
    fn unusable(&self, record: &MemberRecord) -> Option<String> {
        let pool = &self.cluster_state.as_ref()?.cluster.settings.pool;
        let (theirs, ours) = (record.vtep.underlay, self.me.vtep.underlay);
        match record.why_unusable(pool) {
            Some(unfit) => Some(unfit.to_string()),
            None if theirs == ours => Some(format!("its underlay address {theirs} is this node's")),
            None if theirs.is_ipv4() != ours.is_ipv4() => Some(format!(
                "its underlay address {theirs} is of another family than {ours}, so no tunnel is possible"
            )),
            None => None,
        }
    }

    /// Grants a slot of this node to `to`. The response waits for the write.
    fn grant(&mut self, now: Time, to: NodeId, wish: GrantWish) -> Result<Facts, Refusal> {
        let me = self.me.node;
        if !self.sync.synced() {
            return Err(Refusal::NotSynced);
        }
        if self.duplicate.is_some() {
            return Err(Refusal::DuplicateIdentity);
        }
        let Some(cluster_state) = self.cluster_state.as_mut().filter(|_| self.leaving.is_none())
        else {
            return Err(Refusal::NotReady);
        };
        let prefer =
            wish.prefer.and_then(|address| cluster_state.cluster.settings.pool.slot_at(address));
        let changes = match cluster_state.slots.grant(me, to, prefer)? {
            Grant::Again(slots) => return Ok(Facts { slots, ..Facts::default() }),
            Grant::New(changes) => changes,
        };
        let slots: Vec<Run> = changes.iter().map(|(run, _)| *run).collect();
        let count: u32 = slots.iter().map(|run| run.len).sum();
        tracing::info!(%to, name = self.name_of(to), slots = count, "granted");
        self.counters.grants += 1;
        self.note_own_change(now, changes);
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
        self.sync.verify_memory(from);
        let sender = self.credible_identities(now, &[identity]);
        self.introduce(now, sender);
        let mut facts = self.facts_in(buckets);
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

    /// Writes and pushes slot records that this node has changed itself.
    pub(super) fn note_own_change(&mut self, now: Time, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        self.note_slots(&changes);
        // The present records, because of two changes of one slot only the last is written.
        let Some(cluster_state) = &self.cluster_state else { return };
        let slots =
            changes.iter().flat_map(|(run, _)| cluster_state.slots.range(run.start.0, run.end()));
        let slots = slots.collect();
        self.push.add(now, &Facts { slots, ..Facts::default() }, None);
        self.sync.unsettle(now);
        self.recheck_lease(now);
    }

    fn unreadable(&mut self, from: NodeId, error: &dyn std::fmt::Display) -> Response {
        self.note_malformed(from, error);
        Response::Refused(Refusal::Malformed(error.to_string().into()))
    }

    /// Returns all facts that this node has.
    pub(super) fn everything(&self, cluster_state: &ClusterState) -> Facts {
        Facts {
            members: self.directory.iter().cloned().collect(),
            slots: cluster_state.slots.runs().to_vec(),
            active: self.active().into_values().collect(),
            forgets: self.directory.forgets().copied().collect(),
        }
    }
}

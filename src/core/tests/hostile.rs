//! Faulty, lying and silent members: none of them stops another member.

use super::*;
use crate::{
    model::{Forget, Identity, Incarnation, Mac, Suspicion, Version, Vtep},
    sim::host::Host,
    wire::{Key, Record, Refusal},
};

/// Returns the record of a member that does not run.
pub(super) fn absent(number: u16) -> MemberRecord {
    let mut key = [0; 32];
    key[..2].copy_from_slice(&number.to_le_bytes());
    let node = NodeId::of_public_key(&key);
    let underlay: IpAddr = [10, 101, (number >> 8) as u8, number as u8].into();
    MemberRecord {
        node,
        version: Version { starts: 1, change: 0 },
        boot: BootId::from_bytes([1; 8]),
        name: format!("absent-{number}").parse().expect("a name"),
        address: (underlay, 8473).into(),
        vtep: Vtep { mac: Mac::of_node(node), underlay },
        left_to: None,
    }
}

fn first_identity_of(record: &MemberRecord) -> Identity {
    Identity { node: record.node, incarnation: Incarnation { starts: 1, renewals: 0 } }
}

fn non_member_with_seeds(seeds: usize) -> Node {
    let config = NodeConfig { seeds, ..Host::new(1, [1; 24]).config() };
    Node::start(Time::ZERO, config, vec![]).expect("starts")
}

/// Runs a non-member until it has sent `count` hellos, and returns their calls.
fn hello_calls(node: &mut Node, count: usize) -> Vec<CallId> {
    let mut calls = Vec::new();
    let mut now = Time::ZERO;
    while calls.len() < count {
        calls.extend(outputs(node).filter_map(|output| match output {
            Output::Call { call, .. } => Some(call),
            _ => None,
        }));
        now = now + Duration::from_millis(100);
        node.handle(now, Input::Timeout);
    }
    calls
}

fn refused(refusal: Refusal) -> Result<(NodeId, Vec<u8>), CallError> {
    let bytes = Frame::Response(&Response::Refused(refusal).encode());
    Ok((NodeId::from_bytes([9; 8]), bytes.encode(ClusterId::from_bytes([5; 8]))))
}

fn count_stops(node: &mut Node) -> usize {
    outputs(node).filter(|output| matches!(output, Output::Stop(_))).count()
}

#[test]
fn joiner_stops_only_when_all_seeds_refuse_for_good() {
    let mut node = non_member_with_seeds(2);
    let calls = hello_calls(&mut node, 2);
    let (ours, theirs) = (ClusterId::from_bytes([1; 8]), ClusterId::from_bytes([2; 8]));
    let other = || refused(Refusal::OtherCluster { ours, theirs });
    let now = Time::ZERO + seconds(1);
    node.handle(now, Input::Answer { call: calls[0], result: other() });
    assert_eq!(count_stops(&mut node), 0);
    let (seed, why) = node.foreign_seed_failures().next().expect("a failure");
    assert_eq!(seed, 0);
    assert!(why.contains("it refused: the node belongs to cluster"), "{why}");
    node.handle(now, Input::Answer { call: calls[1], result: refused(Refusal::NotReady) });
    assert_eq!(count_stops(&mut node), 0, "the other seed may still admit it");
    let retries = hello_calls(&mut node, 2);
    retries.iter().for_each(|call| {
        node.handle(now, Input::Answer { call: *call, result: other() });
    });
    assert!(count_stops(&mut node) > 0, "all seeds have refused for good");
}

#[test]
fn answer_to_a_call_from_before_a_reload_is_not_taken_for_a_new_seed() {
    let mut node = non_member_with_seeds(2);
    let calls = hello_calls(&mut node, 2);
    let now = Time::ZERO + seconds(1);
    node.set_seeds(now, 1);
    for call in calls {
        let result = Err(CallError::Rejected("another secret".to_owned()));
        node.handle(now, Input::Answer { call, result });
    }
    assert_eq!(count_stops(&mut node), 0, "the new seed has not answered yet");
    assert!(!texts(&node.status().problems).contains("another secret"));
}

#[test]
fn member_that_never_agrees_is_a_problem_and_the_others_are_settled() {
    let mut world = World::with_members(3);
    world.run_for(seconds(20));
    world.byzantine_host = Some(2);
    for _ in 0..200 {
        let now = world.now;
        (0..2).for_each(|host| world.node_mut(host).replica.sync.hasten(now));
        world.run_for(seconds(1));
    }
    assert_eq!(world.oracle.violation, None);
    for host in 0..2 {
        assert!(world.node(host).is_settled());
        let problems = world.problems(host);
        let named = problems.contains("sends facts that cannot be true")
            || problems.contains("still differs after");
        assert!(named && problems.contains("n2 ("), "{problems}");
    }
}

/// Regression: while a dead member was being called, each round that could start chose it again, and no
/// comparison succeeded for twelve minutes.
#[test]
fn dead_member_takes_only_its_share_of_the_comparisons() {
    let mut world = World::with_members(5);
    world.run_for(seconds(5));
    world.kill(4);
    world.restart(0);
    world.run_for(seconds(20));
    let same = |world: &World| world.node(0).status().counters.syncs_same;
    let before = same(&world);
    for _ in 0..120 {
        // As if hashes differed all the time.
        let now = world.now;
        world.node_mut(0).replica.sync.hasten(now);
        world.run_for(seconds(1));
    }
    assert!(same(&world) - before >= 60, "{} comparisons", same(&world) - before);
}

#[test]
fn many_members_reach_gossip_in_batches() {
    let mut world = World::with_members(2);
    let records: Vec<_> = (0..2_000).map(absent).collect();
    let active: Vec<_> = records.iter().map(first_identity_of).collect();
    let cluster = world.node(0).replica.cluster_id().expect("in a cluster");
    let facts = Facts { members: records, active, ..Facts::default() };
    let bytes = Frame::Push(&Push { facts }.encode()).encode(cluster);
    let (from, now) = (world.hosts[1].key, world.now + seconds(1));
    let node = world.node_mut(0);
    node.handle(now, Input::Message { from, bytes });
    let known = |node: &Node| node.opinions().len();
    assert!(known(node) < 600, "one step adds {}", known(node));
    let mut steps = 0;
    while known(node) < 2_000 {
        assert!(node.poll_timeout().is_some_and(|at| at <= now), "the next step is due at once");
        let before = known(node);
        node.handle(now, Input::Timeout);
        assert!(known(node) - before <= 256);
        steps += 1;
    }
    assert!(steps >= 5);
}

#[test]
fn nodes_without_a_record_never_reach_gossip() {
    let mut world = World::with_members(3);
    let active: Vec<_> = (0..1_000).map(|number| first_identity_of(&absent(number))).collect();
    world.push(1, 0, Facts { active, ..Facts::default() });
    world.run_for(seconds(1));
    assert_eq!(world.node(0).opinions().len(), 2);
    world.assert_converged_and_safe();
}

#[test]
fn suspicion_with_an_impossible_refutation_count_is_ignored() {
    let mut world = World::with_members(2);
    let now = world.now;
    let before = world.node(0).membership.identity();
    let node = world.node_mut(0);
    let forged = Suspicion { identity: before, refutation: u16::MAX };
    assert_eq!(node.membership.refute(now, &forged).identity, before);
    assert_eq!(node.membership.identity(), before, "no identity was used up");
    let valid = Suspicion { identity: before, refutation: node.membership.refutation() };
    node.membership.refute(now, &valid);
    assert!(node.membership.refutation() > valid.refutation || valid.refutation == 0);
}

#[test]
fn invalid_saved_records_are_ignored_at_the_start() {
    let mut world = World::with_members(3);
    world.run_for(seconds(3));
    world.kill(0);
    let mut saved = world.hosts[0].disk.records().expect("readable");
    let victim = world.hosts[1].key;
    for (key, record) in &mut saved {
        match record {
            Record::Member(record) if *key == Key::Member(victim) => {
                record.vtep.underlay = "fe80::1".parse().expect("an address");
                record.version.starts = u32::MAX;
            }
            Record::Slots(runs) => {
                runs.iter_mut().for_each(|run| run.record.epoch |= 1 << 63);
            }
            _ => {}
        }
    }
    let config = world.hosts[0].config();
    let node = Node::start(world.now, config, saved).expect("starts");
    assert!(node.replica.directory.get(victim).is_none());
    assert_eq!(node.slots().map(<[Run]>::len), Some(0));
    let theirs = world.node(2).replica.directory.get(victim).cloned().expect("known");
    let mut node = node;
    let facts = Facts { members: vec![theirs], ..Facts::default() };
    let now = world.now;
    assert!(node.learn(now, &facts, Some(world.hosts[2].key)).new, "the valid record is merged");
}

#[test]
fn refused_entry_is_a_problem_of_its_sender_and_not_passed_on() {
    let mut world = World::with_members(3);
    world.run_for(seconds(20));
    let mut record = world.node(2).replica.me.clone();
    record.version.change += 1;
    record.vtep.underlay = "fe80::1".parse().expect("an address");
    let before = world.node(0).roots();
    world.push(2, 0, Facts { members: vec![record], ..Facts::default() });
    assert_eq!(world.node(0).roots(), before);
    assert_eq!(world.node(0).status().counters.refused, 1);
    let problems = world.problems(0);
    assert!(problems.contains("n2 (") && problems.contains("is link-local"), "{problems}");
    world.run_for(seconds(30));
    assert_eq!(world.node(1).status().counters.refused, 0);
    assert_eq!(world.problems(0), "", "the next comparison found no difference");
    world.assert_converged_and_safe();
}

/// Regression: each run of the response was searched in all runs of the request.
#[test]
fn exchange_of_large_tables_is_one_pass_over_them() {
    let bootstrap = Bootstrap::Create(settings("10.0.0.0/8", 24));
    let config = NodeConfig { bootstrap, ..Host::new(0, [0; 24]).config() };
    let mut node = Node::start(Time::ZERO, config, vec![]).expect("starts");
    let from = absent(1);
    let runs: Vec<Run> = (1..60_000)
        .map(|slot| {
            let owner = NodeId::from_bytes([slot as u8, (slot >> 8) as u8, 7, 7, 7, 7, 7, 7]);
            let state = SlotState::Leased;
            let record = SlotRecord { epoch: 9, owner, state, granter: owner };
            Run { start: Slot(slot), len: 1, record }
        })
        .collect();
    let facts = Facts { slots: runs, members: vec![from.clone()], ..Facts::default() };
    let identity = first_identity_of(&from);
    let cluster = node.replica.cluster_id().expect("created");
    for _ in 0..3 {
        let facts = facts.clone();
        let request = Request::Exchange { buckets: u32::MAX, identity, facts };
        let bytes = Frame::Request(&request.encode()).encode(cluster);
        let request = Input::Request { from: from.node, reply: ReplyId(1), bytes };
        node.handle(Time::ZERO + seconds(1), request);
        let answer = outputs(&mut node).find_map(|output| match output {
            Output::Reply { bytes, .. } => read_response(&bytes).ok(),
            _ => None,
        });
        let Some(Response::Facts { facts, .. }) = answer else { panic!("{answer:?}") };
        assert!(facts.slots.len() < 40, "only what it lacks: {}", facts.slots.len());
    }
}

/// Regression: each departure collected all members again, so that one message stopped the loop for minutes.
#[test]
fn departures_of_many_members_are_one_pass_over_them() {
    let mut world = World::with_members(2);
    let records: Vec<_> = (0..12_000).map(absent).collect();
    let nodes: Vec<NodeId> = records.iter().map(|record| record.node).collect();
    let left = |(record, to): (MemberRecord, &NodeId)| MemberRecord {
        left_to: Some(*to),
        version: Version { starts: 1, change: 1 },
        ..record
    };
    let departed = records.clone().into_iter().zip(nodes.iter().rev()).map(left).collect();
    let forget = |(node, successor): (&NodeId, &NodeId)| Forget {
        node: *node,
        round: 1,
        forced: false,
        successor: *successor,
    };
    let forgets = nodes.iter().zip(nodes.iter().skip(1)).map(forget).collect();
    let (from, now) = (world.hosts[1].key, world.now + seconds(1));
    let node = world.node_mut(0);
    node.learn(now, &Facts { members: records, ..Facts::default() }, Some(from));
    node.learn(now, &Facts { members: departed, ..Facts::default() }, Some(from));
    assert!(node.replica.is_gone(nodes[0]), "it has left");
    node.learn(now, &Facts { forgets, ..Facts::default() }, Some(from));
    assert!(node.replica.directory.forgotten(nodes[0]).is_some());
}

/// Regression: the members that had not acknowledged were collected, each with its label, for every forget
/// record, also for those without slots to reclaim: one message stopped the loop for minutes.
#[test]
fn status_with_thousands_of_forgets_takes_one_pass_over_the_members() {
    let mut world = World::with_members(2);
    let mut records: Vec<_> = (0..12_000).map(absent).collect();
    records.iter_mut().for_each(|record| record.name = "same".parse().expect("a name"));
    let (me, from) = (world.hosts[0].key, world.hosts[1].key);
    let now = world.now + seconds(1);
    let node = world.node_mut(0);
    // The peer has obtained them from this node.
    let slots = node.replica.cluster_state.as_ref().expect("in a cluster").slots.runs_of(me);
    let slots: Vec<Slot> = slots.flat_map(Run::slots).skip(100).take(120).collect();
    let lease = |(slot, record): (&Slot, &MemberRecord)| {
        let owner = record.node;
        let record = SlotRecord { epoch: 9, owner, state: SlotState::Leased, granter: from };
        Run { start: *slot, len: 1, record }
    };
    let slots = slots.iter().zip(&records).map(lease).collect();
    let forget = |record: &MemberRecord| Forget {
        node: record.node,
        round: 1,
        forced: false,
        successor: me,
    };
    let forgets = records.iter().take(6_000).map(forget).collect();
    node.learn(now, &Facts { members: records, slots, ..Facts::default() }, Some(from));
    node.learn(now, &Facts { forgets, ..Facts::default() }, Some(from));
    let reclaiming = node.status().reclaiming;
    assert_eq!(reclaiming.len(), 100, "of 120");
    let waits_for = reclaiming[0].waits_for.as_ref().expect("this node is the successor");
    assert_eq!((waits_for.len(), waits_for.last().map(String::as_str)), (21, Some("5981 more")));
    node.handle(now + seconds(10), Input::Timeout);
    assert!(node.replica.forgetting.pending.len() <= 16);
}

/// Regression: each forget record of a node without a member record counted all such records again: one
/// message with 16,384 of them stopped the loop for half a minute.
#[test]
fn forgets_of_thousands_of_unknown_nodes_are_one_pass_over_them() {
    let mut world = World::with_members(2);
    let records: Vec<_> = (0..15_000).map(absent).collect();
    let (me, from) = (world.hosts[0].key, world.hosts[1].key);
    let forget = |node| Forget { node, round: 1, forced: false, successor: me };
    let known = records.iter().map(|record| forget(record.node)).collect();
    let unknown = |number: u32| {
        let [a, b, c, d] = number.to_be_bytes();
        forget(NodeId::from_bytes([0xee, a, b, c, d, 0, 0, 0]))
    };
    let now = world.now + seconds(1);
    let node = world.node_mut(0);
    node.learn(now, &Facts { members: records, ..Facts::default() }, Some(from));
    node.learn(now, &Facts { forgets: known, ..Facts::default() }, Some(from));
    let unknown = (0..16_384).map(unknown).collect();
    node.learn(now, &Facts { forgets: unknown, ..Facts::default() }, Some(from));
    let forgets = node.replica.directory.forgets().count();
    assert_eq!(forgets, 15_000 + 1_024);
}

/// Regression: a later round of the forget record of a gone node counted as a departure again.
#[test]
fn later_round_of_a_forgotten_node_discards_no_other_acknowledgement() {
    let mut world = World::with_members(2);
    let records: Vec<_> = (0..2).map(absent).collect();
    let (me, from) = (world.hosts[0].key, world.hosts[1].key);
    let forget = |number: usize, round| Forget {
        node: records[number].node,
        round,
        forced: false,
        successor: me,
    };
    let now = world.now + seconds(1);
    let node = world.node_mut(0);
    node.learn(now, &Facts { members: records.clone(), ..Facts::default() }, Some(from));
    let forgets = vec![forget(0, 1), forget(1, 1)];
    node.learn(now, &Facts { forgets, ..Facts::default() }, Some(from));
    let era = node.replica.forgetting.era;
    node.replica.forgetting.acknowledge(&forget(0, 1), from);
    node.learn(now, &Facts { forgets: vec![forget(1, 2)], ..Facts::default() }, Some(from));
    assert_eq!(node.replica.forgetting.era, era);
    assert!(node.replica.forgetting.has_acknowledged(&forget(0, 1), from));
}

/// Regression: a node with `replace_by_name` declared all namesakes gone in one turn.
#[test]
fn thousands_of_namesakes_are_replaced_in_parts() {
    let mut world = World::with_members(2);
    let mut records: Vec<_> = (0..2_000).map(absent).collect();
    let from = world.hosts[1].key;
    let now = world.now + seconds(1);
    let node = world.node_mut(0);
    node.config.replace_by_name = true;
    records.iter_mut().for_each(|record| record.name = node.replica.me.name.clone());
    node.learn(now, &Facts { members: records, ..Facts::default() }, Some(from));
    node.replica.sync.agreed = true;
    node.replace_predecessor(now);
    assert_eq!(node.replica.directory.forgets().count(), 64);
}

/// Regression: each slot of a forgotten node caused a step, a log line and a write of its own.
#[test]
fn slots_of_a_forgotten_node_that_arrive_one_by_one_are_reclaimed_together() {
    let mut world = World::with_members(2);
    let victim = absent(1);
    let (me, from) = (world.hosts[0].key, world.hosts[1].key);
    let start = world.now + seconds(1);
    let node = world.node_mut(0);
    let forget = Forget { node: victim.node, round: 1, forced: true, successor: me };
    let members = Facts { members: vec![victim.clone()], ..Facts::default() };
    node.learn(start, &members, Some(from));
    node.learn(start, &Facts { forgets: vec![forget], ..Facts::default() }, Some(from));
    let slots = node.replica.cluster_state.as_ref().expect("in a cluster").slots.runs_of(from);
    let slots: Vec<Slot> = slots.flat_map(Run::slots).take(100).collect();
    let before = node.status().counters.reclaims;
    for (number, start_of) in slots.into_iter().enumerate() {
        let now = start + Duration::from_millis(10 * number as u64);
        let record =
            SlotRecord { epoch: 9, owner: victim.node, state: SlotState::Leased, granter: from };
        let run = Run { start: start_of, len: 1, record };
        node.learn(now, &Facts { slots: vec![run], ..Facts::default() }, Some(from));
        node.step_forget(now);
    }
    let steps = node.status().counters.reclaims - before;
    assert!((1..=5).contains(&steps), "{steps} steps in a second");
    node.step_forget(start + seconds(2));
    assert!(!node.replica.owns_slots(victim.node));
}

//! Tests of forgetting by a majority of voters.

use std::collections::{BTreeMap, BTreeSet};

use super::{hostile::absent, *};
use crate::model::Quorum;

const FORGET_AFTER: Duration = seconds(60);

fn quorum(names: &[&str]) -> Option<Quorum> {
    let names: Vec<_> = names.iter().map(|name| name.parse().expect("name")).collect();
    Some(Quorum::new(FORGET_AFTER, &names).expect("a quorum"))
}

/// Creates five members; the first three are voters.
fn world() -> World {
    let mut world = World::new(1, settings("10.42.0.0/16", 24));
    world.quorum = quorum(&["n0", "n1", "n2"]);
    world.add_creator();
    (1..5).for_each(|_| _ = world.add_joiner(&[0]));
    (0..5).for_each(|host| world.start(host));
    world.run_for(seconds(4));
    world.assert_converged_and_safe();
    world
}

#[test]
fn member_missed_by_most_voters_is_forgotten() {
    let mut world = world();
    world.lose(4);
    world.kill(2);
    world.run_for(FORGET_AFTER - seconds(20));
    assert_eq!(world.leased(0), 5, "not yet");
    world.start(2);
    world.run_for(seconds(60));
    assert_eq!(world.leased(0), 4);
    world.assert_converged_and_safe();
}

#[test]
fn voter_does_not_miss_a_member_whose_kernel_answers_it() {
    let mut world = world();
    let lost = world.lose(4);
    let runs = |node: &mut Node, now, hosts: &[NodeId]| {
        let hosts = hosts.iter().map(|host| (*host, None)).collect();
        node.handle(now, Input::RunningHosts(hosts));
    };
    // Two of the three voters reach its kernel.
    let now = world.now;
    (0..2).for_each(|voter| runs(world.node_mut(voter), now, &[lost]));
    world.run_for(FORGET_AFTER * 3);
    assert_eq!(world.leased(0), 5, "its pods use its subnet");
    let now = world.now;
    (0..2).for_each(|voter| runs(world.node_mut(voter), now, &[]));
    world.run_for(FORGET_AFTER - seconds(10));
    assert_eq!(world.leased(0), 5, "the absence counts from then on");
    world.run_for(seconds(60));
    assert_eq!(world.leased(0), 4);
    world.assert_converged_and_safe();
}

#[test]
fn minority_of_voters_forgets_no_member() {
    let mut world = world();
    // The other part has most of the members, but only one voter.
    world.isolate(0..1);
    world.isolate(1..2);
    world.run_for(FORGET_AFTER * 5);
    assert!((2..5).all(|host| world.node(host).status().counters.voted_gone == 0));
    world.network.mend();
    world.run_for(seconds(30));
    assert_eq!(world.leased(2), 5);
    world.assert_converged_and_safe();
}

#[test]
fn restarted_voters_measure_absence_from_zero() {
    let mut world = world();
    world.lose(4);
    world.run_for(FORGET_AFTER - seconds(15));
    (0..3).for_each(|voter| world.restart(voter));
    world.run_for(FORGET_AFTER - seconds(10));
    assert_eq!(world.leased(0), 5, "the restarted voters measure from zero");
    world.run_for(seconds(40));
    assert_eq!(world.leased(0), 4);
    world.assert_converged_and_safe();
}

#[test]
fn frozen_voter_does_not_count_that_time() {
    let mut world = world();
    (0..3).for_each(|voter| world.pause(voter));
    world.run_for(FORGET_AFTER * 3);
    (0..3).for_each(|voter| world.resume(voter));
    world.run_for(seconds(30));
    assert!((0..3).all(|host| world.node(host).status().counters.voted_gone == 0));
    world.assert_converged_and_safe();
}

#[test]
fn vote_with_another_rule_does_not_count_and_is_a_problem() {
    let mut world = world();
    for voter in [1, 2] {
        world.hosts[voter].quorum = quorum(&["n0", "n1", "n3"]);
        world.restart(voter);
    }
    world.lose(4);
    world.run_for(FORGET_AFTER * 3);
    assert_eq!(world.leased(0), 5);
    let problems = world.problems(0);
    assert!(problems.contains("voter n1 has other voters"), "{problems}");
}

/// Regression: each check resolved the voters for each missing member and queried them about all: invented
/// members stopped the voters' loops for half a minute, again and again.
#[test]
fn voter_queries_about_thousands_of_missing_members_in_parts_and_about_each_in_turn() {
    let mut world = world();
    let members: Vec<MemberRecord> = (0..1_000).map(absent).collect();
    let from = world.hosts[1].key;
    let start = world.now;
    let node = world.node_mut(0);
    node.learn(start, &Facts { members, ..Facts::default() }, Some(from));
    let mut queried = BTreeMap::<NodeId, u32>::new();
    for round in 1..=40 {
        let now = start + seconds(5 * round);
        node.handle(now, Input::Timeout);
        let calls = outputs(node).filter_map(|output| match output {
            Output::Call { bytes, .. } => match Frame::decode(&bytes) {
                Ok((_, Frame::Request(request))) => Request::decode(request).ok(),
                _ => None,
            },
            _ => None,
        });
        let mut about = BTreeSet::new();
        for call in calls {
            if let Request::HaveYouMissed { node, .. } = call {
                about.insert(node);
            }
        }
        assert!(about.len() <= 64, "{}", about.len());
        about.into_iter().for_each(|node| *queried.entry(node).or_default() += 1);
    }
    assert_eq!(queried.len(), 1_000, "each has its turn");
    assert!(queried.values().all(|times| *times <= 2));
}

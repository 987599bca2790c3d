//! Tests of restarts: what a node remembers, and what it does with unverified memory.

use super::*;
use crate::{model::ProblemCode, sim::disk::Disk};

#[test]
fn restarted_node_uses_its_subnet_at_once_without_peers() {
    let mut world = World::with_members(3);
    world.run_for(seconds(2));
    let subnet = world.subnet(2);
    world.cut_power(2);
    world.isolate(2..3);
    world.start(2);
    world.run_for(seconds(1));
    assert_eq!(world.subnet(2), subnet);
    let view = world.node(2).view().expect("a view without any peer");
    assert_eq!(view.peers.len(), 2);
    assert_eq!(world.hosts[2].kernel.routes.len(), 3, "routes of two peers and its own");
    world.network.mend();
    world.run_for(seconds(10));
    assert_eq!(world.node(2).view().expect("a view").unconfirmed, []);
    world.assert_converged_and_safe();
}

#[test]
fn node_with_a_lost_database_gets_its_subnet_back_from_a_peer() {
    let mut world = World::with_members(3);
    let subnet = world.subnet(2);
    world.run_for(seconds(20));
    world.oracle.lenient = true;
    world.kill(2);
    world.hosts[2].disk = Disk::default();
    world.start(2);
    world.run_for(seconds(5));
    assert_eq!(world.subnet(2), subnet);
    world.run_for(seconds(20));
    assert!(world.all_settled(), "the new start exceeds the old one");
    world.assert_converged_and_safe();
}

#[test]
fn restarted_node_grants_nothing_before_its_first_comparison() {
    let mut world = World::with_members(2);
    world.kill(1);
    world.restart(0);
    let joiner = world.join();
    world.run_for(seconds(8));
    assert_eq!(world.node(joiner).status().phase, Phase::Leaseless);
    let problems = world.problems(joiner);
    assert!(problems.contains("has not compared its state"), "{problems}");
    world.start(1);
    world.run_for(seconds(8));
    world.assert_converged_and_safe();
}

#[test]
fn restarted_node_without_a_subnet_searches_for_one() {
    let mut world = World::created(settings("10.42.0.0/24", 26));
    for _ in 1..4 {
        world.join();
        world.run_for(seconds(2));
    }
    world.kill(3);
    world.command(1, Command::Leave);
    world.run_for(seconds(2));
    world.start(3);
    world.run_for(seconds(5));
    assert!(world.subnet(3).is_some());
    world.assert_converged_and_safe();
}

#[test]
fn node_with_a_lost_database_grants_nothing_until_all_members_have_confirmed() {
    let mut world = World::with_members(4);
    world.run_for(seconds(12));
    world.oracle.lenient = true;
    world.kill(2);
    world.hosts[2].disk = Disk::default();
    // One member is unreachable: it may know of a grant that no other member knows.
    world.isolate(3..4);
    world.start(2);
    world.run_for(seconds(3));
    assert!(world.subnet(2).is_some(), "its own subnet needs no confirmation");
    assert!(!world.node(2).status().synced);
    world.network.mend();
    world.run_for(seconds(20));
    assert!(world.node(2).status().synced);
}

#[test]
fn member_that_joined_after_the_restart_verifies_no_memory() {
    let mut world = World::with_members(2);
    world.kill(1);
    world.restart(0);
    world.join();
    world.run_for(seconds(8));
    world.restart(0);
    world.run_for(seconds(8));
    assert!(!world.node(0).status().synced, "the joiner knows the cluster through it alone");
}

#[test]
fn rolled_back_state_directory_is_detected_from_peers_records() {
    let mut world = World::with_members(2);
    world.run_for(seconds(3));
    let old = world.hosts[0].disk.clone();
    world.join();
    world.run_for(seconds(3));
    world.oracle.lenient = true;
    world.kill(0);
    world.hosts[0].disk = old;
    world.start(0);
    world.run_for(seconds(5));
    assert!(world.node(0).status().counters.rollbacks > 0);
    let problems = world.problems(0);
    assert!(problems.contains("rolled back"), "{problems}");
    world.assert_converged_and_safe();
}

#[test]
fn problems_of_contradicting_records_have_a_remedy() {
    let mut world = World::with_members(2);
    world.run_for(seconds(3));
    let node = world.node_mut(0);
    node.counters.rollbacks = 1;
    node.counters.ownership_conflicts = 1;
    node.counters.forged = 1;
    let problems = node.status().problems;
    let codes =
        [ProblemCode::RolledBack, ProblemCode::OwnershipConflict, ProblemCode::ForgedRecords];
    for code in codes {
        let problem = problems.iter().find(|problem| problem.code == code).expect("reported");
        assert!(!problem.fix.is_empty(), "{problem}");
    }
}

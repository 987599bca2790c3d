//! What a node knows after a restart, and what it does before it can be sure of that.

use super::*;
use crate::sim::disk::Disk;

#[test]
fn a_restarted_node_has_its_subnet_at_once_and_alone() {
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
    assert!(!view.unconfirmed.is_empty(), "an old database must not remove anybody");
    assert_eq!(world.hosts[2].kernel.routes.len(), 3, "two peers' and its own");
    world.network.mend();
    world.run_for(seconds(10));
    assert_eq!(world.node(2).view().expect("a view").unconfirmed, []);
    world.assert_right();
}

#[test]
fn a_lost_database_is_no_lost_subnet_while_a_peer_remembers() {
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
    assert!(world.all_settled(), "the new start outranks the old one");
    world.assert_right();
}

#[test]
fn nothing_is_granted_between_a_restart_and_the_first_comparison() {
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
    world.assert_right();
}

#[test]
fn a_node_without_a_subnet_looks_for_one_again_after_a_restart() {
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
    world.assert_right();
}

#[test]
fn a_node_that_lost_its_memory_grants_nothing_until_all_who_are_there_were_asked() {
    let mut world = World::with_members(4);
    world.run_for(seconds(12));
    world.oracle.lenient = true;
    world.kill(2);
    world.hosts[2].disk = Disk::default();
    // One member hears nothing: it may know of a grant that nobody else has seen.
    world.isolate(3..4);
    world.start(2);
    world.run_for(seconds(3));
    assert!(world.subnet(2).is_some(), "its own subnet is beyond doubt");
    assert!(!world.node(2).status().synced);
    world.network.mend();
    world.run_for(seconds(20));
    assert!(world.node(2).status().synced);
}

#[test]
fn a_joiner_that_came_after_the_restart_is_no_witness() {
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
fn a_state_directory_that_was_rolled_back_is_noticed_by_what_peers_know() {
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
    world.assert_right();
}

//! Tests of leaving.

use super::*;

#[test]
fn leave_hands_over_all_slots_and_is_known_everywhere() {
    let mut world = World::with_members(4);
    world.command(2, Command::Leave);
    world.run_for(LATENCY * 30);
    assert!(matches!(world.hosts[2].stopped, Some(Stop::Left { successor: Some(_) })));
    world.assert_converged_and_safe();
    let slots = world.node(0).status().slots;
    assert_eq!((slots.total, slots.leased, slots.free), (255, 3, 252));
}

#[test]
fn leave_interrupted_by_a_crash_continues_after_the_restart() {
    let mut world = World::with_members(3);
    world.run_for(seconds(2));
    // The successor agrees and the records are written; then no message of this node arrives any more.
    world.command(2, Command::Leave);
    while !world.node(2).replica.me.has_left() {
        world.run_for(Duration::from_micros(100));
    }
    world.isolate(2..3);
    world.run_for(seconds(1));
    world.kill(2);
    world.network.mend();
    assert_eq!(world.leased(0), 3, "no member knows of it");
    world.start(2);
    world.run_for(seconds(10));
    assert!(matches!(world.hosts[2].stopped, Some(Stop::Left { .. })));
    world.assert_converged_and_safe();
    let slots = world.node(0).status().slots;
    assert_eq!((slots.leased, slots.free), (2, 253), "all its slots belong to members");
}

#[test]
fn members_that_leave_at_once_lose_no_slot() {
    let mut world = World::with_members(8);
    [1, 2, 4, 5, 7].into_iter().for_each(|leaver| world.command(leaver, Command::Leave));
    world.join();
    world.run_for(seconds(30));
    assert_eq!(world.running(), 4);
    world.assert_converged_and_safe();
    let status = world.node(0).status();
    let here = status.members.iter().filter(|member| !member.left);
    let owned: u32 = here.map(|member| member.free + member.subnets.len() as u32).sum();
    assert_eq!((status.slots.total, owned), (255, 255), "all slots belong to members");
}

#[test]
fn leave_succeeds_for_the_last_member_and_fails_without_reachable_peers() {
    let mut world = World::created(settings("10.42.0.0/16", 24));
    world.command(0, Command::Leave);
    world.run_for(seconds(1));
    assert_eq!(world.hosts[0].stopped, Some(Stop::Left { successor: None }));

    let mut world = World::with_members(2);
    world.isolate(1..2);
    world.run_for(seconds(30));
    world.command(1, Command::Leave);
    world.run_for(seconds(30));
    assert_eq!(world.hosts[1].stopped, None);
    assert_eq!(world.node(1).status().phase, Phase::Member, "it remains a member");
}

//! Going for good.

use super::*;

#[test]
fn leaving_hands_over_everything_and_is_known_everywhere() {
    let mut world = World::with_members(4);
    world.command(2, Command::Leave);
    world.run_for(LATENCY * 30);
    assert!(matches!(world.hosts[2].stopped, Some(Stop::Left { successor: Some(_) })));
    world.assert_right();
    let slots = world.node(0).status().slots;
    assert_eq!((slots.total, slots.leased, slots.free), (255, 3, 252));
}

#[test]
fn a_leave_that_a_crash_cut_short_goes_on_after_the_restart() {
    let mut world = World::with_members(3);
    world.run_for(seconds(2));
    // The successor agrees, the records are written, and nothing of this node arrives any more.
    world.command(2, Command::Leave);
    while !world.node(2).me.has_left() {
        world.run_for(Duration::from_micros(100));
    }
    world.isolate(2..3);
    world.run_for(seconds(1));
    world.kill(2);
    world.network.mend();
    assert_eq!(world.leased(0), 3, "nobody has heard of it");
    world.start(2);
    world.run_for(seconds(10));
    assert!(matches!(world.hosts[2].stopped, Some(Stop::Left { .. })));
    world.assert_right();
    let slots = world.node(0).status().slots;
    assert_eq!((slots.leased, slots.free), (2, 253), "all of it came to somebody who is there");
}

#[test]
fn members_that_leave_together_lose_no_slot_and_none_spins() {
    let mut world = World::with_members(8);
    [1, 2, 4, 5, 7].into_iter().for_each(|leaver| world.command(leaver, Command::Leave));
    world.join();
    world.run_for(seconds(30));
    assert_eq!(world.running(), 4);
    world.assert_right();
    let status = world.node(0).status();
    let here = status.members.iter().filter(|member| !member.left);
    let owned: u32 = here.map(|member| member.free + member.subnets.len() as u32).sum();
    assert_eq!((status.slots.total, owned), (255, 255), "all belongs to somebody who is here");
}

#[test]
fn the_last_member_may_just_go_and_one_without_reachable_peers_may_not() {
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
    assert_eq!(world.node(1).status().phase, Phase::Member, "goes on as before");
}

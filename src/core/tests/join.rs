//! From non-member to member with a subnet.

use super::*;
use crate::{model::MemberRecord, sim::host::Host};

#[test]
fn a_joiner_is_known_everywhere_within_a_few_round_trips() {
    let mut world = World::with_members(10);
    world.join();
    world.run_for(LATENCY * 20);
    world.assert_right();
}

#[test]
fn all_at_once_gives_every_node_its_own_subnet() {
    let mut world = World::created(settings("10.42.0.0/16", 24));
    (1..40).for_each(|_| _ = world.join());
    world.run_for(seconds(3));
    world.assert_right();
    assert_eq!(world.running(), 40, "nobody gave up");
}

#[test]
fn a_quiet_cluster_settles_and_compares_by_hashes_only() {
    let mut world = World::with_members(8);
    world.run_for(seconds(30));
    let differing = |world: &World| -> u64 {
        (0..8).map(|host| world.node(host).status().counters.syncs_different).sum()
    };
    let before = differing(&world);
    world.run_for(seconds(60));
    assert_eq!(before, differing(&world));
    assert!(world.all_settled());
}

#[test]
fn one_pair_that_never_reaches_each_other_stops_no_comparison() {
    let mut world = World::with_members(6);
    let hidden = world.add_joiner(&[1]);
    world.separate(&[0], &[hidden]);
    world.start(hidden);
    world.run_for(seconds(60));
    let joiner = world.add_joiner(&[1]);
    world.start(joiner);
    world.run_for(seconds(10));
    assert!(world.all_settled());
    world.assert_right();
}

#[test]
fn no_node_ever_asks_to_be_woken_in_the_past() {
    let mut world = World::with_members(4);
    world.isolate(1..2);
    world.command(2, Command::Leave);
    for _ in 0..2_000 {
        world.run_for(Duration::from_millis(1));
        for host in &world.hosts {
            let Some(node) = host.node() else { continue };
            let at = node.poll_timeout().expect("something is always due");
            assert!(at > world.now, "{} spins", host.name);
        }
    }
}

#[test]
fn an_answer_that_is_lost_loses_no_slot() {
    let mut world = World::with_members(3);
    // Its question arrives, and the answer, which waits for the donor's disk, does not.
    let joiner = world.join();
    while world.leased(0) < 4 {
        world.run_for(Duration::from_micros(100));
    }
    world.isolate(joiner..joiner + 1);
    world.run_for(seconds(2));
    assert_eq!(world.leased(0), 4, "granted, unknown to the joiner");
    assert_eq!(world.node(joiner).status().phase, Phase::Joining);
    world.network.mend();
    world.run_for(seconds(12));
    world.assert_right();
    assert_eq!(world.leased(0), 4, "asked again, got the same one");
}

/// Kills these members of ten, whose seed has no free slot any more, and has others join.
fn join_after_the_death_of(killed: Range<usize>, prefers: impl Fn(&World) -> Option<IpNet>) {
    let mut world = World::created(settings("10.42.0.0/16", 24));
    for _ in 1..10 {
        world.join();
        world.run_for(Duration::from_millis(300));
    }
    let preferred = prefers(&world);
    killed.clone().for_each(|host| world.kill(host));
    for number in 0..8 {
        let begun = world.now;
        let host = world.add_joiner(&[0]);
        world.hosts[host].prefers = preferred.map(|subnet| subnet.addr()).filter(|_| number == 0);
        world.start(host);
        // A preferred subnet is waited for until the call to its owner has failed.
        let patience = if preferred.is_some() && number == 0 { seconds(6) } else { seconds(2) };
        while world.subnet(host).is_none() {
            world.run_for(Duration::from_millis(5));
            assert!(world.now.since(begun) < patience, "{killed:?}, joiner {number}");
        }
    }
}

#[test]
fn donors_that_died_a_moment_ago_do_not_hold_up_joiners() {
    (1..4).for_each(|last| join_after_the_death_of(1..last + 1, |_| None));
}

#[test]
fn joiner_takes_another_subnet_as_soon_as_the_owner_of_the_preferred_one_is_known_not_to_answer() {
    join_after_the_death_of(1..2, |world| {
        let home = world.node(0).home.as_ref().expect("in a cluster");
        let owner = world.hosts[1].key;
        let mut of_owner = home.slots.runs_of(owner);
        let free = of_owner.find(|run| run.record.state == SlotState::Free).expect("free_slots");
        Some(home.cluster.settings.pool.subnet(free.start))
    });
}

#[test]
fn node_whose_only_peer_went_down_before_the_first_comparison_is_settled() {
    let mut world = World::created(settings("10.42.0.0/16", 24));
    world.run_for(seconds(2));
    let joiner = world.join();
    while world.node(0).is_alone() || !world.node(0).has_company() {
        world.run_for(Duration::from_millis(1));
    }
    world.kill(joiner);
    assert!(!world.node(0).is_settled(), "the joiner's records are not compared yet");
    world.run_for(seconds(60));
    assert!(!world.node(0).has_company());
    assert!(world.node(0).is_settled());
    world.start(joiner);
    world.run_for(seconds(30));
    assert!(world.all_settled());
    world.assert_right();
}

#[test]
fn restarted_node_without_an_answer_of_any_member_is_not_settled() {
    let mut world = World::with_members(2);
    world.kill(1);
    world.restart(0);
    world.run_for(seconds(60));
    assert!(!world.node(0).is_settled());
    world.start(1);
    world.run_for(seconds(30));
    assert!(world.all_settled());
}

#[test]
fn down_members_keep_their_subnets_and_the_way_to_them() {
    let mut world = World::with_members(4);
    world.isolate(3..4);
    world.run_for(seconds(60));
    let lost = world.hosts[3].key;
    let status = world.node(0).status();
    let member = status.members.iter().find(|m| m.node == lost).expect("still listed");
    assert_eq!(member.liveness, Some(Liveness::Down));
    world.assert_right();
    world.network.mend();
    world.run_for(seconds(30));
    assert!(world.all_settled(), "healed");
    world.assert_right();
}

#[test]
fn the_subnet_in_use_stays_when_a_second_one_turns_up() {
    let mut world = World::with_members(3);
    let (id, creator) = (world.hosts[2].key, world.hosts[0].key);
    let subnet = world.subnet(2).expect("a subnet");
    // A grant from long ago, by a seed whose answer never came: a lower slot than the one in use.
    let home = world.node(0).home.as_ref().expect("in a cluster");
    let free = home.slots.runs_of(creator).find(|run| {
        run.record.state == SlotState::Free && home.cluster.settings.pool.subnet(run.start) < subnet
    });
    let free = *free.expect("a lower free slot");
    let record = SlotRecord {
        epoch: free.record.epoch + 1,
        owner: id,
        state: SlotState::Leased,
        granter: creator,
    };
    world.oracle.lenient = true;
    let run = Run { start: free.start, len: 1, record };
    world.push(0, 2, Facts { slots: vec![run], ..Facts::default() });
    world.run_for(seconds(5));
    assert_eq!(world.subnet(2), Some(subnet), "pods live in it");
    assert_eq!(world.leased(0), 3, "the other one was given back");
    world.assert_right();
}

#[test]
fn strangers_that_are_each_others_seeds_become_patient() {
    let mut world = World::new(1, settings("10.42.0.0/16", 24));
    for seed in [1, 0] {
        let host = world.add_joiner(&[seed]);
        world.start(host);
    }
    world.run_for(seconds(60));
    let before = world.network.sent_on_wire;
    world.run_for(seconds(60));
    let greeting = 400;
    assert!(
        world.network.sent_on_wire - before < 150 * greeting,
        "{} bytes in a minute",
        world.network.sent_on_wire - before
    );
}

#[test]
fn a_full_pool_is_said_and_a_freed_subnet_is_taken() {
    let mut world = World::created(settings("10.42.0.0/24", 26));
    for _ in 1..4 {
        world.join();
        world.run_for(seconds(2));
    }
    assert_eq!(world.node(3).status().phase, Phase::Leaseless);
    let problems = world.problems(3);
    assert!(problems.contains("all 3 subnets are leased"), "{problems}");
    world.command(1, Command::Leave);
    world.run_for(seconds(5));
    assert!(world.subnet(3).is_some());
    world.assert_right();
}

#[test]
fn what_reveals_a_grant_waits_for_the_write_that_holds_it() {
    let bootstrap = Bootstrap::Create(settings("10.42.0.0/16", 24));
    let config = |index: u8, bootstrap| {
        let host = Host::new(usize::from(index), [index; 24]);
        NodeConfig { bootstrap, seeds: 1, ..host.config() }
    };
    let mut node = Node::start(Time::ZERO, config(0, bootstrap), vec![]).expect("starts");
    outputs(&mut node).for_each(drop);
    let joiner = config(1, Bootstrap::Join);
    let mut non_member = Node::start(Time::ZERO, joiner.clone(), vec![]).expect("starts");
    let hello = outputs(&mut non_member).find_map(|output| match output {
        Output::Call { bytes, .. } => Some(bytes),
        _ => None,
    });
    let bytes = hello.expect("a non-member greets its seed");
    let request = Input::Request { from: joiner.node, reply: ReplyId(1), bytes };
    node.handle(Time::ZERO + LATENCY, request);
    let mut durable = None;
    let mut waits = Vec::new();
    for output in outputs(&mut node) {
        match output {
            Output::Write { records, seq } => {
                assert!(records.iter().any(|(key, _)| matches!(key, crate::wire::Key::Slots(_))));
                durable = Some(seq);
            }
            Output::Reply { after, .. } | Output::Program { after, .. } => waits.push(after),
            Output::Send { after, .. } => waits.push(after),
            _ => {}
        }
    }
    let durable = durable.expect("a durable write");
    assert!(waits.len() >= 2 && waits.iter().all(|after| *after == durable), "{waits:?}");
}

#[test]
fn foreign_and_broken_messages_change_nothing() {
    let mut world = World::with_members(2);
    let from = world.hosts[1].key;
    let before = world.node(0).status().slots;
    for bytes in [
        vec![],
        vec![9, 9, 9],
        Frame::Push(b"junk").encode(world.node(0).cluster_id().expect("cluster")),
        Frame::Push(&Push { facts: Facts::default() }.encode())
            .encode(ClusterId::from_bytes([7; 8])),
    ] {
        world.input(0, Input::Message { from, bytes });
    }
    assert_eq!(world.node(0).status().counters.malformed, 4);
    assert_eq!(world.node(0).status().slots, before);
}

#[test]
fn clusters_that_were_founded_apart_never_merge() {
    let mut world = World::with_members(2);
    let other = World::new(2, settings("10.42.0.0/16", 24));
    let mut host = Host::new(7, [7; 24]);
    host.creates = Some(other.settings);
    let non_member = Node::start(Time::ZERO, host.config(), Vec::new()).expect("starts");
    let mine = world.node(0).cluster_id().expect("a cluster");
    let theirs = non_member.cluster_id().expect("a cluster");
    assert_ne!(mine, theirs);

    let compare = Request::Compare(non_member.roots());
    let bytes = Frame::Request(&compare.encode()).encode(theirs);
    let before = world.node(0).roots();
    let now = world.now;
    let node = world.node_mut(0);
    node.handle(now, Input::Request { from: non_member.me.node, reply: ReplyId(9), bytes });
    let answer = outputs(node).find_map(|output| match output {
        Output::Reply { bytes, .. } => read_response(&bytes).ok(),
        _ => None,
    });
    let Some(Response::Refused(refusal)) = answer else { panic!("{answer:?}") };
    let said = refusal.to_string();
    assert!(said.contains(&mine.to_string()) && said.contains(&theirs.to_string()), "{said}");
    assert_eq!(world.node(0).roots(), before, "nothing was taken over");
}

#[test]
fn copies_that_start_in_one_moment_both_hear_of_each_other() {
    let mut world = World::with_members(3);
    world.run_for(seconds(2));
    world.oracle.lenient = true;
    world.kill(2);
    // Their records have one version, and only the boot tells them apart.
    world.copy_host(2);
    world.start(2);
    world.run_for(seconds(20));
    for copy in [2, 3] {
        let problems = world.problems(copy);
        assert!(problems.contains("was copied"), "host {copy}: {problems}");
    }
}

#[test]
fn a_copied_state_directory_is_named_and_starts_no_race() {
    let mut world = World::with_members(3);
    world.run_for(seconds(5));
    // A second process with the same key and disk tells about itself, again and again.
    for round in 0..20 {
        let me = world.node(2).me.clone();
        let starts = me.version.starts + 1;
        let version = crate::model::Version { starts, change: 0 };
        let clone = MemberRecord { version, boot: BootId::from_bytes([99; 8]), ..me };
        world.push(0, 2, Facts { members: vec![clone], ..Facts::default() });
        assert_eq!(world.node(2).status().counters.duplicates, round + 1);
    }
    assert!(world.node(2).me.version.starts < 10, "it went above the other once, not twenty times");
    assert!(world.problems(2).contains("was copied"));
    // Its subnet may be in use on both hosts: nobody may be given it.
    world.command(2, Command::Leave);
    world.run_for(seconds(5));
    assert_eq!(world.node(2).status().phase, Phase::Member);
    assert_eq!(world.leased(0), 3);
}

#[test]
fn joiner_whose_granted_subnet_leads_elsewhere_on_its_host_takes_a_spare_one() {
    let probe = World::with_members(2);
    let granted = probe.subnet(1).expect("a subnet");
    // The same world, in which that subnet is on another interface of the joiner's host.
    let mut world = World::created(settings("10.42.0.0/16", 24));
    let joiner = world.add_joiner(&[0]);
    world.hosts[joiner].occupied = vec![granted];
    world.start(joiner);
    world.run_for(seconds(30));
    let taken = world.subnet(joiner).expect("a subnet");
    assert_ne!(taken, granted);
    assert_eq!(world.leased(0), 2, "the other one is free again");
    world.assert_right();
    // The whole pool leads elsewhere: any subnet is better than none.
    let joiner = world.add_joiner(&[0]);
    world.hosts[joiner].occupied = vec!["10.0.0.0/8".parse().expect("a network")];
    world.start(joiner);
    world.run_for(seconds(30));
    assert!(world.subnet(joiner).is_some());
    world.assert_right();
    probe.assert_right();
}

#[test]
fn restarted_node_whose_subnet_leads_elsewhere_by_now_moves_to_a_spare_one() {
    let mut world = World::with_members(3);
    let before = world.subnet(2).expect("a subnet");
    world.kill(2);
    world.run_for(seconds(1));
    world.hosts[2].occupied = vec![before];
    world.start(2);
    world.run_for(seconds(15));
    assert_ne!(world.subnet(2), Some(before));
    world.assert_right();
}

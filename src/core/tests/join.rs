//! Tests of joining, and of the comparisons that follow.

use super::*;
use crate::sim::host::Host;

#[test]
fn joiner_is_known_everywhere_within_a_few_round_trips() {
    let mut world = World::with_members(10);
    world.join();
    world.run_for(LATENCY * 20);
    world.assert_converged_and_safe();
}

#[test]
fn simultaneous_joiners_get_different_subnets() {
    let mut world = World::created(settings("10.42.0.0/16", 24));
    (1..40).for_each(|_| _ = world.join());
    world.run_for(seconds(3));
    world.assert_converged_and_safe();
    assert_eq!(world.running(), 40, "all nodes still run");
}

#[test]
fn seed_of_a_small_pool_has_free_slots_for_each_of_many_joiners() {
    let mut world = World::created(settings("10.42.0.0/16", 24));
    let mut fewest = u32::MAX;
    for joined in 1..=120 {
        world.join();
        world.run_for(Duration::from_millis(100));
        let slots = &world.node(0).replica.cluster_state.as_ref().expect("in a cluster").slots;
        let free = slots.free_count(world.hosts[0].key);
        assert!(free > 0, "none after {joined} joiners");
        fewest = fewest.min(free);
    }
    assert!(fewest < supply::LOW, "it has obtained slots of its joiners");
    world.run_for(seconds(3));
    world.assert_converged_and_safe();
}

#[test]
fn idle_cluster_settles_and_compares_by_hashes_only() {
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
fn pair_without_connection_does_not_stop_comparisons() {
    let mut world = World::with_members(6);
    let hidden = world.add_joiner(&[1]);
    world.separate(&[0], &[hidden]);
    world.start(hidden);
    world.run_for(seconds(60));
    let joiner = world.add_joiner(&[1]);
    world.start(joiner);
    world.run_for(seconds(10));
    assert!(world.all_settled());
    world.assert_converged_and_safe();
}

#[test]
fn timeout_is_never_due_in_the_past() {
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
fn lost_grant_response_loses_no_slot() {
    let mut world = World::with_members(3);
    // Its request arrives; the response, which waits for the granter's disk, does not.
    let joiner = world.join();
    while world.leased(0) < 4 {
        world.run_for(Duration::from_micros(100));
    }
    world.isolate(joiner..joiner + 1);
    world.run_for(seconds(2));
    assert_eq!(world.leased(0), 4, "granted, but unknown to the joiner");
    assert_eq!(world.node(joiner).status().phase, Phase::Joining);
    world.network.mend();
    world.run_for(seconds(12));
    world.assert_converged_and_safe();
    assert_eq!(world.leased(0), 4, "the repeated request got the same slot");
}

/// Kills these members of ten whose seed has no free slot left, and lets further nodes join.
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
        // The joiner waits for a preferred subnet until the call to its owner has failed.
        let patience = if preferred.is_some() && number == 0 { seconds(6) } else { seconds(2) };
        while world.subnet(host).is_none() {
            world.run_for(Duration::from_millis(5));
            assert!(world.now.since(begun) < patience, "{killed:?}, joiner {number}");
        }
    }
}

#[test]
fn recently_dead_granters_do_not_delay_joiners() {
    (1..4).for_each(|last| join_after_the_death_of(1..last + 1, |_| None));
}

#[test]
fn joiner_takes_another_subnet_when_the_owner_of_the_preferred_one_does_not_answer() {
    join_after_the_death_of(1..2, |world| {
        let cluster_state = world.node(0).replica.cluster_state.as_ref().expect("in a cluster");
        let owner = world.hosts[1].key;
        let mut of_owner = cluster_state.slots.runs_of(owner);
        let free = of_owner.find(|run| run.record.state == SlotState::Free).expect("a free slot");
        Some(cluster_state.cluster.settings.pool.subnet(free.start))
    });
}

#[test]
fn node_whose_only_peer_went_down_before_the_first_comparison_is_settled() {
    let mut world = World::created(settings("10.42.0.0/16", 24));
    world.run_for(seconds(2));
    let joiner = world.join();
    while world.node(0).is_alone() || !world.node(0).has_active_peer() {
        world.run_for(Duration::from_millis(1));
    }
    world.kill(joiner);
    assert!(!world.node(0).is_settled(), "no comparison with the joiner yet");
    world.run_for(seconds(60));
    assert!(!world.node(0).has_active_peer());
    assert!(world.node(0).is_settled());
    world.start(joiner);
    world.run_for(seconds(30));
    assert!(world.all_settled());
    world.assert_converged_and_safe();
}

#[test]
fn restarted_node_without_any_answer_is_not_settled() {
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
fn down_members_keep_their_subnets_and_routes() {
    let mut world = World::with_members(4);
    world.isolate(3..4);
    world.run_for(seconds(60));
    let lost = world.hosts[3].key;
    let status = world.node(0).status();
    let member = status.members.iter().find(|m| m.node == lost).expect("still listed");
    assert_eq!(member.liveness, Some(Liveness::Down));
    world.assert_converged_and_safe();
    world.network.mend();
    world.run_for(seconds(30));
    assert!(world.all_settled(), "healed");
    world.assert_converged_and_safe();
}

#[test]
fn present_subnet_is_kept_when_a_second_one_is_granted() {
    let mut world = World::with_members(3);
    let (id, creator) = (world.hosts[2].key, world.hosts[0].key);
    let subnet = world.subnet(2).expect("a subnet");
    // An old grant of a lower slot, by a seed whose response never arrived.
    let cluster_state = world.node(0).replica.cluster_state.as_ref().expect("in a cluster");
    let free = cluster_state.slots.runs_of(creator).find(|run| {
        run.record.state == SlotState::Free
            && cluster_state.cluster.settings.pool.subnet(run.start) < subnet
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
    assert_eq!(world.subnet(2), Some(subnet), "pods have addresses in it");
    assert_eq!(world.leased(0), 3, "the other one was released");
    world.assert_converged_and_safe();
}

#[test]
fn non_members_that_are_each_others_seeds_retry_ever_more_rarely() {
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
fn full_pool_is_a_problem_and_a_freed_subnet_is_leased() {
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
    world.assert_converged_and_safe();
}

#[test]
fn outputs_that_reveal_a_grant_wait_for_its_write() {
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
    let bytes = hello.expect("a non-member sends a hello to its seed");
    let request = Input::Request { from: joiner.node, reply: ReplyId(1), bytes };
    // Later than the pause after the view of the start.
    node.handle(Time::ZERO + LATENCY * 10, request);
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
fn foreign_and_malformed_messages_change_nothing() {
    let mut world = World::with_members(2);
    let from = world.hosts[1].key;
    let before = world.node(0).status().slots;
    for bytes in [
        vec![],
        vec![9, 9, 9],
        Frame::Push(b"junk").encode(world.node(0).replica.cluster_id().expect("cluster")),
        Frame::Push(&Push { facts: Facts::default() }.encode())
            .encode(ClusterId::from_bytes([7; 8])),
    ] {
        world.input(0, Input::Message { from, bytes });
    }
    assert_eq!(world.node(0).status().counters.malformed, 4);
    assert_eq!(world.node(0).status().slots, before);
}

#[test]
fn separately_created_clusters_never_merge() {
    let mut world = World::with_members(2);
    let other = World::new(2, settings("10.42.0.0/16", 24));
    let mut host = Host::new(7, [7; 24]);
    host.creates = Some(other.settings);
    let non_member = Node::start(Time::ZERO, host.config(), Vec::new()).expect("starts");
    let mine = world.node(0).replica.cluster_id().expect("a cluster");
    let theirs = non_member.replica.cluster_id().expect("a cluster");
    assert_ne!(mine, theirs);

    let compare = Request::Compare(non_member.roots());
    let bytes = Frame::Request(&compare.encode()).encode(theirs);
    let before = world.node(0).roots();
    let now = world.now;
    let node = world.node_mut(0);
    node.handle(now, Input::Request { from: non_member.replica.me.node, reply: ReplyId(9), bytes });
    let answer = outputs(node).find_map(|output| match output {
        Output::Reply { bytes, .. } => read_response(&bytes).ok(),
        _ => None,
    });
    let Some(Response::Refused(refusal)) = answer else { panic!("{answer:?}") };
    let said = refusal.to_string();
    assert!(said.contains(&mine.to_string()) && said.contains(&theirs.to_string()), "{said}");
    assert_eq!(world.node(0).roots(), before, "no fact was merged");
}

#[test]
fn copies_that_start_at_once_both_report_a_duplicate_identity() {
    let mut world = World::with_members(3);
    world.run_for(seconds(2));
    world.oracle.lenient = true;
    world.kill(2);
    // Their records have the same version and differ in the boot id only.
    world.copy_host(2);
    world.start(2);
    world.run_for(seconds(20));
    for copy in [2, 3] {
        let problems = world.problems(copy);
        assert!(problems.contains("was copied"), "host {copy}: {problems}");
    }
}

#[test]
fn copied_state_directory_is_a_problem_and_starts_no_race() {
    let mut world = World::with_members(3);
    world.run_for(seconds(5));
    // A second process with the same key and disk publishes its record again and again.
    for round in 0..20 {
        let me = world.node(2).replica.me.clone();
        let starts = me.version.starts + 1;
        let version = crate::model::Version { starts, change: 0 };
        let clone = MemberRecord { version, boot: BootId::from_bytes([99; 8]), ..me };
        world.push(0, 2, Facts { members: vec![clone], ..Facts::default() });
        assert_eq!(world.node(2).status().counters.duplicates, round + 1);
    }
    assert!(
        world.node(2).replica.me.version.starts < 10,
        "it exceeded the other version once, not twenty times"
    );
    assert!(world.problems(2).contains("was copied"));
    // Its subnet may be in use on both hosts, so it must not be handed over.
    world.command(2, Command::Leave);
    world.run_for(seconds(5));
    assert_eq!(world.node(2).status().phase, Phase::Member);
    assert_eq!(world.leased(0), 3);
}

#[test]
fn joiner_whose_granted_subnet_is_routed_elsewhere_leases_a_free_slot() {
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
    assert_eq!(world.leased(0), 2, "the granted slot is free again");
    world.assert_converged_and_safe();
    // The host routes the whole pool elsewhere: any subnet is better than none.
    let joiner = world.add_joiner(&[0]);
    world.hosts[joiner].occupied = vec!["10.0.0.0/8".parse().expect("a network")];
    world.start(joiner);
    world.run_for(seconds(30));
    assert!(world.subnet(joiner).is_some());
    world.assert_converged_and_safe();
    probe.assert_converged_and_safe();
}

#[test]
fn restarted_node_whose_subnet_is_routed_elsewhere_leases_a_free_slot() {
    let mut world = World::with_members(3);
    let before = world.subnet(2).expect("a subnet");
    world.kill(2);
    world.run_for(seconds(1));
    world.hosts[2].occupied = vec![before];
    world.start(2);
    world.run_for(seconds(15));
    assert_ne!(world.subnet(2), Some(before));
    world.assert_converged_and_safe();
}

#[test]
fn preferred_subnet_of_another_member_is_a_notice() {
    let mut world = World::with_members(2);
    let taken = world.subnet(0).expect("a subnet");
    let second = world.subnet(1).expect("a subnet");
    let joiner = world.add_joiner(&[1]);
    world.hosts[joiner].prefers = Some(taken.addr());
    world.start(joiner);
    world.run_for(seconds(5));
    let own = world.subnet(joiner).expect("a subnet");
    let notice = world.node(joiner).missed_preference().expect("a notice").what;
    assert_eq!(notice, format!("preferred {taken} belongs to n0: this node has {own}"));
    assert_eq!(world.node(0).missed_preference(), None, "it prefers none");
    // The owner keeps its subnet at later starts too.
    world.hosts[1].prefers = Some(second.addr());
    world.restart(1);
    world.run_for(seconds(5));
    assert_eq!(world.node(1).missed_preference(), None);
}

#[test]
fn preferred_subnet_in_a_network_of_the_host_is_not_called_taken() {
    let mut world = World::new(1, settings("10.42.0.0/16", 24));
    let creator = world.add_creator();
    let network: IpNet = "10.42.7.0/24".parse().expect("a network");
    world.hosts[creator].prefers = Some(network.addr());
    world.hosts[creator].occupied = vec![network];
    world.start(creator);
    world.run_for(seconds(1));
    let own = world.subnet(creator).expect("a subnet");
    let notice = world.node(creator).missed_preference().expect("a notice").what;
    assert_eq!(
        notice,
        format!(
            "preferred {network} is not used, because another interface or route of this host has \
             {network}: this node has {own}"
        )
    );
}

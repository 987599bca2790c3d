//! Tests of forgetting and reclaiming.

use super::*;

impl World {
    fn forget_by_name(&mut self, at: usize, whom: &str) -> Result<NodeId, CannotForget> {
        let now = self.now;
        self.node_mut(at).forget(now, whom, false)
    }

    /// Destroys a host, and waits until all members hold it as down.
    pub(super) fn lose(&mut self, host: usize) -> NodeId {
        self.destroy(host);
        self.run_for(seconds(20));
        self.hosts[host].key
    }

    fn forget_lost(&mut self, at: usize, lost: NodeId) {
        self.forget(at, lost, false);
        assert_eq!(self.oracle.reached.get("forget refused"), None);
    }
}

/// Creates a world in which the third of three members has left, and its successor is a joiner that the
/// other two do not know. Returns the joiner and the record of the member that left.
fn member_left_to_unknown_successor() -> (World, usize, Vec<MemberRecord>) {
    let mut world = World::with_members(3);
    let joiner = world.add_joiner(&[2]);
    world.separate(&[0, 1], &[2, joiner]);
    world.start(joiner);
    world.run_for(seconds(3));
    assert!(world.subnet(joiner).is_some(), "granted");
    // In its part of the network only the joiner can be the successor. The others learn of it from one
    // record.
    world.run_for(seconds(30));
    world.command(2, Command::Leave);
    world.run_for(seconds(3));
    assert!(matches!(world.hosts[2].stopped, Some(Stop::Left { .. })));
    let record = world.node(joiner).replica.directory.iter().find(|record| record.has_left());
    let members = vec![record.expect("the record of the member that left").clone()];
    (world, joiner, members)
}

#[test]
fn forgotten_member_loses_its_slots_and_is_in_no_view() {
    let mut world = World::with_members(4);
    let lost = world.lose(3);
    world.forget_lost(1, lost);
    world.run_for(seconds(3));
    let slots = world.node(0).status().slots;
    assert_eq!((slots.leased, slots.free), (3, 252));
    assert!(world.node(2).status().members.iter().any(|m| m.node == lost && m.forgotten));
    world.assert_converged_and_safe();
}

#[test]
fn host_installed_again_keeps_its_name_and_its_former_self_while_it_is_down() {
    let mut world = World::with_members(3);
    let former = world.lose(2);
    world.hosts[2].new_identity();
    world.hosts[2].is_powered = true;
    world.move_host(2, world.hosts[2].underlay);
    world.start(2);
    world.run_for(seconds(5));
    let present = world.hosts[2].key;
    world.kill(2);
    world.run_for(seconds(20));
    let member = |at: usize, node| {
        let members = world.node(at).status().members;
        members.into_iter().find(|member| member.node == node).expect("a member")
    };
    for at in [0, 1] {
        let (former, present) = (member(at, former), member(at, present));
        assert_eq!((former.former_self, present.former_self), (true, false));
        assert_eq!(present.label, "n2");
        assert!(former.label.starts_with("n2~"), "{}", former.label);
    }
}

#[test]
fn member_whose_kernel_answers_is_forgotten_only_by_force() {
    let mut world = World::with_members(3);
    let lost = world.lose(2);
    let now = world.now;
    let hosts = [(lost, Some(Duration::from_micros(300)))].into();
    world.node_mut(0).handle(now, Input::RunningHosts(hosts));
    let refused = world.forget_by_name(0, "n2").expect_err("it runs").to_string();
    let said = "n2 is down for gossip, but its kernel answers (0.3 ms): that host runs";
    assert!(refused.starts_with(said), "{refused}");
    assert_eq!(world.node_mut(0).forget(now, "n2", true), Ok(lost));
}

#[test]
fn slots_are_reclaimed_only_after_every_member_has_acknowledged() {
    let mut world = World::with_members(4);
    let lost = world.lose(3);
    world.isolate(2..3);
    world.forget_lost(0, lost);
    world.run_for(seconds(30));
    assert_eq!(world.leased(0), 4, "one member has not acknowledged");
    let reclaiming = &world.node(0).status().reclaiming[0];
    assert_eq!(reclaiming.waits_for, Some(vec!["n2".to_owned()]));
    world.network.mend();
    world.run_for(seconds(15));
    assert_eq!(world.leased(0), 3);
    world.assert_converged_and_safe();
}

#[test]
fn acknowledged_member_is_asked_again_when_an_unacknowledged_one_is_gone() {
    let mut world = World::with_members(4);
    // Host 2 grants to a joiner that only it and its neighbor know, and dies.
    let joiner = world.add_joiner(&[3]);
    world.separate(&[0, 1], &[2, 3, joiner]);
    world.start(joiner);
    world.run_for(seconds(3));
    let subnet = world.subnet(joiner).expect("granted");
    let lost = world.lose(3);
    world.forget_lost(0, lost);
    world.run_for(seconds(5));
    // Its neighbor sends this to a member that has already acknowledged, and is gone before it is asked.
    world.network.mend();
    world.separate(&[0], &[1, 2, joiner]);
    world.run_for(seconds(15));
    let neighbour = world.lose(2);
    world.forget_lost(0, neighbour);
    world.run_for(seconds(5));
    world.network.mend();
    world.run_for(seconds(30));
    assert_eq!(world.subnet(joiner), Some(subnet));
    world.assert_converged_and_safe();
}

#[test]
fn reclaim_waits_for_the_receiver_of_a_leaving_members_records() {
    let (mut world, joiner, members) = member_left_to_unknown_successor();
    let subnet = world.subnet(joiner).expect("granted");
    world.push(1, 0, Facts { members, ..Facts::default() });
    world.run_for(seconds(20));
    assert_eq!(world.node(0).status().counters.reclaims, 0);
    world.network.mend();
    world.run_for(seconds(30));
    assert_eq!(world.subnet(joiner), Some(subnet));
    world.assert_converged_and_safe();
}

#[test]
fn node_known_only_from_a_left_members_record_can_be_forgotten() {
    let (mut world, joiner, members) = member_left_to_unknown_successor();
    // The joiner dies before any other member knows it.
    let lost = world.hosts[joiner].key;
    world.destroy(joiner);
    world.push(1, 0, Facts { members, ..Facts::default() });
    world.run_for(seconds(10));
    let reclaims = |world: &World| -> u64 {
        (0..2).map(|host| world.node(host).status().counters.reclaims).sum()
    };
    assert_eq!(reclaims(&world), 0);
    world.forget_lost(0, lost);
    world.run_for(seconds(10));
    assert!(reclaims(&world) > 0);
    world.assert_converged_and_safe();
}

#[test]
fn forget_is_refused_right_after_a_start() {
    let mut world = World::with_members(2);
    world.kill(0);
    world.network.latency = (seconds(1), seconds(1));
    world.start(0);
    assert_eq!(world.forget_by_name(0, "n1"), Err(CannotForget::Alive("n1".to_owned())));
}

#[test]
fn forced_forget_does_not_wait_for_acknowledgements() {
    let mut world = World::with_members(4);
    let lost = world.lose(3);
    world.isolate(2..3);
    world.oracle.lenient = true;
    world.forget(0, lost, true);
    world.run_for(seconds(3));
    assert_eq!(world.leased(0), 3);
}

#[test]
fn forget_refuses_alive_and_unknown_members_and_itself() {
    let mut world = World::with_members(2);
    assert_eq!(world.forget_by_name(0, "n1"), Err(CannotForget::Alive("n1".to_owned())));
    assert_eq!(world.forget_by_name(0, "n0"), Err(CannotForget::Myself));
    assert_eq!(world.forget_by_name(0, "n7"), Err(CannotForget::Unknown("n7".to_owned())));
}

#[test]
fn forgotten_member_that_returns_is_expelled_and_joins_as_a_new_node() {
    let mut world = World::with_members(3);
    world.kill(2);
    world.run_for(seconds(20));
    let lost = world.hosts[2].key;
    // The host is powered off, because its kernel would still use the subnet otherwise.
    world.cut_power(2);
    world.forget_lost(0, lost);
    world.run_for(seconds(3));
    world.start(2);
    world.run_for(seconds(3));
    assert_eq!(world.oracle.reached.get("expelled"), Some(&1));
    assert_ne!(world.hosts[2].key, lost);
    world.assert_converged_and_safe();
}

#[test]
fn successor_that_is_gone_is_replaced() {
    let mut world = World::with_members(4);
    let lost = world.lose(3);
    // The successor loses contact with one member, and is gone before it can reclaim.
    world.isolate(2..3);
    world.forget_lost(0, lost);
    world.run_for(seconds(2));
    world.destroy(0);
    world.network.mend();
    world.run_for(seconds(20));
    let successor = world.hosts[0].key;
    world.forget_lost(1, successor);
    world.run_for(seconds(30));
    assert_eq!(world.leased(1), 2, "{:?}", world.node(1).status().reclaiming);
    world.assert_converged_and_safe();
}

#[test]
fn late_grant_of_a_forgotten_node_goes_to_its_successor_unused() {
    let late_grant = |world: &World, lost: NodeId| {
        let cluster_state = world.node(0).replica.cluster_state.as_ref().expect("in a cluster");
        let mut free_slots =
            cluster_state.slots.runs_of(lost).filter(|run| run.record.state == SlotState::Free);
        let free = *free_slots.next().expect("a free slot");
        let record = SlotRecord {
            epoch: free.record.epoch + 1,
            owner: world.hosts[1].key,
            state: SlotState::Leased,
            granter: lost,
        };
        Run { start: free.start, len: 1, record }
    };
    // A reclaim by the successor exceeds the grant's epoch.
    let mut world = World::with_members(3);
    let lost = world.lose(2);
    let run = late_grant(&world, lost);
    world.forget_lost(0, lost);
    world.run_for(seconds(3));
    let (now, facts) = (world.now, Facts { slots: vec![run], ..Facts::default() });
    assert!(world.node_mut(1).absorb(now, &facts, None).0.slots.is_empty());
    // Before the reclaim, the receiver passes the granted slot on.
    let mut world = World::with_members(3);
    let lost = world.lose(2);
    let run = late_grant(&world, lost);
    world.isolate(0..1);
    let (now, successor) = (world.now, world.hosts[0].key);
    let forget = Forget { node: lost, round: 1, forced: false, successor };
    let node = world.node_mut(1);
    node.absorb(now, &Facts { forgets: vec![forget], ..Facts::default() }, None);
    node.absorb(now, &Facts { slots: vec![run], ..Facts::default() }, None);
    assert_eq!(node.counters.declined, 1);
    let cluster_state = node.replica.cluster_state.as_ref().expect("in a cluster");
    assert_eq!(cluster_state.slots.record(run.start).expect("known").owner, successor);
}

#[test]
fn re_created_node_takes_its_predecessors_subnet() {
    let mut world = World::with_members(3);
    let subnet = world.subnet(2);
    world.lose(2);
    let new = world.add_joiner(&[0]);
    world.hosts[new].name = "n2".to_owned();
    world.hosts[new].replaces = true;
    world.start(new);
    world.run_for(seconds(20));
    assert_eq!(world.subnet(new), subnet);
    assert_eq!(world.leased(0), 3, "the subnet that it used before was released");
    world.assert_converged_and_safe();
}

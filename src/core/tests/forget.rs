//! Forgetting, and what comes of it.

use super::*;

impl World {
    fn forget_by_name(&mut self, at: usize, whom: &str) -> Result<NodeId, CannotForget> {
        let now = self.now;
        self.node_mut(at).forget(now, whom, false)
    }

    /// Gone for good: it answers nobody, and everybody has noticed.
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

/// The third of three has left, and its successor is a joiner that the other two have never met. Gives the
/// joiner and the leaver's record.
fn a_leaver_and_its_heir() -> (World, usize, Vec<MemberRecord>) {
    let mut world = World::with_members(3);
    let joiner = world.add_joiner(&[2]);
    world.separate(&[0, 1], &[2, joiner]);
    world.start(joiner);
    world.run_for(seconds(3));
    assert!(world.subnet(joiner).is_some(), "granted");
    // In their half only the joiner can be the successor; of it the others hear by one record alone.
    world.run_for(seconds(30));
    world.command(2, Command::Leave);
    world.run_for(seconds(3));
    assert!(matches!(world.hosts[2].stopped, Some(Stop::Left { .. })));
    let record = world.node(joiner).directory.iter().find(|record| record.has_left());
    let members = vec![record.expect("the leaver").clone()];
    (world, joiner, members)
}

#[test]
fn a_forgotten_members_subnets_are_spares_again_and_it_is_in_no_view() {
    let mut world = World::with_members(4);
    let lost = world.lose(3);
    world.forget_lost(1, lost);
    world.run_for(seconds(3));
    let slots = world.node(0).status().slots;
    assert_eq!((slots.leased, slots.free), (3, 252));
    assert!(world.node(2).status().members.iter().any(|m| m.node == lost && m.forgotten));
    world.assert_right();
}

#[test]
fn nothing_is_reclaimed_before_every_member_has_acknowledged() {
    let mut world = World::with_members(4);
    let lost = world.lose(3);
    world.isolate(2..3);
    world.forget_lost(0, lost);
    world.run_for(seconds(30));
    assert_eq!(world.leased(0), 4, "one member was not asked yet");
    let reclaiming = &world.node(0).status().reclaiming[0];
    assert_eq!(reclaiming.waits_for, Some(vec!["n2".to_owned()]));
    world.network.mend();
    world.run_for(seconds(15));
    assert_eq!(world.leased(0), 3);
    world.assert_right();
}

#[test]
fn who_acknowledged_is_asked_again_when_one_who_had_not_is_gone() {
    let mut world = World::with_members(4);
    // The third grants to a joiner that it and its neighbour alone have met, and dies.
    let joiner = world.add_joiner(&[3]);
    world.separate(&[0, 1], &[2, 3, joiner]);
    world.start(joiner);
    world.run_for(seconds(3));
    let subnet = world.subnet(joiner).expect("granted");
    let lost = world.lose(3);
    world.forget_lost(0, lost);
    world.run_for(seconds(5));
    // Its neighbour tells one who has acknowledged already, and is gone before it could be asked itself.
    world.network.mend();
    world.separate(&[0], &[1, 2, joiner]);
    world.run_for(seconds(15));
    let neighbour = world.lose(2);
    world.forget_lost(0, neighbour);
    world.run_for(seconds(5));
    world.network.mend();
    world.run_for(seconds(30));
    assert_eq!(world.subnet(joiner), Some(subnet));
    world.assert_right();
}

#[test]
fn a_leaver_names_who_knows_and_nothing_is_reclaimed_without_that_one() {
    let (mut world, joiner, members) = a_leaver_and_its_heir();
    let subnet = world.subnet(joiner).expect("granted");
    world.push(1, 0, Facts { members, ..Facts::default() });
    world.run_for(seconds(20));
    assert_eq!(world.node(0).status().counters.reclaims, 0);
    world.network.mend();
    world.run_for(seconds(30));
    assert_eq!(world.subnet(joiner), Some(subnet));
    world.assert_right();
}

#[test]
fn whom_only_a_leavers_record_names_can_be_forgotten() {
    let (mut world, joiner, members) = a_leaver_and_its_heir();
    // Nobody there has ever met it, and it dies.
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
    world.assert_right();
}

#[test]
fn right_after_a_start_nobody_is_known_to_be_gone() {
    let mut world = World::with_members(2);
    world.kill(0);
    world.network.latency = (seconds(1), seconds(1));
    world.start(0);
    assert_eq!(world.forget_by_name(0, "n1"), Err(CannotForget::Alive("n1".to_owned())));
}

#[test]
fn force_does_not_wait() {
    let mut world = World::with_members(4);
    let lost = world.lose(3);
    world.isolate(2..3);
    world.oracle.lenient = true;
    world.forget(0, lost, true);
    world.run_for(seconds(3));
    assert_eq!(world.leased(0), 3);
}

#[test]
fn who_is_there_or_unknown_is_not_forgotten() {
    let mut world = World::with_members(2);
    assert_eq!(world.forget_by_name(0, "n1"), Err(CannotForget::Alive("n1".to_owned())));
    assert_eq!(world.forget_by_name(0, "n0"), Err(CannotForget::Myself));
    assert_eq!(world.forget_by_name(0, "n7"), Err(CannotForget::Unknown("n7".to_owned())));
}

#[test]
fn a_forgotten_member_that_comes_back_is_told_and_joins_as_a_new_one() {
    let mut world = World::with_members(3);
    world.kill(2);
    world.run_for(seconds(20));
    let lost = world.hosts[2].key;
    // The machine is off as well, or its kernel would use the subnet still.
    world.cut_power(2);
    world.forget_lost(0, lost);
    world.run_for(seconds(3));
    world.start(2);
    world.run_for(seconds(3));
    assert_eq!(world.oracle.reached.get("expelled"), Some(&1));
    assert_ne!(world.hosts[2].key, lost);
    world.assert_right();
}

#[test]
fn an_heir_that_is_gone_itself_is_replaced() {
    let mut world = World::with_members(4);
    let lost = world.lose(3);
    // The successor hears from one member no more, and is gone before it could take over.
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
    world.assert_right();
}

#[test]
fn what_a_forgotten_node_granted_late_goes_to_its_heir_unused() {
    let late_grant = |world: &World, lost: NodeId| {
        let home = world.node(0).home.as_ref().expect("in a cluster");
        let mut free_slots =
            home.slots.runs_of(lost).filter(|run| run.record.state == SlotState::Free);
        let free = *free_slots.next().expect("a free slot");
        let record = SlotRecord {
            epoch: free.record.epoch + 1,
            owner: world.hosts[1].key,
            state: SlotState::Leased,
            granter: lost,
        };
        Run { start: free.start, len: 1, record }
    };
    // Once the successor has reclaimed the slot, that alone outranks it ...
    let mut world = World::with_members(3);
    let lost = world.lose(2);
    let run = late_grant(&world, lost);
    world.forget_lost(0, lost);
    world.run_for(seconds(3));
    let (now, facts) = (world.now, Facts { slots: vec![run], ..Facts::default() });
    assert!(world.node_mut(1).absorb(now, &facts, None).0.slots.is_empty());
    // ... and before that, the grant is passed on.
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
    let home = node.home.as_ref().expect("in a cluster");
    assert_eq!(home.slots.record(run.start).expect("known").owner, successor);
}

#[test]
fn a_node_made_anew_takes_its_predecessors_subnet() {
    let mut world = World::with_members(3);
    let subnet = world.subnet(2);
    world.lose(2);
    let anew = world.add_joiner(&[0]);
    world.hosts[anew].name = "n2".to_owned();
    world.hosts[anew].replaces = true;
    world.start(anew);
    world.run_for(seconds(20));
    assert_eq!(world.subnet(anew), subnet);
    assert_eq!(world.leased(0), 3, "the one it used meanwhile was given back");
    world.assert_right();
}

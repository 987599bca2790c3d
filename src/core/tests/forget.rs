//! Forgetting, and what comes of it.

use super::*;
use crate::core::CannotForget;

impl World {
    fn forget(&mut self, n: usize, whom: &str, force: bool) -> Result<NodeId, CannotForget> {
        let (id, now) = (self.order[n], self.now);
        let node = self.hosts.get_mut(&id).and_then(|host| host.node.as_mut()).expect("runs");
        let result = node.forget(now, whom, force);
        self.drain(id);
        result
    }

    /// Gone for good: it answers nobody, and everybody has noticed.
    fn lose(&mut self, n: usize) -> NodeId {
        let id = self.order[n];
        self.stop(id);
        self.run_for(Duration::from_secs(20));
        id
    }

    fn leased(&self, n: usize) -> u32 {
        self.node(n).status().slots.leased
    }
}

#[test]
fn a_forgotten_members_subnets_are_spares_again_and_it_is_in_no_view() {
    let mut world = World::with_members(4);
    let lost = world.lose(3);
    assert_eq!(world.forget(1, "n4", false), Ok(lost));
    world.run_for(Duration::from_secs(3));
    let slots = world.node(0).status().slots;
    assert_eq!((slots.leased, slots.spare), (3, 252));
    assert!(world.node(2).status().members.iter().any(|m| m.node == lost && m.forgotten));
    world.assert_mesh();
}

#[test]
fn nothing_is_reclaimed_before_every_member_has_acknowledged() {
    let mut world = World::with_members(4);
    world.lose(3);
    let away = world.order[2];
    world.cut.insert(away);
    world.forget(0, "n4", false).expect("gone");
    world.run_for(Duration::from_secs(30));
    assert_eq!(world.leased(0), 4, "one member was not asked yet");
    let reclaiming = &world.node(0).status().reclaiming[0];
    assert_eq!(reclaiming.waits_for, Some(vec!["n3".to_owned()]));
    world.cut.clear();
    world.run_for(Duration::from_secs(15));
    assert_eq!(world.leased(0), 3);
    world.assert_mesh();
}

#[test]
fn force_does_not_wait() {
    let mut world = World::with_members(4);
    world.lose(3);
    world.cut.insert(world.order[2]);
    world.forget(0, "n4", true).expect("gone");
    world.run_for(Duration::from_secs(3));
    assert_eq!(world.leased(0), 3);
}

#[test]
fn who_is_there_or_unknown_is_not_forgotten() {
    let mut world = World::with_members(2);
    assert_eq!(world.forget(0, "n2", false), Err(CannotForget::Alive("n2".to_owned())));
    assert_eq!(world.forget(0, "n1", false), Err(CannotForget::Myself));
    assert_eq!(world.forget(0, "n7", false), Err(CannotForget::Unknown("n7".to_owned())));
}

#[test]
fn a_forgotten_member_that_comes_back_is_told_and_stops() {
    let mut world = World::with_members(3);
    let lost = world.lose(2);
    world.forget(0, "n3", false).expect("gone");
    world.run_for(Duration::from_secs(3));
    world.start(lost);
    world.run_for(Duration::from_secs(3));
    let stopped = world.hosts[&lost].stopped.clone();
    assert_eq!(stopped, Some(Stop::Expelled { heir: Some(world.order[0]) }));
}

#[test]
fn an_heir_that_is_gone_itself_is_replaced() {
    let mut world = World::with_members(4);
    world.lose(3);
    // The heir hears from nobody any more before it could take over.
    let third = world.order[2];
    world.cut.insert(third);
    world.forget(0, "n4", false).expect("gone");
    world.run_for(Duration::from_secs(2));
    world.lose(0);
    world.cut.clear();
    world.run_for(Duration::from_secs(10));
    world.forget(1, "n1", false).expect("gone");
    world.run_for(Duration::from_secs(30));
    assert_eq!(world.leased(1), 2, "{:?}", world.node(1).status().reclaiming);
    world.assert_mesh();
}

#[test]
fn what_a_forgotten_node_granted_late_goes_to_its_heir_unused() {
    let mut world = World::with_members(3);
    let lost = world.lose(2);
    let spare = {
        let home = world.node(0).home.as_ref().expect("in a cluster");
        *home.slots.runs_of(lost).find(|r| r.record.state == SlotState::Spare).expect("a spare")
    };
    let away = world.order[1];
    world.forget(0, "n3", false).expect("gone");
    world.run_for(Duration::from_secs(3));
    // Only now does its grant to the second node arrive, as from a slow network.
    let record = crate::model::SlotRecord {
        epoch: spare.record.epoch + 1,
        owner: away,
        state: SlotState::Leased,
        granter: lost,
    };
    let run = Run { start: spare.start, len: 1, record };
    let now = world.now;
    let node = world.hosts.get_mut(&away).and_then(|host| host.node.as_mut()).expect("runs");
    let facts = Facts { slots: vec![run], ..Facts::default() };
    // The heir has reclaimed the slot by then, so that alone outranks it ...
    assert!(node.absorb(now, &facts).slots.is_empty());
    // ... and before that, the grant is passed on.
    let mut world = World::with_members(3);
    let (first, second, lost) = (world.order[0], world.order[1], world.lose(2));
    world.cut.insert(first);
    let now = world.now;
    let node = world.hosts.get_mut(&second).and_then(|host| host.node.as_mut()).expect("runs");
    let forget = Forget { node: lost, round: 1, forced: false, heir: first };
    node.absorb(now, &Facts { forgets: vec![forget], ..Facts::default() });
    node.absorb(now, &facts);
    assert_eq!(node.counters.declined, 1);
    let home = node.home.as_ref().expect("in a cluster");
    assert_eq!(home.slots.record(spare.start).expect("known").owner, first);
}

#[test]
fn a_node_made_anew_takes_its_predecessors_subnet() {
    let mut world = World::with_members(3);
    let subnet = world.subnet(2);
    world.lose(2);
    let mut anew = config(9, Founding::Join);
    anew.name = "n3".parse().expect("name");
    anew.replace_by_name = true;
    world.boot(anew);
    world.run_for(Duration::from_secs(20));
    assert_eq!(world.subnet(3), subnet);
    assert_eq!(world.leased(0), 3, "the one it used meanwhile was given back");
}

#[test]
fn a_state_directory_that_was_rolled_back_is_noticed_by_what_peers_know() {
    let mut world = World::with_members(2);
    let founder = world.order[0];
    world.run_for(Duration::from_secs(3));
    let old = world.hosts[&founder].disk.clone();
    world.boot(config(3, Founding::Join));
    world.run_for(Duration::from_secs(3));
    world.stop(founder);
    world.host_mut(founder).disk = old;
    world.start(founder);
    world.run_for(Duration::from_secs(5));
    let status = world.node(0).status();
    assert!(status.counters.rollbacks > 0);
    assert!(status.problems.join(" ").contains("rolled back"), "{:?}", status.problems);
    world.assert_mesh();
}

#[test]
fn clusters_that_were_founded_apart_never_merge() {
    let mut world = World::with_members(2);
    let mut other = World::new(settings("10.42.0.0/16", 24));
    let mine = world.node(0).cluster_id().expect("a cluster");
    let theirs = other.node(0).cluster_id();
    // Another founder with another luck, whose frames get here: the secrets are the same.
    other.hosts.clear();
    let mut config = config(77, Founding::Create(settings("10.42.0.0/16", 24)));
    config.rng_seed = [77; 32];
    let stranger = Node::start(Time::ZERO, config, Vec::new()).expect("starts");
    assert_ne!(stranger.cluster_id(), Some(mine));
    let compare = Request::Compare(stranger.buckets().roots());
    let id = stranger.cluster_id().expect("a cluster");
    let bytes = Frame::Request(&compare.encode()).encode(id);
    let before = world.node(0).roots();
    let now = world.now;
    let first = world.order[0];
    let node = world.hosts.get_mut(&first).and_then(|host| host.node.as_mut()).expect("runs");
    node.handle(now, Input::Request { from: stranger.me.node, reply: ReplyId(9), bytes });
    let answer = std::iter::from_fn(|| node.poll_output()).find_map(|output| match output {
        Output::Reply { bytes, .. } => read_response(&bytes).ok(),
        _ => None,
    });
    let Some(Response::Refused(refusal)) = answer else { panic!("{answer:?}") };
    let said = refusal.to_string();
    assert!(said.contains(&mine.to_string()) && said.contains(&id.to_string()), "{said}");
    assert_eq!(world.node(0).roots(), before, "nothing was taken over");
    assert!(theirs.is_some());
}

//! Nodes in one thread under virtual time, with a network that can be cut and disks that forget what
//! was not flushed. Just enough of a world to state the rules of joining, restarting and leaving.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
};

use ipnet::Ipv4Net;

use super::*;
use crate::{
    model::{BootId, ClusterSettings, Mac, Pool, PoolSpec, SettingsWish, SlotState, Vtep},
    wire::{Facts, Key, Record},
};

mod forget;

const LATENCY: Duration = Duration::from_millis(1);
const NO_ANSWER_AFTER: Duration = Duration::from_secs(5);

struct Host {
    node: Option<Node>,
    config: NodeConfig,
    disk: BTreeMap<String, Vec<u8>>,
    view: Option<View>,
    stopped: Option<Stop>,
    starts: u8,
}

enum Event {
    Message { from: NodeId, to: NodeId, bytes: Vec<u8> },
    Request { from: NodeId, to: NodeId, call: CallId, bytes: Vec<u8> },
    Answer { to: NodeId, call: CallId, result: Result<(NodeId, Vec<u8>), CallError> },
}

struct World {
    now: Time,
    hosts: BTreeMap<NodeId, Host>,
    order: Vec<NodeId>,
    events: BTreeMap<(Time, u64), Event>,
    sequence: u64,
    /// Nodes that nothing reaches and that reach nobody.
    cut: BTreeSet<NodeId>,
    /// Answers to these nodes are lost.
    deaf: BTreeSet<NodeId>,
}

fn settings(network: &str, len: u8) -> ClusterSettings {
    let pool = Pool::new(&PoolSpec {
        network: network.parse().expect("network"),
        subnet_len: Some(len),
        subnet_min: None,
        subnet_max: None,
    });
    ClusterSettings { pool: pool.expect("pool"), vni: 1, vxlan_port: 8472 }
}

fn config(seed: u8, founding: Founding) -> NodeConfig {
    let node = NodeId::of_public_key(&[seed; 32]);
    let underlay = Ipv4Addr::new(192, 0, 2, seed);
    NodeConfig {
        node,
        boot: BootId::from_bytes([seed; 8]),
        name: format!("n{seed}").parse().expect("name"),
        address: SocketAddr::new(underlay.into(), 8473),
        vtep: Vtep { mac: Mac::of_node(node), underlay: underlay.into() },
        founding,
        seeds: usize::from(founding == Founding::Join),
        cluster: None,
        wish: SettingsWish::default(),
        prefer_subnet: None,
        replace_by_name: false,
        rng_seed: [seed; 32],
    }
}

impl World {
    /// A world of one founder.
    fn new(settings: ClusterSettings) -> Self {
        let mut world = Self {
            now: Time::ZERO,
            hosts: BTreeMap::new(),
            order: Vec::new(),
            events: BTreeMap::new(),
            sequence: 0,
            cut: BTreeSet::new(),
            deaf: BTreeSet::new(),
        };
        world.boot(config(1, Founding::Create(settings)));
        world
    }

    fn with_members(count: u8) -> Self {
        let mut world = Self::new(settings("10.42.0.0/16", 24));
        for seed in 2..=count {
            world.boot(config(seed, Founding::Join));
        }
        world.run_for(Duration::from_secs(4));
        world
    }

    fn boot(&mut self, config: NodeConfig) {
        let id = config.node;
        self.order.push(id);
        let disk = BTreeMap::new();
        let host = Host { node: None, config, disk, view: None, stopped: None, starts: 0 };
        self.hosts.insert(id, host);
        self.start(id);
    }

    fn start(&mut self, id: NodeId) {
        let host = self.hosts.get_mut(&id).expect("known host");
        host.starts += 1;
        let mut config = host.config.clone();
        config.boot = BootId::from_bytes([host.starts; 8]);
        config.rng_seed[31] = host.starts;
        let saved = host
            .disk
            .iter()
            .map(|(key, value)| Record::decode(key.as_bytes(), value).expect("own record"));
        host.node = Some(Node::start(self.now, config, saved.collect()).expect("starts"));
        self.drain(id);
    }

    fn stop(&mut self, id: NodeId) {
        self.hosts.get_mut(&id).expect("known host").node = None;
    }

    fn input(&mut self, id: NodeId, input: Input) {
        let now = self.now;
        if let Some(node) = self.hosts.get_mut(&id).and_then(|host| host.node.as_mut()) {
            node.handle(now, input);
            self.drain(id);
        }
    }

    fn drain(&mut self, id: NodeId) {
        let Some(mut node) = self.hosts.get_mut(&id).and_then(|host| host.node.take()) else {
            return;
        };
        let mut outputs = Vec::new();
        while let Some(output) = node.poll_output() {
            outputs.push(output);
        }
        let host = self.hosts.get_mut(&id).expect("known host");
        host.node = Some(node);
        // All writes of a turn are flushed before anything of that turn leaves.
        for output in &outputs {
            if let Output::Write { records, .. } = output {
                for (key, value) in records {
                    host.disk.insert(key.to_string(), value.clone());
                }
            }
        }
        for output in outputs {
            self.carry_out(id, output);
        }
    }

    fn carry_out(&mut self, from: NodeId, output: Output) {
        match output {
            Output::Send { to, bytes, .. } => {
                self.schedule(LATENCY, Event::Message { from, to, bytes });
            }
            Output::Call { call, to, bytes, .. } => {
                let to = match to {
                    Target::Member { node, .. } => node,
                    Target::Seed(_) => self.order[0],
                };
                self.schedule(LATENCY, Event::Request { from, to, call, bytes });
            }
            Output::Reply { reply, bytes, .. } => {
                let (to, call) = unpack(reply, &self.order);
                let lost = self.deaf.contains(&to) || self.cut.contains(&from);
                let result = if lost {
                    Err(CallError::Unreachable("lost".to_owned()))
                } else {
                    Ok((from, bytes))
                };
                let after = if lost { NO_ANSWER_AFTER } else { LATENCY };
                self.schedule(after, Event::Answer { to, call, result });
            }
            Output::Program { view, .. } => {
                let subnet = view.own.subnet;
                self.host_mut(from).view = Some(view);
                self.input(from, Input::InUse(Some(subnet)));
            }
            Output::Withdraw => {
                self.host_mut(from).view = None;
                self.input(from, Input::InUse(None));
            }
            Output::Stop(stop) => {
                self.host_mut(from).stopped = Some(stop);
                self.stop(from);
            }
            Output::Write { .. } | Output::Owned(_) | Output::CannotLeave(_) => {}
        }
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + after, self.sequence), event);
    }

    fn run_for(&mut self, span: Duration) {
        let until = self.now + span;
        // A node that asks to be woken in the past would keep this from ever ending.
        for step in 0.. {
            assert!(step < 5_000_000, "the world does not come to rest");
            let timers = self.hosts.iter().filter_map(|(id, host)| {
                host.node.as_ref().and_then(Node::poll_timeout).map(|at| (at, *id))
            });
            let timer = timers.min();
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let next =
                timer.map(|(at, _)| at).into_iter().chain(event).min().filter(|at| *at <= until);
            let Some(next) = next else { break };
            self.now = self.now.max(next);
            if event.is_some_and(|at| at <= next) {
                let (_, event) = self.events.pop_first().expect("an event is due");
                self.deliver(event);
            } else if let Some((_, id)) = timer {
                self.input(id, Input::Timeout);
            }
        }
        self.now = until;
    }

    fn deliver(&mut self, event: Event) {
        match event {
            Event::Message { from, to, bytes } => {
                if !self.cut.contains(&from) && !self.cut.contains(&to) {
                    self.input(to, Input::Message { from, bytes });
                }
            }
            Event::Request { from, to, call, bytes } => {
                let up = self.hosts.get(&to).is_some_and(|host| host.node.is_some());
                if up && !self.cut.contains(&from) && !self.cut.contains(&to) {
                    let reply = pack(from, call, &self.order);
                    self.input(to, Input::Request { from, reply, bytes });
                } else {
                    let result = Err(CallError::Unreachable("nobody".to_owned()));
                    self.schedule(NO_ANSWER_AFTER, Event::Answer { to: from, call, result });
                }
            }
            Event::Answer { to, call, result } => self.input(to, Input::Answer { call, result }),
        }
    }

    fn host_mut(&mut self, id: NodeId) -> &mut Host {
        self.hosts.get_mut(&id).expect("known host")
    }

    fn node(&self, n: usize) -> &Node {
        self.hosts[&self.order[n]].node.as_ref().expect("runs")
    }

    fn subnet(&self, n: usize) -> Option<Ipv4Net> {
        self.node(n).status().subnet
    }

    fn running(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values().filter(|host| host.node.is_some())
    }

    /// Every running node has its own subnet, and every view has all the others and nobody else.
    fn assert_mesh(&self) {
        let views: Vec<&View> =
            self.running().map(|host| host.view.as_ref().expect("programmed")).collect();
        let subnets: BTreeSet<_> = views.iter().map(|view| view.own.subnet).collect();
        assert_eq!(subnets.len(), views.len(), "subnets are distinct");
        for view in &views {
            let peers: BTreeSet<_> =
                view.peers.values().flat_map(|peer| peer.leases.iter().map(|l| l.1)).collect();
            let others: BTreeSet<_> =
                subnets.iter().copied().filter(|subnet| *subnet != view.own.subnet).collect();
            assert_eq!(peers, others);
        }
    }
}

/// A reply number that holds who asked and under which call.
fn pack(from: NodeId, call: CallId, order: &[NodeId]) -> ReplyId {
    let index = order.iter().position(|id| *id == from).expect("known host") as u64;
    ReplyId(call.0 << 16 | index)
}

fn unpack(reply: ReplyId, order: &[NodeId]) -> (NodeId, CallId) {
    (order[(reply.0 & 0xffff) as usize], CallId(reply.0 >> 16))
}

#[test]
fn a_joiner_is_known_everywhere_within_a_few_round_trips() {
    let mut world = World::with_members(10);
    world.boot(config(11, Founding::Join));
    world.run_for(LATENCY * 20);
    world.assert_mesh();
}

#[test]
fn all_at_once_gives_every_node_its_own_subnet() {
    let mut world = World::new(settings("10.42.0.0/16", 24));
    for seed in 2..=40 {
        world.boot(config(seed, Founding::Join));
    }
    world.run_for(Duration::from_secs(3));
    world.assert_mesh();
    assert_eq!(world.running().count(), 40, "nobody gave up");
}

#[test]
fn a_quiet_cluster_settles_and_compares_by_hashes_only() {
    let mut world = World::with_members(8);
    world.run_for(Duration::from_secs(30));
    let before: u64 = (0..8).map(|n| world.node(n).status().counters.syncs_different).sum();
    world.run_for(Duration::from_secs(60));
    let after: u64 = (0..8).map(|n| world.node(n).status().counters.syncs_different).sum();
    assert_eq!(before, after);
    assert!((0..8).all(|n| world.node(n).status().settled));
}

#[test]
fn a_restarted_node_has_its_subnet_at_once_and_alone() {
    let mut world = World::with_members(3);
    world.run_for(Duration::from_secs(2));
    let (id, subnet) = (world.order[2], world.subnet(2));
    world.stop(id);
    world.cut.insert(id);
    world.host_mut(id).view = None;
    world.start(id);
    let view = world.hosts[&id].view.clone().expect("programmed without any peer");
    assert_eq!(Some(view.own.subnet), subnet);
    assert_eq!(view.peers.len(), 2);
    assert!(!view.unheard.is_empty(), "an old database must not remove anybody");
    world.cut.clear();
    world.run_for(Duration::from_secs(10));
    assert_eq!(world.hosts[&id].view.as_ref().expect("programmed").unheard, []);
    world.assert_mesh();
}

#[test]
fn a_lost_database_is_no_lost_subnet_while_a_peer_remembers() {
    let mut world = World::with_members(3);
    let (id, subnet) = (world.order[2], world.subnet(2));
    world.run_for(Duration::from_secs(20));
    world.stop(id);
    world.host_mut(id).disk.clear();
    world.start(id);
    world.run_for(Duration::from_secs(5));
    assert_eq!(world.subnet(2), subnet);
    world.run_for(Duration::from_secs(20));
    assert!((0..3).all(|n| world.node(n).status().settled), "the new start outranks the old one");
    world.assert_mesh();
}

#[test]
fn a_copied_state_directory_is_named_and_starts_no_race() {
    let mut world = World::with_members(3);
    let id = world.order[2];
    world.run_for(Duration::from_secs(5));
    // A second process with the same key and disk tells a peer about itself, again and again.
    let record = |world: &World, starts: u32| MemberRecord {
        version: crate::model::Version { starts, change: 0 },
        boot: BootId::from_bytes([99; 8]),
        ..world.node(2).me.clone()
    };
    for round in 0..20 {
        let clone = record(&world, world.node(2).me.version.starts + 1);
        let facts = Facts { members: vec![clone], ..Facts::default() };
        let cluster = world.node(2).cluster_id().expect("in a cluster");
        let bytes = Frame::Push(&Push { facts }.encode()).encode(cluster);
        world.input(id, Input::Message { from: world.order[0], bytes });
        assert_eq!(world.node(2).status().counters.clones, round + 1);
    }
    assert!(world.node(2).me.version.starts < 10, "it went above the other once, not twenty times");
    assert!(world.node(2).status().problems.join(" ").contains("was copied"));
}

#[test]
fn no_node_ever_asks_to_be_woken_in_the_past() {
    let mut world = World::with_members(4);
    world.cut.insert(world.order[1]);
    let leaver = world.order[2];
    world.input(leaver, Input::Command(Command::Leave));
    for _ in 0..2_000 {
        world.run_for(Duration::from_millis(1));
        for host in world.running() {
            let at =
                host.node.as_ref().and_then(Node::poll_timeout).expect("something is always due");
            assert!(at > world.now, "{} spins", host.config.name);
        }
    }
}

#[test]
fn nothing_is_granted_between_a_restart_and_the_first_comparison() {
    let mut world = World::with_members(2);
    let founder = world.order[0];
    world.stop(world.order[1]);
    world.stop(founder);
    world.start(founder);
    world.boot(config(3, Founding::Join));
    world.run_for(Duration::from_secs(8));
    assert_eq!(world.node(2).status().phase, Phase::Leaseless);
    let problems = world.node(2).status().problems.join(" ");
    assert!(problems.contains("has not compared its state"), "{problems}");
    let second = world.order[1];
    world.start(second);
    world.run_for(Duration::from_secs(8));
    world.assert_mesh();
}

#[test]
fn an_answer_that_is_lost_loses_no_slot() {
    let mut world = World::with_members(3);
    let joiner = config(4, Founding::Join);
    world.deaf.insert(joiner.node);
    world.boot(joiner);
    world.run_for(Duration::from_secs(2));
    let leased = world.node(0).status().slots.leased;
    assert_eq!(leased, 4, "granted, unknown to the joiner");
    world.deaf.clear();
    world.run_for(Duration::from_secs(8));
    world.assert_mesh();
    assert_eq!(world.node(0).status().slots.leased, 4, "asked again, got the same one");
}

#[test]
fn down_members_keep_their_subnets_and_their_place_in_every_view() {
    let mut world = World::with_members(4);
    let lost = world.order[3];
    world.cut.insert(lost);
    world.run_for(Duration::from_secs(60));
    let status = world.node(0).status();
    let member = status.members.iter().find(|m| m.node == lost).expect("still listed");
    assert_eq!(member.liveness, Some(Liveness::Down));
    assert!(world.hosts[&world.order[0]].view.as_ref().expect("view").peers.contains_key(&lost));
    world.cut.clear();
    world.run_for(Duration::from_secs(30));
    assert!((0..4).all(|n| world.node(n).status().settled), "healed");
    world.assert_mesh();
}

#[test]
fn leaving_hands_over_everything_and_is_known_everywhere() {
    let mut world = World::with_members(4);
    let leaver = world.order[2];
    world.input(leaver, Input::Command(Command::Leave));
    world.run_for(LATENCY * 20);
    assert!(matches!(world.hosts[&leaver].stopped, Some(Stop::Left { heir: Some(_) })));
    world.assert_mesh();
    let slots = world.node(0).status().slots;
    assert_eq!((slots.total, slots.leased, slots.spare), (255, 3, 252));
}

#[test]
fn a_leave_that_a_crash_cut_short_goes_on_after_the_restart() {
    let mut world = World::with_members(3);
    let leaver = world.order[2];
    world.run_for(Duration::from_secs(2));
    // The heir agrees, the records are written, and then nothing of this node arrives any more.
    world.input(leaver, Input::Command(Command::Leave));
    world.run_for(LATENCY * 2);
    world.cut.insert(leaver);
    world.run_for(Duration::from_secs(1));
    world.stop(leaver);
    world.cut.clear();
    assert_eq!(world.node(0).status().slots.leased, 3, "nobody has heard of it");
    world.start(leaver);
    world.run_for(Duration::from_secs(10));
    assert!(matches!(world.hosts[&leaver].stopped, Some(Stop::Left { .. })));
    world.assert_mesh();
    let slots = world.node(0).status().slots;
    assert_eq!((slots.leased, slots.spare), (2, 253), "all of it came to somebody who is there");
}

#[test]
fn members_that_leave_together_lose_no_slot_and_none_spins() {
    let mut world = World::with_members(8);
    for n in [1, 2, 4, 5, 7] {
        let leaver = world.order[n];
        world.input(leaver, Input::Command(Command::Leave));
    }
    world.boot(config(9, Founding::Join));
    world.run_for(Duration::from_secs(30));
    assert_eq!(world.running().count(), 4);
    world.assert_mesh();
    let (node, slots) = (world.node(0), world.node(0).status().slots);
    let here: u32 = node
        .status()
        .members
        .iter()
        .filter(|member| !member.left)
        .map(|member| member.spare + member.subnets.len() as u32)
        .sum();
    assert_eq!((slots.total, here), (255, 255), "every slot belongs to somebody who is here");
}

#[test]
fn a_node_without_a_subnet_looks_for_one_again_after_a_restart() {
    let mut world = World::new(settings("10.42.0.0/24", 26));
    for seed in 2..=4 {
        world.boot(config(seed, Founding::Join));
        world.run_for(Duration::from_secs(2));
    }
    let (leaseless, leaver) = (world.order[3], world.order[1]);
    world.stop(leaseless);
    world.input(leaver, Input::Command(Command::Leave));
    world.run_for(Duration::from_secs(2));
    world.start(leaseless);
    world.run_for(Duration::from_secs(5));
    world.assert_mesh();
}

#[test]
fn the_subnet_in_use_stays_when_a_second_one_turns_up() {
    let mut world = World::with_members(3);
    let (id, subnet) = (world.order[2], world.subnet(2).expect("a subnet"));
    // A grant from long ago, by a seed whose answer never came: a lower slot than the one in use.
    let home = world.node(0).home.as_ref().expect("in a cluster");
    let spare = home.slots.runs_of(world.order[0]).find(|run| {
        run.record.state == SlotState::Spare
            && home.cluster.settings.pool.subnet(run.start) < subnet
    });
    let spare = *spare.expect("a lower spare");
    let record = crate::model::SlotRecord {
        epoch: spare.record.epoch + 1,
        owner: id,
        state: SlotState::Leased,
        granter: world.order[0],
    };
    let run = Run { start: spare.start, len: 1, record };
    let facts = Facts { slots: vec![run], ..Facts::default() };
    let bytes = Frame::Push(&Push { facts }.encode()).encode(home.cluster.id);
    world.input(id, Input::Message { from: world.order[0], bytes });
    world.run_for(Duration::from_secs(5));
    assert_eq!(world.subnet(2), Some(subnet), "pods live in it");
    assert_eq!(world.node(0).status().slots.leased, 3, "the other one was given back");
    world.assert_mesh();
}

#[test]
fn a_node_that_lost_its_memory_grants_nothing_until_all_who_are_there_were_asked() {
    let mut world = World::with_members(4);
    world.run_for(Duration::from_secs(12));
    let forgetful = world.order[2];
    world.stop(forgetful);
    world.host_mut(forgetful).disk.clear();
    // One member hears nothing: it may know of a grant that nobody else has seen.
    world.cut.insert(world.order[3]);
    world.start(forgetful);
    world.run_for(Duration::from_secs(3));
    assert!(world.node(2).status().subnet.is_some(), "its own subnet is beyond doubt");
    assert!(!world.node(2).status().synced);
    world.cut.clear();
    world.run_for(Duration::from_secs(20));
    assert!(world.node(2).status().synced);
}

#[test]
fn a_joiner_that_came_after_the_restart_is_no_witness() {
    let mut world = World::with_members(2);
    let founder = world.order[0];
    world.stop(world.order[1]);
    world.stop(founder);
    world.start(founder);
    world.boot(config(3, Founding::Join));
    world.run_for(Duration::from_secs(8));
    world.stop(founder);
    world.start(founder);
    world.run_for(Duration::from_secs(8));
    assert!(!world.node(0).status().synced, "the joiner knows the cluster through it alone");
}

#[test]
fn strangers_that_are_each_others_seeds_become_patient() {
    let mut world = World::new(settings("10.42.0.0/16", 24));
    let founder = world.order[0];
    world.stop(founder);
    world.hosts.remove(&founder);
    world.order.clear();
    world.boot(config(2, Founding::Join));
    world.boot(config(3, Founding::Join));
    world.run_for(Duration::from_secs(60));
    let before = world.sequence;
    world.run_for(Duration::from_secs(60));
    let asked = world.sequence - before;
    assert!(asked < 400, "{asked} events in a minute of waiting");
}

#[test]
fn the_last_member_may_just_go_and_one_without_reachable_peers_may_not() {
    let mut world = World::new(settings("10.42.0.0/16", 24));
    let only = world.order[0];
    world.input(only, Input::Command(Command::Leave));
    assert_eq!(world.hosts[&only].stopped, Some(Stop::Left { heir: None }));

    let mut world = World::with_members(2);
    let stranded = world.order[1];
    world.cut.insert(stranded);
    world.run_for(Duration::from_secs(30));
    world.input(stranded, Input::Command(Command::Leave));
    assert_eq!(world.hosts[&stranded].stopped, None);
    assert_eq!(world.node(1).status().phase, Phase::Member, "goes on as before");
}

#[test]
fn contradicting_joiners_are_refused_by_name_and_leave_no_trace() {
    let mut world = World::with_members(2);
    let mut other_vni = config(3, Founding::Join);
    other_vni.wish.vni = Some(7);
    let mut other_cluster = config(4, Founding::Join);
    other_cluster.cluster = Some(ClusterId::from_bytes([9; 8]));
    let (vni, cluster) = (other_vni.node, other_cluster.node);
    world.boot(other_vni);
    world.boot(other_cluster);
    world.run_for(Duration::from_secs(1));
    let said = |id: NodeId| match &world.hosts[&id].stopped {
        Some(Stop::Refused(refusal)) => refusal.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(said(vni).contains("vni is 7 here and 1 in the cluster"), "{}", said(vni));
    assert!(said(cluster).contains("0909090909090909"), "{}", said(cluster));
    assert_eq!(world.node(0).status().members.len(), 2);
    assert_eq!(world.node(0).status().slots.leased, 2);
}

#[test]
fn a_full_pool_is_said_and_a_freed_subnet_is_taken() {
    let mut world = World::new(settings("10.42.0.0/24", 26));
    for seed in 2..=4 {
        world.boot(config(seed, Founding::Join));
        world.run_for(Duration::from_secs(2));
    }
    let last = world.node(3).status();
    assert_eq!(last.phase, Phase::Leaseless);
    assert!(last.problems.join(" ").contains("all 3 subnets are leased"), "{:?}", last.problems);
    let leaver = world.order[1];
    world.input(leaver, Input::Command(Command::Leave));
    world.run_for(Duration::from_secs(5));
    world.assert_mesh();
}

#[test]
fn what_reveals_a_grant_waits_for_the_write_that_holds_it() {
    let mut node =
        Node::start(Time::ZERO, config(1, Founding::Create(settings("10.42.0.0/16", 24))), vec![])
            .expect("starts");
    while node.poll_output().is_some() {}
    let joiner = config(2, Founding::Join);
    let mut stranger = Node::start(Time::ZERO, joiner.clone(), vec![]).expect("starts");
    let hello = std::iter::from_fn(|| stranger.poll_output())
        .find_map(|output| match output {
            Output::Call { bytes, .. } => Some(bytes),
            _ => None,
        })
        .expect("a stranger greets its seed");
    let request = Input::Request { from: joiner.node, reply: ReplyId(1), bytes: hello };
    node.handle(Time::ZERO + LATENCY, request);
    let mut durable = None;
    let mut waits = Vec::new();
    while let Some(output) = node.poll_output() {
        match output {
            Output::Write { records, seq } => {
                assert!(records.iter().any(|(key, _)| matches!(key, Key::Slots(_))));
                durable = seq;
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
    let (one, two) = (world.order[0], world.order[1]);
    let before = world.node(0).status().slots;
    for bytes in [
        vec![],
        vec![9, 9, 9],
        Frame::Push(b"junk").encode(world.node(0).cluster_id().expect("cluster")),
        Frame::Push(&Push { facts: Facts::default() }.encode())
            .encode(ClusterId::from_bytes([7; 8])),
    ] {
        world.input(one, Input::Message { from: two, bytes });
    }
    assert_eq!(world.node(0).status().counters.malformed, 4);
    assert_eq!(world.node(0).status().slots, before);
}

//! Rounds with a peer, and what follows from them.

use super::{
    super::{Direction, Seen, Transport},
    *,
};

const PEER: NodeId = NodeId::from_bytes([1; 8]);
const SMALL: Sort = Sort { ipv4: true, kind: Kind::Small };

fn subject(number: u8) -> Subject {
    let first = IpAddr::from([10, 42, number, 254]);
    Subject {
        node: NodeId::from_bytes([number; 8]),
        addresses: Addresses { first, second: None },
        carried: 1450,
        takes_large: true,
        is_doubted: false,
    }
}

/// A clock that goes from one moment at which something is due to the next, and peers.
struct World {
    far: FarPods,
    now: Time,
    number: u32,
    /// Which sorts come to each peer that has a pod, and whether answers to them come back.
    peers: BTreeMap<NodeId, Vec<(Kind, bool)>>,
    /// Peers that tell what has come, and for how long they have had a pod.
    telling: BTreeMap<NodeId, u32>,
    /// Peers shed packets.
    is_shedding: bool,
    /// Of those that are counted one in so many is lost on its way there, or back.
    loses: Option<(Half, u32)>,
    counted: u32,
    /// Packets of several datagrams cannot be sent.
    cannot_send: bool,
    /// After so long connections are made.
    connects_after: Duration,
    /// Peers see no data of connections.
    is_old: bool,
    /// Others than those.
    sent: Vec<IpAddr>,
}

const ALL: [(Kind, bool); 6] = [
    (Kind::Segment, true),
    (Kind::Small, true),
    (Kind::Large, true),
    (Kind::Fragmented, true),
    (Kind::Aggregate, true),
    (Kind::Data, true),
];

impl World {
    fn new(count: u8) -> Self {
        let subjects: Vec<Subject> = (1..=count).map(subject).collect();
        let mut far = FarPods::default();
        far.update(&subjects, &[]);
        let nodes = subjects.iter().map(|subject| subject.node);
        Self {
            far,
            now: Time::ZERO + Duration::from_secs(100),
            number: 0,
            peers: nodes.clone().map(|node| (node, ALL.to_vec())).collect(),
            telling: nodes.map(|node| (node, u32::MAX)).collect(),
            is_shedding: false,
            loses: None,
            counted: 0,
            cannot_send: false,
            connects_after: Duration::ZERO,
            is_old: false,
            sent: Vec::new(),
        }
    }

    /// Until a round has ended, and then as many more.
    fn rounds(&mut self, count: usize) {
        for _ in 0..count {
            self.number += 1;
            self.round();
        }
    }

    fn round(&mut self) {
        let mut came: BTreeMap<NodeId, u16> = BTreeMap::new();
        let mut samples: BTreeMap<NodeId, u16> = BTreeMap::new();
        loop {
            self.now = self.now.max(self.far.next_due().expect("something to do"));
            while let Some(output) = self.far.poll(self.now, self.number) {
                match output {
                    FarOutput::Begin(_) => {}
                    FarOutput::Send { to, kind: Kind::Sample, number, .. } => {
                        self.counted += 1;
                        let node = subject_at(to);
                        let lost = self.loses.filter(|(_, of)| self.counted.is_multiple_of(*of));
                        let half = lost.map(|(half, _)| half);
                        let has_pod = self.peers.get(&node).is_some_and(|sorts| !sorts.is_empty());
                        if has_pod && half != Some(Half::There) {
                            *samples.entry(node).or_default() += 1;
                            if half.is_none() {
                                self.far.on_answer(to, Kind::Sample, number);
                            }
                        }
                    }
                    FarOutput::Send { to, kind, number, .. } => {
                        self.sent.push(to);
                        if kind == Kind::Aggregate && self.cannot_send {
                            self.far.on_unsent(to, kind, number);
                        }
                        let node = subject_at(to);
                        if kind == Kind::Data {
                            let sorts = self.peers.get(&node).into_iter().flatten();
                            if sorts.into_iter().any(|sort| *sort == (Kind::Segment, true)) {
                                let at = self.now + self.connects_after;
                                self.far.on_connected(at, to, number);
                            }
                        }
                        let passing = self.peers.get(&node).into_iter().flatten();
                        for (_, comes_back) in passing.filter(|(passing, _)| *passing == kind) {
                            *came.entry(node).or_default() |= Sort { ipv4: true, kind }.bit();
                            if *comes_back {
                                self.far.on_answer(to, kind, number);
                            }
                        }
                    }
                    FarOutput::Ask(number, nodes) => {
                        let told = nodes.into_iter().filter_map(|node| {
                            let pod_age_ms = *self.telling.get(&node)?;
                            let sees_data = if self.is_old { 0 } else { SEES_DATA };
                            let came = came.get(&node).copied().unwrap_or(0) | sees_data;
                            let samples = samples.get(&node).copied().unwrap_or(0);
                            let shed = self.is_shedding;
                            Some((node, Arrivals { pod_age_ms, came, samples, shed }))
                        });
                        self.far.on_arrivals_told(self.now, number, &told.collect());
                    }
                }
            }
            if self.far.round.is_none() {
                return;
            }
        }
    }
}

fn subject_at(ip: IpAddr) -> NodeId {
    let IpAddr::V4(ip) = ip else { panic!("not asked for") };
    NodeId::from_bytes([ip.octets()[2]; 8])
}

#[test]
fn a_pod_that_answers_all_is_open_and_left_alone_for_a_while() {
    let mut world = World::new(1);
    world.rounds(1);
    assert_eq!((world.far.answering(), world.far.closed()), ([PEER].into(), vec![]));
    assert_eq!(world.far.next_due(), Some(world.now + CALM));
    assert_eq!(world.sent.len(), Kind::ALL.len());
}

#[test]
fn packets_that_do_not_come_there_are_lost_there_after_three_rounds() {
    let mut world = World::new(1);
    let without = ALL.into_iter().filter(|(kind, _)| *kind != Kind::Fragmented);
    world.peers.insert(PEER, without.collect());
    world.rounds(2);
    assert!(world.far.closed().is_empty() && world.far.is_in_doubt());
    world.rounds(1);
    let sort = Sort { ipv4: true, kind: Kind::Fragmented };
    assert_eq!(world.far.closed(), [FarWay { node: PEER, half: Half::There, sort }]);
    assert!(world.far.next_due() > Some(world.now + WATCH), "it is not hurried any more");
    world.peers.insert(PEER, ALL.to_vec());
    world.rounds(1);
    assert!(world.far.closed().is_empty() && !world.far.is_in_doubt());
}

#[test]
fn peer_to_which_large_packets_alone_are_lost_is_told_after_one_round() {
    for (passing, told) in [(&ALL[..2], 1), (&ALL[..1], 0), (&ALL[2..], 0)] {
        let mut world = World::new(1);
        world.peers.insert(PEER, passing.to_vec());
        world.rounds(1);
        assert_eq!(world.far.losing_large().len(), told, "{passing:?}");
        world.peers.insert(PEER, ALL.to_vec());
        world.rounds(1);
        assert!(world.far.losing_large().is_empty());
    }
}

#[test]
fn peer_that_sheds_packets_is_told_of_until_all_is_answered() {
    let mut world = World::new(1);
    world.peers.insert(PEER, ALL[..3].to_vec());
    world.is_shedding = true;
    world.rounds(4);
    assert_eq!((world.far.overrun(), world.far.closed()), (vec![PEER], vec![]));
    world.is_shedding = false;
    world.rounds(1);
    assert!(world.far.overrun().is_empty() && world.far.is_in_doubt());
}

#[test]
fn answers_that_do_not_come_back_are_lost_on_their_way_back() {
    let mut world = World::new(1);
    let without = |(kind, _)| (kind, kind != Kind::Small);
    world.peers.insert(PEER, ALL.map(without).to_vec());
    world.rounds(3);
    assert_eq!(world.far.closed(), [FarWay { node: PEER, half: Half::Back, sort: SMALL }]);
}

#[test]
fn silence_of_a_peer_that_tells_nothing_is_no_loss_and_it_is_tried_more_rarely() {
    let mut world = World::new(1);
    world.peers.clear();
    world.telling.clear();
    let mut before = world.now;
    let mut pauses = Vec::new();
    for _ in 0..8 {
        world.rounds(1);
        pauses.push(world.now.since(before));
        before = world.now;
    }
    assert!(!world.far.is_in_doubt());
    assert!(pauses[7] > CALM * 30, "{pauses:?}");
    // Its pod is there now, and tells so by its own trials.
    world.peers.insert(PEER, ALL.to_vec());
    world.far.on_question(world.now, subject(1).addresses.first);
    assert_eq!(world.far.next_due(), Some(world.now));
    world.rounds(1);
    assert_eq!(world.far.answering(), [PEER].into());
}

#[test]
fn a_pod_that_is_younger_than_the_round_has_lost_nothing() {
    let mut world = World::new(1);
    world.peers.clear();
    world.telling.insert(PEER, 1_000);
    world.rounds(5);
    assert!(!world.far.is_in_doubt());
}

#[test]
fn a_peer_that_had_to_shed_packets_proves_nothing() {
    let mut target = Target { open: [SMALL].into(), ..Target::default() };
    target.arrivals = Some(Arrivals { pod_age_ms: 60_000, shed: true, ..Arrivals::default() });
    assert_eq!(target.verdicts(true).next(), Some((SMALL, Seen::Unclear, Seen::Unclear)));
}

#[test]
fn a_process_that_had_no_turn_for_long_has_seen_no_loss() {
    let mut world = World::new(1);
    world.peers.clear();
    for number in 0..20 {
        while let Some(due) = world.far.next_due() {
            world.now = world.now.max(due) + STALL + Duration::from_millis(1);
            let mut outputs = Vec::new();
            while let Some(output) = world.far.poll(world.now, number) {
                outputs.push(output);
            }
            if outputs.is_empty() {
                break;
            }
        }
    }
    assert!(!world.far.is_in_doubt());
}

#[test]
fn what_this_host_drops_itself_is_not_tried_and_not_told_twice() {
    let mut world = World::new(1);
    world.peers.insert(PEER, vec![(Kind::Segment, true)]);
    world.rounds(3);
    assert_eq!(world.far.closed().len(), Kind::ALL.len() - 2, "data is large, too");
    let way = Way { direction: Direction::In(Transport::Udp), ipv4: true };
    world.far.update(&[subject(1)], &[way]);
    assert!(world.far.closed().is_empty());
    world.sent.clear();
    world.peers.insert(PEER, vec![(Kind::Segment, true), (Kind::Data, true)]);
    world.rounds(1);
    assert_eq!(world.sent.len(), 2);
    world.far.update(&[Subject { takes_large: false, ..subject(1) }], &[]);
    world.sent.clear();
    world.peers.insert(PEER, ALL.to_vec());
    world.rounds(1);
    assert_eq!(world.sent.len(), 3);
}

#[test]
fn data_that_a_connection_does_not_carry_is_lost_where_connections_are_made() {
    let data = Sort { ipv4: true, kind: Kind::Data };
    let closed = |half| [FarWay { node: PEER, half, sort: data }];
    let mut world = World::new(1);
    world.peers.insert(PEER, ALL[..5].to_vec());
    world.rounds(3);
    assert_eq!(world.far.closed(), closed(Half::There));
    world.peers.insert(PEER, ALL.map(|(kind, _)| (kind, kind != Kind::Data)).to_vec());
    world.far.update(&[], &[]);
    world.far.update(&[subject(1)], &[]);
    world.rounds(3);
    assert_eq!(world.far.closed(), closed(Half::Back));
}

#[test]
fn data_that_did_not_get_so_far_or_that_a_peer_does_not_know_of_is_not_lost() {
    let mut slow = World::new(1);
    slow.connects_after = CONNECTED + Duration::from_millis(1);
    let mut old = World::new(1);
    old.is_old = true;
    for world in [&mut slow, &mut old] {
        world.peers.insert(PEER, ALL[..5].to_vec());
        world.rounds(5);
        assert!(world.far.closed().is_empty() && !world.far.is_in_doubt());
        assert_eq!(world.far.answering(), [PEER].into());
    }
    // Where large packets do not pass, data does not, either.
    let mut world = World::new(1);
    world.peers.insert(PEER, ALL[..2].to_vec());
    world.rounds(3);
    assert!(world.far.closed().iter().all(|way| way.sort.kind.is_large()));
    // And where connections are not made.
    world.peers.insert(PEER, ALL[1..5].to_vec());
    world.rounds(3);
    let sort = Sort { ipv4: true, kind: Kind::Segment };
    assert_eq!(world.far.closed(), [FarWay { node: PEER, half: Half::There, sort }]);
}

#[test]
fn one_bad_peer_does_not_keep_the_others_from_being_tried() {
    let mut world = World::new(9);
    let bad: Vec<NodeId> = (1..=4).map(|number| subject(number).node).collect();
    bad.iter().for_each(|node| _ = world.peers.insert(*node, Vec::new()));
    world.rounds(40);
    let closed: BTreeSet<NodeId> = world.far.closed().iter().map(|way| way.node).collect();
    assert_eq!(closed, bad.into_iter().collect());
    assert_eq!(world.far.answering().len(), 5);
    let most = SENDS.len() * Kind::ALL.len() * AT_ONCE * 40;
    assert!(world.sent.len() < most, "{}", world.sent.len());
}

#[test]
fn a_peer_that_is_gone_is_forgotten_with_all_that_was_lost() {
    let mut world = World::new(2);
    world.peers.insert(PEER, Vec::new());
    world.rounds(8);
    assert_eq!(world.far.closed().len(), Kind::ALL.len() - 1, "without a connection no data");
    world.far.update(&[subject(2)], &[]);
    assert!(world.far.closed().is_empty() && !world.far.is_in_doubt());
}

#[test]
fn a_peer_whose_host_answers_nothing_any_more_is_tried_at_once_and_known_by_that_alone() {
    let mut world = World::new(9);
    world.rounds(3);
    assert_eq!(world.far.answering().len(), 9);
    let doubted: Vec<Subject> =
        (1..=9).map(|number| Subject { is_doubted: true, ..subject(number) }).collect();
    world.far.update(&doubted, &[]);
    assert!(world.far.answering().is_empty(), "it was known before the doubt");
    assert!(world.far.next_due() <= Some(world.now));
    let begun = world.now;
    world.rounds(3);
    assert_eq!(world.far.answering().len(), 9);
    assert!(world.now.since(begun) <= ANXIOUS * 3, "none waits for calm rounds");
    world.far.update(&doubted, &[]);
    assert_eq!(world.far.answering().len(), 9, "the doubt is not new");
    assert_eq!(world.far.next_due(), Some(world.now + CALM));
}

#[test]
fn what_is_lost_by_chance_is_told_with_its_share_and_hides_no_other_trial() {
    for half in [Half::There, Half::Back] {
        let mut world = World::new(2);
        world.rounds(4);
        world.loses = Some((half, 4));
        let begun = world.now;
        while world.far.losses().len() < 2 {
            world.rounds(1);
            assert!(world.now.since(begun) < CALM * 4, "it is hurried");
        }
        world.rounds(6);
        let losses = world.far.losses();
        assert_eq!(losses.len(), 2, "{losses:?}");
        for loss in losses {
            assert_eq!((loss.half, loss.percent), (half, 25));
        }
        assert!(world.far.closed().is_empty() && !world.far.is_in_doubt());
        assert_eq!(world.far.answering().len(), 2);
        world.loses = None;
        world.rounds(8);
        assert_eq!(world.far.losses(), []);
        assert_eq!(world.far.next_due(), Some(world.now + CALM));
    }
}

#[test]
fn what_is_known_to_be_lost_is_not_told_as_lost_by_chance() {
    let mut world = World::new(1);
    world.loses = Some((Half::There, 1));
    let without = ALL.into_iter().filter(|(kind, _)| *kind != Kind::Small);
    world.peers.insert(PEER, without.collect());
    world.rounds(20);
    assert_eq!((world.far.closed().len(), world.far.losses()), (1, vec![]));
    let mut world = World::new(1);
    world.loses = Some((Half::There, 2));
    world.rounds(20);
    assert_eq!(world.far.losses().len(), 1);
    let way = Way { direction: Direction::Out(Transport::Udp), ipv4: true };
    world.far.update(&[subject(1)], &[way]);
    assert_eq!(world.far.losses(), []);
}

#[test]
fn a_packet_that_could_not_be_sent_is_no_loss() {
    let mut world = World::new(1);
    let without = ALL.into_iter().filter(|(kind, _)| *kind != Kind::Aggregate);
    world.peers.insert(PEER, without.collect());
    world.cannot_send = true;
    world.rounds(5);
    assert!(world.far.closed().is_empty() && !world.far.is_in_doubt());
}

#[test]
fn where_a_trial_has_a_price_a_peer_is_left_alone_after_it_unless_something_is_lost() {
    let rest = Duration::from_secs(400);
    let mut world = World::new(1);
    world.far.set_rest(Some(rest));
    // It is tried all the same if it has asked first.
    world.far.on_question(world.now, subject(1).addresses.first);
    assert!(world.far.next_due() <= Some(world.now));
    world.rounds(1);
    assert_eq!(world.far.answering(), [PEER].into());
    assert_eq!(world.far.next_due(), Some(world.now + rest));
    // What it asks is a use, too.
    let later = world.now + rest / 2;
    world.far.on_question(later, subject(1).addresses.first);
    assert_eq!(world.far.next_due(), Some(later + rest));
    let without = ALL.into_iter().filter(|(kind, _)| *kind != Kind::Fragmented);
    world.peers.insert(PEER, without.collect());
    world.rounds(1);
    let begun = world.now;
    // Now it is no reason to wait.
    world.far.on_question(world.now, subject(1).addresses.first);
    world.rounds(3);
    assert_eq!(world.far.closed().len(), 1);
    assert!(world.now.since(begun) < CALM);
    // Nor is a rest where it is not known what became of a part.
    world.far.update(&[], &[]);
    world.far.update(&[subject(1)], &[]);
    world.telling.insert(PEER, 0);
    world.rounds(1);
    assert_eq!(world.far.next_due(), Some(world.now + CALM));
    // One that has no pod is not asked more often for that.
    world.peers.clear();
    world.telling.clear();
    world.far.update(&[], &[]);
    world.far.update(&[subject(1)], &[]);
    world.rounds(1);
    assert!(world.far.next_due() >= Some(world.now + rest));
    // Once it has one it tells so.
    world.far.on_question(world.now, subject(1).addresses.first);
    assert_eq!(world.far.next_due(), Some(world.now));
}

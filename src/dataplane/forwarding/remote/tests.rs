//! Rounds of trials with simulated peers.

use super::{
    super::{Direction, TrialProtocol, TrialResult},
    *,
};

const PEER: NodeId = NodeId::from_bytes([1; 8]);
const SMALL: Sort = Sort { ipv4: true, kind: Kind::Small };

fn remote_peer(number: u8) -> RemotePeer {
    let first = IpAddr::from([10, 42, number, 254]);
    RemotePeer {
        node: NodeId::from_bytes([number; 8]),
        addresses: Addresses { first, second: None },
        carried: 1450,
        takes_large: true,
        is_unresponsive: false,
    }
}

/// Simulated peers, and a clock that advances to the next due time.
struct World {
    remote: RemoteTrials,
    now: Time,
    number: u32,
    /// By peer with a pod: the kinds that arrive there, and whether their answers return.
    peers: BTreeMap<NodeId, Vec<(Kind, bool)>>,
    /// By peer that reports arrivals: the age of its pod in milliseconds.
    pod_ages: BTreeMap<NodeId, u32>,
    /// Peers discard packets because they receive too many.
    is_discarding: bool,
    /// Every n-th sample is lost on this half of the path.
    sample_loss: Option<(Half, u32)>,
    counted: u32,
    /// This host cannot send packets of several datagrams.
    cannot_send: bool,
    /// Time after which connections are established.
    connects_after: Duration,
    /// No connection is established, even where first segments are answered.
    never_connects: bool,
    /// Peers are of a version that does not report data of connections.
    lacks_data_reports: bool,
    /// Destinations of all packets except samples.
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
        let peers_to_try: Vec<RemotePeer> = (1..=count).map(remote_peer).collect();
        let mut remote = RemoteTrials::default();
        remote.update(&peers_to_try, &[]);
        let nodes = peers_to_try.iter().map(|info| info.node);
        Self {
            remote,
            now: Time::ZERO + Duration::from_secs(100),
            number: 0,
            peers: nodes.clone().map(|node| (node, ALL.to_vec())).collect(),
            pod_ages: nodes.map(|node| (node, u32::MAX)).collect(),
            is_discarding: false,
            sample_loss: None,
            counted: 0,
            cannot_send: false,
            connects_after: Duration::ZERO,
            never_connects: false,
            lacks_data_reports: false,
            sent: Vec::new(),
        }
    }

    /// Runs this many rounds.
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
            self.now = self.now.max(self.remote.next_due().expect("something to do"));
            while let Some(output) = self.remote.poll(self.now, self.number) {
                match output {
                    RemoteOutput::Begin(_) => {}
                    RemoteOutput::Send { to, kind: Kind::Sample, number, .. } => {
                        self.counted += 1;
                        let node = node_at(to);
                        let lost =
                            self.sample_loss.filter(|(_, of)| self.counted.is_multiple_of(*of));
                        let half = lost.map(|(half, _)| half);
                        let has_pod = self.peers.get(&node).is_some_and(|sorts| !sorts.is_empty());
                        if has_pod && half != Some(Half::There) {
                            *samples.entry(node).or_default() += 1;
                            if half.is_none() {
                                self.remote.on_answer(to, Kind::Sample, number);
                            }
                        }
                    }
                    RemoteOutput::Send { to, kind, number, .. } => {
                        self.sent.push(to);
                        if kind == Kind::Aggregate && self.cannot_send {
                            self.remote.on_unsent(to, kind, number);
                        }
                        let node = node_at(to);
                        if kind == Kind::Data && !self.never_connects {
                            let sorts = self.peers.get(&node).into_iter().flatten();
                            if sorts.into_iter().any(|sort| *sort == (Kind::Segment, true)) {
                                let at = self.now + self.connects_after;
                                self.remote.on_connected(at, to, number);
                            }
                        }
                        let passing = self.peers.get(&node).into_iter().flatten();
                        for (_, is_returned) in passing.filter(|(passing, _)| *passing == kind) {
                            *came.entry(node).or_default() |= Sort { ipv4: true, kind }.bit();
                            if *is_returned {
                                self.remote.on_answer(to, kind, number);
                            }
                        }
                    }
                    RemoteOutput::RequestReports(number, nodes) => {
                        let reports = nodes.into_iter().filter_map(|node| {
                            let pod_age_ms = *self.pod_ages.get(&node)?;
                            let sees_data = if self.lacks_data_reports { 0 } else { SEES_DATA };
                            let came = came.get(&node).copied().unwrap_or(0) | sees_data;
                            let samples = samples.get(&node).copied().unwrap_or(0);
                            let shed = self.is_discarding;
                            Some((node, Arrivals { pod_age_ms, came, samples, shed }))
                        });
                        self.remote.on_arrivals_reported(self.now, number, &reports.collect());
                    }
                }
            }
            if self.remote.round.is_none() {
                return;
            }
        }
    }
}

fn node_at(ip: IpAddr) -> NodeId {
    let IpAddr::V4(ip) = ip else { panic!("not asked for") };
    NodeId::from_bytes([ip.octets()[2]; 8])
}

#[test]
fn pod_that_answers_all_is_open_and_rests() {
    let mut world = World::new(1);
    world.rounds(1);
    assert_eq!((world.remote.answering(), world.remote.closed()), ([PEER].into(), vec![]));
    assert_eq!(world.remote.next_due(), Some(world.now + TRIAL_INTERVAL));
    assert_eq!(world.sent.len(), Kind::ALL.len());
}

#[test]
fn packets_that_do_not_arrive_are_lost_there_after_three_rounds() {
    let mut world = World::new(1);
    let without = ALL.into_iter().filter(|(kind, _)| *kind != Kind::Fragmented);
    world.peers.insert(PEER, without.collect());
    world.rounds(2);
    assert!(world.remote.closed().is_empty() && world.remote.has_recent_loss());
    world.rounds(1);
    let sort = Sort { ipv4: true, kind: Kind::Fragmented };
    assert_eq!(world.remote.closed(), [RemoteWay { node: PEER, half: Half::There, sort }]);
    assert!(
        world.remote.next_due() > Some(world.now + CLOSED_ROUND_INTERVAL),
        "no longer at the short interval"
    );
    world.peers.insert(PEER, ALL.to_vec());
    world.rounds(1);
    assert!(world.remote.closed().is_empty() && !world.remote.has_recent_loss());
}

#[test]
fn peer_losing_only_large_packets_is_reported_after_one_round() {
    for (passing, expected) in [(&ALL[..2], 1), (&ALL[..1], 0), (&ALL[2..], 0)] {
        let mut world = World::new(1);
        world.peers.insert(PEER, passing.to_vec());
        world.rounds(1);
        assert_eq!(world.remote.losing_large().len(), expected, "{passing:?}");
        world.peers.insert(PEER, ALL.to_vec());
        world.rounds(1);
        assert!(world.remote.losing_large().is_empty());
    }
}

#[test]
fn peer_that_discards_packets_is_overloaded_until_all_is_answered() {
    let mut world = World::new(1);
    world.peers.insert(PEER, ALL[..3].to_vec());
    world.is_discarding = true;
    world.rounds(4);
    assert_eq!((world.remote.overloaded(), world.remote.closed()), (vec![PEER], vec![]));
    world.is_discarding = false;
    world.rounds(1);
    assert!(world.remote.overloaded().is_empty() && world.remote.has_recent_loss());
}

#[test]
fn answers_that_do_not_return_are_lost_on_the_way_back() {
    let mut world = World::new(1);
    let without = |(kind, _)| (kind, kind != Kind::Small);
    world.peers.insert(PEER, ALL.map(without).to_vec());
    world.rounds(3);
    assert_eq!(world.remote.closed(), [RemoteWay { node: PEER, half: Half::Back, sort: SMALL }]);
}

#[test]
fn peer_without_reports_has_no_loss_and_is_tried_more_rarely() {
    let mut world = World::new(1);
    world.peers.clear();
    world.pod_ages.clear();
    let mut before = world.now;
    let mut pauses = Vec::new();
    for _ in 0..8 {
        world.rounds(1);
        pauses.push(world.now.since(before));
        before = world.now;
    }
    assert!(!world.remote.has_recent_loss());
    assert!(pauses[7] > TRIAL_INTERVAL * 30, "{pauses:?}");
    // The pod exists now, and its own trials show that.
    world.peers.insert(PEER, ALL.to_vec());
    world.remote.on_question(world.now, remote_peer(1).addresses.first);
    assert_eq!(world.remote.next_due(), Some(world.now));
    world.rounds(1);
    assert_eq!(world.remote.answering(), [PEER].into());
}

#[test]
fn pod_younger_than_the_round_has_no_loss() {
    let mut world = World::new(1);
    world.peers.clear();
    world.pod_ages.insert(PEER, 1_000);
    world.rounds(5);
    assert!(!world.remote.has_recent_loss());
}

#[test]
fn peer_that_discarded_packets_gives_unclear_results() {
    let mut target = Target { open: [SMALL].into(), ..Target::default() };
    target.arrivals = Some(Arrivals { pod_age_ms: 60_000, shed: true, ..Arrivals::default() });
    assert_eq!(
        target.verdicts(true).next(),
        Some((SMALL, TrialResult::Unclear, TrialResult::Unclear))
    );
}

#[test]
fn round_of_a_stopped_process_proves_no_loss() {
    let mut world = World::new(1);
    world.peers.clear();
    for number in 0..20 {
        while let Some(due) = world.remote.next_due() {
            world.now = world.now.max(due) + MAX_STEP_DELAY + Duration::from_millis(1);
            let mut outputs = Vec::new();
            while let Some(output) = world.remote.poll(world.now, number) {
                outputs.push(output);
            }
            if outputs.is_empty() {
                break;
            }
        }
    }
    assert!(!world.remote.has_recent_loss());
}

#[test]
fn packets_dropped_by_this_host_are_not_tried_and_not_reported_twice() {
    let mut world = World::new(1);
    world.peers.insert(PEER, vec![(Kind::Segment, true)]);
    world.rounds(3);
    assert_eq!(world.remote.closed().len(), Kind::ALL.len() - 2, "data counts as large as well");
    let way = TrialWay { direction: Direction::In(TrialProtocol::Udp), ipv4: true };
    world.remote.update(&[remote_peer(1)], &[way]);
    assert!(world.remote.closed().is_empty());
    world.sent.clear();
    world.peers.insert(PEER, vec![(Kind::Segment, true), (Kind::Data, true)]);
    world.rounds(1);
    assert_eq!(world.sent.len(), 2);
    world.remote.update(&[RemotePeer { takes_large: false, ..remote_peer(1) }], &[]);
    world.sent.clear();
    world.peers.insert(PEER, ALL.to_vec());
    world.rounds(1);
    assert_eq!(world.sent.len(), 3);
}

#[test]
fn data_is_lost_when_connections_are_established_but_carry_none() {
    let data = Sort { ipv4: true, kind: Kind::Data };
    let closed = |half| [RemoteWay { node: PEER, half, sort: data }];
    let mut world = World::new(1);
    world.peers.insert(PEER, ALL[..5].to_vec());
    world.rounds(3);
    assert_eq!(world.remote.closed(), closed(Half::There));
    world.peers.insert(PEER, ALL.map(|(kind, _)| (kind, kind != Kind::Data)).to_vec());
    world.remote.update(&[], &[]);
    world.remote.update(&[remote_peer(1)], &[]);
    world.rounds(3);
    assert_eq!(world.remote.closed(), closed(Half::Back));
}

#[test]
fn connection_never_established_is_lost_although_first_segments_are_answered() {
    let mut world = World::new(1);
    world.never_connects = true;
    world.peers.insert(PEER, ALL[..5].to_vec());
    world.rounds(3);
    let sort = Sort { ipv4: true, kind: Kind::Data };
    assert_eq!(world.remote.closed(), [RemoteWay { node: PEER, half: Half::There, sort }]);
    world.never_connects = false;
    world.peers.insert(PEER, ALL.to_vec());
    world.rounds(1);
    assert_eq!(world.remote.closed(), []);
}

#[test]
fn data_not_sent_in_time_or_not_reported_by_peer_is_not_lost() {
    let mut slow = World::new(1);
    slow.connects_after = MAX_CONNECT_TIME + Duration::from_millis(1);
    let mut old = World::new(1);
    old.lacks_data_reports = true;
    for world in [&mut slow, &mut old] {
        world.peers.insert(PEER, ALL[..5].to_vec());
        world.rounds(5);
        assert!(world.remote.closed().is_empty() && !world.remote.has_recent_loss());
        assert_eq!(world.remote.answering(), [PEER].into());
    }
    // If large packets are lost, data is not tried.
    let mut world = World::new(1);
    world.peers.insert(PEER, ALL[..2].to_vec());
    world.rounds(3);
    assert!(world.remote.closed().iter().all(|way| way.sort.kind.is_large()));
    // If connections cannot be established, data is not tried either.
    world.peers.insert(PEER, ALL[1..5].to_vec());
    world.rounds(3);
    let sort = Sort { ipv4: true, kind: Kind::Segment };
    assert_eq!(world.remote.closed(), [RemoteWay { node: PEER, half: Half::There, sort }]);
}

#[test]
fn bad_peers_do_not_prevent_trials_of_others() {
    let mut world = World::new(9);
    let bad: Vec<NodeId> = (1..=4).map(|number| remote_peer(number).node).collect();
    bad.iter().for_each(|node| _ = world.peers.insert(*node, Vec::new()));
    world.rounds(40);
    let closed: BTreeSet<NodeId> = world.remote.closed().iter().map(|way| way.node).collect();
    assert_eq!(closed, bad.into_iter().collect());
    assert_eq!(world.remote.answering().len(), 5);
    let most = SEND_TIMES.len() * Kind::ALL.len() * PEERS_PER_ROUND * 40;
    assert!(world.sent.len() < most, "{}", world.sent.len());
}

#[test]
fn removed_peer_is_forgotten_with_its_losses() {
    let mut world = World::new(2);
    world.peers.insert(PEER, Vec::new());
    world.rounds(8);
    assert_eq!(world.remote.closed().len(), Kind::ALL.len() - 1, "no data without a connection");
    world.remote.update(&[remote_peer(2)], &[]);
    assert!(world.remote.closed().is_empty() && !world.remote.has_recent_loss());
}

#[test]
fn new_suspect_is_tried_at_once_and_judged_only_by_new_results() {
    let mut world = World::new(9);
    world.rounds(3);
    assert_eq!(world.remote.answering().len(), 9);
    let suspects: Vec<RemotePeer> =
        (1..=9).map(|number| RemotePeer { is_unresponsive: true, ..remote_peer(number) }).collect();
    world.remote.update(&suspects, &[]);
    assert!(world.remote.answering().is_empty(), "earlier results do not count");
    assert!(world.remote.next_due() <= Some(world.now));
    let begun = world.now;
    world.rounds(3);
    assert_eq!(world.remote.answering().len(), 9);
    assert!(
        world.now.since(begun) <= SUSPECT_TRIAL_INTERVAL * 3,
        "no peer waits for the regular interval"
    );
    world.remote.update(&suspects, &[]);
    assert_eq!(world.remote.answering().len(), 9, "it was suspect before");
    assert_eq!(world.remote.next_due(), Some(world.now + TRIAL_INTERVAL));
}

#[test]
fn random_loss_is_reported_with_its_percentage_and_other_trials_pass() {
    for half in [Half::There, Half::Back] {
        let mut world = World::new(2);
        world.rounds(4);
        world.sample_loss = Some((half, 4));
        let begun = world.now;
        while world.remote.losses().len() < 2 {
            world.rounds(1);
            assert!(
                world.now.since(begun) < TRIAL_INTERVAL * 4,
                "rounds follow at short intervals"
            );
        }
        world.rounds(6);
        let losses = world.remote.losses();
        assert_eq!(losses.len(), 2, "{losses:?}");
        for loss in losses {
            assert_eq!((loss.half, loss.percent), (half, 25));
        }
        assert!(world.remote.closed().is_empty() && !world.remote.has_recent_loss());
        assert_eq!(world.remote.answering().len(), 2);
        world.sample_loss = None;
        world.rounds(8);
        assert_eq!(world.remote.losses(), []);
        assert_eq!(world.remote.next_due(), Some(world.now + TRIAL_INTERVAL));
    }
}

#[test]
fn known_loss_is_not_reported_as_random_loss() {
    let mut world = World::new(1);
    world.sample_loss = Some((Half::There, 1));
    let without = ALL.into_iter().filter(|(kind, _)| *kind != Kind::Small);
    world.peers.insert(PEER, without.collect());
    world.rounds(20);
    assert_eq!((world.remote.closed().len(), world.remote.losses()), (1, vec![]));
    let mut world = World::new(1);
    world.sample_loss = Some((Half::There, 2));
    world.rounds(20);
    assert_eq!(world.remote.losses().len(), 1);
    let way = TrialWay { direction: Direction::Out(TrialProtocol::Udp), ipv4: true };
    world.remote.update(&[remote_peer(1)], &[way]);
    assert_eq!(world.remote.losses(), []);
}

#[test]
fn packet_that_could_not_be_sent_is_no_loss() {
    let mut world = World::new(1);
    let without = ALL.into_iter().filter(|(kind, _)| *kind != Kind::Aggregate);
    world.peers.insert(PEER, without.collect());
    world.cannot_send = true;
    world.rounds(5);
    assert!(world.remote.closed().is_empty() && !world.remote.has_recent_loss());
}

#[test]
fn peer_with_costly_trials_rests_after_each_unless_packets_are_lost() {
    let rest = Duration::from_secs(400);
    let mut world = World::new(1);
    world.remote.set_rest(Some(rest));
    // A packet from the peer's pod ends the waiting.
    world.remote.on_question(world.now, remote_peer(1).addresses.first);
    assert!(world.remote.next_due() <= Some(world.now));
    world.rounds(1);
    assert_eq!(world.remote.answering(), [PEER].into());
    assert_eq!(world.remote.next_due(), Some(world.now + rest));
    // Packets from the peer's pod count as use, too, and extend the rest.
    let later = world.now + rest / 2;
    world.remote.on_question(later, remote_peer(1).addresses.first);
    assert_eq!(world.remote.next_due(), Some(later + rest));
    let without = ALL.into_iter().filter(|(kind, _)| *kind != Kind::Fragmented);
    world.peers.insert(PEER, without.collect());
    world.rounds(1);
    let begun = world.now;
    // While something is lost, they do not.
    world.remote.on_question(world.now, remote_peer(1).addresses.first);
    world.rounds(3);
    assert_eq!(world.remote.closed().len(), 1);
    assert!(world.now.since(begun) < TRIAL_INTERVAL);
    // A partial answer without a report also prevents the rest.
    world.remote.update(&[], &[]);
    world.remote.update(&[remote_peer(1)], &[]);
    world.pod_ages.insert(PEER, 0);
    world.rounds(1);
    assert_eq!(world.remote.next_due(), Some(world.now + TRIAL_INTERVAL));
    // A peer without a pod is not tried more often because of that.
    world.peers.clear();
    world.pod_ages.clear();
    world.remote.update(&[], &[]);
    world.remote.update(&[remote_peer(1)], &[]);
    world.rounds(1);
    assert!(world.remote.next_due() >= Some(world.now + rest));
    // Once the pod exists, its own packets show it.
    world.remote.on_question(world.now, remote_peer(1).addresses.first);
    assert_eq!(world.remote.next_due(), Some(world.now));
}

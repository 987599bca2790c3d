//! Scenarios with one peer, or a thousand, in steps of [`TICK`].

use std::net::Ipv4Addr;

use super::*;

const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 42, 7, 0));
const UNDERLAY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7));
const TICK: Duration = Duration::from_millis(100);

/// One peer. The `answers` of [`Scenario::run`] decide which probes it answers.
struct Scenario {
    paths: Paths,
    node: NodeId,
    now: Time,
    liveness: Liveness,
    may_probe: bool,
    sent: u32,
    /// The peer's agent answers datagrams; otherwise its kernel refuses them.
    agent: bool,
    round_trip: Duration,
    /// Answers that have not arrived yet.
    in_flight: Vec<(Time, Probe)>,
    states_seen: BTreeSet<PathState>,
}

impl Scenario {
    fn new() -> Self {
        let mut scenario = Self {
            paths: Paths::new(Some(Duration::from_secs(10))),
            node: NodeId::of_public_key(&[1; 32]),
            now: Time::ZERO,
            liveness: Liveness::Alive,
            may_probe: true,
            sent: 0,
            agent: true,
            round_trip: Duration::from_millis(1),
            in_flight: Vec::new(),
            states_seen: BTreeSet::new(),
        };
        scenario.update();
        scenario
    }

    fn update(&mut self) {
        let (node, liveness) = (self.node, Some(self.liveness));
        let peer = ProbedPeer {
            node,
            vtep: PEER,
            underlay: UNDERLAY,
            liveness,
            may_probe: self.may_probe,
        };
        self.paths.update(self.now, [peer].into_iter());
    }

    fn run(&mut self, seconds: u64, answers: impl Fn(&Probe) -> bool) {
        let end = self.now + Duration::from_secs(seconds);
        while self.now < end {
            self.now = self.now + TICK;
            let arrived = self.in_flight.extract_if(.., |(at, _)| *at <= self.now);
            for (_, probe) in arrived.collect::<Vec<_>>() {
                match probe.kind {
                    Kind::Datagram { .. } | Kind::Flow { .. } => {
                        let by = if self.agent { Responder::Agent } else { Responder::Kernel };
                        self.paths.on_arrival(self.now, PEER, probe.sequence, by, false);
                    }
                    _ => self.paths.on_answer(self.now, PEER, probe.sequence, false),
                }
            }
            self.update();
            while let Some(probe) = self.paths.poll(self.now) {
                self.sent += 1;
                if answers(&probe) {
                    self.in_flight.push((self.now + self.round_trip, probe));
                }
            }
            self.states_seen.insert(self.state());
        }
    }

    fn state(&self) -> PathState {
        self.paths.states(self.now).next().expect("one peer").1
    }

    fn is_withdrawn(&self) -> bool {
        !self.paths.withdrawn().is_empty()
    }
}

const fn is_echo(probe: &Probe) -> bool {
    !is_datagram(probe)
}

const fn is_datagram(probe: &Probe) -> bool {
    probe.kind.is_datagram()
}

#[test]
fn answering_peer_is_ok_and_probed_rarely() {
    let mut scenario = Scenario::new();
    scenario.run(60, |_| true);
    assert_eq!(scenario.state(), PathState::Ok);
    assert!(scenario.sent <= 11, "{} requests in a minute", scenario.sent);
}

#[test]
fn down_peer_is_ok_while_its_kernel_answers() {
    let mut scenario = Scenario::new();
    scenario.run(5, |_| true);
    scenario.liveness = Liveness::Down;
    scenario.run(60, |_| true);
    assert_eq!(scenario.state(), PathState::Ok);
    assert!(scenario.paths.withdrawn().is_empty());
}

#[test]
fn down_and_silent_peer_is_withdrawn_in_time_and_restored_by_first_answer() {
    let mut scenario = Scenario::new();
    scenario.run(20, |_| true);
    scenario.liveness = Liveness::Suspect;
    scenario.run(6, |_| false);
    scenario.liveness = Liveness::Down;
    scenario.run(3, |_| false);
    assert_eq!(scenario.state(), PathState::Dead);
    assert!(scenario.paths.withdrawn().is_empty(), "withdrawn only after ten seconds");
    scenario.run(4, |_| false);
    assert_eq!(scenario.paths.withdrawn(), BTreeSet::from([scenario.node]));
    let before = scenario.sent;
    scenario.run(60, |_| false);
    assert!(scenario.sent - before <= 13, "{} to a dead host", scenario.sent - before);
    scenario.run(6, |_| true);
    assert!(scenario.paths.withdrawn().is_empty());
}

#[test]
fn withdrawn_peer_that_may_not_be_probed_is_restored_by_gossip() {
    let mut scenario = Scenario::new();
    scenario.run(5, |_| true);
    scenario.liveness = Liveness::Down;
    scenario.run(20, |_| false);
    (scenario.may_probe, scenario.sent) = (false, 0);
    scenario.run(60, |_| true);
    assert_eq!((scenario.state(), scenario.sent), (PathState::Withdrawn, 0));
    assert_eq!(scenario.paths.next_due(), None);
    scenario.liveness = Liveness::Alive;
    scenario.update();
    assert!(scenario.paths.withdrawn().is_empty());
}

#[test]
fn withdrawn_peer_is_restored_by_gossip_alone() {
    let mut scenario = Scenario::new();
    scenario.run(5, |_| true);
    scenario.liveness = Liveness::Down;
    scenario.run(20, |_| false);
    assert_eq!(scenario.state(), PathState::Withdrawn);
    scenario.liveness = Liveness::Alive;
    scenario.run(1, |_| false);
    assert_eq!(scenario.state(), PathState::Unanswered);
}

#[test]
fn alive_peer_behind_closed_tunnel_is_unanswered_and_never_withdrawn() {
    let mut scenario = Scenario::new();
    scenario.run(40, |_| false);
    assert_eq!(scenario.state(), PathState::Unanswered);
    scenario.paths.on_packet(scenario.now, PEER, false);
    assert_eq!(scenario.state(), PathState::OneWay);
    assert!(scenario.paths.withdrawn().is_empty());
}

#[test]
fn lost_full_size_echoes_with_answered_small_ones_mean_mtu_too_large() {
    let mut scenario = Scenario::new();
    scenario.run(30, |probe| !matches!(probe.kind, Kind::Full { .. }));
    assert_eq!(scenario.state(), PathState::MtuTooLarge);
    assert_eq!(scenario.paths.mtu_reduction(scenario.node), None, "no size passes");
    scenario.run(30, |_| true);
    assert_eq!(scenario.state(), PathState::Ok);
    // The full size is tried occasionally.
    scenario.run(360, |probe| !matches!(probe.kind, Kind::Full { less: ..60 }));
    assert_eq!(scenario.state(), PathState::MtuTooLarge);
    let narrower = scenario.paths.mtu_reduction(scenario.node).expect("it is known");
    assert!((60..68).contains(&narrower), "{narrower}");
    assert!(scenario.paths.are_healthy());
    scenario.run(30, |_| true);
    assert_eq!(
        (scenario.state(), scenario.paths.mtu_reduction(scenario.node)),
        (PathState::Ok, None)
    );
}

#[test]
fn size_of_path_through_switch_without_jumbo_frames_is_found() {
    let mut scenario = Scenario::new();
    scenario.run(60, |probe| !matches!(probe.kind, Kind::Full { less: ..7_500 }));
    assert_eq!(scenario.state(), PathState::MtuTooLarge);
    let found = scenario.paths.mtu_reduction(scenario.node).expect("it is known");
    assert!((7_500..7_508).contains(&found), "{found}");
}

#[test]
fn datagrams_lost_while_echoes_pass_are_noticed_and_counted_on_request() {
    let mut scenario = Scenario::new();
    scenario.run(20, is_echo);
    let peer = BTreeSet::from([scenario.node]);
    assert_eq!(
        (scenario.state(), scenario.paths.losing_datagrams()),
        (PathState::Ok, peer.clone())
    );
    scenario.paths.request_datagrams(scenario.now, &peer, 6);
    assert_eq!(scenario.paths.tally(scenario.node), Some(Tally::default()));
    scenario.run(8, |_| true);
    assert_eq!(scenario.paths.tally(scenario.node), Some(Tally { answered: 6, lost: 0 }));
    assert!(scenario.paths.losing_datagrams().is_empty());
    scenario.paths.request_datagrams(scenario.now, &peer, 6);
    scenario.run(15, is_echo);
    assert_eq!(scenario.paths.tally(scenario.node), Some(Tally { answered: 0, lost: 6 }));
}

#[test]
fn path_with_filtered_echoes_is_ok_while_datagrams_are_answered() {
    let mut scenario = Scenario::new();
    scenario.run(20, |_| true);
    scenario.states_seen.clear();
    scenario.run(120, is_datagram);
    scenario.sent = 0;
    scenario.run(60, is_datagram);
    assert_eq!(scenario.states_seen, BTreeSet::from([PathState::Ok]));
    assert!(scenario.sent <= 10, "{} requests in a minute", scenario.sent);
    // The agent ends; the kernel then refuses the datagrams.
    (scenario.liveness, scenario.agent) = (Liveness::Down, false);
    scenario.run(60, is_datagram);
    assert!(!scenario.is_withdrawn());
    // The host loses power.
    scenario.run(13, |_| false);
    assert!(scenario.is_withdrawn());
    (scenario.liveness, scenario.agent) = (Liveness::Alive, true);
    scenario.run(310, |_| true);
    assert!(scenario.state() == PathState::Ok && scenario.paths.are_healthy());
}

#[test]
fn missing_datagram_answers_prove_nothing_after_agent_ended() {
    let mut scenario = Scenario::new();
    scenario.run(20, |_| true);
    // The host drops both echo replies and refusals.
    scenario.run(120, is_datagram);
    scenario.liveness = Liveness::Down;
    scenario.run(60, |_| false);
    assert_eq!((scenario.state(), scenario.is_withdrawn()), (PathState::Unanswered, false));
}

#[test]
fn requested_size_check_is_sent_at_once() {
    let is_small = |probe: &Probe| !matches!(probe.kind, Kind::Full { less: ..60 });
    let mut scenario = Scenario::new();
    scenario.run(60, |_| true);
    scenario.run(30, is_small);
    assert_eq!(scenario.state(), PathState::Ok, "full-size probes are minutes apart");
    scenario.paths.request_size_check(scenario.now, scenario.node);
    scenario.run(3, is_small);
    assert!(scenario.paths.is_measuring_size(scenario.node));
    scenario.run(12, is_small);
    assert_eq!(scenario.state(), PathState::MtuTooLarge);
    assert!(!scenario.paths.is_measuring_size(scenario.node));
    assert!(scenario.paths.mtu_reduction(scenario.node).is_some_and(|less| less < 68));
    // A known reduction is not measured again, and one answered probe shows that the full size passes.
    let sent = scenario.sent;
    scenario.paths.request_size_check(scenario.now, scenario.node);
    scenario.run(1, is_small);
    assert_eq!(scenario.sent, sent);
    scenario.run(60, |_| true);
    scenario.paths.request_size_check(scenario.now, scenario.node);
    scenario.run(5, |_| true);
    assert_eq!(
        (scenario.state(), scenario.paths.is_measuring_size(scenario.node)),
        (PathState::Ok, false)
    );
}

#[test]
fn peer_that_never_answered_is_never_withdrawn() {
    let mut scenario = Scenario::new();
    scenario.liveness = Liveness::Down;
    scenario.run(600, |_| false);
    assert_eq!((scenario.state(), scenario.is_withdrawn()), (PathState::Unanswered, false));
}

#[test]
fn probes_unanswered_while_agent_was_alive_do_not_withdraw_peer() {
    for gossip_only in [true, false] {
        let mut scenario = Scenario::new();
        scenario.run(20, |_| true);
        // From now on the peer's firewall drops everything except the agent's own packets.
        scenario.run(16, |_| false);
        for _ in 0..6 {
            scenario.paths.on_agent(scenario.now, scenario.node, !gossip_only, None);
            scenario.run(1, |_| false);
        }
        if gossip_only {
            scenario.run(10, |_| false);
        }
        scenario.liveness = Liveness::Down;
        scenario.run(60, |_| false);
        assert_eq!((scenario.state(), scenario.is_withdrawn()), (PathState::Unanswered, false));
        // After new answers, missing answers count again.
        scenario.run(5, |_| true);
        assert_eq!(scenario.state(), PathState::Ok);
        scenario.run(13, |_| false);
        assert_eq!(scenario.state(), PathState::Withdrawn);
    }
}

#[test]
fn unprompted_packets_prevent_withdrawal_while_they_arrive() {
    let mut scenario = Scenario::new();
    scenario.run(20, |_| true);
    scenario.liveness = Liveness::Down;
    for _ in 0..40 {
        scenario.run(1, |_| false);
        scenario.paths.on_packet(scenario.now, UNDERLAY, false);
    }
    assert_eq!((scenario.state(), scenario.is_withdrawn()), (PathState::OneWay, false));
    scenario.run(12, |_| false);
    assert!(scenario.is_withdrawn());
    scenario.paths.on_packet(scenario.now, UNDERLAY, false);
    assert!(!scenario.is_withdrawn());
}

#[test]
fn packets_from_address_of_several_peers_prove_nothing() {
    let subject = |n: u8| {
        let vtep = IpAddr::from([10, 42, n, 0]);
        let node = NodeId::of_public_key(&[n; 32]);
        ProbedPeer {
            node,
            vtep,
            underlay: UNDERLAY,
            liveness: Some(Liveness::Alive),
            may_probe: true,
        }
    };
    let state = |peers: &[ProbedPeer]| {
        let (mut paths, mut now) = (Paths::new(None), Time::ZERO);
        paths.update(now, peers.iter().copied());
        for _ in 0..200 {
            now = now + TICK;
            paths.update_withdrawn(now);
            while paths.poll(now).is_some() {}
        }
        paths.on_packet(now, UNDERLAY, false);
        paths.states(now).next().expect("a peer").1
    };
    assert_eq!(state(&[subject(1)]), PathState::OneWay);
    assert_eq!(state(&[subject(1), subject(2)]), PathState::Unanswered);
}

#[test]
fn round_trip_of_three_seconds_is_no_loss_for_any_liveness() {
    let mut scenario = Scenario::new();
    scenario.round_trip = Duration::from_secs(3);
    for liveness in [Liveness::Alive, Liveness::Suspect, Liveness::Down] {
        scenario.liveness = liveness;
        scenario.run(60, |_| true);
    }
    assert_eq!(scenario.states_seen, BTreeSet::from([PathState::Unknown, PathState::Ok]));
    // A fast path that becomes slow, and the reverse.
    for milliseconds in [20, 3_000, 20] {
        scenario.liveness = Liveness::Alive;
        scenario.round_trip = Duration::from_millis(milliseconds);
        scenario.run(60, |_| true);
        assert_eq!(scenario.state(), PathState::Ok);
        scenario.liveness = Liveness::Down;
        scenario.states_seen.clear();
        scenario.run(60, |_| true);
        assert_eq!(scenario.states_seen, BTreeSet::from([PathState::Ok]));
    }
}

#[test]
fn probes_pending_while_process_was_stopped_are_not_lost() {
    let mut scenario = Scenario::new();
    scenario.run(20, |_| true);
    scenario.liveness = Liveness::Down;
    for _ in 0..5 {
        scenario.run(1, |_| true);
        scenario.states_seen.clear();
        // The last probes are answered while the process is stopped.
        scenario.now = scenario.now + Duration::from_secs(60);
    }
    scenario.run(5, |_| true);
    assert_eq!(scenario.states_seen, BTreeSet::from([PathState::Ok]));
    assert_eq!(scenario.paths.next_due().map(|due| due > scenario.now), Some(true));
}

#[test]
fn loss_of_two_in_five_packets_withdraws_no_peer() {
    let mut scenario = Scenario::new();
    for seed in 1..30_u32 {
        scenario.liveness = if seed.is_multiple_of(3) { Liveness::Down } else { Liveness::Alive };
        let survives = |probe: &Probe| {
            (u32::from(probe.sequence) + seed).wrapping_mul(2_654_435_761) >> 16 & 0xff > 102
        };
        scenario.run(60, survives);
        assert!(!scenario.is_withdrawn());
    }
}

#[test]
fn thousand_peers_are_probed_at_fifty_a_second_or_eight_per_check_while_healthy() {
    let mut paths = Paths::new(None);
    let subject = |n: u32| {
        let bytes = [(n >> 8) as u8 + 1, n as u8].repeat(16);
        let node = NodeId::of_public_key(&bytes.try_into().expect("32 bytes"));
        let vtep = Ipv4Addr::from(n).into();
        ProbedPeer { node, vtep, underlay: vtep, liveness: Some(Liveness::Alive), may_probe: true }
    };
    let subjects: Vec<ProbedPeer> = (0..1_000).map(subject).collect();
    let mut may_probe = |from: u64, answers: bool| {
        let mut sent = 0;
        for tick in 0..1_000 {
            let now = Time::ZERO + Duration::from_millis((from * 1_000 + tick) * 10);
            if tick % 100 == 0 {
                paths.update(now, subjects.iter().copied());
            } else if paths.next_due().is_none_or(|due| now < due) {
                continue;
            }
            while let Some(probe) = paths.poll(now) {
                sent += 1;
                if answers {
                    paths.on_answer(now, probe.to, probe.sequence, false);
                    paths.on_arrival(now, probe.to, probe.sequence, Responder::Agent, false);
                }
            }
        }
        sent
    };
    // Ten seconds per round.
    assert!((450..=501).contains(&may_probe(0, false)));
    (1..9).for_each(|tens| _ = may_probe(tens, true));
    assert!((72..=82).contains(&may_probe(9, true)));
}

/// Returns whether a probe takes the working link of a bond of two links, of which the other is dead.
fn takes_working_link(probe: &Probe, echoes: bool) -> bool {
    match probe.kind {
        Kind::Datagram { flow } | Kind::Flow { flow } => flow % 2 == 0,
        _ => echoes,
    }
}

#[test]
fn flows_lost_while_others_pass_are_counted_until_they_pass() {
    for echoes in [true, false] {
        let mut scenario = Scenario::new();
        scenario.run(20, |_| true);
        assert_eq!(scenario.paths.flows(scenario.node), None);
        scenario.run(80, |probe| takes_working_link(probe, echoes));
        assert_eq!(scenario.paths.flows(scenario.node), Some((4, 8)), "echoes: {echoes}");
        assert_eq!(scenario.state(), PathState::PartlyLost);
        assert!(scenario.paths.losing_datagrams().is_empty(), "checksums are not the cause");
        (scenario.sent, scenario.states_seen) = (0, BTreeSet::new());
        scenario.run(60, |probe| takes_working_link(probe, echoes));
        assert_eq!(scenario.states_seen, BTreeSet::from([PathState::PartlyLost]));
        assert!(scenario.sent <= 60, "{} requests in a minute", scenario.sent);
        scenario.run(40, |_| true);
        assert_eq!((scenario.state(), scenario.paths.flows(scenario.node)), (PathState::Ok, None));
    }
}

#[test]
fn flows_are_not_counted_when_all_flows_or_all_probes_are_lost() {
    let mut scenario = Scenario::new();
    scenario.run(20, |_| true);
    scenario.states_seen.clear();
    scenario.run(120, is_echo);
    assert_eq!(
        scenario.states_seen,
        BTreeSet::from([PathState::Ok]),
        "a firewall may drop datagrams"
    );
    scenario.run(120, |_| true);
    scenario.run(60, |_| false);
    assert!(!scenario.states_seen.contains(&PathState::PartlyLost), "{:?}", scenario.states_seen);
    assert_eq!(scenario.paths.flows(scenario.node), None);
}

#[test]
fn lossy_path_has_no_lost_flows() {
    let mut scenario = Scenario::new();
    for seed in 1..30_u32 {
        let survives = |probe: &Probe| {
            (u32::from(probe.sequence) + seed).wrapping_mul(2_654_435_761) >> 16 & 0xff > 12
        };
        scenario.run(60, survives);
    }
    assert_eq!(scenario.states_seen, BTreeSet::from([PathState::Unknown, PathState::Ok]));
}

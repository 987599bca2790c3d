//! Stories of one peer, or a thousand, told second by second.

use std::net::Ipv4Addr;

use super::*;

const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 42, 7, 0));
const UNDERLAY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7));
const TICK: Duration = Duration::from_millis(100);

/// A peer whose kernel answers while `answers` says so.
struct Story {
    paths: Paths,
    node: NodeId,
    now: Time,
    liveness: Liveness,
    ask: bool,
    sent: u32,
    /// An agent answers datagrams, and not the kernel.
    agent: bool,
    round_trip: Duration,
    /// Answers on their way.
    on_way: Vec<(Time, Probe)>,
    worst: BTreeSet<PathState>,
}

impl Story {
    fn new() -> Self {
        let mut story = Self {
            paths: Paths::new(Some(Duration::from_secs(10))),
            node: NodeId::of_public_key(&[1; 32]),
            now: Time::ZERO,
            liveness: Liveness::Alive,
            ask: true,
            sent: 0,
            agent: true,
            round_trip: Duration::from_millis(1),
            on_way: Vec::new(),
            worst: BTreeSet::new(),
        };
        story.update();
        story
    }

    fn update(&mut self) {
        let (node, liveness) = (self.node, Some(self.liveness));
        let peer = Subject { node, vtep: PEER, underlay: UNDERLAY, liveness, ask: self.ask };
        self.paths.update(self.now, [peer].into_iter());
    }

    fn run(&mut self, seconds: u64, answers: impl Fn(&Probe) -> bool) {
        let end = self.now + Duration::from_secs(seconds);
        while self.now < end {
            self.now = self.now + TICK;
            let arrived = self.on_way.extract_if(.., |(at, _)| *at <= self.now);
            for (_, probe) in arrived.collect::<Vec<_>>() {
                match probe.kind {
                    Kind::Datagram { .. } | Kind::Flow { .. } => {
                        let by = if self.agent { By::Agent } else { By::Kernel };
                        self.paths.on_arrival(self.now, PEER, probe.sequence, by, false);
                    }
                    _ => self.paths.on_answer(self.now, PEER, probe.sequence, false),
                }
            }
            self.update();
            while let Some(probe) = self.paths.poll(self.now) {
                self.sent += 1;
                if answers(&probe) {
                    self.on_way.push((self.now + self.round_trip, probe));
                }
            }
            self.worst.insert(self.state());
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
fn a_peer_that_answers_is_ok_and_asked_rarely() {
    let mut story = Story::new();
    story.run(60, |_| true);
    assert_eq!(story.state(), PathState::Ok);
    assert!(story.sent <= 11, "{} requests in a minute", story.sent);
}

#[test]
fn down_is_not_dead_while_the_kernel_answers() {
    let mut story = Story::new();
    story.run(5, |_| true);
    story.liveness = Liveness::Down;
    story.run(60, |_| true);
    assert_eq!(story.state(), PathState::Ok);
    assert!(story.paths.withdrawn().is_empty());
}

#[test]
fn who_is_down_and_silent_is_withdrawn_in_time_and_back_with_the_first_answer() {
    let mut story = Story::new();
    story.run(20, |_| true);
    story.liveness = Liveness::Suspect;
    story.run(6, |_| false);
    story.liveness = Liveness::Down;
    story.run(3, |_| false);
    assert_eq!(story.state(), PathState::Dead);
    assert!(story.paths.withdrawn().is_empty(), "not for ten seconds");
    story.run(4, |_| false);
    assert_eq!(story.paths.withdrawn(), BTreeSet::from([story.node]));
    let before = story.sent;
    story.run(60, |_| false);
    assert!(story.sent - before <= 13, "{} to a dead host", story.sent - before);
    story.run(6, |_| true);
    assert!(story.paths.withdrawn().is_empty());
}

#[test]
fn who_may_not_be_asked_stays_withdrawn_until_gossip_has_it_back() {
    let mut story = Story::new();
    story.run(5, |_| true);
    story.liveness = Liveness::Down;
    story.run(20, |_| false);
    (story.ask, story.sent) = (false, 0);
    story.run(60, |_| true);
    assert_eq!((story.state(), story.sent), (PathState::Withdrawn, 0));
    assert_eq!(story.paths.next_due(), None);
    story.liveness = Liveness::Alive;
    story.update();
    assert!(story.paths.withdrawn().is_empty());
}

#[test]
fn gossip_alone_brings_it_back_too() {
    let mut story = Story::new();
    story.run(5, |_| true);
    story.liveness = Liveness::Down;
    story.run(20, |_| false);
    assert_eq!(story.state(), PathState::Withdrawn);
    story.liveness = Liveness::Alive;
    story.run(1, |_| false);
    assert_eq!(story.state(), PathState::Unanswered);
}

#[test]
fn a_live_agent_behind_a_closed_tunnel_is_named_and_never_withdrawn() {
    let mut story = Story::new();
    story.run(40, |_| false);
    assert_eq!(story.state(), PathState::Unanswered);
    story.paths.on_packet(story.now, PEER, false);
    assert_eq!(story.state(), PathState::OneWay);
    assert!(story.paths.withdrawn().is_empty());
}

#[test]
fn full_packets_that_are_lost_where_small_ones_are_not_mean_the_mtu() {
    let mut story = Story::new();
    story.run(20, |probe| !matches!(probe.kind, Kind::Full { .. }));
    assert_eq!(story.state(), PathState::MtuTooLarge);
    assert_eq!(story.paths.narrower_by(story.node), None, "none of any size arrives");
    story.run(30, |_| true);
    assert_eq!(story.state(), PathState::Ok);
    // The full size is tried now and then.
    story.run(360, |probe| !matches!(probe.kind, Kind::Full { less: ..60 }));
    assert_eq!(story.state(), PathState::MtuTooLarge);
    let narrower = story.paths.narrower_by(story.node).expect("it is known");
    assert!((60..68).contains(&narrower), "{narrower}");
    assert!(story.paths.are_calm());
    story.run(30, |_| true);
    assert_eq!((story.state(), story.paths.narrower_by(story.node)), (PathState::Ok, None));
}

#[test]
fn datagrams_that_are_lost_where_echoes_are_not_are_noticed_and_counted_when_asked_for() {
    let mut story = Story::new();
    story.run(20, is_echo);
    let peer = BTreeSet::from([story.node]);
    assert_eq!((story.state(), story.paths.deaf()), (PathState::Ok, peer.clone()));
    story.paths.ask_datagrams(story.now, &peer, 6);
    assert_eq!(story.paths.tally(story.node), Some(Tally::default()));
    story.run(8, |_| true);
    assert_eq!(story.paths.tally(story.node), Some(Tally { answered: 6, lost: 0 }));
    assert!(story.paths.deaf().is_empty());
    story.paths.ask_datagrams(story.now, &peer, 6);
    story.run(15, is_echo);
    assert_eq!(story.paths.tally(story.node), Some(Tally { answered: 0, lost: 6 }));
}

#[test]
fn a_path_whose_echoes_are_filtered_is_ok_while_datagrams_are_answered() {
    let mut story = Story::new();
    story.run(20, |_| true);
    story.worst.clear();
    story.run(120, is_datagram);
    story.sent = 0;
    story.run(60, is_datagram);
    assert_eq!(story.worst, BTreeSet::from([PathState::Ok]));
    assert!(story.sent <= 10, "{} requests in a minute", story.sent);
    // The agent goes; its kernel refuses what it had answered.
    (story.liveness, story.agent) = (Liveness::Down, false);
    story.run(60, is_datagram);
    assert!(!story.is_withdrawn());
    // The host loses its power.
    story.run(13, |_| false);
    assert!(story.is_withdrawn());
    (story.liveness, story.agent) = (Liveness::Alive, true);
    story.run(310, |_| true);
    assert!(story.state() == PathState::Ok && story.paths.are_calm());
}

#[test]
fn an_agent_that_answered_datagrams_takes_that_witness_with_it() {
    let mut story = Story::new();
    story.run(20, |_| true);
    // The host lets neither echoes nor refusals out.
    story.run(120, is_datagram);
    story.liveness = Liveness::Down;
    story.run(60, |_| false);
    assert_eq!((story.state(), story.is_withdrawn()), (PathState::Unanswered, false));
}

#[test]
fn size_of_packets_is_asked_at_once_where_those_of_others_were_lost_by_it() {
    let is_small = |probe: &Probe| !matches!(probe.kind, Kind::Full { less: ..60 });
    let mut story = Story::new();
    story.run(60, |_| true);
    story.run(30, is_small);
    assert_eq!(story.state(), PathState::Ok, "it is not asked for minutes");
    story.paths.doubt_size(story.now, story.node);
    story.run(3, is_small);
    assert!(story.paths.is_measured(story.node));
    story.run(12, is_small);
    assert_eq!(story.state(), PathState::MtuTooLarge);
    assert!(!story.paths.is_measured(story.node));
    assert!(story.paths.narrower_by(story.node).is_some_and(|less| less < 68));
    // What is known already is not asked again, and what gets through is known after one question.
    let sent = story.sent;
    story.paths.doubt_size(story.now, story.node);
    story.run(1, is_small);
    assert_eq!(story.sent, sent);
    story.run(60, |_| true);
    story.paths.doubt_size(story.now, story.node);
    story.run(5, |_| true);
    assert_eq!((story.state(), story.paths.is_measured(story.node)), (PathState::Ok, false));
}

#[test]
fn a_peer_that_never_answered_is_never_withdrawn() {
    let mut story = Story::new();
    story.liveness = Liveness::Down;
    story.run(600, |_| false);
    assert_eq!((story.state(), story.is_withdrawn()), (PathState::Unanswered, false));
}

#[test]
fn witnesses_that_fell_silent_while_the_agent_lived_do_not_condemn() {
    for by_gossip in [true, false] {
        let mut story = Story::new();
        story.run(20, |_| true);
        // All but the agent's own packets is dropped there from now on.
        story.run(16, |_| false);
        for _ in 0..6 {
            story.paths.on_agent(story.now, story.node, !by_gossip, None);
            story.run(1, |_| false);
        }
        if by_gossip {
            story.run(10, |_| false);
        }
        story.liveness = Liveness::Down;
        story.run(60, |_| false);
        assert_eq!((story.state(), story.is_withdrawn()), (PathState::Unanswered, false));
        // Once they have answered again they can.
        story.run(5, |_| true);
        assert_eq!(story.state(), PathState::Ok);
        story.run(13, |_| false);
        assert_eq!(story.state(), PathState::Withdrawn);
    }
}

#[test]
fn packets_of_a_peer_keep_its_path_for_as_long_as_they_come() {
    let mut story = Story::new();
    story.run(20, |_| true);
    story.liveness = Liveness::Down;
    for _ in 0..40 {
        story.run(1, |_| false);
        story.paths.on_packet(story.now, UNDERLAY, false);
    }
    assert_eq!((story.state(), story.is_withdrawn()), (PathState::OneWay, false));
    story.run(12, |_| false);
    assert!(story.is_withdrawn());
    story.paths.on_packet(story.now, UNDERLAY, false);
    assert!(!story.is_withdrawn());
}

#[test]
fn packets_from_an_address_of_several_peers_prove_nothing_about_one() {
    let subject = |n: u8| {
        let vtep = IpAddr::from([10, 42, n, 0]);
        let node = NodeId::of_public_key(&[n; 32]);
        Subject { node, vtep, underlay: UNDERLAY, liveness: Some(Liveness::Alive), ask: true }
    };
    let state = |peers: &[Subject]| {
        let (mut paths, mut now) = (Paths::new(None), Time::ZERO);
        paths.update(now, peers.iter().copied());
        for _ in 0..200 {
            now = now + TICK;
            paths.judge(now);
            while paths.poll(now).is_some() {}
        }
        paths.on_packet(now, UNDERLAY, false);
        paths.states(now).next().expect("a peer").1
    };
    assert_eq!(state(&[subject(1)]), PathState::OneWay);
    assert_eq!(state(&[subject(1), subject(2)]), PathState::Unanswered);
}

#[test]
fn a_round_trip_of_three_seconds_is_no_loss_whatever_gossip_says() {
    let mut story = Story::new();
    story.round_trip = Duration::from_secs(3);
    for liveness in [Liveness::Alive, Liveness::Suspect, Liveness::Down] {
        story.liveness = liveness;
        story.run(60, |_| true);
    }
    assert_eq!(story.worst, BTreeSet::from([PathState::Unknown, PathState::Ok]));
    // A fast path that becomes slow, and the other way round.
    for milliseconds in [20, 3_000, 20] {
        story.liveness = Liveness::Alive;
        story.round_trip = Duration::from_millis(milliseconds);
        story.run(60, |_| true);
        assert_eq!(story.state(), PathState::Ok);
        story.liveness = Liveness::Down;
        story.worst.clear();
        story.run(60, |_| true);
        assert_eq!(story.worst, BTreeSet::from([PathState::Ok]));
    }
}

#[test]
fn an_agent_that_stood_still_has_lost_nothing() {
    let mut story = Story::new();
    story.run(20, |_| true);
    story.liveness = Liveness::Down;
    for _ in 0..5 {
        story.run(1, |_| true);
        story.worst.clear();
        // What was asked at the last moment is answered while nobody reads it.
        story.now = story.now + Duration::from_secs(60);
    }
    story.run(5, |_| true);
    assert_eq!(story.worst, BTreeSet::from([PathState::Ok]));
    assert_eq!(story.paths.next_due().map(|due| due > story.now), Some(true));
}

#[test]
fn loss_of_two_in_five_packets_withdraws_nobody() {
    let mut story = Story::new();
    for seed in 1..30_u32 {
        story.liveness = if seed.is_multiple_of(3) { Liveness::Down } else { Liveness::Alive };
        let survives = |probe: &Probe| {
            (u32::from(probe.sequence) + seed).wrapping_mul(2_654_435_761) >> 16 & 0xff > 102
        };
        story.run(60, survives);
        assert!(!story.is_withdrawn());
    }
}

#[test]
fn a_thousand_peers_are_asked_no_faster_than_fifty_a_second_and_eight_at_each_look_while_all_is_well()
 {
    let mut paths = Paths::new(None);
    let subject = |n: u32| {
        let bytes = [(n >> 8) as u8 + 1, n as u8].repeat(16);
        let node = NodeId::of_public_key(&bytes.try_into().expect("32 bytes"));
        let vtep = Ipv4Addr::from(n).into();
        Subject { node, vtep, underlay: vtep, liveness: Some(Liveness::Alive), ask: true }
    };
    let subjects: Vec<Subject> = (0..1_000).map(subject).collect();
    let mut ask = |from: u64, answers: bool| {
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
                    paths.on_arrival(now, probe.to, probe.sequence, By::Agent, false);
                }
            }
        }
        sent
    };
    // Ten seconds each.
    assert!((450..=501).contains(&ask(0, false)));
    (1..9).for_each(|tens| _ = ask(tens, true));
    assert!((72..=82).contains(&ask(9, true)));
}

/// Of a link with two legs, of which one is dead.
fn is_on_a_good_leg(probe: &Probe, echoes: bool) -> bool {
    match probe.kind {
        Kind::Datagram { flow } | Kind::Flow { flow } => flow % 2 == 0,
        _ => echoes,
    }
}

#[test]
fn flows_that_are_lost_while_others_pass_are_counted_until_they_pass_again() {
    for echoes in [true, false] {
        let mut story = Story::new();
        story.run(20, |_| true);
        assert_eq!(story.paths.flows(story.node), None);
        story.run(80, |probe| is_on_a_good_leg(probe, echoes));
        assert_eq!(story.paths.flows(story.node), Some((4, 8)), "echoes: {echoes}");
        assert_eq!(story.state(), PathState::PartlyLost);
        assert!(story.paths.deaf().is_empty(), "no fault of checksums");
        (story.sent, story.worst) = (0, BTreeSet::new());
        story.run(60, |probe| is_on_a_good_leg(probe, echoes));
        assert_eq!(story.worst, BTreeSet::from([PathState::PartlyLost]));
        assert!(story.sent <= 60, "{} requests in a minute", story.sent);
        story.run(40, |_| true);
        assert_eq!((story.state(), story.paths.flows(story.node)), (PathState::Ok, None));
    }
}

#[test]
fn flows_tell_nothing_where_all_of_them_are_lost_or_everything_is() {
    let mut story = Story::new();
    story.run(20, |_| true);
    story.worst.clear();
    story.run(120, is_echo);
    assert_eq!(story.worst, BTreeSet::from([PathState::Ok]), "a firewall drops datagrams");
    story.run(120, |_| true);
    story.run(60, |_| false);
    assert!(!story.worst.contains(&PathState::PartlyLost), "{:?}", story.worst);
    assert_eq!(story.paths.flows(story.node), None);
}

#[test]
fn lossy_paths_have_no_lost_flows() {
    let mut story = Story::new();
    for seed in 1..30_u32 {
        let survives = |probe: &Probe| {
            (u32::from(probe.sequence) + seed).wrapping_mul(2_654_435_761) >> 16 & 0xff > 12
        };
        story.run(60, survives);
    }
    assert_eq!(story.worst, BTreeSet::from([PathState::Unknown, PathState::Ok]));
}

//! Stories of one peer, or a thousand, told second by second.

use std::net::Ipv4Addr;

use super::*;

const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 42, 7, 0));

/// A peer whose kernel answers while `answers` says so.
struct Story {
    paths: Paths,
    node: NodeId,
    now: Time,
    liveness: Liveness,
    ask: bool,
    sent: u32,
}

impl Story {
    fn new() -> Self {
        let node = NodeId::of_public_key(&[1; 32]);
        let paths = Paths::new(Some(Duration::from_secs(10)));
        let mut story =
            Self { paths, node, now: Time::ZERO, liveness: Liveness::Alive, ask: true, sent: 0 };
        story.update();
        story
    }

    fn update(&mut self) {
        let underlay = IpAddr::from([192, 0, 2, 7]);
        let (node, liveness) = (self.node, Some(self.liveness));
        let peer = Subject { node, vtep: PEER, underlay, liveness, ask: self.ask };
        self.paths.update(self.now, [peer].into_iter());
    }

    fn run(&mut self, seconds: u64, answers: impl Fn(&Probe) -> bool) {
        let end = self.now + Duration::from_secs(seconds);
        while self.now < end {
            self.now = self.now + Duration::from_millis(100);
            self.update();
            while let Some(probe) = self.paths.poll(self.now) {
                self.sent += 1;
                if answers(&probe) {
                    let at = self.now + Duration::from_millis(1);
                    match probe.kind {
                        Kind::Datagram => self.paths.on_refusal(at, PEER),
                        _ => self.paths.on_answer(at, PEER, probe.sequence, false),
                    }
                }
            }
        }
    }

    fn state(&self) -> PathState {
        self.paths.states(self.now).next().expect("one peer").1
    }
}

#[test]
fn a_peer_that_answers_is_ok_and_asked_rarely() {
    let mut story = Story::new();
    story.run(60, |_| true);
    assert_eq!(story.state(), PathState::Ok);
    assert!(story.sent <= 6, "{} requests in a minute", story.sent);
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
    story.liveness = Liveness::Down;
    story.run(20, |_| false);
    assert_eq!(story.state(), PathState::Withdrawn);
    story.liveness = Liveness::Alive;
    story.run(1, |_| false);
    assert_eq!(story.state(), PathState::Blocked);
}

#[test]
fn a_live_agent_behind_a_blocked_tunnel_is_named_and_never_withdrawn() {
    let mut story = Story::new();
    story.run(40, |_| false);
    assert_eq!(story.state(), PathState::Blocked);
    story.paths.on_request(story.now, PEER);
    assert_eq!(story.state(), PathState::OneWay);
    assert!(story.paths.withdrawn().is_empty());
}

#[test]
fn full_packets_that_are_lost_where_small_ones_are_not_mean_the_mtu() {
    let mut story = Story::new();
    story.run(20, |probe| probe.kind != Kind::Full);
    assert_eq!(story.state(), PathState::MtuTooLarge);
    story.run(30, |_| true);
    assert_eq!(story.state(), PathState::Ok);
}

#[test]
fn datagrams_that_are_lost_where_echoes_are_not_are_noticed_and_asked_about_anew() {
    let mut story = Story::new();
    story.run(20, |probe| probe.kind != Kind::Datagram);
    let peer = BTreeSet::from([story.node]);
    assert_eq!((story.state(), story.paths.deaf()), (PathState::Ok, peer.clone()));
    story.paths.ask_anew(story.now, &peer);
    assert_eq!(story.paths.datagrams(story.node), None);
    story.run(2, |_| true);
    assert_eq!(story.paths.datagrams(story.node), Some(true));
    assert!(story.paths.deaf().is_empty());
}

#[test]
fn a_thousand_peers_are_asked_no_faster_than_fifty_a_second_and_five_at_each_look_while_all_is_well()
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
                    paths.on_refusal(now, probe.to);
                }
            }
        }
        sent
    };
    // Ten seconds each.
    assert!((450..=501).contains(&ask(0, false)));
    (1..9).for_each(|tens| _ = ask(tens, true));
    assert!((45..=51).contains(&ask(9, true)));
}

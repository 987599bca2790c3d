//! Which peers run, whatever gossip says of their agents.

use std::time::Duration;

use super::Paths;
use crate::model::{NodeId, PathState, Time};

/// Time for which a sign of life shows that a host runs. A peer with a silent agent is probed each second, in
/// a large cluster more rarely.
const VALIDITY: Duration = Duration::from_secs(20);

impl Paths {
    /// Returns the peers that have just given a sign of life, with the round trip of the last answer, or
    /// `None` if only packets of them arrive.
    pub fn running(&self, now: Time) -> impl Iterator<Item = (NodeId, Option<Duration>)> + '_ {
        let at = self.clock.at(now);
        let recent = move |sign: Time| at.since(sign) < VALIDITY;
        let peers = self.peers.iter().filter(move |(_, path)| recent(path.last_sign_of_life));
        peers.filter_map(move |(node, path)| {
            let state = path.state(at);
            let round_trip = path.round_trip.filter(|_| state != PathState::OneWay);
            state.shows_life().then_some((*node, round_trip))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataplane::paths::{CHECK_INTERVAL, Kind, Probe, ProbedPeer},
        model::Liveness,
    };

    const MS: Duration = Duration::from_millis(1);

    /// Runs checks for this many seconds with a peer whose agent is silent.
    fn run(paths: &mut Paths, now: &mut Time, seconds: u32, answers: bool) {
        for _ in 0..seconds {
            while let Some(Probe { to, sequence, kind, .. }) = paths.poll(*now) {
                if answers && kind == Kind::Small {
                    paths.on_answer(*now + MS, to, sequence, false);
                }
            }
            *now = *now + CHECK_INTERVAL;
            paths.update_withdrawn(*now);
        }
    }

    #[test]
    fn host_with_a_silent_agent_runs_while_its_kernel_answers() {
        let node = NodeId::of_public_key(&[1; 32]);
        let mut paths = Paths::new(None);
        let mut now = Time::ZERO + Duration::from_secs(100);
        let peer = ProbedPeer {
            node,
            vtep: [10, 42, 1, 0].into(),
            underlay: [192, 0, 2, 1].into(),
            liveness: Some(Liveness::Down),
            may_probe: true,
        };
        paths.update(now, [peer].into_iter());
        assert_eq!(paths.running(now).count(), 0, "nothing is known yet");
        run(&mut paths, &mut now, 5, true);
        assert_eq!(paths.running(now).collect::<Vec<_>>(), [(node, Some(MS))]);
        run(&mut paths, &mut now, 8, false);
        assert_eq!(paths.running(now).count(), 0, "the host is dead");
        paths.on_packet(now, peer.vtep, false);
        assert_eq!(paths.running(now).collect::<Vec<_>>(), [(node, None)]);
    }

    #[test]
    fn old_answer_of_a_peer_that_is_probed_no_more_shows_nothing() {
        let mut paths = Paths::new(None);
        let mut now = Time::ZERO + Duration::from_secs(100);
        let mut peer = ProbedPeer {
            node: NodeId::of_public_key(&[1; 32]),
            vtep: [10, 42, 1, 0].into(),
            underlay: [192, 0, 2, 1].into(),
            liveness: Some(Liveness::Down),
            may_probe: true,
        };
        paths.update(now, [peer].into_iter());
        run(&mut paths, &mut now, 5, true);
        peer.may_probe = false;
        paths.update(now, [peer].into_iter());
        assert_eq!(paths.running(now).count(), 1);
        run(&mut paths, &mut now, VALIDITY.as_secs() as u32, false);
        assert_eq!(paths.running(now).count(), 0);
    }
}

//! The carrier of the underlay interface: why there is none, and whether it flaps.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use rtnetlink::packet_route::link::LinkAttribute;

use crate::{
    model::{Problem, ProblemCode},
    netlink::link::Link,
    pods::port::{self, PortState},
};

/// Losses of the carrier within [`FLAP_SPAN`] that count as flapping.
const FLAP_LOSSES: usize = 3;
/// The span in which the losses are counted.
const FLAP_SPAN: Duration = Duration::from_secs(60);
/// Time without a loss after which the carrier no longer counts as flapping.
const STABLE_TIME: Duration = Duration::from_secs(5 * 60);

/// Describes why an interface has no carrier, and what to do. A bridge has one if a port forwards.
pub(super) fn no_carrier_reason(link: &Link, links: &[Link]) -> String {
    if link.kind != "bridge" {
        return "is the cable plugged in, and the other end up?".to_owned();
    }
    let name = &link.name;
    let ports = || links.iter().filter(|port| port.is_plugged_into(link.index));
    let waiting = ports().find_map(|port| match port::state(port) {
        Some(state @ (PortState::Listening | PortState::Learning)) => Some((port, state)),
        _ => None,
    });
    if let Some((port, state)) = waiting {
        return format!(
            "it is a bridge, and its port {} is still {state} (STP). It forwards after twice the \
             bridge's forward_delay. If there is no loop, turn STP off (ip link set {name} type bridge \
             stp_state 0, and where the bridge is configured)",
            port.name
        );
    }
    match ports().find(|port| port::state(port) == Some(PortState::Blocking)) {
        Some(port) => format!(
            "it is a bridge, and its port {} is blocking, by STP (a loop) or by another program: bridge -d \
             link show dev {}",
            port.name, port.name
        ),
        None if ports().next().is_none() => format!(
            "it is a bridge without a port: ip link set INTERFACE master {name}, and ip link set INTERFACE up"
        ),
        None => {
            let names: Vec<&str> = ports().map(|port| port.name.as_str()).collect();
            format!(
                "it is a bridge, and none of its ports has one ({}): is the cable plugged in, and the other \
                 end up?",
                names.join(", ")
            )
        }
    }
}

/// Losses of an interface's carrier. They are taken from the kernel's counter, so losses between two
/// checks count as well.
#[derive(Debug, Default)]
pub struct Flaps {
    /// Index of the interface.
    link: u32,
    /// Last value of the kernel's counter.
    count: u32,
    /// Times at which the last few losses were noticed.
    losses: VecDeque<Instant>,
    /// Number of losses since it began to flap; `None` while it does not.
    flapping: Option<u32>,
}

impl Flaps {
    /// Processes a check of the interface.
    pub fn update(&mut self, now: Instant, link: &Link) {
        let counted = link.message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::CarrierDownCount(count) => Some(*count),
            _ => None,
        });
        // Kernels before 4.16 have no counter.
        let Some(count) = counted else { return };
        self.count_losses(now, link.index, count);
    }

    fn count_losses(&mut self, now: Instant, link: u32, count: u32) {
        let known = (self.link, self.count);
        (self.link, self.count) = (link, count);
        if known.0 != link || count < known.1 {
            self.losses.clear();
            self.flapping = None;
            return;
        }
        let new = count - known.1;
        self.losses.extend((0..new).take(FLAP_LOSSES).map(|_| now));
        while self.losses.len() > FLAP_LOSSES {
            self.losses.pop_front();
        }
        let since = |at: &Instant| now.saturating_duration_since(*at);
        let is_often = self.losses.len() == FLAP_LOSSES
            && self.losses.front().is_some_and(|at| since(at) < FLAP_SPAN);
        self.flapping = match self.flapping {
            Some(before) if self.losses.back().is_some_and(|at| since(at) < STABLE_TIME) => {
                Some(before + new)
            }
            None if is_often && new > 0 => Some((FLAP_LOSSES as u32).max(new)),
            _ => None,
        };
    }

    /// Returns when to check again regardless of notifications.
    pub fn due(&self) -> Option<Instant> {
        self.flapping.and(self.losses.back().map(|at| *at + STABLE_TIME))
    }

    /// Returns the problem, with the interface's name, while the carrier flaps.
    pub fn problem(&self, name: &str) -> Option<Problem> {
        let count = self.flapping?;
        Some(Problem::new(
            ProblemCode::LinkFlapping,
            name,
            format!(
                "the carrier of {name} flaps: it was lost {count} times, and tunnel packets with it"
            ),
            format!(
                "check the cable, the transceiver, and the port of the switch (ethtool {name}; ip -s -s \
                 link show {name})"
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carrier_lost_three_times_in_a_minute_flaps_until_five_minutes_without_loss() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut flaps = Flaps::default();
        // The counter's first value is no loss.
        flaps.count_losses(at(0), 2, 40);
        for (second, count) in [(1, 41), (50, 42), (70, 43)] {
            flaps.count_losses(at(second), 2, count);
            assert_eq!((flaps.problem("eth0"), flaps.due()), (None, None), "{second}");
        }
        flaps.count_losses(at(75), 2, 44);
        assert!(flaps.problem("eth0").is_some_and(|said| said.contains("lost 3 times")));
        flaps.count_losses(at(300), 2, 46);
        assert!(flaps.problem("eth0").is_some_and(|said| said.contains("lost 5 times")));
        assert_eq!(flaps.due(), Some(at(600)));
        flaps.count_losses(at(599), 2, 46);
        assert!(flaps.problem("eth0").is_some());
        flaps.count_losses(at(600), 2, 46);
        assert_eq!((flaps.problem("eth0"), flaps.due()), (None, None));
        // Several losses between two checks, and another interface.
        flaps.count_losses(at(700), 2, 53);
        assert!(flaps.problem("eth0").is_some_and(|said| said.contains("lost 7 times")));
        flaps.count_losses(at(701), 3, 90);
        assert_eq!(flaps.problem("eth1"), None);
    }
}

//! Carriers of the underlay's interface: why there is none, and whether it comes and goes.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use rtnetlink::packet_route::link::LinkAttribute;

use crate::{
    netlink::link::Link,
    pods::port::{self, PortState},
};

/// A carrier that is lost so often
const MANY: usize = 3;
/// within this span flaps.
const SPAN: Duration = Duration::from_secs(60);
/// It does so until it was not lost for so long.
const CALM: Duration = Duration::from_secs(5 * 60);

/// Why an interface has no carrier, and what helps: a bridge has one where a port forwards.
pub(super) fn absence(link: &Link, links: &[Link]) -> String {
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
            "it is a bridge, and its port {} is still {state} (STP): it forwards after twice the bridge's \
             forward_delay; where there is no loop, turn STP off for the next time (ip link set {name} type \
             bridge stp_state 0, and where the bridge is configured)",
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

/// How often an interface has lost its carrier: the kernel counts it, so that nothing is missed between two
/// looks.
#[derive(Debug, Default)]
pub struct Flaps {
    link: u32,
    count: u32,
    /// When it was lost, as seen: the last few times.
    lost: VecDeque<Instant>,
    /// How often since it began to flap, as long as it does.
    flapping: Option<u32>,
}

impl Flaps {
    /// Takes in a look at the interface.
    pub fn look(&mut self, now: Instant, link: &Link) {
        let counted = link.message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::CarrierDownCount(count) => Some(*count),
            _ => None,
        });
        // Kernels since 4.16 tell.
        let Some(count) = counted else { return };
        self.note(now, link.index, count);
    }

    fn note(&mut self, now: Instant, link: u32, count: u32) {
        let known = (self.link, self.count);
        (self.link, self.count) = (link, count);
        if known.0 != link || count < known.1 {
            self.lost.clear();
            self.flapping = None;
            return;
        }
        let new = count - known.1;
        self.lost.extend((0..new).take(MANY).map(|_| now));
        while self.lost.len() > MANY {
            self.lost.pop_front();
        }
        let since = |at: &Instant| now.saturating_duration_since(*at);
        let is_often =
            self.lost.len() == MANY && self.lost.front().is_some_and(|at| since(at) < SPAN);
        self.flapping = match self.flapping {
            Some(before) if self.lost.back().is_some_and(|at| since(at) < CALM) => {
                Some(before + new)
            }
            None if is_often && new > 0 => Some((MANY as u32).max(new)),
            _ => None,
        };
    }

    /// When to look again, whatever the kernel tells.
    pub fn due(&self) -> Option<Instant> {
        self.flapping.and(self.lost.back().map(|at| *at + CALM))
    }

    /// What is wrong with the interface of this name, as long as it flaps.
    pub fn problem(&self, name: &str) -> Option<String> {
        let count = self.flapping?;
        Some(format!(
            "the carrier of {name} comes and goes: it was lost {count} times, and tunnel packets with it; \
             look at the cable, the transceiver, and the port of the switch (ethtool {name}; ip -s -s link \
             show {name})"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carrier_that_is_lost_three_times_in_a_minute_flaps_until_it_was_kept_for_five() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut flaps = Flaps::default();
        // What was counted before is nothing new.
        flaps.note(at(0), 2, 40);
        for (second, count) in [(1, 41), (50, 42), (70, 43)] {
            flaps.note(at(second), 2, count);
            assert_eq!((flaps.problem("eth0"), flaps.due()), (None, None), "{second}");
        }
        flaps.note(at(75), 2, 44);
        assert!(flaps.problem("eth0").is_some_and(|said| said.contains("lost 3 times")));
        flaps.note(at(300), 2, 46);
        assert!(flaps.problem("eth0").is_some_and(|said| said.contains("lost 5 times")));
        assert_eq!(flaps.due(), Some(at(600)));
        flaps.note(at(599), 2, 46);
        assert!(flaps.problem("eth0").is_some());
        flaps.note(at(600), 2, 46);
        assert_eq!((flaps.problem("eth0"), flaps.due()), (None, None));
        // Between two looks, and on another interface.
        flaps.note(at(700), 2, 53);
        assert!(flaps.problem("eth0").is_some_and(|said| said.contains("lost 7 times")));
        flaps.note(at(701), 3, 90);
        assert_eq!(flaps.problem("eth1"), None);
    }
}

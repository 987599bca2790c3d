//! Members whose packets are lost for some seconds again and again: by a link that goes away for moments, or
//! a host without CPU time. No single interruption lasts long enough to be a problem of its path.

use std::{collections::BTreeMap, time::Duration};

use super::events::wall_clock;
use crate::{
    agent::Agent,
    api::{Event, MemberState},
    model::{NodeId, Problem, ProblemCode, list_at_most},
};

/// Time in which interruptions are counted.
const WINDOW: Duration = Duration::from_secs(300);
/// Number of interruptions in that time that is reported.
const MIN_INTERRUPTIONS: usize = 4;
/// Limit of members named.
const MAX_NAMED: usize = 3;

impl Agent {
    /// Returns a notice about members that gossip suspected several times within some minutes.
    pub(super) fn interruptions_notice(&self) -> Option<Problem> {
        notice(self.journal.events(), wall_clock())
    }
}

fn notice<'a>(events: impl Iterator<Item = &'a Event>, now: Duration) -> Option<Problem> {
    let since = now.saturating_sub(WINDOW).as_secs_f64();
    let mut counts: BTreeMap<NodeId, (&str, usize)> = BTreeMap::new();
    let recent = events.filter(|event| event.at >= since);
    for member in recent.filter_map(|event| event.member.as_ref()) {
        if member.state == MemberState::Suspect {
            counts.entry(member.node).or_insert((&member.name, 0)).1 += 1;
        }
    }
    let mut named: Vec<(&str, usize)> =
        counts.into_values().filter(|(_, count)| *count >= MIN_INTERRUPTIONS).collect();
    named.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    if named.is_empty() {
        return None;
    }
    let names = named.iter().map(|(name, count)| format!("{name} ({count} times)"));
    let what = format!(
        "members did not answer for some seconds, several times within {} minutes: {}; packets of pods were \
         lost as well, unless only their agents lacked CPU time",
        WINDOW.as_secs() / 60,
        list_at_most(names, MAX_NAMED)
    );
    let fix = "look at the link of that host, or of this one if all members are named: Wi-Fi scans and \
               roaming, a loose cable, a switch port that is relearned (ip -s link, journalctl -k), and at \
               its CPU load";
    Some(Problem::new(ProblemCode::PathPartlyLost, "interruptions", what, fix).notice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{EventKind, EventLevel, MemberChange};

    fn suspected(node: u8, at: f64) -> Event {
        let name = format!("n{node}");
        let text = format!("{name} is suspect");
        let member =
            MemberChange { node: NodeId::from_bytes([node; 8]), name, state: MemberState::Suspect };
        let (kind, level) = (EventKind::Member, EventLevel::Warn);
        Event { number: 1, at, kind, level, text, member: Some(member) }
    }

    #[test]
    fn member_suspected_four_times_within_five_minutes_is_reported() {
        let now = Duration::from_secs(1_000);
        let of = |times: &[f64]| {
            let events: Vec<Event> = times.iter().map(|at| suspected(2, *at)).collect();
            notice(events.iter().chain([&suspected(3, 990.0)]), now).map(|notice| notice.what)
        };
        assert_eq!(of(&[600.0, 650.0, 990.0, 995.0]), None, "two of them are older");
        let said = of(&[800.0, 850.0, 900.0, 990.0]).expect("a notice");
        assert!(said.contains("n2 (4 times)") && !said.contains("n3"), "{said}");
    }
}

//! The verdict and the problems that the forwarder thread reports.

use super::{ForwarderEvent, Forwarding, TrialRunner};
use crate::{
    api::{CheckState, CheckStatus},
    dataplane::forwarding::{Direction, TrialWay, list},
    model::{Problem, ProblemCode},
    sysctl,
};

impl<F: Fn(ForwarderEvent)> TrialRunner<F> {
    /// Reports the results if they have changed.
    pub(super) fn report(&mut self) {
        let mut closed: Vec<TrialWay> = self.trials.closed();
        // These are reported as notices.
        closed.retain(|way| !way.direction.is_of_host());
        let open = self.trials.open();
        let (state, detail) = match (closed.as_slice(), open.as_slice()) {
            ([], []) if self.skipped.is_empty() => {
                (CheckState::Skipped, "no test has ended so far".to_owned())
            }
            ([], []) => (CheckState::Skipped, self.skipped.clone()),
            ([], open) if self.translated.is_empty() => {
                (CheckState::Ok, format!("packets pass: {}{}", list(open), untried(open)))
            }
            ([], _) => {
                let addresses = self.translated.values().map(ToString::to_string);
                let addresses = addresses.collect::<Vec<_>>().join(", ");
                (CheckState::Failing, format!("packets leave under other addresses: {addresses}"))
            }
            (closed, _) => (CheckState::Failing, format!("lost: {}", list(closed))),
        };
        let mut problems = self.reasons.gateway_problems.values().cloned().collect::<Vec<_>>();
        // If forwarding is off, the sysctl's problem says so; and without a gateway no way leads out.
        let is_told = |way: &TrialWay| {
            let gateway_resolves = !self.reasons.gateway_problems.contains_key(&way.ipv4);
            way.direction.is_through() && gateway_resolves && !sysctl::is_forwarding_off(way.ipv4)
        };
        let reported_ways: Vec<TrialWay> = closed.iter().copied().filter(is_told).collect();
        if !reported_ways.is_empty() {
            problems.push(Problem::new(
                ProblemCode::NotForwarding,
                Problem::HOST,
                format!("this host does not forward packets of pods ({})", list(&reported_ways)),
                self.reasons.rules.join("; "),
            ));
        }
        problems.extend(self.reasons.between());
        let port = self.setting.as_ref().map_or(0, |setting| setting.port);
        problems.extend(self.reasons.carried(&closed, port));
        problems.extend(self.reasons.too_large(&closed));
        problems.extend(self.reasons.translations(&self.translated));
        let transit = self.setting.as_ref().map(|setting| self.transit.problems(setting));
        problems.extend(transit.unwrap_or_default());
        let status = CheckStatus { state, detail };
        let drops_incoming = [true, false].map(|ipv4| {
            self.reasons.takes_all
                && reported_ways
                    .iter()
                    .any(|way| way.ipv4 == ipv4 && matches!(way.direction, Direction::In(_)))
        });
        let (input, lacks_gateway) =
            (self.input.clone(), !self.reasons.gateway_problems.is_empty());
        let notices = self.notices.clone();
        let suspects = self.reasons.remote.clone().unwrap_or_default();
        let now = Forwarding {
            status,
            problems,
            notices,
            input,
            drops_incoming,
            is_forbidden: self.is_forbidden,
            lacks_gateway,
            closed,
            arriving: self.arriving.values().copied().collect(),
            suspects,
        };
        if now != self.reported {
            self.reported.clone_from(&now);
            (self.report)(ForwarderEvent::State(now));
        }
    }
}

/// Returns a note if no peer was there or has answered.
fn untried(open: &[TrialWay]) -> &'static str {
    if open.iter().any(|way| way.direction.is_through()) {
        ""
    } else {
        "; no peer has answered so far"
    }
}

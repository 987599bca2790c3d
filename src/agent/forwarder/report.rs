//! What the thread tells: a verdict, and sentences.

use super::{ForwarderNews, Forwarding, TrialRunner, explain};
use crate::{
    api::{CheckState, CheckStatus},
    dataplane::forwarding::{Direction, Way, list},
};

impl<F: Fn(ForwarderNews)> TrialRunner<F> {
    /// Tells what is known, if it is something else than before.
    pub(super) fn report(&mut self) {
        let mut closed: Vec<Way> = self.trials.closed();
        // That is told as a warning.
        closed.retain(|way| !way.direction.is_of_host());
        let open = self.trials.open();
        let (state, detail) = match (closed.as_slice(), open.as_slice()) {
            ([], []) if self.skipped.is_empty() => {
                (CheckState::Skipped, "no trial has ended so far".to_owned())
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
        let mut problems = self.reasons.gateway.values().cloned().collect::<Vec<_>>();
        // Where it is turned off, that is told by the sysctl; and without a gateway no way leads out.
        let is_told = |way: &Way| {
            let has_gateway = !self.reasons.gateway.contains_key(&way.ipv4);
            way.direction.is_through() && has_gateway && explain::is_forwarding_on(way.ipv4)
        };
        let told: Vec<Way> = closed.iter().copied().filter(is_told).collect();
        if !told.is_empty() {
            problems.push(format!(
                "this host does not forward packets of pods ({}): {}",
                list(&told),
                self.reasons.rules.join("; ")
            ));
        }
        problems.extend(self.reasons.between());
        let port = self.setting.as_ref().map_or(0, |setting| setting.port);
        problems.extend(self.reasons.carried(&closed, port));
        problems.extend(self.reasons.too_large(&closed));
        problems.extend(self.reasons.translations(&self.translated));
        let status = CheckStatus { state, detail };
        let drops_incoming = [true, false].map(|ipv4| {
            self.reasons.takes_all
                && told
                    .iter()
                    .any(|way| way.ipv4 == ipv4 && matches!(way.direction, Direction::In(_)))
        });
        let (input, lacks_gateway) = (self.input.clone(), !self.reasons.gateway.is_empty());
        let warnings = self.warnings.clone();
        let suspects = self.reasons.far.clone().unwrap_or_default();
        let now = Forwarding {
            status,
            problems,
            warnings,
            input,
            drops_incoming,
            lacks_gateway,
            closed,
            arriving: self.arriving.values().copied().collect(),
            suspects,
        };
        if now != self.told {
            self.told.clone_from(&now);
            (self.tell)(ForwarderNews::State(now));
        }
    }
}

/// What is missing where no peer was there, or has answered.
fn untried(open: &[Way]) -> &'static str {
    if open.iter().any(|way| way.direction.is_through()) {
        ""
    } else {
        "; no peer has answered so far"
    }
}

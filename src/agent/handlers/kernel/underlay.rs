//! The underlay that is lost, and whether peers answer by another interface nevertheless.

use std::time::Duration;

use crate::{
    agent::Agent,
    dataplane::paths::CHECK_INTERVAL,
    model::{Problem, ProblemCode, Time},
    underlay::UnderlayError,
};

/// Time after the loss in which a peer that answered before may answer again. Probes are sent at the next
/// check.
const DECISION_TIME: Duration = CHECK_INTERVAL.saturating_mul(2);

/// Why the chosen interface carries no tunnels.
pub(in crate::agent) struct LostUnderlay {
    error: UnderlayError,
    /// When it was reported.
    since: Time,
}

impl Agent {
    /// Handles the loss of the underlay, or another reason for it.
    pub(super) fn on_lost_underlay(&mut self, error: UnderlayError) {
        tracing::error!(%error, "underlay lost");
        let now = self.clock.now();
        let since = self.kernel.problems.underlay.take().map_or(now, |lost| lost.since);
        self.kernel.problems.underlay = Some(LostUnderlay { error, since });
        self.prober.paths.request_probes(now);
    }

    /// Whether tunnel packets have no way, as far as is known: the underlay is lost, and no peer has answered
    /// since.
    pub(in crate::agent) fn lacks_underlay(&self) -> bool {
        let is_lost = |lost: &LostUnderlay| {
            self.too_small_interface(&lost.error).is_none() && !self.is_answered_since(lost)
        };
        self.kernel.problems.underlay.as_ref().is_some_and(is_lost)
    }

    /// Returns the present interface if the error is only that the setting `mtu` does not fit it any more:
    /// tunnels remain as they were.
    fn too_small_interface<'a>(&self, error: &'a UnderlayError) -> Option<&'a str> {
        match error {
            UnderlayError::Mtu { iface, .. } if *iface == self.underlay.name => Some(iface),
            _ => None,
        }
    }

    /// Whether a peer has answered a probe that was sent after the loss, and still answers.
    fn is_answered_since(&self, lost: &LostUnderlay) -> bool {
        self.path_states().any(|(node, state, _)| {
            let sent = self.prober.paths.answered_probe(node);
            state.is_answered() && sent.is_some_and(|sent| sent >= lost.since)
        })
    }

    /// Returns the problem that the underlay is lost, or carries less than the overlay device.
    pub(in crate::agent) fn underlay_problem(&self) -> Option<Problem> {
        let lost = self.kernel.problems.underlay.as_ref()?;
        if let Some(iface) = self.too_small_interface(&lost.error) {
            let error = &lost.error;
            let what = format!(
                "{error}. Until then large packets of pods travel in fragments, or are lost"
            );
            return Some(Problem::new(ProblemCode::UnderlayMtu, iface, what, ""));
        }
        let error = &lost.error;
        let (is_answered, now) = (!self.lacks_underlay(), self.clock.now());
        // The route to the peers may lead by another interface.
        let is_undecided = now.since(lost.since) < DECISION_TIME
            && self.path_states().any(|(_, state, _)| state.is_answered());
        if matches!(error, UnderlayError::NoCarrier { .. }) && (is_answered || is_undecided) {
            return None;
        }
        let what = match error {
            // Tunnel packets leave by the interface that has the address.
            UnderlayError::Moved { .. } => format!(
                "no underlay: {error}; until then the tunnels stay as they were, whether packets of pods \
                 pass or not"
            ),
            error if is_answered => format!(
                "no underlay: {error}; the tunnels stay as they were until then, and peers answer"
            ),
            error => format!(
                "no underlay: {error}; pods of this host reach each other, and those of other hosts once \
                 the network is back"
            ),
        };
        Some(Problem::new(ProblemCode::NoUnderlay, Problem::HOST, what, ""))
    }

    /// Returns the notice that peers answer although the interface has no carrier.
    pub(in crate::agent) fn underlay_notice(&self) -> Option<Problem> {
        let lost = self.kernel.problems.underlay.as_ref()?;
        let is_cut_off = matches!(lost.error, UnderlayError::NoCarrier { .. });
        if !is_cut_off || self.lacks_underlay() {
            return None;
        }
        let what = format!(
            "peers answer by another way than the interface that was chosen for tunnels: {}",
            lost.error
        );
        let fix = "repair it, or choose the interface by which packets to the peers leave (iface)";
        Some(Problem::new(ProblemCode::NoUnderlay, Problem::HOST, what, fix).notice())
    }
}

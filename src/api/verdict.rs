//! The one verdict on a node: the same words in the status, the doctor, the dashboard, the readiness check
//! and the metrics.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::Instance;

/// The state of a node as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum VerdictState {
    /// There is no problem.
    Healthy,
    /// There are problems, but pods of this node reach pods of other hosts.
    Degraded,
    /// Pods of this node reach nothing, or the node has not finished its start.
    NotReady,
}

/// The verdict on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Verdict {
    /// The state.
    pub state: VerdictState,
    /// The verdict in words: "healthy", "degraded: 2 problems", or "not ready: " and the reason. The doctor
    /// also says "not set up: " and what to run, or "incomplete: " and how many checks need root.
    pub text: String,
}

impl VerdictState {
    /// All states.
    pub const ALL: [Self; 3] = [Self::Healthy, Self::Degraded, Self::NotReady];

    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::NotReady => "not-ready",
        }
    }
}

impl Verdict {
    /// Returns the verdict on a node with this number of problems. `not_ready` is the reason why it is not
    /// ready.
    pub fn new(not_ready: Option<String>, problems: usize) -> Self {
        let (state, text) = match (not_ready, problems) {
            (Some(why), _) => (VerdictState::NotReady, format!("not ready: {why}")),
            (None, 0) => (VerdictState::Healthy, "healthy".to_owned()),
            (None, 1) => (VerdictState::Degraded, "degraded: 1 problem".to_owned()),
            (None, count) => (VerdictState::Degraded, format!("degraded: {count} problems")),
        };
        Self { state, text }
    }

    /// Returns the verdict on a host without an agent, state and settings.
    pub fn not_set_up(instance: &Instance) -> Self {
        let option = instance.option();
        let text = format!(
            "not set up: run `gossamer init{option}` to create a cluster, or `gossamer join TOKEN{option}` \
             to join one (`gossamer token{option}` on a member prints that command)"
        );
        Self { state: VerdictState::NotReady, text }
    }

    /// Returns the verdict of a doctor that lacks the rights for some checks, and found no problem with the
    /// others.
    pub fn incomplete(skipped: usize, checks: usize) -> Self {
        let text = format!("incomplete: {skipped} of {checks} checks need root");
        Self { state: VerdictState::NotReady, text }
    }

    /// Returns the exit code of commands that show the verdict.
    pub const fn exit_code(&self) -> u8 {
        match self.state {
            VerdictState::Healthy => 0,
            VerdictState::Degraded => 1,
            VerdictState::NotReady => 3,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdict_has_words_and_exit_codes() {
        let of = |not_ready: Option<&str>, problems| {
            let verdict = Verdict::new(not_ready.map(str::to_owned), problems);
            (verdict.to_string(), verdict.exit_code())
        };
        assert_eq!(of(None, 0), ("healthy".to_owned(), 0));
        assert_eq!(of(None, 1), ("degraded: 1 problem".to_owned(), 1));
        assert_eq!(of(None, 3), ("degraded: 3 problems".to_owned(), 1));
        assert_eq!(
            of(Some("it has no subnet yet"), 3),
            ("not ready: it has no subnet yet".to_owned(), 3)
        );
        for state in VerdictState::ALL {
            assert_eq!(serde_json::to_value(state).expect("JSON"), state.name());
        }
    }
}

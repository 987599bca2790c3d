//! Who may decide by time alone that a node is gone.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::{NodeName, bounded};

const MAX_VOTERS: usize = 7;

/// Fixed voters, most of whom must have missed a member for this long. The operator writes the same on all
/// of them: most of a gossiped roster is no majority, for two halves of a cluster can each grow one.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawQuorum")]
pub struct Quorum {
    pub forget_after: Duration,
    /// Node names, sorted and unique.
    voters: Vec<NodeName>,
}

/// The serialised form; reading it back goes through the same checks as an operator's settings.
#[derive(Deserialize)]
struct RawQuorum {
    forget_after: Duration,
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_VOTERS>")]
    voters: Vec<NodeName>,
}

/// Why a quorum is none: the setting that is wrong, and what about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuorumError {
    #[error("{0} voters cannot decide: name 3, 5 or 7 different nodes")]
    Voters(usize),
    #[error("{0:?} is too short: a node that restarts is not gone; use {1:?} or more")]
    TooShort(Duration, Duration),
}

impl TryFrom<RawQuorum> for Quorum {
    type Error = QuorumError;

    fn try_from(raw: RawQuorum) -> Result<Self, QuorumError> {
        Self::new(raw.forget_after, &raw.voters)
    }
}

impl Quorum {
    /// Far longer than it takes to call a member down, and than any vote takes.
    pub const SHORTEST: Duration = Duration::from_secs(60);

    pub fn new(forget_after: Duration, voters: &[NodeName]) -> Result<Self, QuorumError> {
        let mut voters = voters.to_vec();
        voters.sort();
        voters.dedup();
        if !matches!(voters.len(), 3 | 5 | 7) {
            return Err(QuorumError::Voters(voters.len()));
        }
        if forget_after < Self::SHORTEST {
            return Err(QuorumError::TooShort(forget_after, Self::SHORTEST));
        }
        Ok(Self { forget_after, voters })
    }

    pub fn voters(&self) -> &[NodeName] {
        &self.voters
    }

    /// Votes that are enough.
    pub fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }
}

impl fmt::Debug for Quorum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.voters.iter().map(NodeName::as_str).collect();
        write!(f, "{:?} by {}", self.forget_after, names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<NodeName> {
        names.iter().map(|name| name.parse().expect("a name")).collect()
    }

    #[test]
    fn only_an_odd_number_of_different_voters_decides_and_not_in_haste() {
        let hour = Duration::from_secs(3600);
        let quorum = Quorum::new(hour, &names(&["c", "a", "b"])).expect("three");
        assert_eq!((quorum.majority(), quorum.voters()), (2, &names(&["a", "b", "c"])[..]));
        assert_eq!(Quorum::new(hour, &names(&["a", "a", "b"])), Err(QuorumError::Voters(2)));
        assert_eq!(Quorum::new(hour, &names(&["a", "b", "c", "d"])), Err(QuorumError::Voters(4)));
        let second = Duration::from_secs(1);
        let error = Quorum::new(second, &names(&["a", "b", "c"])).expect_err("too short");
        assert_eq!(
            error.to_string(),
            "1s is too short: a node that restarts is not gone; use 60s or more"
        );
    }
}

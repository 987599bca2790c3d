//! The rule by which fixed voters forget nodes without an operator.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::{NodeName, bounded};

/// Greatest number of voters.
const MAX_VOTERS: usize = 7;

/// Fixed voters, a majority of which must have missed a member for `forget_after` before it is forgotten.
///
/// The operator configures the same rule on all voters. A majority of gossiped members would not be safe: two
/// parts of a cluster can each grow one.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawQuorum")]
pub struct Quorum {
    /// How long a majority of the voters must have missed a member.
    pub forget_after: Duration,
    /// Node names, sorted and unique.
    voters: Vec<NodeName>,
}

/// The serialized form. Deserialization applies the same checks as [`Quorum::new`].
#[derive(Deserialize)]
struct RawQuorum {
    forget_after: Duration,
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_VOTERS>")]
    voters: Vec<NodeName>,
}

/// Why a rule is not valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuorumError {
    /// The number of different voters is not 3, 5 or 7.
    #[error("{0} voters cannot decide: name 3, 5 or 7 different nodes")]
    Voters(usize),
    /// `forget_after` is below the minimum, which is the second value.
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
    /// Least `forget_after`. Far longer than gossip needs to call a member down, and than a vote takes.
    pub const SHORTEST: Duration = Duration::from_secs(60);

    /// Checks a rule.
    ///
    /// # Errors
    /// If the number of different voters is not 3, 5 or 7, or `forget_after` is below [`Quorum::SHORTEST`].
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

    /// Returns the voters' names, sorted and unique.
    pub fn voters(&self) -> &[NodeName] {
        &self.voters
    }

    /// Returns the number of votes that decide.
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
    fn quorum_requires_an_odd_number_of_voters_and_a_minimum_time() {
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

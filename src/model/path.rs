//! States of a path to a peer, as the probing node sees it.

use serde::{Deserialize, Serialize};

/// State of the path to one peer. Part of messages between members: new variants are only appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(all(test, feature = "agent"), derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum PathState {
    /// No request was answered yet, and too few were lost for a conclusion.
    Unknown,
    /// Requests are answered.
    Ok,
    /// No request through the tunnel is answered. Either packets are lost, or only these requests are.
    Unanswered,
    /// No request is answered, but packets from the peer arrive.
    OneWay,
    /// Answers arrive on another path than the requests take.
    Asymmetric,
    /// Small packets arrive, packets of full size do not.
    MtuTooLarge,
    /// Neither the peer's agent nor its kernel answers.
    Dead,
    /// Dead for so long that the route to its subnet was replaced by an `unreachable` route.
    Withdrawn,
    /// Packets of some flows are lost, those of others arrive.
    PartlyLost,
}

impl PathState {
    /// Describes the state, as in "packets to NAME: ...".
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unknown => "not known yet",
            Self::Ok => "they arrive",
            Self::Unanswered => "no request through the tunnel is answered",
            Self::OneWay => "requests are not answered, but packets from the peer arrive",
            Self::Asymmetric => "answers arrive on another path",
            Self::MtuTooLarge => "those of full size are lost",
            Self::Dead => "neither its agent nor its kernel answers",
            Self::PartlyLost => "those of some flows are lost, others arrive",
            Self::Withdrawn => "its subnet is unreachable until it answers again",
        }
    }

    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Ok => "ok",
            Self::Unanswered => "unanswered",
            Self::OneWay => "one-way",
            Self::Asymmetric => "asymmetric",
            Self::MtuTooLarge => "mtu-too-large",
            Self::Dead => "dead",
            Self::Withdrawn => "withdrawn",
            Self::PartlyLost => "partly-lost",
        }
    }

    /// Whether no probe of the peer is answered.
    pub const fn is_lost(self) -> bool {
        matches!(self, Self::Dead | Self::Withdrawn | Self::Unanswered | Self::OneWay)
    }

    /// Whether some probe of the peer is answered.
    pub const fn is_answered(self) -> bool {
        !self.is_lost() && !matches!(self, Self::Unknown)
    }

    /// Whether packets of the peer's host arrive.
    pub const fn shows_life(self) -> bool {
        match self {
            Self::Ok | Self::OneWay | Self::Asymmetric | Self::MtuTooLarge | Self::PartlyLost => {
                true
            }
            Self::Unknown | Self::Unanswered | Self::Dead | Self::Withdrawn => false,
        }
    }

    /// Whether the state is a problem.
    pub const fn is_problem(self) -> bool {
        !matches!(self, Self::Unknown | Self::Ok)
    }
}

//! The way of packets to a peer, as the one who asks sees it.

use serde::{Deserialize, Serialize};

/// What is known of the way to one peer. Part of what members tell each other: only appended to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathState {
    /// Nothing was answered yet, and not enough was lost.
    Unknown,
    Ok,
    /// Nothing that is asked of it through the tunnel is answered: that may be closed, or only the questions.
    Unanswered,
    /// The same, though packets of its own arrive.
    OneWay,
    /// Its answers come by another way than our requests go.
    Asymmetric,
    /// Small packets get through, and those of full size do not.
    MtuTooLarge,
    /// Neither its agent nor its kernel answers.
    Dead,
    /// Dead for so long that its subnet is unreachable by route.
    Withdrawn,
    /// Some flows get through, and others do not.
    PartlyLost,
}

impl PathState {
    /// What it means for packets, in a few words.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unknown => "nothing is known yet",
            Self::Ok => "they get through",
            Self::Unanswered => "nothing that is asked through the tunnel is answered",
            Self::OneWay => "what is asked is not answered, and packets from there arrive",
            Self::Asymmetric => "the answers come by another way",
            Self::MtuTooLarge => "those of full size are lost",
            Self::Dead => "neither its agent nor its kernel answers",
            Self::PartlyLost => "those of some flows are lost, and others get through",
            Self::Withdrawn => "its subnet is unreachable until it answers again",
        }
    }

    /// Whether somebody should look at it.
    pub const fn is_bad(self) -> bool {
        !matches!(self, Self::Unknown | Self::Ok)
    }
}

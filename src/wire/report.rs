//! What a member says of itself to somebody who looks at the cluster as a whole, and orders about the
//! cluster's secrets.
//!
//! Both are answered by the shell, not by the core: no decision of a node depends on them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::model::{NodeId, PathState, Text, bounded};

use super::Secret;

const MAX_SECRETS: usize = 16;

/// What is asked. Only ever appended to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Inquiry {
    /// "How are you, and whom do you reach?"
    Report,
    /// "Do this with a secret, and tell me how you are then."
    Secret(SecretOrder),
    /// "Which packets of this round of trials have come to your own pod?"
    Arrivals(u32),
}

/// A step of a rotation. Each is done once, however often it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SecretOrder {
    /// Accept members that prove themselves by this one, too.
    Add(Secret),
    /// Prove yourself by this one from now on.
    Use(SecretId),
    /// Accept nobody by this one any more.
    Drop(SecretId),
}

/// The answer to any [`Inquiry`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Of the program.
    pub version: Text,
    /// How many things are wrong there.
    pub problems: u32,
    /// To each peer with a subnet.
    #[serde(deserialize_with = "bounded::members")]
    pub paths: Vec<PathReport>,
    /// Secrets that it accepts; the first is the one it uses.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_SECRETS>")]
    pub secrets: Vec<SecretId>,
    /// Why an order was not carried out.
    pub refused: Option<Text>,
    /// What has come of a round of trials, if that was asked, and there is a pod for it to come to.
    pub arrivals: Option<Arrivals>,
}

/// What has come of a round of trials to the pod of the agent that is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrivals {
    /// For how long that pod has been there, in milliseconds.
    pub there_for_ms: u32,
    /// A bit for each sort of packet that has come, and was answered.
    pub came: u16,
    /// Packets that were sent to be counted, and have come.
    pub samples: u16,
    /// There were too many packets lately to answer all.
    pub shed: bool,
}

/// The way from the one who reports to a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathReport {
    pub node: NodeId,
    pub state: PathState,
    /// Of the last request that was answered, in microseconds.
    pub round_trip_us: Option<u32>,
}

/// A name for a secret that can be shown: the first four bytes of its hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SecretId(pub(super) [u8; 4]);

impl fmt::Display for SecretId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SecretId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SecretId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_plain = text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u32::from_str_radix(text, 16).ok().filter(|_| is_plain);
        let number = number.ok_or_else(|| {
            format!("secret {text:?}: not eight hexadecimal digits: see `gossamer secret list`")
        })?;
        Ok(Self(number.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::codec::{decode, encode},
        *,
    };

    #[test]
    fn report_of_more_secrets_than_a_node_accepts_is_refused() {
        let report = |count| {
            let secrets = vec![SecretId([0; 4]); count];
            encode(&Report { secrets, ..Report::default() })
        };
        assert!(decode::<Report>("report", &report(MAX_SECRETS)).is_ok());
        let error = decode::<Report>("report", &report(MAX_SECRETS + 1)).expect_err("too many");
        assert!(error.to_string().contains("at most 16"), "{error}");
    }

    #[test]
    fn the_name_of_a_secret_can_be_read_back() {
        let id = SecretId([0, 0x1f, 0xa2, 0xff]);
        assert_eq!(id.to_string(), "001fa2ff");
        assert_eq!("001fa2ff".parse(), Ok(id));
        for wrong in ["", "001fa2f", "001fa2ff0", "001fa2fg", "+01fa2ff"] {
            assert!(wrong.parse::<SecretId>().is_err(), "{wrong}");
        }
    }
}

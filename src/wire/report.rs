//! What a member says of itself to somebody who looks at the cluster as a whole, and orders about the
//! cluster's secrets.
//!
//! Both are answered by the shell, not by the core: no decision of a node depends on them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::model::{NodeId, PathState};

use super::Secret;

/// No cluster records more members.
const MAX_PATHS: usize = 16_384;
const MAX_SECRETS: usize = 16;

/// What is asked. Only ever appended to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Inquiry {
    /// "How are you, and whom do you reach?"
    Report,
    /// "Do this with a secret, and tell me how you are then."
    Secret(SecretOrder),
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
    pub version: String,
    /// How many things are wrong there.
    pub problems: u32,
    /// To each peer with a subnet.
    pub paths: Vec<PathReport>,
    /// Secrets that it accepts; the first is the one it uses.
    pub secrets: Vec<SecretId>,
    /// Why an order was not carried out.
    pub refused: Option<String>,
}

impl Report {
    /// Whether it is one that a member's program can have written: no longer than a large cluster makes it,
    /// and with nothing in it that a terminal would obey.
    pub fn is_plausible(&self) -> bool {
        let texts = [Some(&self.version), self.refused.as_ref()];
        let visible = |text: &&String| text.chars().all(|c| !c.is_control()) && text.len() <= 500;
        texts.iter().flatten().all(visible)
            && self.paths.len() <= MAX_PATHS
            && self.secrets.len() <= MAX_SECRETS
    }
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
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_not_plausible_and_neither_is_too_much() {
        let fine = Report { version: "0.1.0".to_owned(), ..Report::default() };
        assert!(fine.is_plausible());
        let escape = Report { version: "\u{1b}[2J".to_owned(), ..Report::default() };
        let long = Report { refused: Some("x".repeat(501)), ..Report::default() };
        let many = Report { secrets: vec![SecretId([0; 4]); MAX_SECRETS + 1], ..Report::default() };
        for wrong in [escape, long, many] {
            assert!(!wrong.is_plausible(), "{wrong:?}");
        }
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

//! Identifiers of nodes, processes and clusters.
//!
//! All are eight bytes, written as sixteen hexadecimal digits. SWIM repeats a node's identity in each update,
//! so the length matters. The chance of an accidental collision among 10,000 nodes is about 3 in 10^12.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest, Sha256};

/// A node: a hash of its Ed25519 public key. It is independent of addresses and host names, so a node keeps
/// its subnet when these change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId([u8; 8]);

impl NodeId {
    /// Returns the first eight bytes of SHA-256 over a fixed label and the raw public key.
    pub fn of_public_key(key: &[u8; 32]) -> Self {
        let hash = Sha256::new().chain_update(b"gossamer node id").chain_update(key).finalize();
        let mut id = [0; 8];
        id.copy_from_slice(&hash[..8]);
        Self(id)
    }
}

/// One process of an agent. Two running processes with one [`NodeId`] are a duplicate identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootId([u8; 8]);

/// A cluster: a random number that its creator draws. Clusters with different ids never merge.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId([u8; 8]);

impl NodeId {
    /// Stands for an unknown id in the status of an agent that could not read its key.
    pub const UNKNOWN: Self = Self([0; 8]);
}

impl ClusterId {
    /// Stands for an unknown id in the frames of a joiner whose token names no cluster.
    pub const UNKNOWN: Self = Self([0; 8]);
}

/// A text that is not sixteen hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an identifier: expected 16 hexadecimal digits")]
pub struct IdError(String);

macro_rules! eight_byte_id {
    ($($name:ident),+) => {$(
        impl $name {
            /// Returns the id with these bytes.
            pub const fn from_bytes(bytes: [u8; 8]) -> Self {
                Self(bytes)
            }

            /// Returns the bytes of the id.
            pub const fn as_bytes(&self) -> &[u8; 8] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_hex(text).map(Self).ok_or_else(|| IdError(text.to_owned()))
            }
        }

        /// Hexadecimal digits in text formats (JSON, TOML), raw bytes on the wire and on disk.
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
                } else {
                    <[u8; 8]>::deserialize(deserializer).map(Self)
                }
            }
        }
    )+};
}

eight_byte_id!(NodeId, BootId, ClusterId);

/// Parses sixteen hexadecimal digits.
fn parse_hex(text: &str) -> Option<[u8; 8]> {
    if text.len() != 16 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 8];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_round_trips_through_its_text_and_other_texts_are_refused() {
        let id = NodeId::of_public_key(&[7; 32]);
        assert_eq!(id.to_string().parse::<NodeId>(), Ok(id));
        for bad in ["", "12", "zz00000000000000", "00000000000000001", "+1+1+1+1+1+1+1+1"] {
            let error = bad.parse::<ClusterId>().expect_err(bad).to_string();
            assert!(error.contains("16 hexadecimal digits"), "{error}");
        }
    }

    #[test]
    fn different_keys_give_different_node_ids() {
        assert_ne!(NodeId::of_public_key(&[1; 32]), NodeId::of_public_key(&[2; 32]));
    }
}

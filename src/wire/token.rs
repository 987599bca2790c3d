//! The join token: cluster id, secret and seeds in one string to copy from host to host.
//!
//! The string is `gsm1.`, followed by lower-case base32 without padding of the encoded fields and a CRC-32.
//! The checksum covers every character, so a mistyped token is distinguishable from the token of another
//! cluster.

use std::{fmt, str::FromStr};

use data_encoding::BASE32_NOPAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::model::ClusterId;

use super::codec::{decode, encode};

/// Least length of a secret, in bytes. Any host that connects to a node receives a signature that depends on
/// the secret, so the secret must resist guessing.
pub const MIN_SECRET_LEN: usize = 16;
/// Greatest length of a secret, in bytes.
const MAX_SECRET_LEN: usize = 1024;

/// Format and version of the token.
const PREFIX: &str = "gsm1.";
/// Greatest number of seeds in a token.
const MAX_SEEDS: usize = 64;
/// Greatest length of a token without its prefix, in characters.
const MAX_TEXT: usize = 8192;

/// The cluster's shared secret. `Debug` does not print it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>")]
pub struct Secret(Vec<u8>);

impl TryFrom<Vec<u8>> for Secret {
    type Error = TokenError;

    fn try_from(bytes: Vec<u8>) -> Result<Self, TokenError> {
        Self::new(bytes)
    }
}

impl Secret {
    /// Checks and wraps a secret.
    ///
    /// # Errors
    /// If it has fewer than [`MIN_SECRET_LEN`] or more than 1,024 bytes.
    pub fn new(bytes: Vec<u8>) -> Result<Self, TokenError> {
        if !(MIN_SECRET_LEN..=MAX_SECRET_LEN).contains(&bytes.len()) {
            return Err(TokenError::WeakSecret { len: bytes.len() });
        }
        Ok(Self(bytes))
    }

    /// Returns the secret itself.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the printable name of the secret.
    pub fn id(&self) -> SecretId {
        let hash = Sha256::new().chain_update(b"gossamer secret").chain_update(&self.0).finalize();
        SecretId(std::array::from_fn(|i| hash[i]))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.id())
    }
}

/// What a node needs to join a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The cluster, or [`ClusterId::UNKNOWN`] if the token was created before the cluster.
    pub cluster: ClusterId,
    /// The cluster's secret.
    pub secret: Secret,
    /// `HOST:PORT` of members, tried in addition to those of `--join`.
    pub seeds: Vec<String>,
}

impl Token {
    /// Returns the cluster that the token names, if it names one.
    pub fn known_cluster(&self) -> Option<ClusterId> {
        (self.cluster != ClusterId::UNKNOWN).then_some(self.cluster)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = encode(self);
        let checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        write!(f, "{PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        if body.len() > MAX_TEXT {
            return Err(TokenError::Damaged);
        }
        let bytes = BASE32_NOPAD
            .decode(body.to_ascii_uppercase().as_bytes())
            .map_err(|_| TokenError::Damaged)?;
        let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(TokenError::Damaged)?;
        if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
            return Err(TokenError::Damaged);
        }
        let token: Self = decode("token", body).map_err(|_| TokenError::Damaged)?;
        if token.seeds.len() > MAX_SEEDS {
            return Err(TokenError::Damaged);
        }
        Ok(token)
    }
}

/// Why a token is unusable. The error never contains the token's text, which holds the secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The text has another prefix.
    #[error("token: it does not begin with {PREFIX:?}: paste what `gossamer token` printed")]
    NotAToken,
    /// The checksum does not match, or a field exceeds its limit.
    #[error("token: a character is missing or wrong: copy it again from `gossamer token`")]
    Damaged,
    /// The secret is too short or too long.
    #[error(
        "token: its secret has {len} bytes, at least {MIN_SECRET_LEN} are needed: \
         make one with `gossamer token --new`"
    )]
    WeakSecret {
        /// Length of the secret, in bytes.
        len: usize,
    },
}

/// A printable name of a secret: the first four bytes of its hash.
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

    fn token() -> Token {
        Token {
            cluster: ClusterId::from_bytes([1; 8]),
            secret: Secret::new(vec![7; 32]).expect("long enough"),
            seeds: vec!["host-1:8473".to_owned()],
        }
    }

    #[test]
    fn token_round_trips_in_either_case() {
        let text = token().to_string();
        assert_eq!(text.parse(), Ok(token()));
        assert_eq!(format!("  {text}\n").parse(), Ok(token()));
        let upper = format!("{PREFIX}{}", text[PREFIX.len()..].to_ascii_uppercase());
        assert_eq!(upper.parse(), Ok(token()));
    }

    #[test]
    fn mistyped_or_missing_character_is_detected() {
        let text = token().to_string();
        for i in PREFIX.len()..text.len() {
            let mut wrong = text.clone().into_bytes();
            wrong[i] = if wrong[i] == b'a' { b'b' } else { b'a' };
            let wrong = String::from_utf8(wrong).expect("ASCII");
            assert!(wrong.parse::<Token>().is_err(), "character {i}");
        }
        assert_eq!("hunter2".parse::<Token>(), Err(TokenError::NotAToken));
        assert_eq!(text[..text.len() - 2].parse::<Token>(), Err(TokenError::Damaged));
    }

    #[test]
    fn weak_secret_is_refused_and_debug_output_hides_secrets() {
        assert_eq!(Secret::new(vec![0; 15]), Err(TokenError::WeakSecret { len: 15 }));
        let weak = Token { secret: Secret(vec![1]), ..token() }.to_string();
        assert_eq!(weak.parse::<Token>(), Err(TokenError::Damaged));
        assert!(!format!("{:?}", token()).contains("7, 7"));
    }

    #[test]
    fn secret_id_round_trips_through_its_text() {
        let id = SecretId([0, 0x1f, 0xa2, 0xff]);
        assert_eq!(id.to_string(), "001fa2ff");
        assert_eq!("001fa2ff".parse(), Ok(id));
        for wrong in ["", "001fa2f", "001fa2ff0", "001fa2fg", "+01fa2ff"] {
            assert!(wrong.parse::<SecretId>().is_err(), "{wrong}");
        }
    }
}

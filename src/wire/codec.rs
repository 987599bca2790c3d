//! The one module that names bincode, so that it can be replaced in a day (it is unmaintained).
//!
//! Little-endian, varint integers, and a byte limit on everything read.

use bincode::{
    config::{Configuration, Limit, LittleEndian, Varint},
    error::DecodeError,
};
use bytes::BufMut;
use serde::{Serialize, de::DeserializeOwned};

/// No single value may claim more than this while it is decoded.
const LIMIT: usize = super::STREAM_MAX;

const CONFIG: Configuration<LittleEndian, Varint, Limit<LIMIT>> =
    bincode::config::standard().with_limit::<LIMIT>();

/// Bytes that are not what they should be. Nothing has changed when this is returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("empty or cut off")]
    Truncated,
    #[error("{got} bytes, more than the {limit} allowed")]
    TooLong { got: usize, limit: usize },
    #[error(
        "the peer speaks wire version {theirs}, this build speaks {ours}: upgrade the older one"
    )]
    Version { theirs: u8, ours: u8 },
    #[error("unknown frame kind {0}")]
    Kind(u8),
    #[error("malformed {what}: {why}")]
    Malformed { what: &'static str, why: String },
}

/// Encodes a value.
///
/// # Panics
/// Never for the types of this crate: encoding to memory fails only for types that refuse to be
/// serialised, or beyond the limit, which every caller's own bound is far below.
pub fn encode(value: &impl Serialize) -> Vec<u8> {
    match bincode::serde::encode_to_vec(value, CONFIG) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("own types serialise to memory: {error}"),
    }
}

/// Decodes exactly one value that fills `bytes`.
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, WireError> {
    let (value, used) = decode_prefix(what, bytes)?;
    if used == bytes.len() {
        Ok(value)
    } else {
        let why = format!("{} bytes are left over", bytes.len() - used);
        Err(WireError::Malformed { what, why })
    }
}

/// Decodes one value from the front of `bytes`; also gives how many bytes it took.
pub fn decode_prefix<T: DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
) -> Result<(T, usize), WireError> {
    bincode::serde::decode_from_slice(bytes, CONFIG).map_err(|error| match error {
        DecodeError::UnexpectedEnd { .. } => WireError::Truncated,
        DecodeError::LimitExceeded => WireError::TooLong { got: bytes.len(), limit: LIMIT },
        other => WireError::Malformed { what, why: other.to_string() },
    })
}

/// Encodes into a fixed buffer, which stays untouched where the value does not fit.
pub fn encode_into(value: &impl Serialize, mut buffer: impl BufMut) -> Result<(), WireError> {
    let bytes = encode(value);
    if bytes.len() > buffer.remaining_mut() {
        return Err(WireError::TooLong { got: bytes.len(), limit: buffer.remaining_mut() });
    }
    buffer.put_slice(&bytes);
    Ok(())
}

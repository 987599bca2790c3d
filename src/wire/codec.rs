//! The only module that uses bincode, so that this unmaintained crate can be replaced easily.
//!
//! The encoding is little-endian with variable-length integers; every decoder has a byte limit.

use bincode::{
    config::{Configuration, Limit, LittleEndian, Varint},
    error::DecodeError,
};
use bytes::BufMut;
use serde::{Serialize, de::DeserializeOwned};

/// Greatest length of a frame on a stream, in bytes. A full table of 65,536 single-slot runs takes less than
/// 2 MiB.
pub const STREAM_MAX: usize = 4 << 20;
/// Limit of the bytes that one value may claim while it is decoded.
const LIMIT: usize = STREAM_MAX;

/// The encoding.
const CONFIG: Configuration<LittleEndian, Varint, Limit<LIMIT>> =
    bincode::config::standard().with_limit::<LIMIT>();

/// Why bytes cannot be decoded. The decoder has changed nothing when it returns this.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The input ends too early.
    #[error("empty or truncated")]
    Truncated,
    /// The input exceeds a limit.
    #[error("{got} bytes, more than the {limit} allowed")]
    TooLong {
        /// Length of the input, in bytes.
        got: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// The sender uses another version of the wire format.
    #[error(
        "the peer speaks wire version {theirs}, this build speaks {ours}: upgrade the older one"
    )]
    Version {
        /// The sender's version.
        theirs: u8,
        /// [`super::WIRE_VERSION`].
        ours: u8,
    },
    /// The frame has an unknown kind.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// The bytes are not an encoding of the expected type.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// The expected type.
        what: &'static str,
        /// The decoder's error.
        why: String,
    },
}

/// Encodes a value.
///
/// # Panics
/// Never for the types of this crate: encoding to memory fails only for types that refuse to be serialized.
pub fn encode(value: &impl Serialize) -> Vec<u8> {
    match bincode::serde::encode_to_vec(value, CONFIG) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("own types serialize to memory: {error}"),
    }
}

/// Decodes one value that fills `bytes` exactly.
///
/// # Errors
/// If `bytes` is truncated, too long or malformed, or has trailing bytes.
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, WireError> {
    let (value, used) = decode_prefix(what, bytes)?;
    if used == bytes.len() {
        Ok(value)
    } else {
        let why = format!("{} trailing bytes", bytes.len() - used);
        Err(WireError::Malformed { what, why })
    }
}

/// Decodes one value from the front of `bytes`. Also returns its length in bytes.
///
/// # Errors
/// If `bytes` is truncated, too long or malformed.
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

/// Encodes a value into a buffer.
///
/// # Errors
/// `TooLong` if the value does not fit. The buffer is unchanged in this case.
pub fn encode_into(value: &impl Serialize, mut buffer: impl BufMut) -> Result<(), WireError> {
    let bytes = encode(value);
    if bytes.len() > buffer.remaining_mut() {
        return Err(WireError::TooLong { got: bytes.len(), limit: buffer.remaining_mut() });
    }
    buffer.put_slice(&bytes);
    Ok(())
}

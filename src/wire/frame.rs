//! The outer layer of every message between nodes: version, kind, cluster id, payload.
//!
//! The cluster id allows a receiver to reject a frame of another cluster with the same secret before it
//! parses the payload.

use crate::model::ClusterId;

use super::{STREAM_MAX, WireError};

/// Version of the wire format. It is also part of the ALPN name that peers negotiate.
pub const WIRE_VERSION: u8 = 1;

/// Greatest length of a frame in a QUIC datagram, in bytes. A new quinn connection carries at least 1,162
/// bytes; the rest is margin. Longer frames are sent on a stream.
pub const DATAGRAM_MAX: usize = 1150;

/// Length of version, kind and cluster id, in bytes.
const HEADER: usize = 10;

/// A message with its unparsed payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A SWIM packet with the sender's hashes: [`super::Gossip`].
    Swim(&'a [u8]),
    /// Facts that are new to the sender: [`super::Push`].
    Push(&'a [u8]),
    /// A request on a stream: [`super::Request`].
    Request(&'a [u8]),
    /// The response on the same stream: [`super::Response`].
    Response(&'a [u8]),
    /// An inquiry of one agent to another, on a stream: [`super::Inquiry`].
    Inquiry(&'a [u8]),
    /// The answer on the same stream: [`super::InquiryAnswer`].
    Answer(&'a [u8]),
}

impl<'a> Frame<'a> {
    /// Encodes the frame.
    pub fn encode(self, cluster: ClusterId) -> Vec<u8> {
        let (kind, payload) = match self {
            Self::Swim(payload) => (1, payload),
            Self::Push(payload) => (2, payload),
            Self::Request(payload) => (3, payload),
            Self::Response(payload) => (4, payload),
            Self::Inquiry(payload) => (5, payload),
            Self::Answer(payload) => (6, payload),
        };
        let mut bytes = Vec::with_capacity(HEADER + payload.len());
        bytes.extend_from_slice(&[WIRE_VERSION, kind]);
        bytes.extend_from_slice(cluster.as_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Splits a frame into cluster id, kind and payload.
    ///
    /// # Errors
    /// If the version or the kind is unknown, or the frame is truncated or too long.
    pub fn decode(bytes: &'a [u8]) -> Result<(ClusterId, Self), WireError> {
        let (&theirs, rest) = bytes.split_first().ok_or(WireError::Truncated)?;
        if theirs != WIRE_VERSION {
            return Err(WireError::Version { theirs, ours: WIRE_VERSION });
        }
        if bytes.len() > STREAM_MAX {
            return Err(WireError::TooLong { got: bytes.len(), limit: STREAM_MAX });
        }
        let (&kind, rest) = rest.split_first().ok_or(WireError::Truncated)?;
        let (cluster, payload) = rest.split_first_chunk::<8>().ok_or(WireError::Truncated)?;
        let frame = match kind {
            1 => Self::Swim(payload),
            2 => Self::Push(payload),
            3 => Self::Request(payload),
            4 => Self::Response(payload),
            5 => Self::Inquiry(payload),
            6 => Self::Answer(payload),
            other => return Err(WireError::Kind(other)),
        };
        Ok((ClusterId::from_bytes(*cluster), frame))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frame_of_another_version_is_refused_with_both_versions() {
        let mut bytes = Frame::Push(b"x").encode(ClusterId::UNKNOWN);
        bytes[0] = 9;
        let error = Frame::decode(&bytes).expect_err("version 9");
        assert_eq!(error, WireError::Version { theirs: 9, ours: WIRE_VERSION });
        assert!(error.to_string().contains("upgrade the older one"), "{error}");
    }

    #[test]
    fn frame_of_unknown_kind_or_short_length_is_refused() {
        let cluster = ClusterId::from_bytes([5; 8]);
        let mut bytes = Frame::Swim(b"").encode(cluster);
        for cut in 0..bytes.len() {
            assert!(Frame::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        bytes[1] = 200;
        assert_eq!(Frame::decode(&bytes), Err(WireError::Kind(200)));
    }

    proptest! {
        #[test]
        fn frame_round_trips(
            id in any::<[u8; 8]>(), kind in 0..6, payload in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let cluster = ClusterId::from_bytes(id);
            let frame = match kind {
                0 => Frame::Swim(&payload),
                1 => Frame::Push(&payload),
                2 => Frame::Request(&payload),
                3 => Frame::Response(&payload),
                4 => Frame::Inquiry(&payload),
                _ => Frame::Answer(&payload),
            };
            let bytes = frame.encode(cluster);
            prop_assert_eq!(Frame::decode(&bytes), Ok((cluster, frame)));
        }
    }
}

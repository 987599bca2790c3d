//! The layout of foca's packets, with headers and updates in this crate's encoding.

use bytes::{Buf, BufMut};
use foca::{Codec, Header, Member};
use serde::{Serialize, de::DeserializeOwned};

use crate::model::Identity;

use super::{
    Roots, WireError,
    codec::{decode_prefix, encode, encode_into},
};

/// A SWIM packet as foca lays it out: a header, optionally followed by the number of updates and the updates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwimPacket {
    /// Sender, receiver and kind of message.
    pub header: Header<Identity>,
    /// Updates about members.
    pub members: Vec<Member<Identity>>,
    /// Whether the number of updates is present; foca distinguishes an empty list from a missing one.
    has_list: bool,
}

impl SwimPacket {
    /// Decodes a packet.
    ///
    /// # Errors
    /// If the packet is truncated or malformed, or has trailing bytes.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, WireError> {
        let header = SwimCodec.decode_header(&mut bytes)?;
        let has_list = !bytes.is_empty();
        let mut members = Vec::new();
        if has_list {
            let (count, rest) = bytes.split_first_chunk().ok_or(WireError::Truncated)?;
            bytes = rest;
            for _ in 0..u16::from_be_bytes(*count) {
                members.push(SwimCodec.decode_member(&mut bytes)?);
            }
        }
        if !bytes.is_empty() {
            let why = format!("{} trailing bytes", bytes.len());
            return Err(WireError::Malformed { what: "swim packet", why });
        }
        Ok(Self { header, members, has_list })
    }

    /// Returns a packet with a list of updates.
    pub const fn new(header: Header<Identity>, members: Vec<Member<Identity>>) -> Self {
        Self { header, members, has_list: true }
    }

    /// Returns a packet without a list of updates.
    pub const fn bare(header: Header<Identity>) -> Self {
        Self { header, members: Vec::new(), has_list: false }
    }

    /// Encodes the packet.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = encode(&self.header);
        if self.has_list {
            bytes.extend_from_slice(&(self.members.len() as u16).to_be_bytes());
            self.members.iter().for_each(|member| bytes.extend_from_slice(&encode(member)));
        }
        bytes
    }
}

/// Length of the hashes before a SWIM packet, in bytes.
pub const ROOTS_LEN: usize = 24;

/// A SWIM packet with the hashes of the sender's state. A neighbor's packet so shows, without a comparison,
/// whether both nodes hold the same facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gossip<'a> {
    /// The sender's hashes.
    pub roots: Roots,
    /// The packet: [`SwimPacket`].
    pub packet: &'a [u8],
}

impl<'a> Gossip<'a> {
    /// Encodes the hashes, in little-endian byte order, and the packet.
    pub fn encode(self) -> Vec<u8> {
        let Roots { members, slots, active } = self.roots;
        let mut bytes = Vec::with_capacity(ROOTS_LEN + self.packet.len());
        [members, slots, active]
            .iter()
            .for_each(|root| bytes.extend_from_slice(&root.to_le_bytes()));
        bytes.extend_from_slice(self.packet);
        bytes
    }

    /// Splits the payload of a frame.
    ///
    /// # Errors
    /// If it is truncated.
    pub fn decode(payload: &'a [u8]) -> Result<Self, WireError> {
        let (roots, packet) =
            payload.split_first_chunk::<{ ROOTS_LEN }>().ok_or(WireError::Truncated)?;
        let [members, slots, active] = std::array::from_fn(|n| {
            u64::from_le_bytes(std::array::from_fn(|byte| roots[8 * n + byte]))
        });
        Ok(Self { roots: Roots { members, slots, active }, packet })
    }
}

/// The codec that foca uses for headers and updates.
#[derive(Clone, Copy, Debug, Default)]
pub struct SwimCodec;

impl Codec<Identity> for SwimCodec {
    type Error = WireError;

    fn encode_header(
        &mut self,
        header: &Header<Identity>,
        buf: impl BufMut,
    ) -> Result<(), WireError> {
        encode_into(header, buf)
    }

    fn decode_header(&mut self, buf: impl Buf) -> Result<Header<Identity>, WireError> {
        take("swim header", buf)
    }

    fn encode_member(
        &mut self,
        member: &Member<Identity>,
        buf: impl BufMut,
    ) -> Result<(), WireError> {
        encode_into(member, buf)
    }

    fn decode_member(&mut self, buf: impl Buf) -> Result<Member<Identity>, WireError> {
        take("swim member", buf)
    }
}

/// Decodes one value from the front of a buffer and advances the buffer.
fn take<T: Serialize + DeserializeOwned>(
    what: &'static str,
    mut buf: impl Buf,
) -> Result<T, WireError> {
    let (value, used) = decode_prefix(what, buf.chunk())?;
    buf.advance(used);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use crate::model::{Incarnation, NodeId};

    use super::*;

    #[test]
    fn packet_round_trips_and_trailing_bytes_are_refused() {
        let id = Identity {
            node: NodeId::of_public_key(&[1; 32]),
            incarnation: Incarnation { starts: 2, renewals: 0 },
        };
        let header =
            Header { src: id, src_incarnation: 7, dst: id, message: foca::Message::Gossip };
        for (members, has_list) in
            [(Vec::new(), false), (Vec::new(), true), (vec![Member::alive(id); 3], true)]
        {
            let packet = SwimPacket { header: header.clone(), members, has_list };
            let bytes = packet.encode();
            assert_eq!(SwimPacket::decode(&bytes), Ok(packet));
            let padded = [&bytes[..], &[0, 0, 0]].concat();
            assert!(SwimPacket::decode(&padded).is_err());
            for cut in 1..bytes.len() - header_len(&header) {
                assert!(SwimPacket::decode(&bytes[..bytes.len() - cut]).is_err(), "{cut}");
            }
        }
    }

    fn header_len(header: &Header<Identity>) -> usize {
        encode(header).len()
    }

    #[test]
    fn member_round_trips_and_a_short_buffer_stays_unchanged() {
        let id = Identity {
            node: NodeId::of_public_key(&[1; 32]),
            incarnation: Incarnation { starts: 70_000, renewals: 2 },
        };
        let member = Member::alive(id);
        let mut bytes = Vec::new();
        SwimCodec.encode_member(&member, &mut bytes).expect("fits");
        assert!(bytes.len() <= 16, "an update takes {} bytes", bytes.len());
        let mut rest: &[u8] = &bytes;
        assert_eq!(SwimCodec.decode_member(&mut rest), Ok(member.clone()));
        assert!(rest.is_empty());

        let mut small = [0_u8; 9];
        let mut window = &mut small[..];
        assert!(SwimCodec.encode_member(&member, &mut window).is_err());
        assert_eq!(small, [0; 9]);
    }
}

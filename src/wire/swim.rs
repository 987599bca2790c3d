//! How foca's packets are laid out: headers and member updates through our own codec.

use bytes::{Buf, BufMut};
use foca::{Codec, Header, Member};
use serde::{Serialize, de::DeserializeOwned};

use crate::model::Identity;

use super::{
    WireError,
    codec::{decode_prefix, encode_into},
};

/// Stateless; foca owns one.
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
    fn members_round_trip_and_never_leave_half_a_record() {
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

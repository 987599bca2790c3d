//! The connection id of a first packet, which proves that the sender has the cluster's secret.
//!
//! The client chooses this id (RFC 9000, 7.2), and a Retry token returns it. Here it consists of a
//! random number and its HMAC with a key from the secret. A node thus distinguishes hosts with the
//! secret from non-members before a handshake begins. An observer of the packet can repeat the id.

use std::array;

use quinn::{ConnectionId, ConnectionIdGenerator as _};
use quinn_proto::RandomConnectionIdGenerator;
use ring::hmac;

/// Bytes of the random part.
const RANDOM_LEN: usize = 8;
/// Bytes of the id, the maximum of QUIC.
const ID_LEN: usize = 20;

/// Creates ids, and recognizes those of other nodes.
#[derive(Clone)]
pub(super) struct FirstIds {
    /// One key per accepted secret; the first creates ids.
    keys: Vec<hmac::Key>,
}

impl FirstIds {
    /// Creates ids with the first key, and recognizes ids of all keys.
    pub(super) fn new(keys: &[[u8; 32]]) -> Self {
        Self { keys: keys.iter().map(|key| hmac::Key::new(hmac::HMAC_SHA256, key)).collect() }
    }

    /// Returns an id for a first packet of this node.
    pub(super) fn choose(&self) -> ConnectionId {
        let random = RandomConnectionIdGenerator::new(RANDOM_LEN).generate_cid();
        self.keys.first().map_or(random, |key| with_code(key, &random))
    }

    /// Returns whether the sender of an id has one of the secrets, or has seen the id.
    pub(super) fn proves_secret(&self, id: &ConnectionId) -> bool {
        let Some((random, _)) = id.split_at_checked(RANDOM_LEN) else { return false };
        // Compares in constant time.
        let differs = |right: &[u8]| right.iter().zip(&id[..]).fold(0, |sum, (a, b)| sum | (a ^ b));
        id.len() == ID_LEN && self.keys.iter().any(|key| differs(&with_code(key, random)) == 0)
    }
}

/// Returns the id with this random part.
fn with_code(key: &hmac::Key, random: &[u8]) -> ConnectionId {
    let code = hmac::sign(key, random);
    let mut bytes = random.iter().chain(code.as_ref()).copied();
    let id: [u8; ID_LEN] = array::from_fn(|_| bytes.next().unwrap_or(0));
    ConnectionId::new(&id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ids_of_accepted_secrets_are_recognized() {
        let (old, new) = (FirstIds::new(&[[1; 32]]), FirstIds::new(&[[2; 32]]));
        let both = FirstIds::new(&[[1; 32], [2; 32]]);
        for id in [old.choose(), new.choose()] {
            assert!(both.proves_secret(&id));
            assert_eq!(old.proves_secret(&id), !new.proves_secret(&id));
        }
        assert!(old.proves_secret(&both.choose()), "the first one is used");
        assert_ne!(old.choose(), old.choose());
        let id = old.choose();
        for place in 0..ID_LEN {
            let mut bytes = id.to_vec();
            bytes[place] ^= 1;
            assert!(!old.proves_secret(&ConnectionId::new(&bytes)), "byte {place}");
        }
        for length in 0..ID_LEN {
            assert!(!old.proves_secret(&ConnectionId::new(&id[..length])), "{length} bytes");
        }
        let random = RandomConnectionIdGenerator::new(ID_LEN).generate_cid();
        assert!(!both.proves_secret(&random));
    }
}

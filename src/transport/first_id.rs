//! The connection id of a first packet, which shows that its sender has the cluster's secret.
//!
//! The client chooses that id (RFC 9000, 7.2), and a Retry token gives it back. Here it is a random number
//! and a code that follows from the number and the secret. So a node tells hosts that have the secret from
//! strangers before a handshake begins. An observer of the packet can show the id again.

use std::array;

use quinn::{ConnectionId, ConnectionIdGenerator as _};
use quinn_proto::RandomConnectionIdGenerator;
use ring::hmac;

/// The random part, which makes each id another one.
const RANDOM: usize = 8;
/// The longest that QUIC knows.
const LENGTH: usize = 20;

/// Chooses ids, and recognizes those of others.
#[derive(Clone)]
pub(super) struct FirstIds {
    /// Of each secret that is accepted; the first one is used.
    keys: Vec<hmac::Key>,
}

impl FirstIds {
    /// The first of the keys is used; ids by any of them are recognized.
    pub(super) fn new(keys: &[[u8; 32]]) -> Self {
        Self { keys: keys.iter().map(|key| hmac::Key::new(hmac::HMAC_SHA256, key)).collect() }
    }

    /// An id for a first packet of this node.
    pub(super) fn choose(&self) -> ConnectionId {
        let random = RandomConnectionIdGenerator::new(RANDOM).generate_cid();
        self.keys.first().map_or(random, |key| with_code(key, &random))
    }

    /// Whether the sender of an id has one of the secrets, or has seen the id.
    pub(super) fn show_secret(&self, id: &ConnectionId) -> bool {
        let Some((random, _)) = id.split_at_checked(RANDOM) else { return false };
        // In a time that tells nothing of the code.
        let differs = |right: &[u8]| right.iter().zip(&id[..]).fold(0, |sum, (a, b)| sum | (a ^ b));
        id.len() == LENGTH && self.keys.iter().any(|key| differs(&with_code(key, random)) == 0)
    }
}

fn with_code(key: &hmac::Key, random: &[u8]) -> ConnectionId {
    let code = hmac::sign(key, random);
    let mut bytes = random.iter().chain(code.as_ref()).copied();
    let id: [u8; LENGTH] = array::from_fn(|_| bytes.next().unwrap_or(0));
    ConnectionId::new(&id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_accepted_secrets_are_recognized_and_no_others() {
        let (old, new) = (FirstIds::new(&[[1; 32]]), FirstIds::new(&[[2; 32]]));
        let both = FirstIds::new(&[[1; 32], [2; 32]]);
        for id in [old.choose(), new.choose()] {
            assert!(both.show_secret(&id));
            assert_eq!(old.show_secret(&id), !new.show_secret(&id));
        }
        assert!(old.show_secret(&both.choose()), "the first one is used");
        assert_ne!(old.choose(), old.choose());
        let id = old.choose();
        for place in 0..LENGTH {
            let mut bytes = id.to_vec();
            bytes[place] ^= 1;
            assert!(!old.show_secret(&ConnectionId::new(&bytes)), "byte {place}");
        }
        for length in 0..LENGTH {
            assert!(!old.show_secret(&ConnectionId::new(&id[..length])), "{length} bytes");
        }
        let random = RandomConnectionIdGenerator::new(LENGTH).generate_cid();
        assert!(!both.show_secret(&random));
    }
}

//! Dialling a seed by its name, which may have several addresses, some of which lead nowhere.

use std::{net::SocketAddr, time::Duration};

use quinn::{Connection, VarInt};
use tokio::task::JoinSet;

use super::{Event, dial::Dialler};
use crate::{core::CallError, model::NodeId, worker::resolve};

/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;
/// The next address of a name is tried when the one before has not answered within this time (RFC 8305, 5).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);

impl Dialler {
    /// Connects to the address of a name that answers first. The addresses are tried staggered, both families
    /// in turn, and each time another one comes first: one that swallows packets holds up no join.
    ///
    /// # Errors
    /// Fails if the name has no address, or with the reason of the last one.
    pub(super) async fn connect_name(
        &self,
        name: &str,
        turn: usize,
    ) -> Result<(NodeId, Connection), CallError> {
        let ipv4_only = self.endpoint.local_addr().is_ok_and(|local| local.is_ipv4());
        let mut resolved = resolve(name.to_owned())
            .await
            .map_err(|error| CallError::Unreachable(format!("{name}: {error}")))?;
        resolved.retain(|address| address.is_ipv4() || !ipv4_only);
        let mut tries = JoinSet::new();
        for (place, address) in in_turn(resolved, turn).into_iter().enumerate() {
            let dialler = self.clone();
            let delay = NEXT_ADDRESS_AFTER * u32::try_from(place).unwrap_or(u32::MAX);
            tries.spawn(async move {
                tokio::time::sleep(delay).await;
                dialler.connect(address).await
            });
        }
        let mut last = CallError::Unreachable(format!("{name} has no usable address"));
        while let Some(tried) = tries.join_next().await {
            match tried {
                Ok(Ok((peer, connection))) if peer == self.me => {
                    connection.close(VarInt::from_u32(3), b"myself");
                    last = CallError::Myself;
                }
                Ok(Ok((peer, connection))) => {
                    self.read(peer, connection.clone());
                    let known =
                        Event::Connected { peer, connection: connection.clone(), inbound: false };
                    let _ = self.events.send(known).await;
                    return Ok((peer, connection));
                }
                // That it is this node itself tells more than that another address is silent.
                Ok(Err(error)) if last != CallError::Myself => last = error,
                Ok(Err(_)) | Err(_) => {}
            }
        }
        Err(last)
    }
}

/// Addresses in the order in which they are tried at this turn: families alternate (RFC 8305, 4), and the
/// first becomes the last with each turn.
fn in_turn(addresses: Vec<SocketAddr>, turn: usize) -> Vec<SocketAddr> {
    let first_is_ipv4 = addresses.first().is_some_and(SocketAddr::is_ipv4);
    let (preferred, others): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv4() == first_is_ipv4);
    let mut order = Vec::new();
    for place in 0..preferred.len().max(others.len()) {
        order.extend(preferred.get(place).into_iter().chain(others.get(place)).copied());
    }
    order.dedup();
    if !order.is_empty() {
        let first = turn % order.len();
        order.rotate_left(first);
    }
    order.truncate(MAX_ADDRESSES);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_a_name_alternate_families_and_take_turns() {
        let address = |text: &str| -> SocketAddr { text.parse().expect("an address") };
        let resolved =
            || ["[2001:db8::1]:1", "[2001:db8::2]:1", "192.0.2.1:1"].map(address).to_vec();
        let first = ["[2001:db8::1]:1", "192.0.2.1:1", "[2001:db8::2]:1"].map(address);
        assert_eq!(in_turn(resolved(), 0), first);
        let firsts = (0..4).map(|turn| in_turn(resolved(), turn)[0]);
        assert!(firsts.eq([first[0], first[1], first[2], first[0]]));
        let many = (0..20).map(|port| SocketAddr::from(([192, 0, 2, 1], port))).collect();
        assert_eq!(in_turn(many, 19).len(), MAX_ADDRESSES);
        assert!(in_turn(Vec::new(), 3).is_empty());
    }
}

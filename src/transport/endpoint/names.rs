//! Resolves and dials a seed by name. A name may have several addresses, some of them unreachable.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use quinn::{Connection, VarInt};
use tokio::task::JoinSet;

use super::{Event, dial::Dialer};
use crate::{
    model::{CallError, NodeId, unspecified},
    worker::resolve,
};

/// Upper limit of the addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Longest wait for name servers: a resolver asks the second one after five seconds (resolv.conf(5)).
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(6);
/// Time in which the name of a seed must resolve before it is reported.
const NAME_PATIENCE: Duration = Duration::from_secs(2);
/// Delay until the next address is tried if the previous one has not answered (RFC 8305, 5).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);

impl Dialer {
    /// Connects to the address of a name that answers first. The addresses are tried with a delay,
    /// alternating between families. Each call starts with another address, so that one that drops
    /// packets delays only some joins.
    ///
    /// # Errors
    /// When the name has no usable address; otherwise the error of the last address.
    pub(super) async fn connect_name(
        &self,
        name: &str,
        turn: usize,
    ) -> Result<(NodeId, Connection), CallError> {
        let local = self.endpoint.local_addr().ok().map(|local| local.ip());
        let ipv4_only = local.is_some_and(|local| local.is_ipv4());
        let mut resolved = in_time(name, RESOLVE_TIMEOUT, resolve(name.to_owned())).await?;
        resolved.retain(|address| address.is_ipv4() || !ipv4_only);
        if resolved.is_empty() {
            let why = "it is IPv6, and this host's underlay is IPv4".to_owned();
            return Err(CallError::NoRoute { address: name.to_owned(), why });
        }
        let mut attempts = JoinSet::new();
        for (place, address) in order_for_turn(resolved, turn).into_iter().enumerate() {
            let dialer = self.clone();
            let delay = NEXT_ADDRESS_AFTER * u32::try_from(place).unwrap_or(u32::MAX);
            attempts.spawn(async move {
                tokio::time::sleep(delay).await;
                let connected = dialer.connect(address).await;
                connected.map_err(|error| reason(error, local, address))
            });
        }
        let mut last = CallError::Unreachable(format!("{name} does not answer"));
        while let Some(attempt) = attempts.join_next().await {
            match attempt {
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
                // That an address is this node itself says more than that another one is silent.
                Ok(Err(error)) if last != CallError::Myself => last = error,
                Ok(Err(_)) | Err(_) => {}
            }
        }
        Err(last)
    }
}

/// Looks up the name of a seed, `HOST:PORT`.
///
/// # Errors
/// Fails if the name does not resolve within two seconds.
pub async fn check_name(seed: &str) -> Result<(), CallError> {
    in_time(seed, NAME_PATIENCE, resolve(seed.to_owned())).await.map(drop)
}

/// Returns the reason for a failed call: that this host has no route, if the kernel says so.
fn reason(error: CallError, local: Option<IpAddr>, address: SocketAddr) -> CallError {
    // Rules may choose a route by the source.
    let of_family = local.filter(|local| local.is_ipv4() == address.is_ipv4());
    let source = of_family.unwrap_or_else(|| unspecified(address.is_ipv4()));
    let is_routeless = |error: &io::Error| {
        matches!(error.kind(), ErrorKind::NetworkUnreachable | ErrorKind::AddrNotAvailable)
    };
    match UdpSocket::bind((source, 0)).and_then(|socket| socket.connect(address)) {
        Err(why) if is_routeless(&why) && matches!(error, CallError::Unreachable(_)) => {
            CallError::NoRoute { address: address.to_string(), why: why.to_string() }
        }
        _ => error,
    }
}

/// Returns the addresses of a name. A resolver whose name servers are silent takes long to fail.
async fn in_time(
    name: &str,
    limit: Duration,
    resolved: impl Future<Output = io::Result<Vec<SocketAddr>>>,
) -> Result<Vec<SocketAddr>, CallError> {
    let why = match tokio::time::timeout(limit, resolved).await {
        Ok(Ok(addresses)) if !addresses.is_empty() => return Ok(addresses),
        Ok(Ok(_)) => "it has no address".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no name server has answered for {} s", limit.as_secs()),
    };
    // All seeds have a port.
    let host = name.rsplit_once(':').map_or(name, |(host, _)| host);
    Err(CallError::Unresolved { name: host.to_owned(), why })
}

/// Returns the addresses in the order of this turn: families alternate (RFC 8305, 4), and each turn
/// starts with the next address.
fn order_for_turn(addresses: Vec<SocketAddr>, turn: usize) -> Vec<SocketAddr> {
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

    #[tokio::test]
    async fn name_that_does_not_resolve_is_named_with_what_the_resolver_says() {
        let failed = async { Err(io::Error::other("Name or service not known")) };
        let error =
            in_time("host.invalid:8473", RESOLVE_TIMEOUT, failed).await.expect_err("it failed");
        assert_eq!(
            error.to_string(),
            "the name host.invalid does not resolve (Name or service not known): check DNS or /etc/hosts"
        );
        let silent = in_time("host.invalid:8473", Duration::ZERO, std::future::pending());
        let error = silent.await.expect_err("no answer").to_string();
        let said = "the name host.invalid does not resolve (no name server has answered for 0 s)";
        assert!(error.starts_with(said), "{error}");
    }

    #[test]
    fn addresses_of_a_name_alternate_families_and_take_turns() {
        let address = |text: &str| -> SocketAddr { text.parse().expect("an address") };
        let resolved =
            || ["[2001:db8::1]:1", "[2001:db8::2]:1", "192.0.2.1:1"].map(address).to_vec();
        let first = ["[2001:db8::1]:1", "192.0.2.1:1", "[2001:db8::2]:1"].map(address);
        assert_eq!(order_for_turn(resolved(), 0), first);
        let firsts = (0..4).map(|turn| order_for_turn(resolved(), turn)[0]);
        assert!(firsts.eq([first[0], first[1], first[2], first[0]]));
        let many = (0..20).map(|port| SocketAddr::from(([192, 0, 2, 1], port))).collect();
        assert_eq!(order_for_turn(many, 19).len(), MAX_ADDRESSES);
        assert!(order_for_turn(Vec::new(), 3).is_empty());
    }
}

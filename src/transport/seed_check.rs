//! Checks whether seeds would admit this host, without joining.
//!
//! The check uses a newly drawn node key, so that no member mistakes it for a known node.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use nix::ifaddrs::getifaddrs;

use crate::{
    model::{CallError, CallId, ClusterId, Problem, ProblemCode},
    random::random,
    transport::{Call, Credentials, NodeKey, Received, Transport, endpoint::in_time},
    wire::{Frame, Request, Roots, Secret},
    worker::resolve,
};

/// Time in which a name must resolve before it is reported.
const NAME_PATIENCE: Duration = Duration::from_secs(2);

/// Sends a request to each seed, with secrets of which the first is in use. Returns, sorted by seed, nothing
/// or why the seed gave no answer. Takes at most ten seconds.
///
/// # Errors
/// Fails when the system gives no random bytes, or no UDP socket can be bound.
pub async fn check_seeds(
    seeds: &[String],
    secrets: &[Secret],
) -> anyhow::Result<Vec<(String, Result<(), CallError>)>> {
    let credentials = Credentials::new(secrets, &NodeKey::from_seed(random()?)?)?;
    let any: SocketAddr = (Ipv6Addr::UNSPECIFIED, 0).into();
    let bound = Transport::bind(any, &credentials);
    let bound = bound.or_else(|_| Transport::bind(([0, 0, 0, 0], 0).into(), &credentials));
    let (mut transport, mut events) = bound?;
    let request = Request::Compare(Roots::default()).encode();
    let frame = Frame::Request(&request).encode(ClusterId::UNKNOWN);
    for (number, seed) in seeds.iter().enumerate() {
        transport.call_name(Call::Node(CallId(number as u64)), seed.clone(), frame.clone());
    }
    let mut answers = Vec::new();
    while answers.len() < seeds.len() {
        let Some(event) = events.recv().await else { break };
        if let Some(Received::Answer { call: Call::Node(call), result }) = transport.handle(event)
            && let Some(seed) = usize::try_from(call.0).ok().and_then(|n| seeds.get(n))
        {
            answers.push((seed.clone(), result.map(drop)));
        }
    }
    transport.close().await;
    answers.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(answers)
}

/// Looks up the name of a seed, `HOST:PORT`.
///
/// # Errors
/// Fails if the name does not resolve within two seconds.
pub async fn check_name(seed: &str) -> Result<(), CallError> {
    in_time(seed, NAME_PATIENCE, resolve(seed.to_owned())).await.map(drop)
}

/// Whether a seed is an address of this host. False for a name that is not an address.
pub fn is_own_address(seed: &str) -> bool {
    let Ok(address) = seed.parse::<SocketAddr>() else { return false };
    let own = getifaddrs().into_iter().flatten().filter_map(|interface| interface.address);
    let ip = |own: nix::sys::socket::SockaddrStorage| -> Option<IpAddr> {
        let ipv4 = own.as_sockaddr_in().map(|own| own.ip().into());
        ipv4.or_else(|| own.as_sockaddr_in6().map(|own| own.ip().into()))
    };
    own.filter_map(ip).any(|own| own == address.ip())
}

/// Returns the problem that these seeds are addresses of this host. `of_token`: they come from the token.
pub fn own_address_problem(seeds: &[&str], of_token: bool) -> Problem {
    let (of, is) = match (of_token, seeds.len()) {
        (true, 1) => ("the token's address", "is"),
        (true, _) => ("the token's addresses", "are"),
        (false, 1) => ("the seed", "is"),
        (false, _) => ("the seeds", "are"),
    };
    let seeds = seeds.join(", ");
    let what = format!(
        "{of} {seeds} {is} this host's own, so no member is found there (virtual machines that are each \
         behind their own NAT have the same address)"
    );
    let fix = "name a member by an address that this host reaches (--join ADDRESS). Or start the member \
               that made the token with --iface NAME or --advertise ADDRESS, and use a new token of \
               that member (gossamer token)";
    Problem::new(ProblemCode::OwnAddressSeed, seeds, what, fix)
}

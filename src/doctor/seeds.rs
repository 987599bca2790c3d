//! Checks whether seeds would admit this host, without joining.
//!
//! The check uses a newly drawn node key, so that no member mistakes it for a known node.

use std::net::{Ipv6Addr, SocketAddr};

use crate::{
    model::{CallError, CallId, ClusterId},
    random::random,
    transport::{Call, Credentials, NodeKey, Received, Transport},
    wire::{Frame, Request, Roots, Secret},
};

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

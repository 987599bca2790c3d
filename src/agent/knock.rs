//! Asking seeds whether they would let this host in, without joining.
//!
//! Under a key that is made up for that, so no member mistakes it for a node it knows.

use std::net::{Ipv6Addr, SocketAddr};

use super::random;
use crate::{
    core::{CallError, CallId, Input},
    model::ClusterId,
    transport::{Credentials, NodeKey, Transport},
    wire::{Frame, Request, Roots, Secret},
};

/// What each seed says: nothing is wrong, or why it gave no answer. Ends within ten seconds.
pub async fn knock(
    seeds: &[String],
    secret: &Secret,
) -> anyhow::Result<Vec<(String, Result<(), CallError>)>> {
    let credentials =
        Credentials::new(std::slice::from_ref(secret), &NodeKey::from_seed(random()?)?)?;
    let any: SocketAddr = (Ipv6Addr::UNSPECIFIED, 0).into();
    let bound = Transport::bind(any, &credentials);
    let bound = bound.or_else(|_| Transport::bind(([0, 0, 0, 0], 0).into(), &credentials));
    let (mut transport, mut events) = bound?;
    let question = Request::Compare(Roots::default()).encode();
    let frame = Frame::Request(&question).encode(ClusterId::UNKNOWN);
    for (number, seed) in seeds.iter().enumerate() {
        transport.call_name(CallId(number as u64), seed.clone(), frame.clone());
    }
    let mut answers = Vec::new();
    while answers.len() < seeds.len() {
        let Some(event) = events.recv().await else { break };
        if let Some(Input::Answer { call, result }) = transport.handle(event)
            && let Some(seed) = usize::try_from(call.0).ok().and_then(|n| seeds.get(n))
        {
            answers.push((seed.clone(), result.map(drop)));
        }
    }
    transport.close().await;
    answers.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(answers)
}

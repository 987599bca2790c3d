//! Reads IPsec policies (`ip xfrm policy`, linux/xfrm.h), to name a policy that applies to packets.
//!
//! Implemented here because only one dump of the protocol is needed.

use std::{io, net::IpAddr};

use ipnet::IpNet;
use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_XFRM,
};

use super::{
    RECEIVE_BUFFER_BYTES,
    attributes::{address, find},
    open_socket,
    raw::answers,
    receive, send_all,
};

/// `XFRM_MSG_GETPOLICY`.
const GET_POLICY: u16 = 0x15;
/// `XFRM_MSG_GETDEFAULT`.
const GET_DEFAULT: u16 = 0x28;
/// Bytes of a `struct nlmsghdr`, and of one with a `struct xfrm_userpolicy_default`: a byte for each of `in`,
/// `fwd` and `out`.
const HEADER: usize = 16;
const DEFAULTS: u32 = 16 + 3;
/// `XFRM_USERPOLICY_BLOCK`.
const BLOCK: u8 = 1;
/// Bytes of a `struct nlmsghdr` with a `struct xfrm_userpolicy_id`.
const REQUEST: u32 = 16 + 64;
/// Bytes of `struct xfrm_userpolicy_info`, which precedes the attributes.
const INFO: usize = 168;
/// Bytes of `struct xfrm_selector`, the first member of that struct.
const SELECTOR: usize = 56;
/// `XFRMA_TMPL`: the transformations of matching packets.
const TEMPLATE: u16 = 5;
const AF_INET: u16 = 2;
/// The directions of a `struct xfrm_userpolicy_default`, in its order.
const DEFAULT_DIRECTIONS: [&str; 3] = ["in", "fwd", "out"];
/// Names of `XFRM_POLICY_IN`, `XFRM_POLICY_OUT` and `XFRM_POLICY_FWD`.
const DIRECTIONS: [&str; 3] = ["in", "out", "fwd"];

/// An IPsec policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Source network.
    pub from: IpNet,
    /// Destination network.
    pub to: IpNet,
    /// The direction, as in `ip xfrm policy`.
    pub direction: &'static str,
    /// Priority; lower is preferred.
    pub priority: u32,
    /// Whether matching packets are dropped.
    pub blocks: bool,
    /// Whether matching packets are transformed, for example encrypted.
    pub transforms: bool,
    /// Further properties of matching packets, in the syntax of `ip xfrm policy`; may be empty.
    pub what: String,
}

impl Policy {
    /// Returns whether matching packets pass unchanged.
    pub const fn lets_pass(&self) -> bool {
        !self.blocks && !self.transforms
    }
}

/// Returns all policies of this network namespace. Requires `CAP_NET_ADMIN`.
///
/// # Errors
/// If the kernel refuses or does not answer.
pub fn policies() -> io::Result<Vec<Policy>> {
    let socket = open_socket(NETLINK_XFRM)?;
    let mut request = Vec::new();
    request.extend(REQUEST.to_ne_bytes());
    request.extend(GET_POLICY.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.resize(REQUEST as usize, 0);
    send_all(&socket, &request)?;
    let mut buffer = Vec::with_capacity(RECEIVE_BUFFER_BYTES);
    let mut policies = Vec::new();
    loop {
        receive(&socket, &mut buffer)?;
        for answer in answers(&buffer) {
            match answer.error {
                Some(errno) if errno != 0 => return Err(io::Error::from_raw_os_error(errno)),
                _ if answer.done => return Ok(policies),
                _ => policies.extend(policy(&[&answer.own[..], &answer.attributes].concat())),
            }
        }
    }
}

/// Returns the directions (`in`, `fwd`, `out`) in which packets that no policy matches are dropped. Requires
/// Linux 5.15.
///
/// # Errors
/// If the kernel refuses or does not answer.
pub fn blocked_by_default() -> io::Result<Vec<&'static str>> {
    let socket = open_socket(NETLINK_XFRM)?;
    let mut request = Vec::new();
    request.extend(DEFAULTS.to_ne_bytes());
    request.extend(GET_DEFAULT.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.resize((DEFAULTS as usize).next_multiple_of(4), 0);
    send_all(&socket, &request)?;
    let mut buffer = Vec::with_capacity(RECEIVE_BUFFER_BYTES);
    receive(&socket, &mut buffer)?;
    match defaults(&buffer) {
        Some(blocked) => Ok(blocked),
        None => Err(io::Error::from(io::ErrorKind::Unsupported)),
    }
}

/// Parses the answer; `None` if it is an error.
fn defaults(answer: &[u8]) -> Option<Vec<&'static str>> {
    let kind = u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    let actions: [u8; 3] = *answer.get(HEADER..)?.first_chunk()?;
    let directions = DEFAULT_DIRECTIONS.into_iter().zip(actions);
    let blocked = directions.filter(|(_, action)| *action == BLOCK);
    (kind == GET_DEFAULT).then(|| blocked.map(|(direction, _)| direction).collect())
}

/// Parses a `struct xfrm_userpolicy_info` with its attributes.
fn policy(bytes: &[u8]) -> Option<Policy> {
    let family = u16::from_ne_bytes(*bytes.get(40..)?.first_chunk()?);
    let length = if family == AF_INET { 4 } else { 16 };
    let network = |at: usize, prefix_len: u8| {
        let ip: IpAddr = address(bytes.get(at..at + length)?)?;
        IpNet::new(ip, prefix_len).ok()
    };
    let priority = u32::from_ne_bytes(*bytes.get(152..)?.first_chunk()?);
    let direction = DIRECTIONS.get(usize::from(*bytes.get(160)?))?;
    Some(Policy {
        to: network(0, *bytes.get(42)?)?,
        from: network(16, *bytes.get(43)?)?,
        direction,
        priority,
        blocks: *bytes.get(161)? != 0,
        transforms: find(bytes.get(INFO..)?, TEMPLATE).is_some(),
        what: protocol_and_ports(bytes.get(..SELECTOR)?),
    })
}

/// Returns protocol and ports of a `struct xfrm_selector`, as text.
fn protocol_and_ports(selector: &[u8]) -> String {
    let half = |at: usize| u16::from_be_bytes([selector[at], selector[at + 1]]);
    let mut words = Vec::new();
    match selector[44] {
        0 => {}
        6 => words.push("proto tcp".to_owned()),
        17 => words.push("proto udp".to_owned()),
        number => words.push(format!("proto {number}")),
    }
    for (name, at) in [("sport", 36), ("dport", 32)] {
        match half(at + 2) {
            0 => {}
            u16::MAX => words.push(format!("{name} {}", half(at))),
            mask => words.push(format!("{name} {}/{mask:#x}", half(at))),
        }
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_with_the_default_to_block_are_read_and_an_error_has_none() {
        let answer = |kind: u16, actions: [u8; 3]| {
            let header = [&19_u32.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10]].concat();
            [header, actions.to_vec()].concat()
        };
        assert_eq!(defaults(&answer(GET_DEFAULT, [1, 2, 1])), Some(vec!["in", "out"]));
        assert_eq!(defaults(&answer(GET_DEFAULT, [2, 2, 0])), Some(Vec::new()));
        assert_eq!(defaults(&answer(2, [1, 1, 1])), None);
        assert_eq!(defaults(&[]), None);
    }
}

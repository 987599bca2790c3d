//! IPsec policies (`ip xfrm policy`, linux/xfrm.h): read, to name one that takes packets.
//!
//! By hand, because of all that protocol one dump is needed.

use std::{io, net::IpAddr};

use ipnet::IpNet;
use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_XFRM,
};

use super::{
    RECEIVE_BUFFER,
    attributes::{address, find},
    open_socket,
    raw::answers,
    receive, send_all,
};

/// `XFRM_MSG_GETPOLICY`
const GET_POLICY: u16 = 0x15;
/// `struct nlmsghdr` with a `struct xfrm_userpolicy_id`.
const REQUEST: u32 = 16 + 64;
/// `struct xfrm_userpolicy_info`, before the attributes.
const INFO: usize = 168;
/// `struct xfrm_selector`, with which it begins.
const SELECTOR: usize = 56;
/// `XFRMA_TMPL`: what is done with packets that match.
const TEMPLATE: u16 = 5;
const AF_INET: u16 = 2;
const DIRECTIONS: [&str; 3] = ["in", "out", "fwd"];

/// What is done with packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub from: IpNet,
    pub to: IpNet,
    /// As `ip xfrm policy` calls it.
    pub direction: &'static str,
    pub priority: u32,
    /// Packets that match are dropped.
    pub blocks: bool,
    /// Packets that match are transformed, as by encryption.
    pub transforms: bool,
    /// What else it selects packets by, as `ip xfrm policy` takes it.
    pub what: String,
}

impl Policy {
    /// Whether packets that match pass as they are.
    pub const fn lets_pass(&self) -> bool {
        !self.blocks && !self.transforms
    }
}

/// All policies of this network namespace. Takes CAP_NET_ADMIN.
pub fn policies() -> io::Result<Vec<Policy>> {
    let socket = open_socket(NETLINK_XFRM)?;
    let mut request = Vec::new();
    request.extend(REQUEST.to_ne_bytes());
    request.extend(GET_POLICY.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.resize(REQUEST as usize, 0);
    send_all(&socket, &request)?;
    let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
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
        what: selected(bytes.get(..SELECTOR)?),
    })
}

/// By which protocol and ports (`struct xfrm_selector`).
fn selected(selector: &[u8]) -> String {
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

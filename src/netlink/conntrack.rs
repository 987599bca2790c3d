//! Reads tracked connections (`linux/netfilter/nfnetlink_conntrack.h`), to find address translations that a
//! connection keeps although the rule behind them is gone.
//!
//! Implemented here because only one dump of the protocol is needed. Requires `CAP_NET_ADMIN`.

use std::{io, net::IpAddr};

use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_NETFILTER,
};

use super::{
    RECEIVE_BUFFER_BYTES,
    attributes::{Attributes, address, find},
    open_socket,
    raw::{answers, append},
    receive, send_all,
};

/// `NFNL_SUBSYS_CTNETLINK` and `IPCTNL_MSG_CT_GET`.
const GET: u16 = (1 << 8) | 1;
/// `CTA_TUPLE_ORIG` and `CTA_TUPLE_REPLY`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
/// `CTA_TUPLE_IP` and `CTA_TUPLE_PROTO`.
const ADDRESSES: u16 = 1;
const PROTOCOL: u16 = 2;
/// `CTA_IP_V4_SRC`, `CTA_IP_V4_DST`, `CTA_IP_V6_SRC` and `CTA_IP_V6_DST`.
const SOURCES: [u16; 2] = [1, 3];
const DESTINATIONS: [u16; 2] = [2, 4];
/// `CTA_PROTO_NUM`, `CTA_PROTO_SRC_PORT` and `CTA_PROTO_DST_PORT`.
const NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
/// IP protocol number of UDP (IANA).
const UDP: u8 = 17;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Limit of connections that are read; a dump of more takes too long.
const MAX_READ: usize = 500_000;
/// Limit of connections that are returned.
const MAX_FOUND: usize = 1_024;

/// A connection whose packets are sent on with other addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// Source of its packets before the translation.
    pub from: IpAddr,
    /// Destination of its packets before the translation.
    pub to: IpAddr,
    /// Source afterwards.
    pub new_from: IpAddr,
    /// Destination afterwards.
    pub new_to: IpAddr,
}

/// Returns connections to a UDP port whose addresses, or whose destination port, are translated.
///
/// # Errors
/// If the kernel refuses or does not answer, or does not track connections.
pub fn translated(ipv4: bool, port: u16) -> io::Result<Vec<Translated>> {
    let socket = open_socket(NETLINK_NETFILTER)?;
    let family = if ipv4 { AF_INET } else { AF_INET6 };
    let mut request = Vec::new();
    let flags = NLM_F_REQUEST | NLM_F_DUMP;
    append(GET, flags, 1, [family, 0, 0, 0], &Attributes::new(), &mut request);
    send_all(&socket, &request)?;
    let mut buffer = Vec::with_capacity(RECEIVE_BUFFER_BYTES);
    let (mut found, mut count) = (Vec::new(), 0);
    loop {
        receive(&socket, &mut buffer)?;
        for answer in answers(&buffer) {
            match answer.error {
                Some(errno) if errno != 0 => return Err(io::Error::from_raw_os_error(errno)),
                _ if answer.done || count == MAX_READ || found.len() == MAX_FOUND => {
                    return Ok(found);
                }
                _ => found.extend(connection(&answer.attributes, port)),
            }
            count += 1;
        }
    }
}

/// The addresses and ports of one direction of a UDP connection.
struct Direction {
    from: IpAddr,
    to: IpAddr,
    source: u16,
    destination: u16,
}

/// Parses a connection. Returns `None` if it is not one to the port, or is not translated.
fn connection(attributes: &[u8], port: u16) -> Option<Translated> {
    let own = direction(find(attributes, ORIGINAL)?)?;
    let reply = direction(find(attributes, REPLY)?)?;
    let is_translated = own.from != reply.to || own.to != reply.from || reply.source != port;
    let (new_from, new_to) = (reply.to, reply.from);
    let found = Translated { from: own.from, to: own.to, new_from, new_to };
    (own.destination == port && is_translated).then_some(found)
}

fn direction(tuple: &[u8]) -> Option<Direction> {
    let (addresses, protocol) = (find(tuple, ADDRESSES)?, find(tuple, PROTOCOL)?);
    if find(protocol, NUMBER)?.first() != Some(&UDP) {
        return None;
    }
    let ip = |kinds: [u16; 2]| kinds.into_iter().find_map(|kind| address(find(addresses, kind)?));
    let number = |kind| Some(u16::from_be_bytes(*find(protocol, kind)?.first_chunk()?));
    Some(Direction {
        from: ip(SOURCES)?,
        to: ip(DESTINATIONS)?,
        source: number(SOURCE_PORT)?,
        destination: number(DESTINATION_PORT)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple((from, to): ([u8; 4], [u8; 4]), ports: [u16; 2], protocol: u8) -> Attributes {
        let addresses = Attributes::new().put(SOURCES[0], &from).put(DESTINATIONS[0], &to);
        let protocol = Attributes::new()
            .put(NUMBER, &[protocol])
            .put(SOURCE_PORT, &ports[0].to_be_bytes())
            .put(DESTINATION_PORT, &ports[1].to_be_bytes());
        Attributes::new().nest(ADDRESSES, &addresses).nest(PROTOCOL, &protocol)
    }

    #[test]
    fn only_translated_connections_to_the_port_are_found() {
        let (here, there, other) = ([10, 99, 0, 11], [10, 99, 0, 12], [172, 17, 0, 2]);
        let read = |own: Attributes, reply: Attributes| {
            let both = Attributes::new().nest(ORIGINAL, &own).nest(REPLY, &reply);
            (0..both.as_bytes().len()).for_each(|end| {
                let _ = connection(&both.as_bytes()[..end], 8472);
            });
            connection(both.as_bytes(), 8472).map(|found| (found.new_from, found.new_to))
        };
        let own = |protocol| tuple((there, here), [5_000, 8_472], protocol);
        let plain = tuple((here, there), [8_472, 5_000], UDP);
        assert_eq!(read(own(UDP), plain), None);
        let elsewhere = || tuple((other, there), [8_472, 5_000], UDP);
        assert_eq!(read(own(UDP), elsewhere()), Some((there.into(), other.into())));
        let under = tuple((here, other), [8_472, 5_000], UDP);
        assert_eq!(read(own(UDP), under), Some((other.into(), here.into())));
        let other_port = tuple((here, there), [9_000, 5_000], UDP);
        assert!(read(own(UDP), other_port).is_some());
        assert_eq!(read(own(6), tuple((other, there), [8_472, 5_000], 6)), None, "TCP");
        assert_eq!(read(tuple((there, here), [5_000, 53], UDP), elsewhere()), None);
    }
}

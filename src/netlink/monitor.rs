//! Notifications of the kernel about changes of its tables, by any program.
//!
//! A monitor never blocks and stores nothing, because a pod that sets its interface down and up causes ten
//! thousand notifications a second. After an overrun it is unknown what was lost, so the reader must then
//! check everything.

use std::{
    borrow::Cow,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rtnetlink::{
    packet_core::NetlinkPayload,
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use super::{RECEIVE_BUFFER_BYTES, drain, parse_messages};

/// `RTNLGRP_*` (linux/rtnetlink.h): links, neighbors, addresses, routes and rules of both families.
const ALL_GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];
/// The groups of links and addresses.
const INTERFACE_GROUPS: [u32; 3] = [1, 5, 9];
/// `RTM_NEWLINK` (linux/rtnetlink.h).
const NEW_LINK: u16 = 16;
/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `struct ifinfomsg`.
const LINK_HEADER: usize = 16;
/// `IFLA_STATS`, `IFLA_STATS64` and `IFLA_AF_SPEC` (`linux/if_link.h`).
const STATISTICS: [u16; 3] = [7, 23, 26];
/// Receive buffer of the socket in bytes: about 20,000 changes, which exceeds a burst of a busy host.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// A socket that receives notifications about changes in its network namespace.
pub struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Opens a monitor of interfaces, neighbors, addresses, routes and rules.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open() -> io::Result<Self> {
        Self::of(&ALL_GROUPS)
    }

    /// Opens a monitor of interfaces and addresses.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn of_interfaces() -> io::Result<Self> {
        Self::of(&INTERFACE_GROUPS)
    }

    fn of(groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for &group in groups {
            // Groups from 9 on are those of IPv6, which the kernel may lack.
            let joined = socket.add_membership(group);
            if group < 9 {
                joined?;
            }
        }
        // Without CAP_NET_ADMIN the buffer is limited by rmem_max and overruns sooner.
        let _ = socket.set_rx_buf_sz(i32::try_from(SOCKET_BUFFER_BYTES).unwrap_or(i32::MAX));
        socket.set_non_blocking(true)?;
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE_BUFFER_BYTES) })
    }

    /// Passes the pending notifications to `each`, at most as many as [`drain`] reads per call. The socket
    /// stays readable while there are more. Returns whether notifications were lost.
    ///
    /// # Errors
    /// If the socket fails or a datagram is truncated.
    pub fn read(&mut self, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<bool> {
        drain(&self.socket, &mut self.buffer, |bytes| {
            for message in parse_messages(&without_statistics(bytes))? {
                if let NetlinkPayload::InnerMessage(inner) = message.payload {
                    each(inner);
                }
            }
            Ok(())
        })
    }
}

/// Removes counters and sysctls from messages about interfaces. They are two thirds of each message, and no
/// reader needs them. Connecting one pod causes a dozen such messages.
fn without_statistics(bytes: &[u8]) -> Cow<'_, [u8]> {
    let mut rest = bytes;
    let mut kept = Vec::with_capacity(bytes.len());
    while let Some(length) = rest.first_chunk::<4>() {
        let length = u32::from_ne_bytes(*length) as usize;
        let (Some(message), true) = (rest.get(..length), length >= HEADER) else {
            // The parser reports the truncated message.
            return bytes.into();
        };
        let start = kept.len();
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        match message.split_at_checked(HEADER + LINK_HEADER) {
            Some((headers, mut attributes)) if kind == NEW_LINK => {
                kept.extend(headers);
                while let [one, two, three, four, ..] = *attributes {
                    let length = usize::from(u16::from_ne_bytes([one, two])).max(4);
                    let end = length.next_multiple_of(4).min(attributes.len());
                    if !STATISTICS.contains(&u16::from_ne_bytes([three, four])) {
                        kept.extend(&attributes[..end]);
                    }
                    attributes = &attributes[end..];
                }
                let length = ((kept.len() - start) as u32).to_ne_bytes();
                kept[start..start + 4].copy_from_slice(&length);
            }
            _ => kept.extend(message),
        }
        kept.resize(kept.len().next_multiple_of(4), 0);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    kept.into()
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::{
        packet_core::NetlinkMessage,
        packet_route::{
            address::AddressMessage,
            link::{AfSpecInet, AfSpecUnspec, LinkAttribute, LinkMessage, Stats64},
        },
    };

    use super::*;

    fn bytes(message: RouteNetlinkMessage) -> Vec<u8> {
        let mut message = NetlinkMessage::from(message);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn statistics_are_removed_and_everything_else_is_kept() {
        let link = |attributes: &[LinkAttribute]| {
            let mut link = LinkMessage::default();
            link.header.index = 7;
            link.attributes = attributes.to_vec();
            RouteNetlinkMessage::NewLink(link)
        };
        let name = LinkAttribute::IfName("gsm1".to_owned());
        let alias = LinkAttribute::IfAlias("pod web".to_owned());
        let statistics = [
            LinkAttribute::Stats64(Stats64::default()),
            LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![AfSpecInet::DevConf(
                Default::default(),
            )])]),
        ];
        let [counters, sysctls] = statistics;
        let whole = link(&[name.clone(), counters, alias.clone(), sysctls]);
        let address = RouteNetlinkMessage::NewAddress(AddressMessage::default());
        let received = [bytes(whole.clone()), bytes(address.clone()), bytes(whole)].concat();
        let kept = without_statistics(&received);
        assert!(kept.len() * 3 < received.len(), "{} of {}", kept.len(), received.len());
        let read = parse_messages(&kept).expect("whole messages").into_iter();
        let read: Vec<NetlinkPayload<_>> = read.map(|message| message.payload).collect();
        let wanted = [link(&[name.clone(), alias.clone()]), address, link(&[name, alias])];
        assert_eq!(read, wanted.map(NetlinkPayload::InnerMessage));
    }

    #[test]
    fn truncated_messages_are_left_unchanged() {
        let mut received = bytes(RouteNetlinkMessage::NewLink(LinkMessage::default()));
        received.truncate(received.len() - 4);
        assert_eq!(without_statistics(&received), received);
        assert!(parse_messages(&without_statistics(&received)).is_err());
    }

    #[test]
    fn attribute_lengths_never_exceed_their_message() {
        let mut received = bytes(RouteNetlinkMessage::NewLink(LinkMessage::default()));
        for attribute in [[0, 0, 3, 0], [255, 255, 3, 0], [4, 0, 7, 0]] {
            received.extend(attribute);
            let length = (received.len() as u32).to_ne_bytes();
            received[..4].copy_from_slice(&length);
            assert!(without_statistics(&received).len() <= received.len());
        }
    }
}

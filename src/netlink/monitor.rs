//! What the kernel tells about changes of its tables, whoever made them.
//!
//! Never blocks, and keeps nothing: a pod that sets its interface down and up makes the kernel tell of it
//! ten thousand times a second. What was lost in an overrun is not known, so the reader must look at
//! everything then.

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

use super::{RECEIVE_BUFFER, drain, parse_messages};

/// `RTNLGRP_*` of linux/rtnetlink.h: links, neighbours, addresses, routes and rules of both families.
const EVERYTHING: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];
/// Of them, links and addresses.
const INTERFACES: [u32; 3] = [1, 5, 9];
/// `RTM_NEWLINK` of linux/rtnetlink.h, and the lengths of `struct nlmsghdr` and `struct ifinfomsg`.
const NEW_LINK: u16 = 16;
const HEADER: usize = 16;
const LINK_HEADER: usize = 16;
/// `IFLA_STATS`, `IFLA_STATS64` and `IFLA_AF_SPEC` of linux/if_link.h.
const STATISTICS: [u16; 3] = [7, 23, 26];
/// Some 20,000 changes: more than one burst of a busy host.
const SOCKET_BUFFER: usize = 8 << 20;

/// A socket that hears of all changes in its network namespace.
pub struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Hears of interfaces, neighbours, routes and rules.
    pub fn open() -> io::Result<Self> {
        Self::of(&EVERYTHING)
    }

    /// Hears of interfaces and their addresses alone.
    pub fn of_interfaces() -> io::Result<Self> {
        Self::of(&INTERFACES)
    }

    fn of(groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for &group in groups {
            // A kernel without IPv6 has no such group.
            let joined = socket.add_membership(group);
            if group < 9 {
                joined?;
            }
        }
        // Without the privilege to exceed the system's limit it stays smaller, and overruns sooner.
        let _ = socket.set_rx_buf_sz(i32::try_from(SOCKET_BUFFER).unwrap_or(i32::MAX));
        socket.set_non_blocking(true)?;
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// Gives each change that has been told, or as many of them as one turn takes; the socket stays readable
    /// while there are more. Says whether more happened than the socket could hold.
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

/// Messages without counters and sysctls of interfaces: two thirds of what the kernel says of each change,
/// and nothing that a listener asks for. A pod that is connected makes a dozen of these changes.
fn without_statistics(bytes: &[u8]) -> Cow<'_, [u8]> {
    let mut rest = bytes;
    let mut kept = Vec::with_capacity(bytes.len());
    while let Some(length) = rest.first_chunk::<4>() {
        let length = u32::from_ne_bytes(*length) as usize;
        let (Some(message), true) = (rest.get(..length), length >= HEADER) else {
            // The parser names what is wrong.
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
    fn statistics_are_left_out_and_all_else_of_each_message_stays() {
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
        let told = [bytes(whole.clone()), bytes(address.clone()), bytes(whole)].concat();
        let kept = without_statistics(&told);
        assert!(kept.len() * 3 < told.len(), "{} of {}", kept.len(), told.len());
        let read = parse_messages(&kept).expect("whole messages").into_iter();
        let read: Vec<NetlinkPayload<_>> = read.map(|message| message.payload).collect();
        let wanted = [link(&[name.clone(), alias.clone()]), address, link(&[name, alias])];
        assert_eq!(read, wanted.map(NetlinkPayload::InnerMessage));
    }

    #[test]
    fn messages_that_are_cut_off_stay_as_they_are() {
        let mut told = bytes(RouteNetlinkMessage::NewLink(LinkMessage::default()));
        told.truncate(told.len() - 4);
        assert_eq!(without_statistics(&told), told);
        assert!(parse_messages(&without_statistics(&told)).is_err());
    }

    #[test]
    fn attributes_of_any_length_end_with_their_message() {
        let mut told = bytes(RouteNetlinkMessage::NewLink(LinkMessage::default()));
        for attribute in [[0, 0, 3, 0], [255, 255, 3, 0], [4, 0, 7, 0]] {
            told.extend(attribute);
            let length = (told.len() as u32).to_ne_bytes();
            told[..4].copy_from_slice(&length);
            assert!(without_statistics(&told).len() <= told.len());
        }
    }
}

//! Notifications about the forwarding setting of interfaces, changed by any program (`RTM_NEWNETCONF`,
//! linux/netconf.h).
//!
//! The socket never blocks. An overrun loses notifications. A call returns at most as many as [`drain`]
//! reads; the next call returns the rest.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
};

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::{RECEIVE_BUFFER_BYTES, attributes, drain, raw::answers};

/// `RTNLGRP_IPV4_NETCONF`.
const GROUP: u32 = 24;
/// `RTNLGRP_IPV6_NETCONF`. The kernel may lack it.
const GROUP_OF_IPV6: u32 = 25;
/// `NETCONFA_IFINDEX`.
const INDEX: u16 = 1;
/// `NETCONFA_FORWARDING`.
const FORWARDING: u16 = 2;
/// `NETCONFA_IFINDEX_ALL`.
const ALL: i32 = -1;
/// `AF_INET` and `AF_INET6`, with whether it is IPv4.
const FAMILIES: [(u8, bool); 2] = [(2, true), (10, false)];

/// The new forwarding setting of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardingChange {
    /// Whether it is the setting of IPv4.
    pub ipv4: bool,
    /// Index of the interface. `None` for the setting of all interfaces.
    pub link: Option<u32>,
    /// Whether forwarding is on.
    pub forwards: bool,
}

/// A socket that receives changes of forwarding settings.
pub struct ForwardingMonitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl ForwardingMonitor {
    /// Opens the socket.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(GROUP)?;
        let _ = socket.add_membership(GROUP_OF_IPV6);
        socket.set_non_blocking(true)?;
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE_BUFFER_BYTES) })
    }

    /// Returns a descriptor that is readable when there are changes.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns the changes since the last call.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn read(&mut self) -> io::Result<Vec<ForwardingChange>> {
        let mut changes = Vec::new();
        drain(&self.socket, &mut self.buffer, |bytes| {
            changes.extend(
                answers(bytes).filter_map(|answer| parse_change(answer.own[0], &answer.attributes)),
            );
            Ok(())
        })?;
        Ok(changes)
    }
}

fn parse_change(family: u8, bytes: &[u8]) -> Option<ForwardingChange> {
    let number = |kind| Some(i32::from_ne_bytes(attributes::find(bytes, kind)?.try_into().ok()?));
    let (_, ipv4) = FAMILIES.into_iter().find(|(number, _)| *number == family)?;
    let index = number(INDEX)?;
    let link = u32::try_from(index).ok();
    let is_known = index == ALL || link.is_some();
    is_known.then_some(ForwardingChange { ipv4, link, forwards: number(FORWARDING)? != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attributes::Attributes;

    #[test]
    fn forwarding_of_one_and_of_all_interfaces_is_read_but_not_the_default() {
        let received = |index: i32, forwarding: i32| {
            let bytes = Attributes::new().put(INDEX, &index.to_ne_bytes());
            bytes.put(FORWARDING, &forwarding.to_ne_bytes())
        };
        let read = |family, attributes: Attributes| parse_change(family, attributes.as_bytes());
        let one = ForwardingChange { ipv4: true, link: Some(7), forwards: true };
        assert_eq!(read(2, received(7, 1)), Some(one));
        let all = ForwardingChange { ipv4: false, link: None, forwards: false };
        assert_eq!(read(10, received(ALL, 0)), Some(all));
        assert_eq!(read(2, received(-2, 0)), None, "NETCONFA_IFINDEX_DEFAULT");
        assert_eq!(read(7, received(7, 0)), None, "another family");
        assert_eq!(read(2, Attributes::new().put(INDEX, &[7, 0])), None, "cut off");
    }
}

//! What the kernel tells of the forwarding of interfaces, by any program (`RTM_NEWNETCONF`,
//! linux/netconf.h).
//!
//! Never blocks. What was lost in an overrun is missing, and what is more than one turn takes comes with the
//! next.

use std::io;

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::{RECEIVE_BUFFER, attributes, drain, raw::answers};

/// `RTNLGRP_IPV4_NETCONF`, and the same of IPv6, which not every kernel has.
const GROUP: u32 = 24;
const GROUP_OF_IPV6: u32 = 25;
/// `NETCONFA_IFINDEX` and `NETCONFA_FORWARDING`.
const INDEX: u16 = 1;
const FORWARDING: u16 = 2;
/// `NETCONFA_IFINDEX_ALL`
const ALL: i32 = -1;
/// `AF_INET` and `AF_INET6`.
const FAMILIES: [(u8, bool); 2] = [(2, true), (10, false)];

/// The forwarding of an interface, as it is from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switched {
    pub ipv4: bool,
    /// Index of the interface; none, if it is that of all interfaces.
    pub link: Option<u32>,
    pub forwards: bool,
}

/// Hears of forwarding that is switched.
pub struct Switches {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Switches {
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(GROUP)?;
        let _ = socket.add_membership(GROUP_OF_IPV6);
        socket.set_non_blocking(true)?;
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// What has been told since.
    pub fn read(&mut self) -> io::Result<Vec<Switched>> {
        let mut heard = Vec::new();
        drain(&self.socket, &mut self.buffer, |bytes| {
            heard.extend(
                answers(bytes).filter_map(|answer| switched(answer.own[0], &answer.attributes)),
            );
            Ok(())
        })?;
        Ok(heard)
    }
}

fn switched(family: u8, bytes: &[u8]) -> Option<Switched> {
    let number = |kind| Some(i32::from_ne_bytes(attributes::find(bytes, kind)?.try_into().ok()?));
    let (_, ipv4) = FAMILIES.into_iter().find(|(number, _)| *number == family)?;
    let index = number(INDEX)?;
    let link = u32::try_from(index).ok();
    let is_known = index == ALL || link.is_some();
    is_known.then_some(Switched { ipv4, link, forwards: number(FORWARDING)? != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attributes::Attributes;

    #[test]
    fn forwarding_of_one_and_of_all_interfaces_is_read_and_that_of_new_ones_is_not() {
        let told = |index: i32, forwarding: i32| {
            let bytes = Attributes::new().put(INDEX, &index.to_ne_bytes());
            bytes.put(FORWARDING, &forwarding.to_ne_bytes())
        };
        let read = |family, attributes: Attributes| switched(family, attributes.as_bytes());
        let one = Switched { ipv4: true, link: Some(7), forwards: true };
        assert_eq!(read(2, told(7, 1)), Some(one));
        let all = Switched { ipv4: false, link: None, forwards: false };
        assert_eq!(read(10, told(ALL, 0)), Some(all));
        assert_eq!(read(2, told(-2, 0)), None, "NETCONFA_IFINDEX_DEFAULT");
        assert_eq!(read(7, told(7, 0)), None, "another family");
        assert_eq!(read(2, Attributes::new().put(INDEX, &[7, 0])), None, "cut off");
    }
}

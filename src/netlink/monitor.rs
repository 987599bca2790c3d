//! What the kernel tells about changes of its tables, whoever made them.
//!
//! Never blocks. What was lost in an overrun is not known, so the reader must look at everything then.

use std::{
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
/// Some 20,000 changes: more than one burst of a busy host.
const SOCKET_BUFFER: usize = 8 << 20;

/// A socket that hears of all changes in its network namespace.
pub struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

/// What was waiting.
#[derive(Debug, Default)]
pub struct Heard {
    pub messages: Vec<RouteNetlinkMessage>,
    /// More happened than the socket could hold.
    pub overrun: bool,
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

    /// Takes everything that has come.
    pub fn read(&mut self) -> io::Result<Heard> {
        let mut heard = Heard::default();
        heard.overrun = drain(&self.socket, &mut self.buffer, |bytes| {
            for message in parse_messages(bytes)? {
                if let NetlinkPayload::InnerMessage(inner) = message.payload {
                    heard.messages.push(inner);
                }
            }
            Ok(())
        })?;
        Ok(heard)
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

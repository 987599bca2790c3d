//! Notifications about tables: changes, and the processing of traced packets.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::{INET, RECEIVE_BUFFER_BYTES, nfta};
use crate::netlink::{
    attributes, drain,
    raw::{Answer, answers},
};

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// `NFNLGRP_NFTRACE`.
const TRACE_GROUP: u32 = 9;

/// A socket that receives notifications about changes of tables.
pub struct Changes {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Changes {
    /// Opens the socket.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open() -> io::Result<Self> {
        Self::open_group(GROUP)
    }

    fn open_group(group: u32) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(group)?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE_BUFFER_BYTES) })
    }

    /// Returns whether any table has changed since the last call. True after an overrun.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn any(&mut self) -> io::Result<bool> {
        let mut any = false;
        let overrun = drain(&self.socket, &mut self.buffer, |_| {
            any = true;
            Ok(())
        })?;
        Ok(any || overrun)
    }

    /// Returns whether this `inet` table has changed since the last call. True after an overrun.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn touched(&mut self, table: &str) -> io::Result<bool> {
        self.touched_in(&[(INET, table.to_owned())], None)
    }

    /// Like [`Self::touched`], for tables by family and name. Ignores changes made by the socket with the
    /// port id `but_for`.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn touched_in(
        &mut self,
        tables: &[(u8, String)],
        but_for: Option<u32>,
    ) -> io::Result<bool> {
        let mut touched = false;
        // In every kind of object the first attribute is the name of the table.
        let of_table = |answer: Answer| {
            let name = attributes::find(&answer.attributes, nfta::TABLE_NAME).map(attributes::text);
            let is_it = |(family, table): &(u8, String)| {
                answer.own[0] == *family && name == Some(table.as_str())
            };
            Some(answer.port) != but_for && tables.iter().any(is_it)
        };
        let overrun = drain(&self.socket, &mut self.buffer, |bytes| {
            touched |= answers(bytes).any(of_table);
            Ok(())
        })?;
        Ok(touched || overrun)
    }
}

/// A socket that receives what rules do with traced packets.
pub struct Traces(Changes);

impl Traces {
    /// Opens the socket.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open() -> io::Result<Self> {
        Changes::open_group(TRACE_GROUP).map(Self)
    }

    /// Passes the pending notifications to `each`: the family of the rules, and the `NFTA_TRACE_*`
    /// attributes.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn read(&mut self, mut each: impl FnMut(u8, &[u8])) -> io::Result<()> {
        let Changes { socket, buffer } = &mut self.0;
        drain(socket, buffer, |bytes| {
            answers(bytes).for_each(|answer| each(answer.own[0], &answer.attributes));
            Ok(())
        })?;
        Ok(())
    }
}

impl AsFd for Traces {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

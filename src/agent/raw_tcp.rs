//! Sockets by which segments of TCP are sent and seen as they are, whatever the kernel makes of them.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::dataplane::forwarding::parse;

/// Sends from an address, and is shown each segment that comes to it. Takes CAP_NET_RAW.
pub(super) fn open(address: IpAddr) -> io::Result<Socket> {
    let at = SocketAddr::new(address, 0);
    let socket = Socket::new(Domain::for_address(at), Type::RAW, Some(Protocol::TCP))?;
    socket.bind(&at.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The segment in what such a socket with this address has received: with IPv4 it comes with the header
/// before it.
pub(super) fn segment(address: IpAddr, received: &[u8]) -> Option<&[u8]> {
    match address {
        IpAddr::V4(_) => parse(received).map(|(.., segment)| segment),
        IpAddr::V6(_) => Some(received),
    }
}

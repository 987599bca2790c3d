//! Raw sockets that send and receive TCP segments independently of the kernel's TCP state.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::dataplane::forwarding::parse;

/// Opens a nonblocking raw TCP socket bound to `address`. It sends from that address and receives a copy
/// of each segment sent to it. Needs `CAP_NET_RAW`.
pub(in crate::agent) fn open(address: IpAddr) -> io::Result<Socket> {
    let at = SocketAddr::new(address, 0);
    let socket = Socket::new(Domain::for_address(at), Type::RAW, Some(Protocol::TCP))?;
    socket.bind(&at.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Returns the TCP segment in data received on a socket of [`open`] with this address. IPv4 raw sockets
/// deliver the IP header as well; IPv6 ones do not.
pub(super) fn segment(address: IpAddr, received: &[u8]) -> Option<&[u8]> {
    match address {
        IpAddr::V4(_) => parse(received).map(|(.., segment)| segment),
        IpAddr::V6(_) => Some(received),
    }
}

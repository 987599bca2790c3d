//! The UDP socket: buffers that a flood does not fill, and a limit for answers to non-members.

use std::{
    fmt,
    fs::{self, File},
    io::{self, BufRead, BufReader, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::{
    AsyncUdpSocket, Runtime as _, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::admission::SharedAdmissions;

/// What waits to be sent. Answers to addresses of the own network that no host has wait in it for ARP or ND,
/// and must not take the room of members' packets.
const SEND_BUFFER: usize = 16 << 20;
/// What waits to be read: a second of a flood in which the process does not run.
const RECEIVE_BUFFER: usize = 8 << 20;

/// A UDP socket for an address that the host may not have yet: it can come with the network.
fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    match address {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    // Beyond the host's limit only with CAP_NET_ADMIN: a program without it gets as much as it may have.
    if setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER).is_err() {
        socket.set_send_buffer_size(SEND_BUFFER)?;
    }
    if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// How much of what comes finds room.
#[derive(Clone, Copy, Debug)]
pub struct ReceiveBuffer {
    /// Of the socket; none, if the kernel did not tell.
    inode: Option<u64>,
    is_ipv4: bool,
    /// The host's limit has made it smaller than it should be, in bytes.
    pub capped: Option<usize>,
}

impl ReceiveBuffer {
    fn of(socket: &UdpSocket, address: SocketAddr) -> Self {
        // The kernel counts its own share too, and gives room for that (socket(7), SO_RCVBUF).
        let size = getsockopt(socket, sockopt::RcvBuf).map_or(RECEIVE_BUFFER, |size| size / 2);
        let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd()));
        let text = link.ok().and_then(|link| link.into_os_string().into_string().ok());
        let inode =
            text.and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let capped = (size < RECEIVE_BUFFER).then_some(size);
        Self { inode, is_ipv4: address.is_ipv4(), capped }
    }

    pub const fn wanted() -> usize {
        RECEIVE_BUFFER
    }

    /// Packets that found no room since the socket was made; none, where that is not known.
    pub fn dropped(&self) -> Option<u64> {
        let table = if self.is_ipv4 { "/proc/self/net/udp" } else { "/proc/self/net/udp6" };
        dropped(BufReader::new(File::open(table).ok()?), self.inode?)
    }
}

/// By the kernel's table of UDP sockets (proc(5)): the tenth word is the inode, the last one the count.
fn dropped(table: impl BufRead, inode: u64) -> Option<u64> {
    let inode = inode.to_string();
    table.lines().map_while(Result::ok).find_map(|line| {
        let mut words = line.split_whitespace();
        let is_its = words.nth(9) == Some(&inode);
        words.last().filter(|_| is_its)?.parse().ok()
    })
}

/// QUIC's socket. Packets that admission does not let go are lost, as on a network.
pub(super) struct LimitedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    admissions: SharedAdmissions,
}

impl LimitedSocket {
    /// Must be called within a tokio runtime.
    pub(super) fn bind(
        address: SocketAddr,
        admissions: SharedAdmissions,
    ) -> io::Result<(Self, ReceiveBuffer)> {
        let socket = bind(address)?;
        let buffer = ReceiveBuffer::of(&socket, address);
        let inner = quinn::TokioRuntime.wrap_udp_socket(socket)?;
        Ok((Self { inner, admissions }, buffer))
    }
}

impl fmt::Debug for LimitedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl AsyncUdpSocket for LimitedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let to = transmit.destination.ip();
        match self.admissions.lock().may_send(Instant::now(), to) {
            true => self.inner.try_send(transmit),
            false => Ok(()),
        }
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(context, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_without_room_in_the_socket_are_counted() {
        let socket = bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
        let address = socket.local_addr().expect("an address");
        let buffer = ReceiveBuffer::of(&socket, address);
        assert_eq!(buffer.dropped(), Some(0));
        setsockopt(&socket, sockopt::RcvBuf, &1).expect("a small buffer");
        let sender = UdpSocket::bind("127.0.0.1:0").expect("bound");
        for _ in 0..100 {
            sender.send_to(&[0; 1_000], address).expect("sent");
        }
        assert!(buffer.dropped().is_some_and(|dropped| dropped > 50), "{:?}", buffer.dropped());
    }
}

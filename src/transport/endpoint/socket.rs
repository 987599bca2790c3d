//! The UDP socket, with buffers that survive a flood and a limit for answers to non-members.

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

/// Bytes of the send buffer. Answers to unused addresses of the local network wait in it for ARP or
/// ND, and must leave room for members' packets.
const SEND_BUFFER_BYTES: usize = 16 << 20;
/// Bytes of the receive buffer: it holds a flood of one second in which the process does not run.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;

/// Opens a UDP socket. The host may not have the address yet, because the network may come up
/// later.
fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    match address {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    // The limit of the host can be exceeded only with `CAP_NET_ADMIN`; without it, the buffer is as
    // large as permitted.
    if setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER_BYTES).is_err() {
        socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    }
    if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES).is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// The receive buffer of the socket.
#[derive(Clone, Copy, Debug)]
pub struct ReceiveBuffer {
    /// Inode of the socket; `None` if the kernel does not report it.
    inode: Option<u64>,
    is_ipv4: bool,
    /// The size in bytes, if the host's limit made it smaller than [`ReceiveBuffer::wanted`].
    pub capped: Option<usize>,
}

impl ReceiveBuffer {
    /// Reads the state of the socket's receive buffer.
    fn of(socket: &UdpSocket, address: SocketAddr) -> Self {
        // The kernel doubles the size for its own overhead (socket(7), `SO_RCVBUF`).
        let size =
            getsockopt(socket, sockopt::RcvBuf).map_or(RECEIVE_BUFFER_BYTES, |size| size / 2);
        let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd()));
        let text = link.ok().and_then(|link| link.into_os_string().into_string().ok());
        let inode =
            text.and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let capped = (size < RECEIVE_BUFFER_BYTES).then_some(size);
        Self { inode, is_ipv4: address.is_ipv4(), capped }
    }

    /// Returns the intended size in bytes.
    pub const fn wanted() -> usize {
        RECEIVE_BUFFER_BYTES
    }

    /// Returns the number of packets that did not fit into the receive buffer since the socket was opened;
    /// `None` if unknown.
    pub fn dropped(&self) -> Option<u64> {
        let table = if self.is_ipv4 { "/proc/self/net/udp" } else { "/proc/self/net/udp6" };
        dropped(BufReader::new(File::open(table).ok()?), self.inode?)
    }
}

/// Reads the counter from the kernel's table of UDP sockets (proc(5)): the tenth word is the inode,
/// the last one the counter.
fn dropped(table: impl BufRead, inode: u64) -> Option<u64> {
    let inode = inode.to_string();
    table.lines().map_while(Result::ok).find_map(|line| {
        let mut words = line.split_whitespace();
        let is_its = words.nth(9) == Some(&inode);
        words.last().filter(|_| is_its)?.parse().ok()
    })
}

/// QUIC's socket. Packets that admission rejects are dropped silently, like packets lost on the
/// network.
pub(super) struct LimitedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    admissions: SharedAdmissions,
}

impl LimitedSocket {
    /// Opens the socket. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the socket cannot be opened.
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
    fn packets_beyond_the_receive_buffer_are_counted() {
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

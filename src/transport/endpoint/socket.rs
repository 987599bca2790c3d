//! The UDP socket: buffers that a flood does not fill, and a limit for answers to strangers.

use std::{
    fmt, io,
    io::IoSliceMut,
    net::{SocketAddr, UdpSocket},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use nix::sys::socket::{setsockopt, sockopt};
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

/// QUIC's socket. Packets that admission does not let go are lost, as on a network.
pub(super) struct LimitedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    admissions: SharedAdmissions,
}

impl LimitedSocket {
    /// Must be called within a tokio runtime.
    pub(super) fn bind(address: SocketAddr, admissions: SharedAdmissions) -> io::Result<Self> {
        let inner = quinn::TokioRuntime.wrap_udp_socket(bind(address)?)?;
        Ok(Self { inner, admissions })
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

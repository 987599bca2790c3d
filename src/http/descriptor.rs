//! Passes a file descriptor with a request over the control socket (unix(7), `SCM_RIGHTS`).
//!
//! A runtime's plugin may open network namespaces that the agent, with fewer capabilities, may not. A
//! connection holds at most one descriptor: a later one replaces an earlier one.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use axum::serve::Listener;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{UnixListener, UnixStream},
};

/// The descriptor that a connection has received, until it is taken.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReceivedDescriptor(Arc<Mutex<Option<OwnedFd>>>);

impl ReceivedDescriptor {
    pub(crate) fn take(&self) -> Option<OwnedFd> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn put(&self, descriptor: OwnedFd) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(descriptor);
    }
}

/// A connection that receives descriptors, and may send one with its first bytes.
#[derive(Debug)]
pub(crate) struct Carrier {
    stream: UnixStream,
    sending: Option<OwnedFd>,
    received: ReceivedDescriptor,
}

impl Carrier {
    pub(crate) fn new(stream: UnixStream, sending: Option<OwnedFd>) -> Self {
        Self { stream, sending, received: ReceivedDescriptor::default() }
    }

    /// Returns where received descriptors are put.
    pub(crate) fn received(&self) -> ReceivedDescriptor {
        self.received.clone()
    }

    fn receive(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut places = [IoSliceMut::new(bytes)];
        let read = recvmsg(&self.stream, &mut places, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                descriptors.for_each(|descriptor| self.received.put(descriptor));
            }
        }
        Ok(read.bytes)
    }

    fn send(&self, descriptor: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let places = [IoSlice::new(bytes)];
        Ok(sendmsg(&self.stream, &places, &mut control, SendFlags::NOSIGNAL)?)
    }
}

impl AsyncRead for Carrier {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let bytes = buffer.initialize_unfilled();
            match self.stream.try_io(Interest::READABLE, || self.receive(bytes)) {
                Ok(count) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Carrier {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        while let Some(descriptor) = &self.sending {
            ready!(self.stream.poll_write_ready(cx))?;
            let send = || self.send(descriptor.as_fd(), bytes);
            match self.stream.try_io(Interest::WRITABLE, send) {
                Ok(count) => {
                    self.sending = None;
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A listener whose connections receive descriptors.
pub(crate) struct CarrierListener(pub(crate) UnixListener);

impl Listener for CarrierListener {
    type Io = Carrier;
    type Addr = ();

    async fn accept(&mut self) -> (Carrier, ()) {
        let (stream, _) = Listener::accept(&mut self.0).await;
        (Carrier::new(stream, None), ())
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::MetadataExt as _};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::runtime::block_on;

    #[test]
    fn descriptor_sent_with_first_bytes_refers_to_same_file() {
        let file = File::open("/proc/self/ns/net").expect("a namespace");
        let inode = file.metadata().expect("metadata").ino();
        let arrived = block_on(async {
            let (near, far) = UnixStream::pair().expect("a pair");
            let mut sender = Carrier::new(near, Some(file.into()));
            let mut receiver = Carrier::new(far, None);
            sender.write_all(b"one").await.expect("written");
            sender.write_all(b"two").await.expect("written");
            let mut bytes = [0; 6];
            receiver.read_exact(&mut bytes).await.expect("read");
            assert_eq!(&bytes, b"onetwo");
            (receiver.received.take(), receiver.received.take())
        });
        let (Some(first), None) = arrived.expect("a runtime") else { panic!("not one descriptor") };
        assert_eq!(File::from(first).metadata().expect("metadata").ino(), inode);
    }
}

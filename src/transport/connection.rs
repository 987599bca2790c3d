//! Tasks that read a connection, and operations on it.

use std::{net::SocketAddr, time::Duration};

use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;

use super::intake::{Intake, Message, NodeIntake};
use crate::{
    model::{CallError, CallId, InquiryId, NodeId, ReplyId},
    wire::visible,
};

/// Time after which a call without a response fails.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Time within which a peer must finish a message or request that it has started.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// What happened on the network. The owning loop passes each event to [`super::Transport::handle`].
#[derive(Debug)]
pub enum Event {
    /// A connection was established.
    Connected {
        /// The other node.
        peer: NodeId,
        /// The connection.
        connection: Connection,
        /// Whether the peer opened it.
        inbound: bool,
    },
    /// A connection has ended.
    Closed {
        /// The other node.
        peer: NodeId,
        /// Quinn's id of the connection.
        stable_id: usize,
    },
    /// This node could not connect to a peer.
    DialFailed {
        /// The peer.
        peer: NodeId,
        /// The reason.
        error: CallError,
    },
    /// A frame arrived.
    Message {
        /// The sender.
        from: NodeId,
        /// The frame.
        message: Message,
    },
    /// A request arrived.
    Request {
        /// The sender.
        from: NodeId,
        /// The request.
        message: Message,
        /// The stream for the response.
        stream: SendStream,
    },
    /// A call has ended.
    Answer {
        /// The call.
        call: Call,
        /// The response and its sender, or why there is none.
        result: Result<(NodeId, Message), CallError>,
    },
}

/// A call, by the part of the program that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// A request of the core.
    Node(CallId),
    /// An inquiry of the agent.
    Inquiry(InquiryId),
}

/// What has arrived from a peer, whose certificate proves its id.
#[derive(Clone, Debug)]
pub enum Received {
    /// A frame that needs no response.
    Message {
        /// The sender.
        from: NodeId,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// A request; its response goes to [`super::Transport::reply`].
    Request {
        /// The sender.
        from: NodeId,
        /// Identifies the response.
        reply: ReplyId,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// A call has ended. Each call ends exactly once.
    Answer {
        /// The call.
        call: Call,
        /// The node that responded and its frame, or why there is none.
        result: Result<(NodeId, Vec<u8>), CallError>,
    },
}

/// Sender of the queue to the owning loop.
pub(super) type Events = mpsc::Sender<Event>;

/// Reads all datagrams and streams of a connection until it ends.
pub(super) async fn read(peer: NodeId, connection: Connection, intake: Intake, events: Events) {
    let intake = intake.of_node(peer);
    loop {
        tokio::select! {
            datagram = connection.read_datagram() => match datagram {
                // Datagrams may be lost anyway, so a full queue drops them.
                Ok(bytes) => {
                    let message = Message::datagram(bytes.into());
                    let _ = events.try_send(Event::Message { from: peer, message });
                }
                Err(_) => break,
            },
            stream = connection.accept_uni() => match stream {
                Ok(stream) => {
                    tokio::spawn(read_message(peer, stream, intake.clone(), events.clone()));
                }
                Err(_) => break,
            },
            streams = connection.accept_bi() => match streams {
                Ok((send, recv)) => {
                    let streams = (send, recv);
                    tokio::spawn(read_request(peer, streams, intake.clone(), events.clone()));
                }
                Err(_) => break,
            },
        }
    }
    tracing::trace!(%peer, reason = ?connection.close_reason(), "connection ended");
    let _ = events.send(Event::Closed { peer, stable_id: connection.stable_id() }).await;
}

/// Sends a frame on a connection.
pub(super) fn send_on(connection: &Connection, bytes: Vec<u8>, reliably: bool) {
    if !reliably && connection.max_datagram_size().is_some_and(|max| bytes.len() <= max) {
        if let Err(error) = connection.send_datagram(bytes.into()) {
            tracing::debug!(%error, "frame lost");
        }
    } else {
        tokio::spawn(send_stream(connection.clone(), bytes));
    }
}

/// Sends a frame that is too large for a datagram, and waits until the peer has received it.
async fn send_stream(connection: Connection, bytes: Vec<u8>) {
    let sent = async {
        let mut stream = connection.open_uni().await?;
        stream.write_all(&bytes).await?;
        stream.finish()?;
        stream.stopped().await?;
        anyhow::Ok(())
    };
    match tokio::time::timeout(CALL_TIMEOUT, sent).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(error = visible(&error.to_string()), "frame lost"),
        Err(_) => tracing::debug!("frame lost: the peer did not read it in time"),
    }
}

/// Sends a request on a new stream and reads the response.
pub(super) async fn request(
    peer: NodeId,
    connection: &Connection,
    intake: &Intake,
    bytes: &[u8],
) -> Result<(NodeId, Message), CallError> {
    let response = async {
        let (mut send, mut recv) = connection.open_bi().await?;
        send.write_all(bytes).await?;
        send.finish()?;
        anyhow::Ok(intake.of_node(peer).read(&mut recv).await?)
    };
    let received = || connection.stats().udp_rx.datagrams;
    let before = received();
    let response = tokio::time::timeout(CALL_TIMEOUT, response).await;
    if response.is_err() && received() == before {
        // The peer has not even acknowledged packets, so it is gone or has another address.
        connection.close(VarInt::from_u32(2), b"silent");
    }
    match response {
        Ok(Ok(message)) => Ok((peer, message)),
        // The connection's reason is more specific than the stream's error.
        Ok(Err(error)) => Err(connection.close_reason().map_or_else(
            || CallError::Unreachable(visible(&error.to_string())),
            |reason| call_error(&reason, connection.remote_address()),
        )),
        Err(_) => Err(CallError::Unreachable(format!("no answer within {CALL_TIMEOUT:?}"))),
    }
}

/// Converts a connection error; distinguishes a refused certificate from an unreachable peer.
pub(super) fn call_error(error: &ConnectionError, address: SocketAddr) -> CallError {
    // RFC 9001, 4.8: TLS alerts are transport errors 0x100 to 0x1ff.
    let alert = match error {
        ConnectionError::TransportError(error) => Some(u64::from(error.code)),
        ConnectionError::ConnectionClosed(close) => Some(u64::from(close.error_code)),
        _ => None,
    };
    const NO_APPLICATION_PROTOCOL: u64 = 0x178;
    match alert {
        Some(NO_APPLICATION_PROTOCOL) => CallError::Rejected(format!(
            "{address} speaks another version of the protocol: upgrade the older node"
        )),
        Some(0x100..=0x1ff) => CallError::OtherSecret(address),
        // A close reason is text of the peer.
        _ => CallError::Unreachable(visible(&format!("{address}: {error}"))),
    }
}

/// Reads a one-way stream.
async fn read_message(from: NodeId, mut stream: RecvStream, intake: NodeIntake, events: Events) {
    match tokio::time::timeout(READ_TIMEOUT, intake.read(&mut stream)).await {
        Ok(Ok(message)) => _ = events.send(Event::Message { from, message }).await,
        Ok(Err(error)) => tracing::debug!(%from, error = visible(&error.to_string()), "frame lost"),
        Err(_) => tracing::debug!(%from, "frame lost: the peer did not finish it in time"),
    }
}

/// Reads the request of a two-way stream.
async fn read_request(
    from: NodeId,
    (stream, mut recv): (SendStream, RecvStream),
    intake: NodeIntake,
    events: Events,
) {
    match tokio::time::timeout(READ_TIMEOUT, intake.read(&mut recv)).await {
        Ok(Ok(message)) => _ = events.send(Event::Request { from, message, stream }).await,
        Ok(Err(error)) => {
            tracing::debug!(%from, error = visible(&error.to_string()), "request lost");
        }
        Err(_) => tracing::debug!(%from, "request lost: the peer did not finish it in time"),
    }
}

//! One connection's reader, and the few operations on a connection.

use std::{net::SocketAddr, time::Duration};

use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;

use super::intake::{Intake, Message, NodeIntake};
use crate::{
    core::{CallError, CallId},
    model::NodeId,
    wire::visible,
};

/// A call that got no answer in this time gets none.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that opens a stream must say what it wants within this time.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// What happened on the network. Passed to [`super::Transport::handle`] by the loop that owns it.
#[derive(Debug)]
pub enum Event {
    Connected { peer: NodeId, connection: Connection, inbound: bool },
    Closed { peer: NodeId, stable_id: usize },
    DialFailed { peer: NodeId, error: CallError },
    Message { from: NodeId, message: Message },
    Request { from: NodeId, message: Message, stream: SendStream },
    Answer { call: CallId, result: Result<(NodeId, Message), CallError> },
}

pub(super) type Events = mpsc::Sender<Event>;

/// Reads everything that comes in on a connection until it ends.
pub(super) async fn read(peer: NodeId, connection: Connection, intake: Intake, events: Events) {
    let intake = intake.of_node(peer);
    loop {
        tokio::select! {
            datagram = connection.read_datagram() => match datagram {
                // Lossy by nature: a busy loop sheds them rather than fall behind.
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

/// Sends a frame that is too large for a datagram.
pub(super) async fn send_stream(connection: Connection, bytes: Vec<u8>) {
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
        Err(_) => tracing::debug!("frame lost: the peer does not read"),
    }
}

/// Asks on a new stream and reads the answer.
pub(super) async fn ask(
    peer: NodeId,
    connection: &Connection,
    intake: &Intake,
    bytes: &[u8],
) -> Result<(NodeId, Message), CallError> {
    let answer = async {
        let (mut send, mut recv) = connection.open_bi().await?;
        send.write_all(bytes).await?;
        send.finish()?;
        anyhow::Ok(intake.of_node(peer).read(&mut recv).await?)
    };
    let received = || connection.stats().udp_rx.datagrams;
    let before = received();
    let answer = tokio::time::timeout(CALL_TIMEOUT, answer).await;
    if answer.is_err() && received() == before {
        // Not even an acknowledgement: whoever was there has gone, or moved.
        connection.close(VarInt::from_u32(2), b"silent");
    }
    match answer {
        Ok(Ok(message)) => Ok((peer, message)),
        // The connection knows best why its streams failed.
        Ok(Err(error)) => Err(connection.close_reason().map_or_else(
            || CallError::Unreachable(visible(&error.to_string())),
            |reason| call_error(&reason, connection.remote_address()),
        )),
        Err(_) => Err(CallError::Unreachable(format!("no answer within {CALL_TIMEOUT:?}"))),
    }
}

/// Tells a refused certificate from a peer that is not there.
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
        Some(0x100..=0x1ff) => CallError::Rejected(format!(
            "{address} has a certificate of another secret: use the token of its cluster"
        )),
        // A reason to close is the peer's own text.
        _ => CallError::Unreachable(visible(&format!("{address}: {error}"))),
    }
}

async fn read_message(from: NodeId, mut stream: RecvStream, intake: NodeIntake, events: Events) {
    match tokio::time::timeout(READ_TIMEOUT, intake.read(&mut stream)).await {
        Ok(Ok(message)) => _ = events.send(Event::Message { from, message }).await,
        Ok(Err(error)) => tracing::debug!(%from, error = visible(&error.to_string()), "frame lost"),
        Err(_) => tracing::debug!(%from, "frame lost: the peer does not finish it"),
    }
}

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
        Err(_) => tracing::debug!(%from, "request lost: the peer does not finish it"),
    }
}

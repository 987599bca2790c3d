//! The task that accepts connections.

use std::{collections::BTreeMap, future::IntoFuture as _, time::Instant};

use quinn::{Connection, Endpoint, Incoming, VarInt};
use tokio::sync::oneshot;

use super::{
    DIAL_TIMEOUT, Event, Events,
    admission::{
        Admission, Budget, FirstPacket, HandshakePlace, MAX_PLACES, NON_MEMBERS_TIMEOUT,
        NewHandshake, SharedAdmissions,
    },
    read,
};
use crate::transport::{credentials::peer_of, intake::Intake};

/// Accepts connections while the endpoint exists.
pub(super) async fn accept(
    endpoint: Endpoint,
    admissions: SharedAdmissions,
    intake: Intake,
    events: Events,
) {
    // Handshakes in progress. Dropping a sender ends the handshake in favor of a newer one.
    let mut in_progress: BTreeMap<u64, oneshot::Sender<()>> = BTreeMap::new();
    while let Some(incoming) = endpoint.accept().await {
        let first = FirstPacket {
            from: incoming.remote_address().ip(),
            id: incoming.orig_dst_cid(),
            is_proven: incoming.remote_address_validated(),
        };
        let admission = admissions.lock().decide(Instant::now(), first);
        match admission {
            Admission::Begin(NewHandshake { number, budget, instead_of }) => {
                let place = admissions.place(number);
                let (keep, displaced_signal) = oneshot::channel();
                let shake = handshake(incoming, budget, displaced_signal, place);
                tokio::spawn(serve(shake, intake.clone(), events.clone()));
                if let Some(displaced) = instead_of {
                    in_progress.remove(&displaced);
                }
                in_progress.insert(number, keep);
                if in_progress.len() > 2 * MAX_PLACES {
                    in_progress.retain(|_, keep| !keep.is_closed());
                }
            }
            // A Retry fails only if the address is already proven.
            Admission::Retry => _ = incoming.retry(),
            Admission::Refuse => incoming.refuse(),
            Admission::Ignore => incoming.ignore(),
        }
    }
}

/// Completes a handshake. Returns `None` if it fails, exceeds its time limit, or is displaced by
/// another one.
async fn handshake(
    incoming: Incoming,
    budget: Budget,
    displaced_signal: oneshot::Receiver<()>,
    _place: HandshakePlace,
) -> Option<Connection> {
    let address = incoming.remote_address();
    let limit = if budget == Budget::NonMember { NON_MEMBERS_TIMEOUT } else { DIAL_TIMEOUT };
    tokio::select! {
        finished = tokio::time::timeout(limit, incoming.into_future()) => match finished {
            Ok(Ok(connection)) => return Some(connection),
            Ok(Err(error)) => tracing::debug!(%address, %error, "handshake failed"),
            Err(_) => tracing::debug!(%address, "handshake not finished in time"),
        },
        _ = displaced_signal => tracing::debug!(%address, "handshake displaced by a newer one"),
    }
    None
}

/// Reads a connection after its handshake.
async fn serve(
    handshake: impl Future<Output = Option<Connection>>,
    intake: Intake,
    events: Events,
) {
    let Some(connection) = handshake.await else { return };
    let Some(peer) = peer_of(&connection) else {
        return connection.close(VarInt::from_u32(2), b"unreadable certificate");
    };
    let event = Event::Connected { peer, connection: connection.clone(), inbound: true };
    let _ = events.send(event).await;
    read(peer, connection, intake, events).await;
}

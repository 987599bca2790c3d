//! The task that accepts connections.

use std::{collections::BTreeMap, future::IntoFuture as _, time::Instant};

use quinn::{Connection, Endpoint, Incoming, VarInt};
use tokio::sync::oneshot;

use super::{
    DIAL_TIMEOUT, Event, Events,
    admission::{
        Admission, Begun, Budget, First, MAX_PLACES, Place, STRANGERS_TIMEOUT, SharedAdmissions,
    },
    read,
};
use crate::transport::{credentials::peer_of, intake::Intake};

/// Accepts connections for as long as the endpoint lives.
pub(super) async fn accept(
    endpoint: Endpoint,
    admissions: SharedAdmissions,
    intake: Intake,
    events: Events,
) {
    // Handshakes under way. One has to end for a newer one when its sender is dropped.
    let mut under_way: BTreeMap<u64, oneshot::Sender<()>> = BTreeMap::new();
    while let Some(incoming) = endpoint.accept().await {
        let first = First {
            from: incoming.remote_address().ip(),
            id: incoming.orig_dst_cid(),
            is_proven: incoming.remote_address_validated(),
        };
        let admission = admissions.lock().judge(Instant::now(), first);
        match admission {
            Admission::Begin(Begun { number, budget, instead_of }) => {
                let place = admissions.place(number);
                let (stays, ends) = oneshot::channel();
                let shake = handshake(incoming, budget, ends, place);
                tokio::spawn(serve(shake, intake.clone(), events.clone()));
                if let Some(displaced) = instead_of {
                    under_way.remove(&displaced);
                }
                under_way.insert(number, stays);
                if under_way.len() > 2 * MAX_PLACES {
                    under_way.retain(|_, stays| !stays.is_closed());
                }
            }
            // It fails only where the address is proven already.
            Admission::Retry => _ = incoming.retry(),
            Admission::Refuse => incoming.refuse(),
            Admission::Ignore => incoming.ignore(),
        }
    }
}

/// None if it has failed, was not finished in time, or had to end for another one.
async fn handshake(
    incoming: Incoming,
    budget: Budget,
    ends: oneshot::Receiver<()>,
    _place: Place,
) -> Option<Connection> {
    let address = incoming.remote_address();
    let limit = if budget == Budget::Stranger { STRANGERS_TIMEOUT } else { DIAL_TIMEOUT };
    tokio::select! {
        finished = tokio::time::timeout(limit, incoming.into_future()) => match finished {
            Ok(Ok(connection)) => return Some(connection),
            Ok(Err(error)) => tracing::debug!(%address, %error, "handshake failed"),
            Err(_) => tracing::debug!(%address, "handshake not finished in time"),
        },
        _ = ends => tracing::debug!(%address, "handshake ended for a newer one"),
    }
    None
}

/// Reads what comes in on a connection, once there is one.
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

//! The task that accepts connections.

use std::{future::IntoFuture as _, time::Instant};

use quinn::{Endpoint, Incoming, VarInt};

use super::{
    DIAL_TIMEOUT, Event, Events,
    admission::{Admission, Place, SharedAdmissions},
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
    while let Some(incoming) = endpoint.accept().await {
        let from = incoming.remote_address().ip();
        let is_proven = incoming.remote_address_validated();
        let admission = admissions.lock().judge(Instant::now(), from, is_proven);
        match admission {
            Admission::Begin(budget) => {
                let place = admissions.place(budget, from);
                tokio::spawn(handshake(incoming, place, intake.clone(), events.clone()));
            }
            // It fails only where the address is proven already.
            Admission::Retry => _ = incoming.retry(),
            Admission::Refuse => incoming.refuse(),
        }
    }
}

async fn handshake(incoming: Incoming, place: Place, intake: Intake, events: Events) {
    let address = incoming.remote_address();
    let connection = match tokio::time::timeout(DIAL_TIMEOUT, incoming.into_future()).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(%address, %error, "handshake failed"),
        Err(_) => return tracing::debug!(%address, "handshake not finished in time"),
    };
    drop(place);
    let Some(peer) = peer_of(&connection) else {
        return connection.close(VarInt::from_u32(2), b"unreadable certificate");
    };
    let event = Event::Connected { peer, connection: connection.clone(), inbound: true };
    let _ = events.send(event).await;
    read(peer, connection, intake, events).await;
}

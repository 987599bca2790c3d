//! Dials addresses.

use std::{net::SocketAddr, time::Instant};

use quinn::{ClientConfig, Connection, Endpoint};

use super::{DIAL_TIMEOUT, Events, Intake, admission::SharedAdmissions, read};
use crate::{
    model::{CallError, NodeId},
    transport::{
        connection::call_error,
        credentials::{SERVER_NAME, peer_of},
    },
};

/// What a dialing task needs.
#[derive(Clone)]
pub(super) struct Dialer {
    pub(super) endpoint: Endpoint,
    pub(super) client: ClientConfig,
    pub(super) admissions: SharedAdmissions,
    pub(super) intake: Intake,
    pub(super) events: Events,
    pub(super) me: NodeId,
}

impl Dialer {
    /// Connects to the node that answers at an address.
    ///
    /// # Errors
    /// When no node answers in time, or the handshake fails.
    pub(super) async fn connect(
        &self,
        address: SocketAddr,
    ) -> Result<(NodeId, Connection), CallError> {
        self.admissions.lock().learn_non_member(Instant::now(), address.ip());
        let connecting = self
            .endpoint
            .connect_with(self.client.clone(), address, SERVER_NAME)
            .map_err(|error| CallError::Unreachable(format!("{address}: {error}")))?;
        let connection = tokio::time::timeout(DIAL_TIMEOUT, connecting)
            .await
            .map_err(|_| CallError::Unreachable(format!("{address} does not answer")))?
            .map_err(|error| call_error(&error, address))?;
        let peer = peer_of(&connection)
            .ok_or_else(|| CallError::Unreachable(format!("{address}: unreadable certificate")))?;
        Ok((peer, connection))
    }

    /// Starts a task that reads a connection.
    pub(super) fn read(&self, peer: NodeId, connection: Connection) {
        tokio::spawn(read(peer, connection, self.intake.clone(), self.events.clone()));
    }
}

//! HTTP on sockets: connections with limits, Unix sockets of one owner, and file descriptors that arrive with
//! a request. Knows no route and no caller.

mod connections;
mod descriptor;
mod paced;
mod socket;

use tokio::sync::oneshot::{self, Sender};

pub use connections::{Closing, Excess, serve, serve_until};
pub(crate) use descriptor::{Carrier, CarrierListener, ReceivedDescriptor};
pub use socket::{Socket, SocketError};

/// Why a request got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// The loop has ended.
    Ended,
    /// The loop dropped the request.
    Unanswered,
}

/// Passes a request to the agent's loop and waits for the answer.
///
/// # Errors
/// Fails if the loop has ended, or dropped the request.
pub async fn submit<Q, T>(
    submit_fn: &(dyn Fn(Q) -> bool + Send + Sync),
    request: impl FnOnce(Sender<T>) -> Q,
) -> Result<T, Dropped> {
    let (sender, receiver) = oneshot::channel();
    if !submit_fn(request(sender)) {
        return Err(Dropped::Ended);
    }
    receiver.await.map_err(|_| Dropped::Unanswered)
}

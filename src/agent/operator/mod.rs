//! What operators see and request: status, events, pings, surveys of all members, and the rotation of the
//! secret.

mod common_findings;
pub(super) mod events;
pub(super) mod inquiries;
mod interruptions;
mod lease_audit;
mod path_status;
pub(super) mod ping;
mod preferred;
pub(super) mod requests;
mod routes;
pub(super) mod secrets;
mod silent_peers;
pub(super) mod status;
pub(super) mod survey;
mod verdict;

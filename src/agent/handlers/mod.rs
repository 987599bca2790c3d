//! The event loop's handlers, one module for each source of events.

pub(super) mod docker;
pub(super) mod kernel;
pub(super) mod probe;

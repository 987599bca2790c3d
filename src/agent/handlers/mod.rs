//! The event loop's handlers, one module for each source of events.

mod api;
mod core;
mod disk;
pub(super) mod docker;
pub(super) mod kernel;
pub(super) mod kubernetes;
mod path_mtus;
pub(super) mod probe;

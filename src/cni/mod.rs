//! The CNI plugin: what a container runtime calls to connect a container (CNI SPEC.md 1.1.0).
//!
//! The program itself, called with `CNI_COMMAND` in its environment. It reads the request, asks the agent
//! over its control socket and prints the answer in the runtime's version of the format; the agent does the
//! work. What ends a pod is noted where no agent answers ([`Spool`]). Called as `loopback` it sets up a pod's
//! `lo`, for which it takes no agent.

mod config;
mod error;
mod loopback;
mod netns;
mod plugin;
mod request;
mod result;
mod spool;

pub use netns::open as open_netns;
pub use plugin::{COMMAND, ask, connect, detach, disconnect, run};
pub use request::LOOPBACK;
pub use spool::{Note, Spool};

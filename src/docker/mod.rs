//! Docker's network plugin: a driver for networks and one for addresses (libnetwork's remote drivers) on a
//! socket where Docker looks for plugins.
//!
//! Every Docker network of this driver leads into the overlay: its addresses are of this node's subnet, so
//! each is unique in the cluster. What Docker asks becomes questions to the agent's loop; here nothing
//! is known but Docker's way to ask (moby: `libnetwork/docs/remote.md`, `ipam.md`). Docker moves the
//! interface into the container and gives it addresses and routes; the way to the outside and published
//! ports are its own bridge `docker_gwbridge`.

mod message;
mod server;

pub use server::{DIRECTORY, Endpoint, Joined, PATIENCE, Request, handle, socket_in};

/// On whose behalf addresses of Docker's are held.
pub const OWNER: &str = "docker";

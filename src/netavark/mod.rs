//! The netavark plugin: what Podman 5 calls to create a network and to connect a container (plugin-API.md of
//! netavark).
//!
//! The program itself, called with one of the plugin's four subcommands, which are none of its own. As with
//! CNI, the plugin reads the request, asks the agent over its control socket and prints the answer; nothing
//! here touches the kernel or keeps anything. A network is a way into the one overlay: it holds the overlay's
//! networks and no subnet of a host, so it stays valid whichever subnet the host has.

mod create;
mod json;
mod plugin;

pub use plugin::{Call, run};

/// How Podman names the driver: the file name of the plugin.
pub const DRIVER: &str = "gossamer";

/// The owner of addresses in a network.
fn owner(network: &str) -> String {
    format!("podman/{network}")
}

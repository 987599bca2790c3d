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

/// What Podman and netavark send, for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let network = serde_json::json!({
        "name": "web",
        "id": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "driver": "gossamer",
        "network_interface": "podman1",
        "subnets": null,
        "ipv6_enabled": false,
        "internal": false,
        "dns_enabled": false,
        "options": { "mtu": "1400" },
        "ipam_options": { "driver": "none" },
    });
    let connection = serde_json::json!({
        "container_id": "a",
        "container_name": "b",
        "port_mappings": null,
        "network": network,
        "network_options": { "interface_name": "eth0", "static_ips": ["10.42.0.7"], "static_mac": "" },
    });
    [network, connection].map(|value| value.to_string().into_bytes()).into()
}

/// Reads what Podman and netavark send, for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn fuzz(input: &[u8]) -> bool {
    let connection = json::connection(input);
    let is_connection = connection.is_ok_and(|connection| {
        connection.network.socket().is_ok() | connection.network_options.mac().is_ok()
    });
    is_connection | json::network(input).is_ok()
}

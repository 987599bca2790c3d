//! The netavark plugin, which Podman 5 calls to create a network and to connect a container (plugin-API.md of
//! netavark).
//!
//! The plugin is this program, called with one of the plugin's four subcommands. These are not commands of
//! gossamer. The plugin reads the request, sends it to the agent over the control socket and prints the
//! answer, as the CNI plugin does. It does not touch the kernel and stores nothing. A Podman network holds
//! the overlay's networks and no subnet of a host, so it stays valid when the host's subnet changes.

mod create;
mod json;
mod plugin;

pub use plugin::{Call, run};

/// Podman's name of the driver, which is the file name of the plugin.
pub const DRIVER: &str = "gossamer";

/// Returns the owner under which the agent stores the pods of a network.
fn owner(network: &str) -> String {
    format!("podman/{network}")
}

/// Returns example requests of Podman and netavark, as seeds for the fuzzer.
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

/// Parses the input as each request of Podman and netavark, for the fuzzer. Returns whether any of them
/// accepts it.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn fuzz(input: &[u8]) -> bool {
    let connection = json::connection(input);
    let is_connection = connection.is_ok_and(|connection| {
        connection.network.socket().is_ok() | connection.network_options.mac().is_ok()
    });
    is_connection | json::network(input).is_ok()
}

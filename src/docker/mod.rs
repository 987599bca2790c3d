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

pub use server::{DIRECTORY, Endpoint, Joined, Request, TIMEOUT, handle, socket_in};

/// On whose behalf addresses of Docker's are held.
pub const OWNER: &str = "docker";

/// What dockerd sends, for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let generic = serde_json::json!({ "com.docker.network.generic": { "a": "b" } });
    let network = serde_json::json!({
        "NetworkID": "n", "Options": generic, "IPv4Data": [{ "Pool": "0.0.0.0/0" }]
    });
    let interface = serde_json::json!({ "Address": "10.42.0.7/24", "MacAddress": "" });
    let endpoint =
        serde_json::json!({ "NetworkID": "n", "EndpointID": "e", "Interface": interface });
    let options = serde_json::json!({ "RequestAddressType": "com.docker.network.gateway" });
    let address = serde_json::json!({ "PoolID": "p", "Address": "", "Options": options });
    [network, endpoint, address].map(|body| body.to_string().into_bytes()).into()
}

/// Reads what dockerd sends, for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn fuzz(body: &[u8]) -> bool {
    use message::{AddressRequest, CreateNetwork, EndpointRequest, RequestPool};

    use crate::json::read;
    let network = read::<CreateNetwork>(body);
    let address = read::<AddressRequest>(body);
    network.as_ref().is_ok_and(|network| network.options().count() < 1_000)
        | address.as_ref().is_ok_and(|address| address.is_for_gateway() | address.mac().is_some())
        | read::<EndpointRequest>(body).is_ok()
        | read::<RequestPool>(body).is_ok()
}

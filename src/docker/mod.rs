//! Docker's network plugin: a network driver and an address driver (libnetwork's remote drivers) on a socket
//! in Docker's plugin directory.
//!
//! Every Docker network of this driver connects containers with the overlay. Their addresses are from this
//! node's subnet, so each is unique in the cluster. This module translates Docker's protocol (moby:
//! `libnetwork/docs/remote.md`, `ipam.md`) into requests to the agent's loop. Docker itself moves the
//! interface into the container and sets its addresses and routes. Outbound connections and published ports
//! use Docker's own bridge `docker_gwbridge`.

mod message;
mod server;

use crate::{
    model::{Mac, Pod},
    pods::mac_at,
};

pub use server::{Endpoint, EndpointInterface, Request, TIMEOUT, handle};

/// Owner under which the agent stores Docker's addresses.
pub const OWNER: &str = "docker";

/// Returns the MAC of a pod, which follows from its address unless one was requested; `None` if Docker chose
/// it.
pub fn mac_of(pod: &Pod) -> Option<Mac> {
    let derived = || (pod.owner != OWNER).then(|| mac_at(pod.addresses.first));
    pod.mac.or_else(derived)
}

/// Returns example requests of dockerd, as seeds for the fuzzer.
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

/// Parses the input as each request of dockerd, for the fuzzer. Returns whether any of them accepts it.
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

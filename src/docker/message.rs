//! Docker's requests as JSON. Only the fields in use are declared. Unknown fields are ignored, and null
//! counts as an absent field.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::json::{map_without_nulls, object_or_default, objects_without_nulls, or_default};

/// Key of the options that the user gave with `docker network create -o`.
const GENERIC: &str = "com.docker.network.generic";
/// Option of a network: its MTU. Docker sends it for `--opt com.docker.network.driver.mtu`.
pub const MTU: &str = "com.docker.network.driver.mtu";
/// Option of an address request: what the address is for.
const REQUEST_TYPE: &str = "RequestAddressType";
/// Value of [`REQUEST_TYPE`] for the address of the host itself.
const GATEWAY: &str = "com.docker.network.gateway";
/// Option of an address request: the MAC of the container's interface.
const MAC: &str = "com.docker.network.endpoint.macaddress";

/// `NetworkDriver.CreateNetwork`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CreateNetwork {
    /// IPv4 pools of the network.
    #[serde(rename = "IPv4Data", deserialize_with = "objects_without_nulls")]
    pub ipv4: Vec<PoolData>,
    /// IPv6 pools of the network.
    #[serde(rename = "IPv6Data", deserialize_with = "objects_without_nulls")]
    pub ipv6: Vec<PoolData>,
    #[serde(deserialize_with = "or_default")]
    options: Map<String, Value>,
}

/// A pool of a network.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PoolData {
    /// The pool as a network in text form.
    #[serde(deserialize_with = "or_default")]
    pub pool: String,
}

/// A request about an endpoint (`CreateEndpoint`, `Join`, `DeleteEndpoint`, `EndpointOperInfo`).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointRequest {
    /// Docker's id of the endpoint.
    #[serde(rename = "EndpointID", deserialize_with = "or_default")]
    pub endpoint: String,
    /// Path of the container's network namespace.
    #[serde(rename = "SandboxKey", deserialize_with = "or_default")]
    pub sandbox: String,
    /// Addresses and MAC of the endpoint.
    #[serde(rename = "Interface", deserialize_with = "object_or_default")]
    pub interface: Interface,
}

/// The interface of an endpoint. Fields that Docker leaves out are empty.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Interface {
    /// IPv4 address with prefix length.
    #[serde(deserialize_with = "or_default")]
    pub address: String,
    /// IPv6 address with prefix length.
    #[serde(rename = "AddressIPv6", deserialize_with = "or_default")]
    pub address6: String,
    /// The MAC.
    #[serde(rename = "MacAddress", deserialize_with = "or_default")]
    pub mac: String,
}

/// `IpamDriver.RequestPool`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RequestPool {
    /// The subnet that the user requests (`--subnet`); empty for any.
    #[serde(deserialize_with = "or_default")]
    pub pool: String,
    /// The range that the user requests (`--ip-range`); empty for none.
    #[serde(deserialize_with = "or_default")]
    pub sub_pool: String,
    /// Options of the address driver (`--ipam-opt`).
    #[serde(deserialize_with = "map_without_nulls")]
    pub options: BTreeMap<String, String>,
    /// Whether an IPv6 pool is requested.
    #[serde(rename = "V6", deserialize_with = "or_default")]
    pub v6: bool,
}

/// `IpamDriver.RequestAddress` or `IpamDriver.ReleaseAddress`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AddressRequest {
    /// Id of the pool, which is the pool in text form.
    #[serde(rename = "PoolID", deserialize_with = "or_default")]
    pub pool: String,
    /// The address to reserve or to release; empty for any.
    #[serde(deserialize_with = "or_default")]
    pub address: String,
    #[serde(deserialize_with = "map_without_nulls")]
    options: BTreeMap<String, String>,
}

impl CreateNetwork {
    /// Returns the options that the user gave with `-o`.
    pub fn options(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.options.get(GENERIC).and_then(Value::as_object).into_iter().flatten()
    }
}

impl AddressRequest {
    /// Returns whether the address is for the host itself and not for a container.
    pub fn is_for_gateway(&self) -> bool {
        self.option(REQUEST_TYPE) == Some(GATEWAY)
    }

    /// Returns the MAC of the container's interface.
    pub fn mac(&self) -> Option<&str> {
        self.option(MAC)
    }

    fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;

    #[test]
    fn null_in_any_field_counts_as_absent() {
        let network = r#"{"NetworkID": "n", "Options": null, "IPv4Data": null, "IPv6Data": null}"#;
        let network: CreateNetwork = json::read(network.as_bytes()).expect("a request");
        assert!(network.ipv4.is_empty() && network.options().next().is_none());
        let data = br#"{"IPv4Data": [null, {"Pool": null, "Gateway": null}], "IPv6Data": [null]}"#;
        let network: CreateNetwork = json::read(data).expect("a request");
        let pools: Vec<&str> = network.ipv4.iter().map(|data| data.pool.as_str()).collect();
        assert_eq!((pools, network.ipv6.len()), (vec![""], 0));
        for text in [
            r#"{"EndpointID": null, "SandboxKey": null, "Interface": null}"#,
            r#"{"Interface": {"Address": null, "AddressIPv6": null, "MacAddress": null}}"#,
        ] {
            let endpoint: EndpointRequest = json::read(text.as_bytes()).expect("a request");
            assert!(endpoint.interface.address.is_empty() && endpoint.interface.mac.is_empty());
        }
        let pool = br#"{"Pool": null, "SubPool": null, "Options": null, "V6": null}"#;
        assert!(!json::read::<RequestPool>(pool).expect("a request").v6);
        let address = br#"{"PoolID": null, "Address": null, "Options": {"a": null, "b": "c"}}"#;
        assert_eq!(json::read::<AddressRequest>(address).expect("a request").mac(), None);
    }

    #[test]
    fn unreadable_field_is_named_with_its_path() {
        let data = br#"{"IPv4Data": [{"Pool": 7}]}"#;
        let error = json::read::<CreateNetwork>(data).expect_err("no text");
        assert!(error.starts_with("IPv4Data[0].Pool: invalid type"), "{error}");
    }
}

//! What Docker says, as JSON. Fields that are of no use here are left out; those of later versions are
//! ignored, and null is as good as no field.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::json::{map_without_nulls, object_or_default, objects_without_nulls, or_default};

/// The key of what the user gave with `docker network create -o`.
const GENERIC: &str = "com.docker.network.generic";
/// Given as such an option.
pub const MTU: &str = "com.docker.network.driver.mtu";
const REQUEST_TYPE: &str = "RequestAddressType";
const GATEWAY: &str = "com.docker.network.gateway";
const MAC: &str = "com.docker.network.endpoint.macaddress";

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CreateNetwork {
    #[serde(rename = "IPv4Data", deserialize_with = "objects_without_nulls")]
    pub ipv4: Vec<PoolData>,
    #[serde(rename = "IPv6Data", deserialize_with = "objects_without_nulls")]
    pub ipv6: Vec<PoolData>,
    #[serde(deserialize_with = "or_default")]
    options: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PoolData {
    #[serde(deserialize_with = "or_default")]
    pub pool: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointRequest {
    #[serde(rename = "EndpointID", deserialize_with = "or_default")]
    pub endpoint: String,
    #[serde(rename = "SandboxKey", deserialize_with = "or_default")]
    pub sandbox: String,
    #[serde(rename = "Interface", deserialize_with = "object_or_default")]
    pub interface: Interface,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Interface {
    #[serde(deserialize_with = "or_default")]
    pub address: String,
    #[serde(rename = "AddressIPv6", deserialize_with = "or_default")]
    pub address6: String,
    #[serde(rename = "MacAddress", deserialize_with = "or_default")]
    pub mac: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RequestPool {
    #[serde(deserialize_with = "or_default")]
    pub pool: String,
    #[serde(deserialize_with = "or_default")]
    pub sub_pool: String,
    #[serde(deserialize_with = "map_without_nulls")]
    pub options: BTreeMap<String, String>,
    #[serde(rename = "V6", deserialize_with = "or_default")]
    pub v6: bool,
}

/// To be given, or taken back.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AddressRequest {
    #[serde(rename = "PoolID", deserialize_with = "or_default")]
    pub pool: String,
    #[serde(deserialize_with = "or_default")]
    pub address: String,
    #[serde(deserialize_with = "map_without_nulls")]
    options: BTreeMap<String, String>,
}

impl CreateNetwork {
    /// What the user gave with `-o`.
    pub fn options(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.options.get(GENERIC).and_then(Value::as_object).into_iter().flatten()
    }
}

impl AddressRequest {
    /// For the host itself, and not for a container.
    pub fn is_for_gateway(&self) -> bool {
        self.option(REQUEST_TYPE) == Some(GATEWAY)
    }

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
    fn null_in_the_place_of_any_field_is_as_good_as_no_field() {
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
    fn what_cannot_be_read_is_named_by_its_field() {
        let data = br#"{"IPv4Data": [{"Pool": 7}]}"#;
        let error = json::read::<CreateNetwork>(data).expect_err("no text");
        assert!(error.starts_with("IPv4Data[0].Pool: invalid type"), "{error}");
    }
}

//! What Docker says, as JSON. Fields that are of no use here are left out; those of later versions are
//! ignored.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

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
    #[serde(rename = "IPv4Data")]
    pub ipv4: Vec<PoolData>,
    #[serde(rename = "IPv6Data")]
    pub ipv6: Vec<PoolData>,
    options: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PoolData {
    pub pool: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointRequest {
    #[serde(rename = "EndpointID")]
    pub endpoint: String,
    #[serde(rename = "SandboxKey")]
    pub sandbox: String,
    #[serde(rename = "Interface")]
    pub interface: Interface,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Interface {
    pub address: String,
    #[serde(rename = "AddressIPv6")]
    pub address6: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RequestPool {
    pub pool: String,
    pub sub_pool: String,
    pub options: Option<BTreeMap<String, String>>,
    #[serde(rename = "V6")]
    pub v6: bool,
}

/// To be given, or taken back.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AddressRequest {
    #[serde(rename = "PoolID")]
    pub pool: String,
    pub address: String,
    options: Option<BTreeMap<String, String>>,
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
        self.options.as_ref()?.get(name).map(String::as_str)
    }
}

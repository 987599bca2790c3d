//! JSON of Podman and netavark: requests and answers. Unknown fields are ignored, and null counts as an
//! absent field, because versions differ in both.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use crate::{
    api::{Attached, AttachedAddress},
    config::Instance,
    json::{
        Object, list_without_nulls, map_without_nulls, object, objects_without_nulls, or_default,
    },
    model::Mac,
};

/// Maximum length of a request, in bytes.
pub const INPUT_MAX: u64 = 1 << 20;
/// Maximum length of a network's name, in bytes. Podman stores the network in a file of this name.
const NAME_MAX: usize = 250;

/// Option of a network (`podman network create -o`): the name of the overlay.
pub const INSTANCE: &str = "instance";
/// Option of a network: the path of the agent's control socket.
pub const SOCKET: &str = "socket";

/// A network, with the fields that gossamer uses.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Name of the network.
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    /// The options that the user gave with `-o`.
    #[serde(deserialize_with = "map_without_nulls")]
    pub options: BTreeMap<String, String>,
    /// Options of the address driver.
    #[serde(deserialize_with = "map_without_nulls")]
    pub ipam_options: BTreeMap<String, String>,
    /// The network's subnets.
    #[serde(deserialize_with = "objects_without_nulls")]
    pub subnets: Vec<Subnet>,
    /// Static routes; must be empty.
    #[serde(deserialize_with = "list_without_nulls")]
    pub routes: Vec<Value>,
    /// Name servers of the network; must be empty.
    #[serde(deserialize_with = "list_without_nulls")]
    pub network_dns_servers: Vec<Value>,
    /// Name of the bridge; must be empty.
    #[serde(deserialize_with = "or_default")]
    pub network_interface: String,
    /// Whether containers get no route out of the network; must be false.
    #[serde(deserialize_with = "or_default")]
    pub internal: bool,
    /// Whether the user requests IPv6.
    #[serde(deserialize_with = "or_default")]
    pub ipv6_enabled: bool,
}

/// A subnet of a network.
#[derive(Debug, Deserialize)]
pub struct Subnet {
    /// The subnet.
    pub subnet: IpNet,
    /// The gateway that the user requests; must be absent.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    /// The range that the user requests; must be absent.
    #[serde(default)]
    pub lease_range: Option<Value>,
}

/// A container and one of its networks, to be connected or disconnected.
#[derive(Debug, Deserialize)]
pub struct Connection {
    /// Id of the container.
    pub container_id: String,
    /// Ports that the user publishes.
    #[serde(default, deserialize_with = "list_without_nulls")]
    pub port_mappings: Vec<Value>,
    /// The network.
    #[serde(deserialize_with = "object")]
    pub network: Network,
    /// What the container requests in this network.
    #[serde(deserialize_with = "object")]
    pub network_options: ContainerOptions,
}

/// What a container requests in a network.
#[derive(Debug, Deserialize)]
pub struct ContainerOptions {
    /// Name of the interface in the container.
    pub interface_name: String,
    /// The addresses that it must get. If empty, the agent chooses.
    #[serde(default, deserialize_with = "list_without_nulls")]
    pub static_ips: Vec<IpAddr>,
    #[serde(default, deserialize_with = "or_default")]
    static_mac: String,
}

/// Parses the network that Podman wants to create. Returns the whole object, which the answer repeats, and
/// the fields in use.
///
/// # Errors
/// If the input is malformed or too long, or the network's name is empty or too long.
pub fn network(input: &[u8]) -> Result<(Map<String, Value>, Network), String> {
    let whole: Map<String, Value> = parse(input)?;
    let Object(network): Object<Network> = parse(input)?;
    network.check_name()?;
    Ok((whole, network))
}

/// Parses the request to connect or disconnect a container.
///
/// # Errors
/// If the input is malformed or too long, or the network's name is empty or too long.
pub fn connection(input: &[u8]) -> Result<Connection, String> {
    let Object(connection): Object<Connection> = parse(input)?;
    connection.network.check_name()?;
    Ok(connection)
}

/// Returns netavark's `StatusBlock` of a connected container. It has no name servers: the container uses the
/// host's.
pub fn status_block(interface: &str, attached: &Attached) -> Value {
    let subnet = |one: &AttachedAddress| json!({ "ipnet": one.address, "gateway": one.gateway });
    let subnets: Vec<Value> = attached.addresses.iter().map(subnet).collect();
    json!({
        "dns_search_domains": [],
        "dns_server_ips": [],
        "interfaces": { interface: { "mac_address": attached.mac, "subnets": subnets } },
    })
}

impl Network {
    fn check_name(&self) -> Result<(), String> {
        match self.name.len() {
            0 => Err("the network has no name".to_owned()),
            1..=NAME_MAX => Ok(()),
            _ => Err(format!("the network's name is longer than {NAME_MAX} bytes")),
        }
    }

    /// Returns the path of the agent's control socket.
    ///
    /// # Errors
    /// If the option `socket` or `instance` is invalid.
    pub fn socket(&self) -> Result<PathBuf, String> {
        if let Some(socket) = self.options.get(SOCKET).map(PathBuf::from) {
            let relative = || format!("option {SOCKET}={}: use an absolute path", socket.display());
            return if socket.is_absolute() { Ok(socket) } else { Err(relative()) };
        }
        let name = self.options.get(INSTANCE).map_or("", String::as_str);
        let instance: Result<Instance, _> = name.parse();
        Ok(instance.map_err(|error| format!("option {INSTANCE}: {error}"))?.socket())
    }
}

impl ContainerOptions {
    /// Returns the MAC that the container must have.
    ///
    /// # Errors
    /// If the text is not a MAC.
    pub fn mac(&self) -> Result<Option<Mac>, String> {
        match self.static_mac.as_str() {
            "" => Ok(None),
            text => text.parse().map(Some),
        }
    }
}

fn parse<T: DeserializeOwned>(input: &[u8]) -> Result<T, String> {
    if input.len() as u64 > INPUT_MAX {
        return Err(format!("the request on stdin is longer than {INPUT_MAX} bytes"));
    }
    crate::json::read(input).map_err(|error| format!("the request on stdin: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request of netavark 1.14.
    const SETUP: &str = r#"{
        "container_id": "c4856cb8", "container_name": "a", "port_mappings": null,
        "network": {
            "dns_enabled": false, "driver": "gossamer", "id": "24f6", "internal": false, "ipv6_enabled": true,
            "name": "web", "network_interface": null, "options": {"instance": "blue"},
            "ipam_options": {"driver": "none"},
            "subnets": [{"gateway": "10.42.0.1", "lease_range": null, "subnet": "10.42.0.0/16"}],
            "routes": null, "network_dns_servers": null
        },
        "network_options": {
            "aliases": ["c4856cb804ac"], "interface_name": "eth0", "static_ips": ["10.42.7.9"],
            "static_mac": "02:00:00:00:00:09", "options": null
        },
        "a_field_of_later_versions": {"x": [1]}
    }"#;

    #[test]
    fn complete_request_is_parsed() {
        let read = connection(SETUP.as_bytes()).expect("a request");
        assert_eq!((read.container_id.as_str(), read.network.name.as_str()), ("c4856cb8", "web"));
        assert_eq!(read.network.socket(), Ok("/run/gossamer-blue/gossamer.sock".into()));
        assert_eq!(read.network_options.static_ips, [IpAddr::from([10, 42, 7, 9])]);
        assert_eq!(read.network_options.mac(), Ok(Some(Mac::from_bytes([2, 0, 0, 0, 0, 9]))));
        assert!(read.port_mappings.is_empty());
    }

    #[test]
    fn null_counts_as_absent_field() {
        let little = r#"{"container_id": "c", "network": {"name": "web"},
            "network_options": {"interface_name": "eth0"}}"#;
        let nulls = r#"{"container_id": "c", "container_name": null, "port_mappings": null,
            "network": {"name": "web", "options": null, "ipam_options": null, "subnets": null,
                "internal": null, "ipv6_enabled": null, "network_interface": null},
            "network_options": {"interface_name": "eth0", "static_ips": null, "static_mac": null}}"#;
        for text in [little, nulls] {
            let read = connection(text.as_bytes()).expect("a request");
            assert_eq!(read.network.socket(), Ok("/run/gossamer/gossamer.sock".into()));
            assert_eq!(read.network_options.mac(), Ok(None));
            assert!(read.network.subnets.is_empty() && !read.network.internal);
        }
    }

    #[test]
    fn invalid_request_is_refused_with_the_place() {
        let long = [b" ".repeat(INPUT_MAX as usize), SETUP.as_bytes().to_vec()].concat();
        let nameless = SETUP.replace("\"web\"", "null");
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        let endless = SETUP.replace("web", &"w".repeat(NAME_MAX + 1));
        for (input, word) in [
            (&b""[..], "stdin"),
            (b"[]", "stdin"),
            (b"{}", "container_id"),
            (deep.as_bytes(), "stdin"),
            (&long, "longer"),
            (nameless.as_bytes(), "no name"),
            (endless.as_bytes(), "longer"),
        ] {
            let error = connection(input).expect_err(word);
            assert!(error.contains(word), "{error}");
        }
        let other = SETUP.replace("10.42.7.9", "10.42");
        let error = connection(other.as_bytes()).expect_err("no address");
        assert!(error.contains("network_options.static_ips[0]: invalid IP address"), "{error}");
        let other = SETUP.replace("02:00:00:00:00:09", "02:00");
        let read = connection(other.as_bytes()).expect("a request");
        assert!(read.network_options.mac().expect_err("no MAC").contains("02:00"));
        for (option, word) in
            [(r#""socket": "run""#, "absolute"), (r#""instance": "Blue""#, "instance")]
        {
            let other = SETUP.replace(r#""instance": "blue""#, option);
            let error = connection(other.as_bytes()).expect("a request").network.socket();
            assert!(error.as_ref().is_err_and(|error| error.contains(word)), "{error:?}");
        }
    }

    #[test]
    fn status_block_has_netavarks_format() {
        let address = |address: &str, gateway: &str| AttachedAddress {
            address: address.parse().expect("an address"),
            gateway: gateway.parse().expect("an address"),
        };
        let attached = Attached {
            mac: Mac::from_bytes([0x0a, 0x58, 10, 42, 7, 2]),
            link: "gsm0123456789".to_owned(),
            link_mac: Mac::from_bytes([0x0e, 1, 2, 3, 4, 5]),
            bridge: "gsm0".to_owned(),
            bridge_mac: None,
            mtu: 1450,
            routes: Vec::new(),
            addresses: vec![
                address("10.42.7.2/24", "10.42.7.1"),
                address("fd42:0:0:7::2/64", "fd42:0:0:7::1"),
            ],
        };
        let wanted = json!({
            "dns_search_domains": [],
            "dns_server_ips": [],
            "interfaces": { "eth0": {
                "mac_address": "0a:58:0a:2a:07:02",
                "subnets": [
                    { "ipnet": "10.42.7.2/24", "gateway": "10.42.7.1" },
                    { "ipnet": "fd42:0:0:7::2/64", "gateway": "fd42:0:0:7::1" },
                ],
            }},
        });
        assert_eq!(status_block("eth0", &attached), wanted);
    }
}

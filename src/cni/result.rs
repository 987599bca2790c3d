//! The result of ADD, in the format of each version of the specification.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::api::{Attached, AttachedRoute};

/// What ADD has created, independent of the version.
#[derive(Debug, Default)]
pub struct AddResult {
    /// The interfaces, in the order of the result. The last one is the pod's.
    pub interfaces: Vec<Interface>,
    /// Address with prefix length, and gateway. All belong to the last interface.
    pub addresses: Vec<(IpNet, Option<IpAddr>)>,
    /// The pod's routes.
    pub routes: Vec<AttachedRoute>,
    /// The `dns` object of the result.
    pub dns: Value,
}

/// An interface in the result.
#[derive(Debug, Default)]
pub struct Interface {
    /// Name of the interface in its namespace.
    pub name: String,
    /// The MAC as text.
    pub mac: Option<String>,
    /// The MTU in bytes.
    pub mtu: Option<u32>,
    /// Path of the network namespace, unless it is the host's.
    pub sandbox: Option<String>,
}

impl AddResult {
    /// Builds the result for a pod of the overlay: bridge, the host's end of the veth pair, and the pod's
    /// end.
    pub fn new(interface: &str, netns: &str, attached: &Attached, dns: Value) -> Self {
        let link = |name: &str, mac: Option<String>, sandbox: Option<&str>| Interface {
            name: name.to_owned(),
            mac,
            mtu: Some(attached.mtu),
            sandbox: sandbox.map(str::to_owned),
        };
        let bridge_mac = attached.bridge_mac.map(|mac| mac.to_string());
        Self {
            interfaces: vec![
                link(&attached.bridge, bridge_mac, None),
                link(&attached.link, Some(attached.link_mac.to_string()), None),
                link(interface, Some(attached.mac.to_string()), Some(netns)),
            ],
            addresses: attached
                .addresses
                .iter()
                .map(|one| (one.address, Some(one.gateway)))
                .collect(),
            routes: attached.routes.clone(),
            dns,
        }
    }

    /// Returns the answer to ADD (section "ADD Success" of each version of the specification).
    pub fn to_json(&self, version: &str) -> Value {
        if matches!(version, "0.1.0" | "0.2.0") {
            return self.to_oldest_json(version);
        }
        let interfaces: Vec<Value> =
            self.interfaces.iter().map(|link| link.to_json(version == "1.1.0")).collect();
        let owner = self.interfaces.len().saturating_sub(1);
        let address = |(address, gateway): &(IpNet, Option<IpAddr>)| {
            let mut ip = json!({ "address": address, "interface": owner });
            if let Some(gateway) = gateway {
                ip["gateway"] = json!(gateway);
            }
            if version.starts_with("0.") {
                ip["version"] = if address.addr().is_ipv4() { "4" } else { "6" }.into();
            }
            ip
        };
        json!({
            "cniVersion": version,
            "interfaces": interfaces,
            "ips": self.addresses.iter().map(address).collect::<Vec<_>>(),
            "routes": self.routes.iter().map(route).collect::<Vec<_>>(),
            "dns": self.dns,
        })
    }

    /// Returns the format of 0.1.0 and 0.2.0: one address of each family, no interfaces.
    fn to_oldest_json(&self, version: &str) -> Value {
        let mut result = Map::new();
        result.insert("cniVersion".to_owned(), version.into());
        for (key, ipv4) in [("ip4", true), ("ip6", false)] {
            let is_of_family = |(address, _): &&(IpNet, _)| address.addr().is_ipv4() == ipv4;
            let Some((address, gateway)) = self.addresses.iter().find(is_of_family) else {
                continue;
            };
            let routes = self.routes.iter().filter(|route| route.via.is_ipv4() == ipv4);
            let mut ip = json!({ "ip": address, "routes": routes.map(route).collect::<Vec<_>>() });
            if let Some(gateway) = gateway {
                ip["gateway"] = json!(gateway);
            }
            result.insert(key.to_owned(), ip);
        }
        result.insert("dns".to_owned(), self.dns.clone());
        Value::Object(result)
    }
}

impl Interface {
    fn to_json(&self, with_mtu: bool) -> Value {
        let mut link = Map::from_iter([("name".to_owned(), json!(self.name))]);
        let texts = [("mac", &self.mac), ("sandbox", &self.sandbox)];
        for (key, text) in texts.into_iter().filter_map(|(key, text)| Some((key, text.as_ref()?))) {
            link.insert(key.to_owned(), json!(text));
        }
        if let Some(mtu) = self.mtu.filter(|_| with_mtu) {
            link.insert("mtu".to_owned(), mtu.into());
        }
        Value::Object(link)
    }
}

fn route(AttachedRoute { to, via }: &AttachedRoute) -> Value {
    json!({ "dst": to, "gw": via })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::AttachedAddress, model::Mac};

    #[test]
    fn result_has_the_format_of_each_version() {
        let attached = Attached {
            mac: Mac::from_bytes([0x0a, 0x58, 10, 42, 7, 2]),
            link: "gsm0123456789".to_owned(),
            link_mac: Mac::from_bytes([0x0e, 1, 2, 3, 4, 5]),
            bridge: "gsm0".to_owned(),
            bridge_mac: None,
            mtu: 1450,
            addresses: vec![AttachedAddress {
                address: "10.42.7.2/24".parse().expect("an address"),
                gateway: [10, 42, 7, 1].into(),
            }],
            routes: vec![AttachedRoute {
                to: "0.0.0.0/0".parse().expect("a network"),
                via: [10, 42, 7, 1].into(),
            }],
        };
        let result =
            AddResult::new("eth0", "/ns", &attached, json!({ "nameservers": ["10.42.0.10"] }));
        let new = result.to_json("1.1.0");
        assert_eq!(
            new["interfaces"][2],
            json!({ "name": "eth0", "mac": "0a:58:0a:2a:07:02", "mtu": 1450, "sandbox": "/ns" })
        );
        assert_eq!(
            new["ips"],
            json!([{ "address": "10.42.7.2/24", "gateway": "10.42.7.1", "interface": 2 }])
        );
        assert_eq!(new["routes"], json!([{ "dst": "0.0.0.0/0", "gw": "10.42.7.1" }]));
        assert_eq!(new["dns"]["nameservers"], json!(["10.42.0.10"]));
        for version in ["0.3.0", "0.3.1", "0.4.0"] {
            let old = result.to_json(version);
            assert_eq!(
                (&old["ips"][0]["version"], &old["interfaces"][2]["mtu"]),
                (&json!("4"), &Value::Null)
            );
        }
        assert_eq!(result.to_json("1.0.0")["ips"][0].get("version"), None);
        let oldest = result.to_json("0.2.0");
        assert_eq!(
            oldest["ip4"],
            json!({
                "ip": "10.42.7.2/24",
                "gateway": "10.42.7.1",
                "routes": [{ "dst": "0.0.0.0/0", "gw": "10.42.7.1" }],
            })
        );
        assert_eq!((oldest.get("ip6"), oldest.get("interfaces")), (None, None));
    }
}

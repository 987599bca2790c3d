//! A connected pod as the runtime reads it: the formats of the specification's versions differ.

use serde_json::{Value, json};

use crate::api::Attached;

/// The answer to ADD (section "ADD Success").
pub fn added(version: &str, interface: &str, netns: &str, attached: &Attached) -> Value {
    let with_mtu = version == "1.1.0";
    let old = version.starts_with("0.");
    let link = |name: &str, mac: Option<String>, sandbox: Option<&str>| {
        let mut link = json!({ "name": name });
        let mut put = |key: &str, value: Value| {
            _ = link.as_object_mut().map(|o| o.insert(key.to_owned(), value))
        };
        mac.into_iter().for_each(|mac| put("mac", mac.into()));
        if with_mtu {
            put("mtu", attached.mtu.into());
        }
        sandbox.into_iter().for_each(|sandbox| put("sandbox", sandbox.into()));
        link
    };
    let bridge_mac = attached.bridge_mac.map(|mac| mac.to_string());
    // The pod's own is the third.
    let interfaces = [
        link(&attached.bridge, bridge_mac, None),
        link(&attached.link, Some(attached.link_mac.to_string()), None),
        link(interface, Some(attached.mac.to_string()), Some(netns)),
    ];
    let ips: Vec<Value> = attached
        .addresses
        .iter()
        .map(|one| {
            let mut ip = json!({ "address": one.address, "gateway": one.gateway, "interface": 2 });
            if old {
                ip["version"] = if one.gateway.is_ipv4() { "4" } else { "6" }.into();
            }
            ip
        })
        .collect();
    let routes = attached.addresses.iter().map(|one| {
        let all = if one.gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        json!({ "dst": all, "gw": one.gateway })
    });
    json!({
        "cniVersion": version,
        "interfaces": interfaces,
        "ips": ips,
        "routes": routes.collect::<Vec<_>>(),
        "dns": {},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::AttachedAddress, model::Mac};

    #[test]
    fn each_version_has_its_own_format() {
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
        };
        let new = added("1.1.0", "eth0", "/ns", &attached);
        assert_eq!(
            new["interfaces"][2],
            json!({ "name": "eth0", "mac": "0a:58:0a:2a:07:02", "mtu": 1450, "sandbox": "/ns" })
        );
        assert_eq!(
            new["ips"],
            json!([{ "address": "10.42.7.2/24", "gateway": "10.42.7.1", "interface": 2 }])
        );
        assert_eq!(new["routes"], json!([{ "dst": "0.0.0.0/0", "gw": "10.42.7.1" }]));
        let old = added("0.4.0", "eth0", "/ns", &attached);
        assert_eq!(
            (&old["ips"][0]["version"], &old["interfaces"][2]["mtu"]),
            (&json!("4"), &Value::Null)
        );
        assert_eq!(added("1.0.0", "eth0", "/ns", &attached)["ips"][0].get("version"), None);
    }
}

//! Checks a new network, and fills in the fields that gossamer defines.
//!
//! The network gets the overlay's networks as its subnets, and the IPAM driver `none`. With that driver
//! Podman accepts any address of the overlay for `--ip`, does not allocate a subnet from the overlay, and
//! stores nothing that depends on the subnet of this host.

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::json::{INSTANCE, Network, SOCKET};

/// IPAM driver with which Podman allocates no addresses.
const NO_ADDRESSES: &str = "none";

/// Checks that gossamer supports the properties of a new network.
///
/// # Errors
/// If it does not. The message names the flag of `podman network create`.
pub fn check(network: &Network, overlay: &[IpNet]) -> Result<(), String> {
    check_options(network)?;
    let shown: Vec<String> = overlay.iter().map(ToString::to_string).collect();
    let shown = shown.join(" and ");
    for subnet in &network.subnets {
        if !overlay.contains(&subnet.subnet.trunc()) {
            return Err(format!(
                "--subnet {}: leave it out: each host gives its containers addresses from its own subnet of \
                 {shown}",
                subnet.subnet
            ));
        }
        if subnet.gateway.is_some() || subnet.lease_range.is_some() {
            return Err(
                "--gateway, --ip-range: leave them out: they are the agent's, and differ on each host"
                    .to_owned(),
            );
        }
    }
    if network.ipv6_enabled && !overlay.iter().any(|network| network.addr().is_ipv6()) {
        return Err(format!(
            "--ipv6: the overlay is {shown} and has no IPv6: its cluster was created without network6"
        ));
    }
    Ok(())
}

/// Checks the properties that do not depend on the overlay.
fn check_options(network: &Network) -> Result<(), String> {
    if let Some(key) =
        network.options.keys().find(|key| ![INSTANCE, SOCKET].contains(&key.as_str()))
    {
        return Err(format!(
            "option {key}: a gossamer network has the options {INSTANCE} and {SOCKET} only; everything else, \
             such as the MTU, is a setting of the agent"
        ));
    }
    let ipam = network.ipam_options.get("driver").map_or("", String::as_str);
    if !["", NO_ADDRESSES].contains(&ipam) {
        return Err(format!(
            "--ipam-driver {ipam}: leave it out: gossamer allocates the addresses"
        ));
    }
    let refused = [
        (
            network.internal,
            "--internal: not supported: containers of the overlay always have a route to their host",
        ),
        (
            !network.routes.is_empty(),
            "--route: not supported: containers have a default route through their host",
        ),
        (
            !network.network_dns_servers.is_empty(),
            "--dns: not supported for the network: give --dns to `podman run`",
        ),
        (
            !network.network_interface.is_empty(),
            "--interface-name: not supported: the bridge's name is the agent's setting `bridge`",
        ),
    ];
    match refused.into_iter().find(|(is_asked, _)| *is_asked) {
        Some((_, why)) => Err(why.to_owned()),
        None => Ok(()),
    }
}

/// Sets the fields that gossamer defines. Leaves all others unchanged.
pub fn fill(network: &mut Map<String, Value>, overlay: &[IpNet]) {
    let subnets: Vec<Value> = overlay.iter().map(|subnet| json!({ "subnet": subnet })).collect();
    let ipv6 = overlay.iter().any(|subnet| subnet.addr().is_ipv6());
    for (key, value) in [
        ("subnets", json!(subnets)),
        ("ipam_options", json!({ "driver": NO_ADDRESSES })),
        ("ipv6_enabled", json!(ipv6)),
        // Podman's name server serves only networks of netavark's built-in drivers.
        ("dns_enabled", json!(false)),
    ] {
        network.insert(key.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::json::network, *};

    fn created(more: Value, overlay: &[&str]) -> Result<Map<String, Value>, String> {
        // The input of Podman 5.4.
        let mut input = json!({
            "name": "web", "id": "d5d6", "driver": "gossamer", "created": "0001-01-01T00:00:00Z",
            "ipv6_enabled": false, "internal": false, "dns_enabled": true, "labels": {"a": "b"},
        });
        for (key, value) in more.as_object().expect("an object") {
            input[key] = value.clone();
        }
        let overlay: Vec<IpNet> =
            overlay.iter().map(|text| text.parse().expect("a network")).collect();
        let (mut whole, network) = network(input.to_string().as_bytes())?;
        check(&network, &overlay)?;
        fill(&mut whole, &overlay);
        Ok(whole)
    }

    const OVERLAY: [&str; 1] = ["10.42.0.0/16"];

    #[test]
    fn created_network_has_the_overlay_and_podmans_fields() {
        let made = created(json!({}), &OVERLAY).expect("a network");
        for (key, wanted) in [
            ("name", json!("web")),
            ("id", json!("d5d6")),
            ("driver", json!("gossamer")),
            ("labels", json!({ "a": "b" })),
            ("subnets", json!([{ "subnet": "10.42.0.0/16" }])),
            ("ipam_options", json!({ "driver": "none" })),
            ("ipv6_enabled", json!(false)),
            ("dns_enabled", json!(false)),
        ] {
            assert_eq!(made[key], wanted, "{key}");
        }
        let both = [OVERLAY[0], "fd42::/48"];
        let made = created(json!({ "ipv6_enabled": true }), &both).expect("a network");
        assert_eq!(made["ipv6_enabled"], true);
        assert_eq!(made["subnets"], json!([{ "subnet": OVERLAY[0] }, { "subnet": "fd42::/48" }]));
        for allowed in [
            json!({ "subnets": [{ "subnet": "10.42.0.0/16" }] }),
            json!({ "ipam_options": { "driver": "none" }, "options": { "instance": "blue" } }),
            json!({ "subnets": null, "options": null, "routes": null, "ipam_options": null }),
        ] {
            created(allowed.clone(), &OVERLAY).unwrap_or_else(|error| panic!("{allowed}: {error}"));
        }
    }

    #[test]
    fn unsupported_property_is_refused_by_its_flag() {
        for (asked, word) in [
            (json!({ "options": { "mtu": "1400" } }), "option mtu"),
            (json!({ "ipam_options": { "driver": "host-local" } }), "--ipam-driver host-local"),
            (json!({ "subnets": [{ "subnet": "10.42.7.0/24" }] }), "--subnet 10.42.7.0/24"),
            (
                json!({ "subnets": [{ "subnet": "10.42.0.0/16", "gateway": "10.42.0.1" }] }),
                "--gateway",
            ),
            (json!({ "subnets": [{ "subnet": "10.42.0.0/16", "lease_range": {} }] }), "--ip-range"),
            (json!({ "ipv6_enabled": true }), "--ipv6"),
            (json!({ "internal": true }), "--internal"),
            (json!({ "routes": [{}] }), "--route"),
            (json!({ "network_dns_servers": ["1.1.1.1"] }), "--dns"),
            (json!({ "network_interface": "br0" }), "--interface-name"),
        ] {
            let error = created(asked, &OVERLAY).expect_err(word);
            assert!(error.contains(word), "{error}");
        }
    }
}

//! Compares the routes in `prevResult` with the kernel, for CHECK. Any plugin may have added those routes.

use std::{fmt, fs::File, net::IpAddr, path::Path};

use ipnet::IpNet;
use serde_json::Value;

use super::{
    error::{CniError, code},
    netns,
};
use crate::netlink::{
    Netlink,
    route::{MAIN, UnicastRoute},
};

/// A route in `prevResult`. `None` fields are not compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    to: IpNet,
    via: Option<IpAddr>,
    metric: Option<u32>,
    table: u32,
}

impl Expected {
    /// Returns the routes of a result. Skips malformed ones.
    pub fn all(result: &Value) -> Vec<Self> {
        let all = result["routes"].as_array().map(Vec::as_slice).unwrap_or_default();
        all.iter().filter_map(Self::read).collect()
    }

    fn read(route: &Value) -> Option<Self> {
        let to: IpNet = route["dst"].as_str()?.parse().ok()?;
        let number = |key: &str| {
            let number = route[key].as_u64().and_then(|number| u32::try_from(number).ok());
            // The kernel treats 0 as "not set".
            number.filter(|number| *number != 0)
        };
        Some(Self {
            to: to.trunc(),
            via: route["gw"].as_str().and_then(|text| text.parse().ok()),
            metric: number("priority"),
            table: number("table").unwrap_or(MAIN),
        })
    }

    fn matches(&self, listed: &UnicastRoute) -> bool {
        self.to == listed.to
            && self.table == listed.table
            && self.via.is_none_or(|via| listed.gateways.contains(&via))
            && self.metric.is_none_or(|metric| metric == listed.metric)
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to)?;
        self.via.iter().try_for_each(|via| write!(f, " via {via}"))?;
        self.metric.iter().try_for_each(|metric| write!(f, " metric {metric}"))?;
        if self.table == MAIN { Ok(()) } else { write!(f, " table {}", self.table) }
    }
}

/// Checks that the routes exist in the namespace of a pod. `path` is the namespace's path for messages.
///
/// # Errors
/// If the routes cannot be read, or if one is missing. The error names the first missing route.
pub fn compare(opened: &File, path: &Path, expected: &[Expected]) -> Result<(), CniError> {
    if expected.is_empty() {
        return Ok(());
    }
    let failed = |error| CniError::new(code::IO, format!("routes in {}: {error}", path.display()));
    let host_netns = File::open(netns::OWN_NETNS).map_err(failed)?;
    let mut inside = Netlink::open_in(opened, &host_netns)
        .map_err(|error| netns::namespace_error("CNI_NETNS", path, &error))?;
    let mut listed = Vec::new();
    for ipv4 in [true, false] {
        if expected.iter().any(|route| route.to.addr().is_ipv4() == ipv4) {
            listed.extend(inside.routes(ipv4).map_err(failed)?);
        }
    }
    match expected.iter().find(|route| !listed.iter().any(|listed| route.matches(listed))) {
        None => Ok(()),
        Some(route) => {
            let why = format!("{} does not have the route {route} of prevResult", path.display());
            Err(CniError::new(code::IO, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn listed(to: &str, via: &str, metric: u32, table: u32) -> UnicastRoute {
        let gateways = vec![via.parse().expect("an address")];
        UnicastRoute { to: to.parse().expect("a network"), gateways, link: None, metric, table }
    }

    #[test]
    fn route_is_compared_only_in_the_fields_of_the_result() {
        let matches = |route: Value, listed: &UnicastRoute| {
            let read = Expected::all(&json!({ "routes": [route] }));
            read.iter().all(|route| route.matches(listed))
        };
        let default = listed("0.0.0.0/0", "10.42.7.1", 0, MAIN);
        assert!(matches(json!({ "dst": "0.0.0.0/0", "gw": "10.42.7.1" }), &default));
        assert!(matches(json!({ "dst": "0.0.0.0/0", "gw": null, "table": 0 }), &default));
        assert!(!matches(json!({ "dst": "0.0.0.0/0", "gw": "10.42.7.9" }), &default));
        assert!(!matches(json!({ "dst": "10.0.0.0/8", "gw": "10.42.7.1" }), &default));
        assert!(!matches(json!({ "dst": "0.0.0.0/0", "table": 100 }), &default));
        let other = listed("10.0.0.0/8", "10.42.7.1", 50, 100);
        assert!(matches(json!({ "dst": "10.1.2.3/8", "priority": 50, "table": 100 }), &other));
        assert!(!matches(json!({ "dst": "10.0.0.0/8", "priority": 51, "table": 100 }), &other));
        assert!(!matches(json!({ "dst": "::/0" }), &default));
    }

    #[test]
    fn malformed_routes_are_skipped() {
        for routes in [json!(null), json!("a"), json!({}), json!([null, 1, {}, { "dst": "a" }])] {
            assert_eq!(Expected::all(&json!({ "routes": routes })), []);
        }
    }
}

//! Interpretation of the answers of the API server.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::model::Pool;

/// Limit of a foreign text in a message, in characters.
const MAX_SHOWN_CHARS: usize = 300;

/// Returns the subnets in the object of a node; `None` if the value is not the object of that node.
///
/// # Errors
/// Fails when it has no subnet, or one that cannot be parsed.
pub(super) fn cidrs(node: &Value, name: &str) -> Option<Result<Vec<IpNet>, String>> {
    if node["kind"] != "Node" || node["metadata"]["name"] != name {
        return None;
    }
    let list = node["spec"]["podCIDRs"].as_array().map(Vec::as_slice).unwrap_or_default();
    let texts = if list.is_empty() { std::slice::from_ref(&node["spec"]["podCIDR"]) } else { list };
    let texts = texts.iter().filter_map(Value::as_str).filter(|text| !text.is_empty());
    let parse = |text: &str| {
        let shown = shortened(text);
        text.parse().map_err(|_| format!("node {name}: podCIDR {shown:?} is no subnet"))
    };
    let cidrs: Result<Vec<IpNet>, String> = texts.map(parse).collect();
    let none = || format!("node {name} has no spec.podCIDR yet");
    Some(cidrs.and_then(|cidrs| if cidrs.is_empty() { Err(none()) } else { Ok(cidrs) }))
}

/// Whether an answer with status 404 means that there is no such node. Proxies send 404 pages of their own.
pub(super) fn says_no_such_node(status: &Value, name: &str) -> bool {
    status["kind"] == "Status"
        && status["reason"] == "NotFound"
        && status["details"]["name"] == name
        && status["details"]["kind"] == "nodes"
}

/// Returns the internal addresses of the other nodes in a list; `None` if the value is no list.
pub(super) fn others(nodes: &Value, name: &str) -> Option<Vec<IpAddr>> {
    let items = nodes["items"].as_array()?;
    let others = items.iter().filter(|node| node["metadata"]["name"] != name);
    let internal = |node: &Value| {
        let addresses = node["status"]["addresses"].as_array()?;
        let internal = addresses.iter().find(|address| address["type"] == "InternalIP")?;
        internal["address"].as_str()?.parse().ok()
    };
    Some(others.filter_map(internal).collect())
}

/// Returns the message in an error of the API server, or the beginning of another answer.
pub(super) fn reason(body: &[u8]) -> String {
    let status: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = String::from_utf8_lossy(body);
    shortened(status["message"].as_str().unwrap_or(text.trim()))
}

/// Returns a text cut to [`MAX_SHOWN_CHARS`].
pub(super) fn shortened(text: &str) -> String {
    let mut shown: String = text.chars().take(MAX_SHOWN_CHARS).collect();
    if shown.len() < text.len() {
        shown.push_str("...");
    }
    shown
}

/// Returns the first address of the slot that these subnets form, in any order.
///
/// # Errors
/// Fails with a remedy when they are not the subnets of one slot of the pool.
pub(crate) fn fit(cidrs: &[IpNet], pool: &Pool) -> Result<IpAddr, String> {
    let mut found = Vec::new();
    for (network, len) in divisions(pool) {
        let cidr = cidrs.iter().find(|cidr| is_ipv4(cidr) == is_ipv4(&network)).ok_or_else(|| {
            format!(
                "the podCIDRs {} have none for network {network}: leave that network out, or make Kubernetes \
                 assign subnets of it (--cluster-cidr)",
                listed(cidrs)
            )
        })?;
        if cidr.prefix_len() != len || cidr.trunc() != *cidr || !network.contains(cidr) {
            return Err(format!(
                "{cidr} is no subnet of length {len} of {network}: set network to the cluster's CIDR (of \
                 kube-controller-manager, or k3s server), and subnet_len to the nodes' mask"
            ));
        }
        found.push(*cidr);
    }
    let first = found.first().map(IpNet::network);
    let slot = first.and_then(|address| Some((address, pool.slot_at(address)?)));
    let (address, slot) = slot.ok_or_else(|| {
        format!("{} is outside the range from subnet_min to subnet_max", listed(&found))
    })?;
    if !pool.subnets(slot).iter().eq(found.iter().copied()) {
        let wanted: Vec<IpNet> = pool.subnets(slot).iter().collect();
        return Err(format!(
            "the podCIDRs {} have different offsets in their networks, and gossamer leases {} together: \
             delete the Node object, and restart its kubelet for a new pair",
            listed(&found),
            listed(&wanted)
        ));
    }
    Ok(address)
}

/// Logs the subnets of this node that are not used.
pub(crate) fn warn_of_unused(cidrs: &[IpNet], pool: &Pool) {
    let is_used = |cidr: &&IpNet| divisions(pool).any(|(network, _)| network.contains(*cidr));
    for cidr in cidrs.iter().filter(|cidr| !is_used(cidr)) {
        tracing::warn!(
            %cidr,
            "podCIDR not used: set both network and network6 for pods of both families"
        );
    }
}

/// Returns the networks of the pool, each with the prefix length of its subnets.
fn divisions(pool: &Pool) -> impl Iterator<Item = (IpNet, u8)> {
    [Some((pool.network(), pool.subnet_len())), pool.second()].into_iter().flatten()
}

const fn is_ipv4(network: &IpNet) -> bool {
    matches!(network, IpNet::V4(_))
}

fn listed(networks: &[IpNet]) -> String {
    networks.iter().map(IpNet::to_string).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::PoolSpec;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().expect("a network")).collect()
    }

    fn pool(network: &str, network6: Option<&str>) -> Pool {
        let network: IpNet = network.parse().expect("a network");
        let network6 = network6.map(|text| text.parse().expect("a network"));
        let subnet_min = Some(network.network());
        Pool::new(&PoolSpec { network6, subnet_min, ..PoolSpec::of(network) }).expect("a pool")
    }

    fn node(spec: &Value) -> Value {
        json!({ "kind": "Node", "metadata": { "name": "n1" }, "spec": spec })
    }

    #[test]
    fn cidrs_node_object_returns_all_pod_cidrs() {
        let both = json!({ "podCIDR": "fd00:1::/64", "podCIDRs": ["fd00:1::/64", "10.42.1.0/24"] });
        let two = Some(Ok(nets(&["fd00:1::/64", "10.42.1.0/24"])));
        assert_eq!(cidrs(&node(&both), "n1"), two);
        let one = json!({ "podCIDR": "10.42.1.0/24" });
        assert_eq!(cidrs(&node(&one), "n1"), Some(Ok(nets(&["10.42.1.0/24"]))));
        for (spec, why) in
            [(json!({}), "has no spec.podCIDR"), (json!({ "podCIDR": "x" }), "\"x\"")]
        {
            let error = cidrs(&node(&spec), "n1").expect("about this node").expect_err("nothing");
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn cidrs_other_object_returns_none() {
        let spec = json!({ "podCIDR": "10.42.1.0/24" });
        assert_eq!(cidrs(&node(&spec), "n2"), None);
        assert_eq!(cidrs(&json!({ "kind": "Status", "metadata": { "name": "n1" } }), "n1"), None);
        let gone = json!({
            "kind": "Status", "reason": "NotFound", "details": { "name": "n1", "kind": "nodes" },
        });
        assert!(says_no_such_node(&gone, "n1"));
        assert!(!says_no_such_node(&gone, "n2") && !says_no_such_node(&Value::Null, "n1"));
        assert!(!says_no_such_node(&json!({ "kind": "Status", "reason": "NotFound" }), "n1"));
    }

    #[test]
    fn fit_pod_cidrs_in_either_order_returns_the_first_address_of_the_slot() {
        let dual = pool("10.42.0.0/16", Some("fd00:42::/56"));
        let first: IpAddr = [10, 42, 3, 0].into();
        let (ipv4, ipv6) = ("10.42.3.0/24", "fd00:42:0:3::/64");
        assert_eq!(fit(&nets(&[ipv4, ipv6]), &dual), Ok(first));
        assert_eq!(fit(&nets(&[ipv6, ipv4]), &dual), Ok(first));
        assert_eq!(fit(&nets(&[ipv6, ipv4]), &pool("10.42.0.0/16", None)), Ok(first));
        let only6 = pool("fd00:42::/56", None);
        let address: IpAddr = "fd00:42:0:3::".parse().expect("an address");
        assert_eq!(fit(&nets(&[ipv4, ipv6]), &only6), Ok(address));
    }

    #[test]
    fn fit_pod_cidrs_of_no_slot_fails_with_a_remedy() {
        let dual = pool("10.42.0.0/16", Some("fd00:42::/56"));
        for (cidrs, why) in [
            (&["10.42.3.0/24"][..], "have none for network fd00:42::/56"),
            (&["10.42.3.0/25", "fd00:42:0:3::/64"], "10.42.3.0/25 is no subnet of length 24"),
            (&["10.43.3.0/24", "fd00:42:0:3::/64"], "no subnet of length 24 of 10.42.0.0/16"),
            (&["10.42.3.9/24", "fd00:42:0:3::/64"], "10.42.3.9/24 is no subnet"),
            (&["10.42.3.0/24", "fd00:42:0:4::/64"], "different offsets"),
        ] {
            let error = fit(&nets(cidrs), &dual).expect_err("no slot");
            assert!(error.contains(why), "{error}");
        }
        assert!(fit(&[], &dual).is_err());
    }

    #[test]
    fn others_returns_internal_addresses() {
        let node = |name: &str, kind: &str, address: &str| {
            let addresses = json!([{ "type": kind, "address": address }]);
            json!({ "metadata": { "name": name }, "status": { "addresses": addresses } })
        };
        let nodes = json!({ "items": [
            node("me", "InternalIP", "10.0.0.1"),
            node("other", "InternalIP", "10.0.0.2"),
            node("outside", "ExternalIP", "203.0.113.3"),
        ] });
        assert_eq!(others(&nodes, "me"), Some(vec![IpAddr::from([10, 0, 0, 2])]));
        assert_eq!(others(&Value::Null, "me"), None);
    }

    #[test]
    fn reason_of_a_long_answer_is_shortened() {
        assert_eq!(
            reason(br#"{"kind":"Status","message":"nodes is forbidden"}"#),
            "nodes is forbidden"
        );
        assert_eq!(reason(b"bad gateway\n"), "bad gateway");
        assert_eq!(reason("ä".repeat(5_000).as_bytes()).chars().count(), MAX_SHOWN_CHARS + 3);
    }
}

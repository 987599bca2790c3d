//! Dual-stack clusters, and the calls of a kubelet's runtime in them.

use serde_json::{Value, json};

use super::{api_server::ApiServer, manifests::start_as_kubelet, nodes};
use crate::{
    cni::{Runtime, namespaces},
    common::{TIMEOUT, client, isolated, new_token, run, skipped, tool},
};

const NETWORK6: &str = "fd00:42::/56";

/// Returns the addresses of a result, without prefix lengths.
fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().expect("addresses");
    let text = |ip: &Value| ip["address"].as_str().expect("an address").to_owned();
    ips.iter().map(|ip| text(ip).split('/').next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn dual_stack_pods_have_an_address_of_each_pod_cidr_in_either_order() {
    isolated(|lab| {
        let server = ApiServer::start()?;
        let hosts = nodes(lab, &server, 2)?;
        let token = new_token()?;
        for (number, host) in hosts.iter().enumerate() {
            let ip = format!("fd99::{}", number + 1);
            if !run(&host.netns, &format!("ip addr add {ip}/64 dev eth0 nodad")).status.success() {
                let test = "dual_stack_pods_have_an_address_of_each_pod_cidr_in_either_order";
                skipped(test, "the kernel has no IPv6");
                return Ok(());
            }
        }
        for ipv6_first in [false, true] {
            let mut agents = Vec::new();
            for (number, host) in hosts.iter().enumerate() {
                let slot = number + 3 + 2 * usize::from(ipv6_first);
                let (ip4, ip6) = (host.ip.to_string(), format!("fd99::{}", number + 1));
                let cidr4 = format!("10.42.{slot}.0/24");
                let cidr6 = format!("fd00:42:0:{slot:x}::/64");
                let (ip, cidrs) = match ipv6_first {
                    false => (ip4, [cidr4.as_str(), cidr6.as_str()]),
                    true => (ip6, [cidr6.as_str(), cidr4.as_str()]),
                };
                server.register(&host.name, &ip, &cidrs);
                let more = [("GOSSAMER_NETWORK6", NETWORK6)];
                agents.push(start_as_kubelet(host, &ip, &token, &server.variables(), &more)?);
            }
            for (number, agent) in agents.iter_mut().enumerate() {
                let status = agent.wait_converged(2, TIMEOUT)?;
                let slot = number + 3 + 2 * usize::from(ipv6_first);
                assert_eq!(status["subnet"], format!("10.42.{slot}.0/24"));
                assert_eq!(status["subnet6"], format!("fd00:42:0:{slot:x}::/64"));
                let underlay = status["kernel"]["underlay_address"].to_string();
                assert_eq!(underlay.contains("fd99::"), ipv6_first, "{underlay}");
            }
            check_runtime_calls(&agents[0], &agents[1], if ipv6_first { "six" } else { "four" })?;
            drop(agents);
            for host in &hosts {
                std::fs::remove_dir_all(host.dir.join("state"))?;
                tool(&host.netns, "ip link del gossamer.1");
                tool(&host.netns, "ip link del gsm0");
            }
        }
        Ok(())
    });
}

/// Makes the calls of containerd and CRI-O for two pods of a node, with a pod of another node.
fn check_runtime_calls(
    one: &gossamer::lab::Agent,
    other: &gossamer::lab::Agent,
    suffix: &str,
) -> anyhow::Result<()> {
    let [a_name, b_name, far_name] =
        ["a", "b", "far"].map(|name| format!("{name}-of-the-nodes-{suffix}"));
    let (a_name, b_name, far_name) = (a_name.as_str(), b_name.as_str(), far_name.as_str());
    let spaces = namespaces(&[a_name, b_name, far_name])?;
    let (runtime, there) = (Runtime::new(one), Runtime::new(other));
    let done = |runtime: &Runtime<'_>, verb: &str, name: &str, more: &Value| {
        let (done, said) = runtime.call(verb, name, more);
        assert!(done, "{verb} {name}: {said}");
    };
    done(&runtime, "STATUS", a_name, &json!({}));
    let (a, b, far) = (runtime.add(a_name), runtime.add(b_name), there.add(far_name));
    for result in [&a, &b] {
        assert_eq!(addresses(result).len(), 2, "{result}");
    }
    // Runtimes identify pods by their full ids.
    let listed = client(one, &["pods", "-o", "wide"]).stdout;
    assert!(String::from_utf8_lossy(&listed).contains(a_name));
    done(&runtime, "CHECK", a_name, &json!({ "prevResult": a }));
    for ip in addresses(&far).iter().chain(&addresses(&b)) {
        tool(&spaces[0], &format!("ping -c 1 -W 5 {ip}"));
    }
    // A kubelet's GC lists the remaining pods, and DEL is repeated.
    let left =
        json!({ "cni.dev/valid-attachments": [{ "containerID": a_name, "ifname": "eth0" }] });
    done(&runtime, "GC", a_name, &left);
    let (code, _) = runtime.refused("CHECK", b_name, &json!({ "prevResult": b }));
    assert!(code > 0);
    done(&runtime, "CHECK", a_name, &json!({ "prevResult": a }));
    runtime.del(b_name);
    runtime.del(a_name);
    runtime.del(a_name);
    done(&runtime, "STATUS", a_name, &json!({}));
    there.del(far_name);
    Ok(())
}

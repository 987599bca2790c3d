//! Unusual pods: with a second interface, their own MAC, or a namespace without a name.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use gossamer::lab::{Agent, Host, NetNs, Pinger};
use serde_json::{Value, json};

use crate::{
    cni::{Runtime, address, namespaces, pods, veths},
    common::{Cluster, TIMEOUT, isolated, program, run, skipped, status_where, tool, wait_until},
};

fn gateway(result: &Value) -> &str {
    result["ips"][0]["gateway"].as_str().expect("a gateway")
}

fn ping(from: &NetNs, to: &str) {
    let ping = format!("ping -c 1 -W 2 {to}");
    wait_until("it is not reached", TIMEOUT, || run(from, &ping).status.success());
}

#[test]
fn first_packet_to_a_new_pod_arrives() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let runtime = Runtime::new(&cluster.agents[0]);
        // This host knows the pod's MAC, so it neither queries nor retransmits anything.
        let mut pinger = Pinger::new(&cluster.hosts[0].netns)?;
        for round in 0..40 {
            let name = format!("pod{round}");
            let _space = NetNs::new(&name)?;
            let pod = address(&runtime.add(&name)).parse()?;
            let answered = pinger.ping(pod, TIMEOUT)?;
            assert!(answered.is_some(), "round {round}: one packet was lost");
            runtime.del(&name);
        }
        Ok(())
    });
}

#[test]
fn second_interface_gets_its_own_address_and_the_first_keeps_the_default_route() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 2)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let first = runtime.add("a");
        let second = [("CNI_IFNAME", "net1")];
        let (done, other) = runtime.call_with("ADD", "a", &second, &json!({ "name": "second" }));
        assert!(done && address(&other) != address(&first), "{other}");
        let default = tool(&spaces[0], "ip route show default");
        assert!(default.lines().count() == 1 && default.contains("dev eth0"), "{default}");
        // The result must match the kernel.
        assert_eq!((&other["routes"], other["ips"][0]["gateway"].is_string()), (&json!([]), true));
        assert!(tool(&spaces[0], "ip addr show net1").contains(&address(&other)));
        // Both addresses can be reached, from this host and from the other one.
        runtime.add("b");
        Runtime::new(&cluster.agents[1]).add("c");
        for (from, result) in [(1, &first), (1, &other), (2, &first), (2, &other)] {
            ping(&spaces[from], &address(result));
        }
        ping(&cluster.hosts[0].netns, &address(&other));
        for (interface, name) in [("eth0", "pods"), ("net1", "second")] {
            let checked = [("CNI_IFNAME", interface)];
            let (whole, why) = runtime.call_with("CHECK", "a", &checked, &json!({ "name": name }));
            assert!(whole, "{why}");
        }
        assert!(runtime.call_with("DEL", "a", &second, &json!({ "name": "second" })).0);
        wait_until("its veth pair is gone", TIMEOUT, || veths(&cluster.hosts[0]) == 2);
        ping(&spaces[2], &address(&first));
        assert!(tool(&spaces[0], "ip route show default").contains("dev eth0"));
        Ok(())
    });
}

#[test]
fn remaining_interface_gets_the_routes_of_a_removed_one() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a", "b"])?;
        let second = [("CNI_IFNAME", "net1")];
        let routes = |space: &NetNs, to: &str| {
            ["-4", "-6"].map(|family| tool(space, &format!("ip {family} route show {to}")))
        };
        for (space, name, more) in
            [(&spaces[0], "a", json!({})), (&spaces[1], "b", json!({ "isDefaultGateway": false }))]
        {
            let runtime = Runtime::new(&agent);
            runtime.add(name);
            let defaults = routes(space, "default");
            let (done, result) = runtime.call_with("ADD", name, &second, &more);
            assert!(done, "{result}");
            // The agent reads the request for these routes back from the kernel.
            agent.end(nix::sys::signal::Signal::SIGKILL)?;
            agent = Agent::start(program(), &host, &[])?;
            agent.wait_converged(1, TIMEOUT)?;
            Runtime::new(&agent).del(name);
            wait_until("its veth pair is gone", TIMEOUT, || {
                !run(space, "ip link show eth0").status.success()
            });
            let now = routes(space, "default");
            if name == "a" {
                assert_eq!(now, defaults.map(|text| text.replace("eth0", "net1")));
            } else {
                assert_eq!(now, ["", ""]);
                let networks = ["-4 route show 10.42.0.0/16", "-6 route show fd42::/48"]
                    .map(|command| tool(space, &format!("ip {command}")));
                assert!(networks.iter().all(|route| route.contains("dev net1")), "{networks:?}");
            }
        }
        Ok(())
    });
}

#[test]
fn remaining_interface_gets_the_routes_of_one_removed_without_an_agent() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.add("a");
        let second = [("CNI_IFNAME", "net1")];
        let (done, result) = runtime.call_with("ADD", "a", &second, &json!({}));
        assert!(done, "{result}");
        let default = || tool(&spaces[0], "ip route show default");
        let before = default();
        cluster.agents[0].end(nix::sys::signal::Signal::SIGKILL)?;
        Runtime::new(&cluster.agents[0]).del("a");
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        cluster.converge()?;
        wait_until("its veth pair is gone", TIMEOUT, || {
            !run(&spaces[0], "ip link show eth0").status.success()
        });
        assert_eq!(default(), before.replace("eth0", "net1"));
        Ok(())
    });
}

#[test]
fn existing_default_route_is_kept_and_the_overlay_gets_its_own_route() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 2)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        // The state that another plugin leaves; gossamer must keep it whatever its metric is.
        tool(&spaces[0], "ip link add eth0 type bridge");
        tool(&spaces[0], "ip addr add 192.0.2.2/24 dev eth0");
        tool(&spaces[0], "ip link set eth0 up");
        tool(&spaces[0], "ip route add default via 192.0.2.1 metric 100");
        let runtime = Runtime::new(&cluster.agents[0]);
        let (done, net1) = runtime.call_with("ADD", "a", &[("CNI_IFNAME", "net1")], &json!({}));
        assert!(done, "{net1}");
        let none = json!({ "isDefaultGateway": false });
        let (done, b) = runtime.call("ADD", "b", &none);
        assert!(done, "{b}");
        assert_eq!(tool(&spaces[1], "ip route show default"), "");
        let default = tool(&spaces[0], "ip route show default");
        assert!(default.lines().count() == 1 && default.contains("192.0.2.1"), "{default}");
        let c = Runtime::new(&cluster.agents[1]).add("c");
        for (space, result) in [(&spaces[0], &net1), (&spaces[1], &b)] {
            let wanted = json!([{ "dst": "10.42.0.0/16", "gw": gateway(result) }]);
            assert_eq!(result["routes"], wanted);
            ping(space, &address(&c));
            ping(&spaces[2], &address(result));
        }
        Ok(())
    });
}

/// Creates a script that starts the agent with the capabilities of the systemd unit.
fn with_few_capabilities(host: &Host) -> PathBuf {
    let script = host.dir.join("gossamer-with-few-capabilities");
    let text = format!(
        "#!/bin/sh\nexec setpriv --bounding-set=-all,+net_admin,+net_raw,+sys_admin \\\n  \
         --inh-caps=-all {} \"$@\"\n",
        program().display()
    );
    fs::write(&script, text).expect("written");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("changed");
    script
}

#[test]
fn namespace_given_by_process_path_needs_no_extra_capability() {
    if Command::new("setpriv").arg("--version").output().is_err() {
        return skipped(
            "namespace_given_by_process_path_needs_no_extra_capability",
            "setpriv (util-linux) is not installed",
        );
    }
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let few = with_few_capabilities(&host);
        let mut agent = Agent::start(&few, &host, &["--init"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let mut container = Command::new("unshare")
            .args(["--net", "sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()?;
        let path = format!("/proc/{}/ns/net", container.id());
        let own = fs::read_link("/proc/self/ns/net")?;
        wait_until("it has a namespace", TIMEOUT, || {
            fs::read_link(&path).is_ok_and(|netns| netns != own)
        });
        let named = [("CNI_NETNS", path.as_str())];
        let runtime = Runtime::new(&agent);
        let (done, added) = runtime.call_with("ADD", "c", &named, &json!({}));
        assert!(done && added["interfaces"][2]["sandbox"] == path.as_str(), "{added}");
        ping(&host.netns, &address(&added));
        assert!(runtime.call_with("CHECK", "c", &named, &json!({ "prevResult": added })).0);
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        let mut agent = Agent::start(&few, &host, &[])?;
        agent.wait_converged(1, TIMEOUT)?;
        let runtime = Runtime::new(&agent);
        let (whole, why) = runtime.call_with("CHECK", "c", &named, &json!({}));
        assert!(whole, "{why}");
        ping(&host.netns, &address(&added));
        // Its end is detected as that of any other pod.
        container.kill()?;
        container.wait()?;
        wait_until("its veth pair is gone", TIMEOUT, || veths(&host) == 0);
        status_where(&mut agent, |status| status["pods"] == 0);
        let runtime = Runtime::new(&agent);
        assert!(runtime.call_with("DEL", "c", &named, &json!({})).0);
        assert_eq!(pods(&mut agent), 0);
        Ok(())
    });
}

#[test]
fn host_namespace_is_rejected_and_keeps_its_routes() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = &cluster.hosts[0].netns;
        let routes = tool(host, "ip route show default");
        let runtime = Runtime::new(&cluster.agents[0]);
        // The namespace of the agent, by its process; and that of the plugin itself.
        let agents = format!("/proc/{}/ns/net", cluster.agents[0].pid());
        for path in [agents.as_str(), "/proc/self/ns/net"] {
            for verb in ["ADD", "CHECK"] {
                let named = [("CNI_NETNS", path), ("CNI_IFNAME", "eth9")];
                let (done, error) = runtime.call_with(verb, "c", &named, &json!({}));
                assert!(!done, "{verb} {path}: {error}");
                if verb == "ADD" {
                    let why = error["msg"].as_str().expect("a text");
                    assert!(error["code"] == 4 && why.contains("this host's own"), "{error}");
                }
            }
        }
        assert_eq!(tool(host, "ip route show default"), routes);
        assert!(!run(host, "ip link show eth9").status.success());
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        Ok(())
    });
}

#[test]
fn ipv6_disabled_in_a_namespace_is_enabled_on_the_pods_interface_only() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a", "b"])?;
        spaces[0].sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        spaces[1].sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
        let runtime = Runtime::new(&agent);
        for space in &spaces {
            let added = runtime.add(space.name());
            let gateway = added["ips"][1]["gateway"].as_str().expect("a gateway");
            assert!(gateway.starts_with("fd42:"), "{added}");
            ping(space, gateway);
            // The setting for all other interfaces is unchanged.
            tool(space, "ip link add other type bridge");
            tool(space, "ip link set other up");
            assert_eq!(tool(space, "ip -6 addr show dev other"), "");
        }
        Ok(())
    });
}

#[test]
fn requested_mac_is_used_kept_over_restarts_and_given_to_one_pod_only() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let mac = "02:12:34:56:78:9a";
        let wish = json!({ "runtimeConfig": { "mac": mac } });
        let (done, a) = runtime.call("ADD", "a", &wish);
        assert!(done && a["interfaces"][2]["mac"] == mac, "{a}");
        assert!(tool(&spaces[0], "ip link show dev eth0").contains(mac));
        ping(&spaces[0], gateway(&a));
        let (code, why) = runtime.refused("ADD", "b", &wish);
        assert!(code == 101 && why.contains("a eth0 has it"), "{code} {why}");
        let (code, why) = runtime.refused("ADD", "b", &json!({ "mac": "0a:58:0a:2a:00:01" }));
        assert!(code == 101 && why.contains("0a:58"), "{code} {why}");
        // MACs that this host itself uses at the bridge, and the MAC of the agent's trial pod.
        let gateway_of_a = gateway(&a).to_owned();
        let (net, _) = gateway_of_a.rsplit_once('.').expect("dots");
        let octets: Vec<String> = net
            .split('.')
            .map(|octet| format!("{:02x}", octet.parse::<u8>().expect("a number")))
            .collect();
        let of_trial = format!("0e:58:{}:fe", octets.join(":"));
        let host = &cluster.hosts[0].netns;
        let port = a["interfaces"][1]["name"].as_str().expect("a name");
        let shown = tool(host, &format!("ip -br link show dev {port}"));
        let of_port = shown.split_whitespace().nth(2).expect("a MAC").to_owned();
        for taken in [of_trial, of_port] {
            let (_, why) =
                runtime.refused("ADD", "b", &json!({ "runtimeConfig": { "mac": taken } }));
            assert!(why.contains(&taken) && why.contains("this host"), "{taken}: {why}");
        }
        let arguments = [("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=b;MAC=02-12-34-56-78-9B")];
        let (done, b) = runtime.call_with("ADD", "b", &arguments, &json!({}));
        assert!(done && b["interfaces"][2]["mac"] == "02:12:34:56:78:9b", "{b}");

        cluster.restart(0, &[])?;
        // The anti-spoofing table is re-created.
        run(&cluster.hosts[0].netns, "nft delete table bridge gossamer.1");
        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.add("c");
        ping(&spaces[0], gateway(&a));
        ping(&spaces[1], &address(&a));
        assert!(runtime.call("CHECK", "a", &json!({ "prevResult": a })).0);
        // A MAC set by another plugin is reported, because packets from it are dropped.
        tool(&spaces[2], "ip link set eth0 address 02:00:00:00:00:01");
        let (code, why) = runtime.refused("CHECK", "c", &json!({}));
        assert!(code == 5 && why.contains("capability mac"), "{code} {why}");
        // A released MAC may be assigned again.
        runtime.del("a");
        tool(&spaces[2], "ip link set eth0 down");
        runtime.del("c");
        let (done, c) = runtime.call("ADD", "c", &wish);
        assert!(done && c["interfaces"][2]["mac"] == mac, "{c}");
        Ok(())
    });
}

#[test]
fn changed_mac_of_an_address_is_announced_to_neighbors_at_once() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["neighbor", "a", "b", "c"])?;
        let runtime = Runtime::new(&agent);
        runtime.add("neighbor");
        let both = |result: &Value| {
            [0, 1].map(|family: usize| {
                let text = result["ips"][family]["address"].as_str().expect("an address");
                text.split('/').next().expect("an address").to_owned()
            })
        };
        let first = json!({ "runtimeConfig": { "mac": "02:00:00:00:00:01" } });
        let (done, a) = runtime.call("ADD", "a", &first);
        assert!(done, "{a}");
        let addresses = both(&a);
        addresses.iter().for_each(|address| ping(&spaces[0], address));
        runtime.del("a");
        // One pod with a requested MAC, and one with the MAC derived from the address.
        let ips = json!([addresses[0]]);
        for (name, mac) in [("b", Some("02:00:00:00:00:02")), ("c", None)] {
            let wish = json!({ "runtimeConfig": { "ips": ips, "mac": mac } });
            let (done, result) = runtime.call("ADD", name, &wish);
            assert!(done && both(&result) == addresses, "{result}");
            let mac = result["interfaces"][2]["mac"].as_str().expect("a MAC");
            for address in &addresses {
                let shown = tool(&spaces[0], &format!("ip neigh show {address}"));
                assert!(shown.contains(mac), "{name} has {mac}: {shown}");
                ping(&spaces[0], address);
            }
            runtime.del(name);
        }
        // The MAC derived from the IPv4 address, whichever address comes first.
        let octets = addresses[0].parse::<std::net::Ipv4Addr>()?.octets();
        let octets = octets.map(|octet| format!("{octet:02x}")).join(":");
        let ips = json!([addresses[1], addresses[0]]);
        let wish = json!({ "runtimeConfig": { "ips": ips, "mac": format!("0a:58:{octets}") } });
        let (done, c) = runtime.call("ADD", "c", &wish);
        assert!(done, "{c}");
        Ok(())
    });
}

//! Packets to unused addresses of a host's subnet are rejected before the kernel looks for a neighbor.

use std::{
    net::{Ipv6Addr, UdpSocket},
    thread,
    time::Duration,
};

use gossamer::lab::{Agent, Lab, NetNs, Pinger};
use nix::sys::signal::Signal;

use crate::{
    cni::{Runtime, namespaces},
    common::{
        Cluster, TIMEOUT, assert_logged, client, eventually, has_problem, isolated, program, run,
        sh, status_where, token_of, tool, wait_until,
    },
};

/// Number of addresses; more than any default of `net.ipv6.neigh.default.gc_thresh3`.
const FLOOD: u32 = 3_000;
const LIST_REJECT_TABLE: &str = "nft list table inet gossamer.1-pods";

/// Starts two hosts with both families; the first one has 10.42.7.0/24.
fn cluster(lab: &mut Lab) -> anyhow::Result<Cluster> {
    let first = lab.host(1, "n1")?;
    let overlay = ["--init", "--network6", "fd42::/48", "--prefer-subnet", "10.42.7.0"];
    let mut agent = Agent::start(program(), &first, &overlay)?;
    agent.wait_converged(1, TIMEOUT)?;
    let token = token_of(&mut agent)?;
    let mut cluster = Cluster { hosts: vec![first], agents: vec![agent], token };
    cluster.join(lab, 2)?;
    cluster.converge()?;
    Ok(cluster)
}

/// Sends a datagram to each of many addresses of the first host's subnet.
fn flood(from: &NetNs) -> anyhow::Result<()> {
    Ok(from.run(|| {
        let socket = UdpSocket::bind("[::]:0")?;
        for number in 0x1_0000..0x1_0000 + FLOOD {
            let [high, low] = [number >> 16, number & 0xffff].map(|part| part as u16);
            // A rejection is an error here, from this host or by a message of the other one.
            let _ = socket.send_to(b"x", (Ipv6Addr::new(0xfd42, 0, 0, 7, 0, 0, high, low), 9));
        }
        Ok(())
    })?)
}

/// Returns the entries for addresses of the subnets on the pods' bridge, except those of pods.
fn entries_of_non_pods(host: &NetNs, pods: &[String]) -> Vec<String> {
    let all = tool(host, "ip neigh show nud all dev gsm0");
    let of_subnet = |line: &&str| line.starts_with("fd42:") || line.starts_with("10.42.");
    let is_pods = |line: &str| pods.iter().any(|ip| line.starts_with(&format!("{ip} ")));
    all.lines().filter(of_subnet).filter(|line| !is_pods(line)).map(str::to_owned).collect()
}

fn addresses(added: &serde_json::Value) -> Vec<String> {
    let ips = added["ips"].as_array().expect("addresses");
    let text = |ip: &serde_json::Value| ip["address"].as_str().expect("an address").to_owned();
    ips.iter().map(text).map(|ip| ip.split('/').next().expect("an address").to_owned()).collect()
}

fn reaches(from: &NetNs, to: &str) -> bool {
    run(from, &format!("ping -c 1 -W 2 {to}")).status.success()
}

#[test]
fn packets_to_unused_addresses_create_no_neighbors_and_new_pods_are_reachable() {
    isolated(|lab| {
        let mut cluster = cluster(lab)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let mut known = addresses(&Runtime::new(&cluster.agents[0]).add("a"));
        Runtime::new(&cluster.agents[1]).add("b");
        let host = &cluster.hosts[0].netns;
        eventually(host, LIST_REJECT_TABLE, |text| text.contains(&known[0]));
        known.extend(["10.42.7.254", "fd42:0:0:7::fe"].map(str::to_owned));

        // The sender is notified at once; the kernel alone would take three seconds.
        for unused in ["10.42.7.99", "fd42:0:0:7::99"] {
            let said = run(&spaces[1], &format!("ping -c 1 -W 2 {unused}"));
            let said = String::from_utf8(said.stdout)?;
            assert!(said.to_lowercase().contains("unreachable"), "{said}");
        }
        // From a pod elsewhere, and from this host itself.
        for source in [&spaces[1], host] {
            flood(source)?;
            let _ = run(source, "ping -c 1 -W 1 10.42.7.98");
            let malformed = entries_of_non_pods(host, &known);
            assert!(malformed.len() < 5, "{} entries: {:?}", malformed.len(), malformed.first());
        }
        let added = addresses(&Runtime::new(&cluster.agents[0]).add("c"));
        for address in known.iter().take(2).chain(&added) {
            // A new bridge resolves no address until the duplicate detection of its own address has
            // ended.
            wait_until(address, TIMEOUT, || reaches(&spaces[1], address));
        }

        // Changes by other programs are repaired; a restart loses no packet; a removed pod is rejected.
        tool(host, "nft delete table inet gossamer.1-pods");
        eventually(host, LIST_REJECT_TABLE, |text| {
            text.contains(&added[0]) && text.contains("reject")
        });
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["repairs"]["anti-spoofing"].as_u64() >= Some(1)
        });
        let (mut pinger, to) = (Pinger::new(&spaces[1])?, added[0].parse()?);
        let pinging = thread::spawn(move || pinger.stream(to, 300, Duration::from_millis(10)));
        cluster.agents[0].end(Signal::SIGTERM)?;
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        cluster.agents[0].wait_converged(2, TIMEOUT)?;
        assert_eq!(pinging.join().expect("the pinger ends")?, 300);
        Runtime::new(&cluster.agents[0]).del("c");
        eventually(host, LIST_REJECT_TABLE, |text| !text.contains(&added[0]));
        assert!(reaches(&spaces[1], &known[0]) && !reaches(&spaces[1], &added[0]));
        Ok(())
    });
}

#[test]
fn foreign_port_on_the_bridge_is_reachable() {
    isolated(|lab| {
        let mut cluster = cluster(lab)?;
        let spaces = namespaces(&["a", "b"])?;
        Runtime::new(&cluster.agents[0]).add("a");
        Runtime::new(&cluster.agents[1]).add("b");
        let host = &cluster.hosts[0].netns;
        eventually(host, LIST_REJECT_TABLE, |text| text.contains("reject"));
        let other = NetNs::new("other")?;
        tool(host, "ip link add other0 type veth peer name eth0 netns other");
        for command in [
            "ip addr add 10.42.7.99/24 dev eth0",
            "ip link set eth0 up",
            "ip route add default via 10.42.7.1",
        ] {
            tool(&other, command);
        }
        tool(host, "ip link set other0 master gsm0 up");
        eventually(&spaces[1], "ping -c 1 -W 1 10.42.7.99", |said| {
            said.contains(" 0% packet loss")
        });
        tool(host, "ip link set other0 nomaster");
        eventually(host, LIST_REJECT_TABLE, |text| text.contains("reject"));
        cluster.converge()?;
        Ok(())
    });
}

/// gossamer owns the MTU of a port and the entries of pods, and repairs changes by other programs.
#[test]
fn changed_neighbor_entry_and_port_mtu_of_a_pod_are_repaired() {
    isolated(|lab| {
        let cluster = cluster(lab)?;
        let _spaces = namespaces(&["a"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let pod = addresses(&runtime.add("a"));
        let host = &cluster.hosts[0].netns;
        let mac = "lladdr 0a:58:0a:2a:07:02 PERMANENT";
        for ip in &pod {
            eventually(host, &format!("ip neigh show {ip} dev gsm0"), |text| text.contains(mac));
            let wrong =
                format!("ip neigh replace {ip} lladdr 02:00:00:00:00:99 nud permanent dev gsm0");
            tool(host, &wrong);
        }
        let ports = tool(host, "ip -br link show master gsm0 type veth");
        let port = ports.split(['@', ' ']).find(|name| name.starts_with("gsm")).expect("a port");
        tool(host, &format!("ip link set {port} mtu 1200"));
        for ip in &pod {
            eventually(host, &format!("ip neigh show {ip} dev gsm0"), |text| text.contains(mac));
            wait_until(ip, TIMEOUT, || reaches(host, ip));
        }
        eventually(host, &format!("ip link show {port}"), |text| text.contains("mtu 1450"));
        runtime.del("a");
        eventually(host, "ip neigh show dev gsm0 nud permanent", |text| !text.contains(&pod[0]));
        Ok(())
    });
}

/// Otherwise the kernel would evict them first when a pod fills the table, which all namespaces share.
#[test]
fn neighbor_entries_of_next_hops_and_gateways_persist_and_follow_mac_changes() {
    isolated(|lab| {
        let cluster = cluster(lab)?;
        let spaces = namespaces(&["a"])?;
        Runtime::new(&cluster.agents[0]).add("a");
        for gateway in ["10.42.7.1", "fd42:0:0:7::1"] {
            let entry = tool(&spaces[0], &format!("ip neigh show {gateway} dev eth0"));
            assert!(entry.contains("lladdr") && entry.contains("extern_learn"), "{entry}");
            assert!(reaches(&spaces[0], gateway), "{gateway}");
        }
        let (host, peer) = (&cluster.hosts[0].netns, &cluster.hosts[1].netns);
        let show = format!("ip neigh show {} dev eth0 nud all", cluster.hosts[1].ip);
        let stays = |text: &str| text.contains("extern_learn") && text.contains("lladdr");
        eventually(host, &show, stays);
        let mac = "02:00:00:00:00:77";
        tool(peer, &format!("ip link set eth0 address {mac}"));
        eventually(host, &show, |text| stays(text) && text.contains(mac));
        tool(host, &format!("ip neigh del {} dev eth0", cluster.hosts[1].ip));
        eventually(host, &show, |text| stays(text) && text.contains(mac));
        assert!(reaches(host, &cluster.hosts[1].ip.to_string()));

        let left = client(&cluster.agents[1], &["leave"]);
        assert!(left.status.success(), "{left:?}");
        eventually(host, &show, |text| !text.contains("extern_learn"));
        let of_peer = format!("ip neigh show {} dev eth0 nud all", cluster.hosts[0].ip);
        eventually(peer, &of_peer, |text| !text.contains("extern_learn"));
        Ok(())
    });
}

/// No later process knows which next hops an earlier one has protected.
#[test]
fn forgotten_node_that_restarts_releases_neighbor_entries_that_an_earlier_process_protected() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.agents[1].end(Signal::SIGKILL)?;
        // Its kernel still answers.
        let forget = ["forget", "--force", "--yes", "n2"];
        assert!(client(&cluster.agents[0], &forget).status.success());
        let host = &cluster.hosts[1];
        let entry =
            "10.99.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud stale extern_learn protocol 73";
        tool(&host.netns, &format!("ip neigh replace {entry}"));
        let show = "ip neigh show 10.99.0.77 dev eth0 nud all";
        assert!(tool(&host.netns, show).contains("extern_learn"));
        cluster.agents[1] = Agent::start(program(), host, &[])?;
        eventually(&host.netns, show, |text| !text.contains("extern_learn"));
        assert_logged(&cluster.agents[1], "this node was forgotten by the cluster");
        Ok(())
    });
}

/// A firewall of bridges that drops address resolution between pods, and no other packets.
#[test]
fn chain_that_blocks_address_resolution_between_pods_is_reported_until_removed() {
    isolated(|lab| {
        let mut cluster = cluster(lab)?;
        let spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.add("a");
        let other = addresses(&runtime.add("b"));
        let (host, agent) = (&cluster.hosts[0].netns, &mut cluster.agents[0]);
        for (family, rule, address) in [
            (4, "ether type arp", &other[0]),
            (4, "arp operation reply", &other[0]),
            (6, "icmpv6 type nd-neighbor-solicit", &other[1]),
            (6, "icmpv6 type nd-neighbor-advert", &other[1]),
        ] {
            let reaches = || {
                run(&spaces[0], "ip neigh flush all");
                run(&spaces[1], "ip neigh flush all");
                run(&spaces[0], &format!("ping -c 1 -W 1 {address}")).status.success()
            };
            sh(
                host,
                &format!(
                    "nft add table bridge wall && \
                     nft add chain bridge wall f {{ type filter hook forward priority 0 ; }} && \
                     nft add rule bridge wall f {rule} drop"
                ),
            );
            assert!(!reaches(), "{rule}: the case is another one");
            let words = format!("pods of this host do not find each other (IPv{family})");
            wait_until(rule, TIMEOUT, || {
                has_problem(agent, &words)
                    && has_problem(agent, "chain bridge wall f (hook forward) has rules that drop")
            });
            let shown = String::from_utf8(client(agent, &["doctor"]).stdout)?;
            assert!(shown.contains("PROBLEM   forwarding     pods of this host"), "{shown}");
            sh(host, "nft delete table bridge wall");
            status_where(agent, |status| status["problems"] == serde_json::json!([]));
            assert!(reaches());
        }
        // Where all packets pass, the check succeeds.
        sh(
            host,
            "nft add table bridge wall && \
             nft add chain bridge wall f { type filter hook forward priority 0 ; } && \
             nft add rule bridge wall f ip daddr 192.0.2.1 drop",
        );
        status_where(agent, |status| {
            let forwarding = &status["kernel"]["forwarding"];
            let detail = forwarding["detail"].as_str().unwrap_or_default();
            forwarding["state"] == "ok"
                && ["IPv4 neighbors", "IPv6 neighbors"].iter().all(|words| detail.contains(words))
        });
        Ok(())
    });
}

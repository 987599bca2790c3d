//! Pods that give back to the bridge what comes to them: frames that would go round for ever.

use std::{
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use gossamer::lab::NetNs;
use serde_json::json;

use crate::{
    cni::{Runtime, address, namespaces},
    common::{Cluster, TIMEOUT, has_problem, isolated, run, sh, skipped, tool, wait_until},
};

/// Many more than the kernels of a few pods send of their own accord in a second.
const ROUND_AND_ROUND: u64 = 500;

/// How many packets have come to a pod.
fn received(pod: &NetNs) -> u64 {
    let interfaces = tool(pod, "cat /proc/net/dev");
    let own = interfaces.lines().find_map(|line| line.trim_start().strip_prefix("eth0:"));
    let packets = own.and_then(|numbers| numbers.split_whitespace().nth(1)?.parse().ok());
    packets.expect("a number")
}

/// Has a pod that bridges these interfaces ask by broadcast for an address that nothing has; says how many
/// packets come to another pod within a second. Takes the bridge away then.
fn asks_while_bridging(pod: &NetNs, interfaces: &[&str], own: &str, other: &NetNs) -> u64 {
    sh(pod, "ip link add loop0 type bridge && ip link set loop0 up");
    for interface in interfaces {
        sh(pod, &format!("ip addr flush dev {interface} && ip link set {interface} up"));
        sh(pod, &format!("ip link set {interface} master loop0"));
        sh(pod, &format!("bridge link set dev {interface} hairpin on"));
    }
    tool(pod, &format!("ip addr add {own}/24 dev loop0"));
    let (subnet, _) = own.rsplit_once('.').expect("dots");
    let before = received(other);
    run(pod, &format!("ping -c 1 -W 1 {subnet}.99"));
    let count = received(other) - before;
    tool(pod, "ip link del loop0");
    count
}

#[test]
fn pod_that_sends_back_what_comes_to_it_makes_no_loop() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let own = address(&runtime.add("a"));
        runtime.add("b");
        let count = asks_while_bridging(&spaces[0], &["eth0"], &own, &spaces[1]);
        assert!((1..ROUND_AND_ROUND).contains(&count), "{count} packets");
        // By two interfaces of its own.
        let variables = [("CNI_IFNAME", "eth1")];
        let (done, second) = runtime.call_with("ADD", "a", &variables, &json!({}));
        assert!(done, "{second}");
        let count = asks_while_bridging(&spaces[0], &["eth0", "eth1"], &own, &spaces[1]);
        assert!((1..ROUND_AND_ROUND).contains(&count), "{count} packets");
        Ok(())
    });
}

/// Where rules for forwarded packets see those between ports of a bridge, such a packet leaves the bridge by
/// the port by which it came.
#[test]
fn pod_reaches_itself_by_the_address_of_a_service() {
    isolated(|lab| {
        let test = "pod_reaches_itself_by_the_address_of_a_service";
        let cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a"])?;
        let own = address(&Runtime::new(&cluster.agents[0]).add("a"));
        let host = &cluster.hosts[0].netns;
        if !run(host, "sysctl -w net.bridge.bridge-nf-call-iptables=1").status.success() {
            skipped(test, "rules for forwarded packets do not see those of bridges here");
            return Ok(());
        }
        let (subnet, _) = own.rsplit_once('.').expect("dots");
        let service = format!("{subnet}.200");
        sh(
            host,
            &format!(
                "nft add table ip services && \
                 nft add chain ip services pre {{ type nat hook prerouting priority -100 ; }} && \
                 nft add chain ip services post {{ type nat hook postrouting priority 100 ; }} && \
                 nft add rule ip services pre ip daddr {service} dnat to {own} && \
                 nft add rule ip services post ip saddr {own} ip daddr {own} counter masquerade"
            ),
        );
        // Of the gateway: packets to the service come to the host as they come to a router.
        let gateway = format!("{subnet}.1");
        tool(&spaces[0], &format!("ip route add {service}/32 via {gateway} dev eth0"));
        wait_until("the pod does not reach itself", TIMEOUT, || {
            run(&spaces[0], &format!("ping -c 1 -W 1 {service}")).status.success()
        });
        let rules = tool(host, "nft list table ip services");
        assert!(!rules.contains("counter packets 0 "), "not by the rule: {rules}");
        Ok(())
    });
}

#[test]
fn pod_that_floods_groups_is_slowed_down_and_told_and_its_other_packets_pass() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b"])?;
        let socket = cluster.agents[0].socket().to_owned();
        let runtime = Runtime::at(&socket);
        let own: Ipv4Addr = address(&runtime.add("a")).parse()?;
        let other = address(&runtime.add("b"));
        tool(&spaces[0], &format!("ping -c 1 -W 2 {other}"));
        let [a, b, c, _] = own.octets();
        let flood = |packets: u32| {
            let (before, begun) = (received(&spaces[1]), Instant::now());
            let sent = spaces[0].run(|| {
                let socket = UdpSocket::bind((own, 0))?;
                socket.set_broadcast(true)?;
                for _ in 0..packets {
                    socket.send_to(b"x", (Ipv4Addr::new(a, b, c, 255), 9))?;
                }
                Ok(())
            });
            sent.map(|()| (received(&spaces[1]) - before, begun.elapsed()))
        };
        // As many as services that look for each other send at once.
        let (count, _) = flood(1_000)?;
        assert!(count >= 1_000, "{count}");
        std::thread::sleep(Duration::from_secs(1));
        let (count, took) = flood(40_000)?;
        let most = 2_000 * (took.as_secs() + 2) + ROUND_AND_ROUND;
        assert!(count <= most, "{count} in {took:?}");
        tool(&spaces[0], &format!("ping -c 5 -i 0.2 -W 2 {other}"));
        let words = "a pod sends more than 2000 broadcasts and multicasts a second";
        let agent = &mut cluster.agents[0];
        wait_until("it is not told", TIMEOUT, || has_problem(agent, words));
        wait_until("it is still told", TIMEOUT, || !has_problem(agent, words));
        Ok(())
    });
}

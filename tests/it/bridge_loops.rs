//! Pods that send frames back to the bridge: such frames would circulate without end.

use std::{
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use gossamer::lab::NetNs;
use serde_json::json;

use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        Cluster, TIMEOUT, eventually, has_problem, isolated, run, sh, skipped, tool, wait_until,
    },
};

/// Packets; many more than the kernels of a few pods send by themselves in a second.
const LOOP_PACKETS: u64 = 500;

/// Returns how many packets a pod has received.
fn received_packets(pod: &NetNs) -> u64 {
    let interfaces = tool(pod, "cat /proc/net/dev");
    let own = interfaces.lines().find_map(|line| line.trim_start().strip_prefix("eth0:"));
    let packets = own.and_then(|numbers| numbers.split_whitespace().nth(1)?.parse().ok());
    packets.expect("a number")
}

/// Makes a pod bridge these interfaces and send a broadcast query for an unused address. Returns how many
/// packets another pod receives within a second. Removes the bridge afterwards.
fn packets_while_bridging(pod: &NetNs, interfaces: &[&str], own: &str, other: &NetNs) -> u64 {
    sh(pod, "ip link add loop0 type bridge && ip link set loop0 up");
    for interface in interfaces {
        sh(pod, &format!("ip addr flush dev {interface} && ip link set {interface} up"));
        sh(pod, &format!("ip link set {interface} master loop0"));
        sh(pod, &format!("bridge link set dev {interface} hairpin on"));
    }
    tool(pod, &format!("ip addr add {own}/24 dev loop0"));
    let (subnet, _) = own.rsplit_once('.').expect("dots");
    let before = received_packets(other);
    run(pod, &format!("ping -c 1 -W 1 {subnet}.99"));
    let count = received_packets(other) - before;
    tool(pod, "ip link del loop0");
    count
}

#[test]
fn pod_that_reflects_frames_creates_no_loop() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let own = address(&runtime.add("a"));
        runtime.add("b");
        let count = packets_while_bridging(&spaces[0], &["eth0"], &own, &spaces[1]);
        assert!((1..LOOP_PACKETS).contains(&count), "{count} packets");
        // With two interfaces of the pod.
        let variables = [("CNI_IFNAME", "eth1")];
        let (done, second) = runtime.call_with("ADD", "a", &variables, &json!({}));
        assert!(done, "{second}");
        let count = packets_while_bridging(&spaces[0], &["eth0", "eth1"], &own, &spaces[1]);
        assert!((1..LOOP_PACKETS).contains(&count), "{count} packets");
        Ok(())
    });
}

fn mac_of(pod: &NetNs) -> String {
    let link = tool(pod, "ip -br link show dev eth0");
    link.split_whitespace().nth(2).expect("a MAC").to_owned()
}

/// Makes a pod send back all received frames under its own MAC, whatever their destination.
fn reflect_frames(pod: &NetNs) {
    let mac = mac_of(pod);
    sh(
        pod,
        &format!(
            "ip addr flush dev eth0 && ip link add loop0 address {mac} type bridge && \
             ip link set eth0 master loop0 && bridge link set dev eth0 hairpin on && \
             nft add table bridge loop && \
             nft add chain bridge loop back {{ type filter hook postrouting priority 0 ; }} && \
             nft add rule bridge loop back ether saddr set {mac} && ip link set loop0 up"
        ),
    );
}

#[test]
fn pods_that_reflect_frames_to_an_unknown_mac_create_no_loop() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        for pod in ["a", "b", "c"] {
            runtime.add(pod);
        }
        spaces[..2].iter().for_each(reflect_frames);
        for pod in &spaces[..2] {
            eventually(pod, "bridge -d link show dev eth0", |text| {
                text.contains("state forwarding")
            });
            eventually(pod, "ip link show dev loop0", |text| text.contains("state UP"));
        }
        // A link-local address that is not derived from a pod's MAC may belong to any pod.
        sh(
            &spaces[0],
            "ip addr add fe80::77/64 dev loop0 nodad && \
             ip neigh add fe80::99 lladdr 02:00:00:00:00:99 dev loop0",
        );
        // Packets to groups that the pods' kernels send themselves are not counted; they circulate within
        // the limit.
        sh(
            &spaces[2],
            "nft add table netdev seen && \
             nft add chain netdev seen in { type filter hook ingress device eth0 priority 0 ; } && \
             nft add rule netdev seen in ether daddr 02:00:00:00:00:99 counter",
        );
        run(&spaces[0], "ping -c 3 -i 0.2 -W 1 -I fe80::77%loop0 fe80::99%loop0");
        let seen = tool(&spaces[2], "nft list table netdev seen");
        assert!(seen.contains("counter packets 0 "), "{seen}");
        Ok(())
    });
}

#[test]
fn frame_to_a_mac_unknown_to_the_bridge_reaches_only_its_owner() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b", "guest"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let added = runtime.add("a");
        runtime.add("b");
        let (host, own) = (&cluster.hosts[0].netns, address(&added));
        let mac = mac_of(&spaces[0]);
        let port = added["interfaces"][1]["name"].as_str().expect("a name");
        // For example a virtual machine that has not sent anything yet.
        sh(
            host,
            "ip link add guest0 type veth peer name eth0 netns guest && \
             ip link set guest0 master gsm0 up",
        );
        let (subnet, _) = own.rsplit_once('.').expect("dots");
        sh(
            &spaces[2],
            &format!(
                "sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1 && \
                 ip link set eth0 address 02:00:00:00:00:77 && ip link set eth0 up && \
                 ip addr add {subnet}.200/24 dev eth0 && \
                 ip neigh replace {own} lladdr {mac} dev eth0 nud permanent"
            ),
        );
        sh(&spaces[0], &format!("ip neigh replace {subnet}.200 lladdr 02:00:00:00:00:77 dev eth0"));
        wait_until("the guest is not reached", TIMEOUT, || {
            run(&spaces[0], &format!("ping -c 1 -W 1 {subnet}.200")).status.success()
        });
        // Also packets of the host, while a pod has sent nothing that the bridge could learn from.
        let before = received_packets(&spaces[1]);
        for _ in 0..100 {
            run(host, &format!("bridge fdb del {mac} dev {port} master"));
            tool(host, &format!("ping -c 1 -W 2 {own}"));
        }
        let count = received_packets(&spaces[1]) - before;
        assert!(count < 50, "{count} packets");
        Ok(())
    });
}

/// Where rules for forwarded packets see those between ports of a bridge, such a packet leaves the bridge
/// by the port at which it arrived.
#[test]
fn pod_reaches_itself_by_a_service_address() {
    isolated(|lab| {
        let test = "pod_reaches_itself_by_a_service_address";
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
        // By the gateway: packets to the service reach the host as a router.
        let gateway = format!("{subnet}.1");
        tool(&spaces[0], &format!("ip route add {service}/32 via {gateway} dev eth0"));
        wait_until("the pod does not reach itself", TIMEOUT, || {
            run(&spaces[0], &format!("ping -c 1 -W 1 {service}")).status.success()
        });
        let rules = tool(host, "nft list table ip services");
        assert!(!rules.contains("counter packets 0 "), "the rule did not match: {rules}");
        Ok(())
    });
}

#[test]
fn pod_that_floods_multicast_is_limited_and_reported_and_its_unicast_passes() {
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
            let (before, begun) = (received_packets(&spaces[1]), Instant::now());
            let sent = spaces[0].run(|| {
                let socket = UdpSocket::bind((own, 0))?;
                socket.set_broadcast(true)?;
                for _ in 0..packets {
                    socket.send_to(b"x", (Ipv4Addr::new(a, b, c, 255), 9))?;
                }
                Ok(())
            });
            sent.map(|()| (received_packets(&spaces[1]) - before, begun.elapsed()))
        };
        // As many as services that discover each other send at once.
        let (count, _) = flood(1_000)?;
        assert!(count >= 1_000, "{count}");
        std::thread::sleep(Duration::from_secs(1));
        let (count, took) = flood(40_000)?;
        let most = 2_000 * (took.as_secs() + 2) + LOOP_PACKETS;
        assert!(count <= most, "{count} in {took:?}");
        tool(&spaces[0], &format!("ping -c 5 -i 0.2 -W 2 {other}"));
        let words = "a pod sends more than 2000 broadcasts and multicasts a second";
        let agent = &mut cluster.agents[0];
        wait_until("it is not reported", TIMEOUT, || has_problem(agent, words));
        wait_until("it is still reported", TIMEOUT, || !has_problem(agent, words));
        Ok(())
    });
}

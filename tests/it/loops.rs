//! Pods that give back to the bridge what comes to them: frames that would go round for ever.

use std::{
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use gossamer::lab::NetNs;
use serde_json::json;

use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        Cluster, PATIENCE, eventually, has_problem, isolated, run, sh, skipped, tool, wait_until,
    },
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

fn mac_of(pod: &NetNs) -> String {
    let link = tool(pod, "ip -br link show dev eth0");
    link.split_whitespace().nth(2).expect("a MAC").to_owned()
}

/// Has a pod send back under its own MAC what comes to it, whatever its destination.
fn sends_back(pod: &NetNs) {
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
fn pods_that_send_back_frames_to_a_mac_that_nothing_has_make_no_loop() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        for pod in ["a", "b", "c"] {
            runtime.add(pod);
        }
        spaces[..2].iter().for_each(sends_back);
        for pod in &spaces[..2] {
            eventually(pod, "bridge -d link show dev eth0", |text| {
                text.contains("state forwarding")
            });
            eventually(pod, "ip link show dev loop0", |text| text.contains("state UP"));
        }
        // A link-local address that follows from no pod's MAC may be any pod's.
        sh(
            &spaces[0],
            "ip addr add fe80::77/64 dev loop0 nodad && \
             ip neigh add fe80::99 lladdr 02:00:00:00:00:99 dev loop0",
        );
        // Beside the groups that their kernels send to, and which go round under the limit.
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
fn frame_to_a_mac_that_the_bridge_does_not_know_reaches_its_owner_alone() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b", "guest"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let added = runtime.add("a");
        runtime.add("b");
        let (host, own) = (&cluster.hosts[0].netns, address(&added));
        let mac = mac_of(&spaces[0]);
        let port = added["interfaces"][1]["name"].as_str().expect("a name");
        // Of a virtual machine, say, that has not sent anything yet.
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
        wait_until("the guest is not reached", PATIENCE, || {
            run(&spaces[0], &format!("ping -c 1 -W 1 {subnet}.200")).status.success()
        });
        // What the host sends as well, as long as a pod has sent nothing that the bridge remembers.
        let before = received(&spaces[1]);
        for _ in 0..100 {
            run(host, &format!("bridge fdb del {mac} dev {port} master"));
            tool(host, &format!("ping -c 1 -W 2 {own}"));
        }
        let count = received(&spaces[1]) - before;
        assert!(count < 50, "{count} packets");
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
        wait_until("the pod does not reach itself", PATIENCE, || {
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
        wait_until("it is not told", PATIENCE, || has_problem(agent, words));
        wait_until("it is still told", PATIENCE, || !has_problem(agent, words));
        Ok(())
    });
}

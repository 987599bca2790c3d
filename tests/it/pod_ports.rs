//! Changed settings of a pod's port on the bridge are repaired. What drops a pod's packets at the port is
//! detected by probing the pod, and reported.

use std::{
    fs,
    net::Ipv4Addr,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Host, NetNs};
use serde_json::Value;

use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        Cluster, TIMEOUT, client, eventually, has_notice, has_problem, isolated, link_socket,
        program, run, skipped, status_where, texts, token_of, tool, wait_until,
    },
    silence_causes::{start_pair, wait_for_path, wait_for_problem},
};

/// Returns a filter that needs no compiler. The bytecode returns 2 (`TC_ACT_SHOT`) to drop a packet, and
/// 0 to pass it.
fn filter(host: &Host, bytecode: &str) -> String {
    let path = host.dir.join("filter.bpf");
    fs::write(&path, bytecode).expect("written");
    format!("protocol all bpf direct-action bytecode-file {}", path.display())
}

/// Returns a filter that drops packets of more than `bytes` bytes.
pub fn longer_than(host: &Host, bytes: u32) -> String {
    filter(host, &format!("4,128 0 0 0,37 0 1 {bytes},6 0 0 2,6 0 0 0,"))
}

/// A port setting, the output of `ip -d link show` with it, and the output for a correct port. The first
/// settings are made by `ip link set dev PORT type bridge_slave`, the later ones by `bridge link set dev
/// PORT`.
const SETTINGS: [(&str, &str, &str); 11] = [
    ("isolated on", "isolated on", "isolated off"),
    ("flood off", "flood off", "flood on"),
    ("learning off", "learning off", "learning on"),
    ("neigh_suppress on", "neigh_suppress on", "neigh_suppress off"),
    ("locked on", "locked on", "locked off"),
    ("guard on", "guard on", "guard off"),
    ("mcast_flood off", "mcast_flood off", "mcast_flood on"),
    ("bcast_flood off", "bcast_flood off", "bcast_flood on"),
    ("hairpin off", "hairpin off", "hairpin on"),
    ("state 0", "state 0", "state forwarding"),
    ("state 4", "state 4", "state forwarding"),
];

type PortAndAddress = (String, String);

/// Adds pods on a cluster's first host. Returns their namespaces, ports and addresses.
fn with_pods(
    cluster: &mut Cluster,
    names: &[&str],
) -> anyhow::Result<(Vec<NetNs>, Vec<PortAndAddress>)> {
    let spaces = namespaces(names)?;
    let mut pods = Vec::new();
    for name in names {
        let added = Runtime::new(&cluster.agents[0]).add(name);
        let port = added["interfaces"].as_array().expect("a list").iter().find_map(|interface| {
            let name = interface["name"].as_str()?;
            (name.starts_with("gsm") && name.len() > 6).then(|| name.to_owned())
        });
        pods.push((port.expect("a port"), address(&added)));
    }
    Ok((spaces, pods))
}

fn detail(status: &Value) -> String {
    status["kernel"]["forwarding"]["detail"].as_str().unwrap_or_default().to_owned()
}

fn wait_for_answers(cluster: &mut Cluster, words: &str) {
    status_where(&mut cluster.agents[0], |status| detail(status).contains(words));
}

fn sh(host: &Host, commands: &[&str]) {
    commands.iter().for_each(|command| _ = tool(&host.netns, command));
}

/// Waits until status and doctor report these texts about a pod, and the check fails.
fn wait_for_report(cluster: &mut Cluster, words: &[&str]) -> anyhow::Result<()> {
    let agent = &mut cluster.agents[0];
    wait_until(&words.join(", "), TIMEOUT, || words.iter().all(|words| has_problem(agent, words)));
    status_where(agent, |status| status["kernel"]["forwarding"]["state"] == "failing");
    let shown = String::from_utf8(client(agent, &["doctor"]).stdout)?;
    assert!(shown.contains("PROBLEM   forwarding"), "{shown}");
    Ok(())
}

fn wait_until_not_reported(cluster: &mut Cluster) {
    let agent = &mut cluster.agents[0];
    wait_until("still reported", TIMEOUT, || !has_problem(agent, "not answer"));
}

#[test]
fn changed_settings_of_a_pods_port_are_repaired_at_once() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let (_spaces, pods) = with_pods(&mut cluster, &["a"])?;
        let (port, _) = &pods[0];
        let host = &cluster.hosts[0].netns;
        let show = format!("ip -d link show dev {port}");
        eventually(host, &show, |shown| shown.contains("state forwarding"));
        for (first, second, right) in SETTINGS {
            for command in [
                format!("ip link set dev {port} type bridge_slave {first}"),
                format!("bridge link set dev {port} {second}"),
            ] {
                let begun = Instant::now();
                if !run(host, &command).status.success() {
                    skipped(&command, "this kernel or ip does not know it");
                    continue;
                }
                eventually(host, &show, |shown| shown.contains(right));
                println!("{:>7.1?} {command}", begun.elapsed());
            }
        }
        let filtering = "ip link set gsm0 type bridge vlan_filtering 1";
        for (command, show, right) in [
            (&*format!("ip link set {port} down"), &*show, "state forwarding"),
            (&*format!("ip link set {port} nomaster"), &show, "master gsm0"),
            (filtering, "ip -d link show gsm0", "vlan_filtering 0"),
        ] {
            if !run(host, command).status.success() {
                skipped(command, "this kernel does not know it");
                continue;
            }
            eventually(host, show, |shown| shown.contains(right));
        }
        let shown = tool(host, &show);
        for (.., right) in SETTINGS {
            assert!(shown.contains(right), "{right}: {shown}");
        }
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["repairs"]["bridge"].as_u64() > Some(10)
        });
        Ok(())
    });
}

/// Commands that drop packets at a pod's interface, commands that end this, and the reported words.
type Drops = (Vec<String>, Vec<String>, Vec<String>);

/// Returns the drops of packets at `port`.
fn drops(host: &Host, port: &str) -> [Drops; 5] {
    let drop = filter(host, "1,6 0 0 2,");
    let question = format!("the query does not leave this host by {port}: ");
    let answer = format!("its answer arrives at {port}, and this host drops it: ");
    [
        (
            vec![format!("tc qdisc add dev {port} root blackhole")],
            vec![format!("tc qdisc del dev {port} root")],
            vec![
                question.clone(),
                format!("the queueing discipline blackhole of {port} has dropped"),
            ],
        ),
        (
            vec![
                format!("tc qdisc add dev {port} clsact"),
                format!("tc filter add dev {port} ingress {drop}"),
            ],
            vec![format!("tc qdisc del dev {port} clsact")],
            vec![answer.clone(), format!("{port} has filters on its ingress (bpf)")],
        ),
        (
            vec![
                format!("tc qdisc add dev {port} clsact"),
                format!("tc filter add dev {port} egress {drop}"),
            ],
            vec![format!("tc qdisc del dev {port} clsact")],
            vec![question.clone(), format!("{port} has filters on its egress (bpf)")],
        ),
        (
            vec![
                "nft add table bridge wall".to_owned(),
                "nft add chain bridge wall out { type filter hook output priority 0 ; }".to_owned(),
                format!("nft add rule bridge wall out oifname {port} drop"),
            ],
            vec!["nft delete table bridge wall".to_owned()],
            vec![question, "chain bridge wall out (hook output)".to_owned()],
        ),
        (
            vec![
                "nft add table netdev wall".to_owned(),
                format!(
                    "nft add chain netdev wall in {{ type filter hook ingress device {port} priority 0 ; \
                     policy drop ; }}"
                ),
            ],
            vec!["nft delete table netdev wall".to_owned()],
            vec![answer, "chain netdev wall in (hook ingress) has the policy drop".to_owned()],
        ),
    ]
}

/// Tests one part of the drops at the second pod's interface: all of them take minutes. Returns the pods.
fn check_drops(cluster: &mut Cluster, part: Range<usize>) -> anyhow::Result<Vec<NetNs>> {
    let (spaces, pods) = with_pods(cluster, &["a", "b"])?;
    let (port, ip) = &pods[1];
    wait_for_answers(cluster, "2 pods answer when asked");
    let pod = format!("pod b eth0 ({ip}, {port}) does not answer ARP: ");
    for (begin, end, words) in &drops(&cluster.hosts[0], port)[part] {
        let host = &cluster.hosts[0];
        sh(host, &begin.iter().map(String::as_str).collect::<Vec<_>>());
        let words: Vec<&str> =
            [pod.as_str()].into_iter().chain(words.iter().map(String::as_str)).collect();
        wait_for_report(cluster, &words)?;
        assert!(!has_problem(&mut cluster.agents[0], "pod a eth0"), "the other pod");
        sh(&cluster.hosts[0], &end.iter().map(String::as_str).collect::<Vec<_>>());
        wait_until_not_reported(cluster);
    }
    Ok(spaces)
}

#[test]
fn queueing_discipline_or_filter_that_drops_at_a_pods_interface_is_reported_until_removed() {
    isolated(|lab| check_drops(&mut Cluster::start(lab, 1)?, 0..3).map(drop));
}

#[test]
fn rule_that_drops_at_a_pods_interface_is_reported_until_removed() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _pods = check_drops(&mut cluster, 3..5)?;
        // If all pods are cut off, this is reported once.
        sh(&cluster.hosts[0], &["tc qdisc add dev gsm0 root blackhole"]);
        let words =
            ["pods do not find their gateway", "queueing discipline blackhole of gsm0 has dropped"];
        wait_for_report(&mut cluster, &words)?;
        assert!(!has_problem(&mut cluster.agents[0], "does not answer"));
        sh(&cluster.hosts[0], &["tc qdisc del dev gsm0 root"]);
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["forwarding"]["state"] != "failing"
                && status["problems"] == Value::Array(vec![])
        });
        Ok(())
    });
}

/// What another program attaches to a pod's interface, the notice, and the commands that remove it. The
/// filter drops packets longer than 1000 bytes.
const FOREIGN_HOOKS: [(&str, &str, &str); 4] = [
    (
        "tc qdisc add dev PORT root pfifo limit 1",
        "the queueing discipline pfifo of PORT may drop",
        "tc qdisc del dev PORT root",
    ),
    (
        "tc qdisc add dev PORT root tbf rate 100kbit burst 2k latency 1ms",
        "the queueing discipline tbf of PORT may drop",
        "tc qdisc del dev PORT root",
    ),
    (
        "tc qdisc add dev PORT clsact && tc filter add dev PORT ingress LONGER",
        "filters on the ingress of PORT (bpf) drop some of the pod's packets",
        "tc filter del dev PORT ingress",
    ),
    (
        "tc qdisc add dev PORT clsact && tc filter add dev PORT egress LONGER",
        "filters on the egress of PORT (bpf) drop some of the pod's packets",
        "tc filter del dev PORT egress",
    ),
];

/// As old and new versions of the CNI plugin `bandwidth` create them, and a filter that drops nothing.
const HARMLESS: [&str; 3] = [
    "tc qdisc add dev PORT root handle 1: tbf rate 8mbit burst 64k latency 25ms && \
     ip link add bwp0 type ifb && ip link set bwp0 up && \
     tc qdisc add dev bwp0 root handle 1: tbf rate 8mbit burst 64k latency 25ms && \
     tc qdisc add dev PORT ingress && tc filter add dev PORT ingress protocol all u32 match u32 0 0 \
     action mirred egress redirect dev bwp0",
    "tc qdisc add dev PORT root handle 1: htb default 30",
    "tc qdisc add dev PORT clsact && tc filter add dev PORT ingress LONGER",
];

#[test]
fn foreign_qdiscs_and_filters_of_a_pods_port_are_warned_of_except_bandwidth_limits() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let names = ["a", "b", "c", "d"];
        let (spaces, pods) = with_pods(&mut cluster, &names)?;
        wait_for_answers(&mut cluster, "4 pods answer when asked");
        let host = &cluster.hosts[0].netns;
        let (port, ip) = &pods[0];
        let in_place = |commands: &str, port: &str, bytes: u32| {
            let longer = longer_than(&cluster.hosts[0], bytes);
            crate::common::sh(host, &commands.replace("PORT", port).replace("LONGER", &longer));
        };
        for ((port, _), harmless) in pods[1..].iter().zip(HARMLESS) {
            in_place(harmless, port, 60_000);
        }
        for (begin, words, end) in FOREIGN_HOOKS {
            in_place(begin, port, 1_000);
            // Sends what the filters drop.
            run(&spaces[0], &format!("ping -c 1 -W 1 -s 1200 {}", pods[3].1));
            let words = words.replace("PORT", port);
            let agent = &mut cluster.agents[0];
            wait_until(&words, TIMEOUT, || has_notice(agent, &words));
            let status = agent.ask("/v1/status", TIMEOUT)?;
            let said = texts(&status["notices"]);
            assert!(said.contains(&format!("pod a eth0 ({ip}): ")), "{said}");
            assert!(!["b", "c", "d"].iter().any(|name| said.contains(&format!("pod {name}"))));
            assert!(!texts(&status["problems"]).contains(port.as_str()), "{status:#}");
            assert!(said.contains(&end.replace("PORT", port)), "{said}");
            in_place(end, port, 0);
            wait_until("still reported", TIMEOUT, || !has_notice(agent, port));
            if begin.contains("clsact") {
                in_place("tc qdisc del dev PORT clsact", port, 0);
            }
        }
        Ok(())
    });
}

/// The pod's own administrator may change this.
#[test]
fn pod_that_changed_its_own_interface_is_no_problem() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let (spaces, pods) = with_pods(&mut cluster, &["a", "b", "c"])?;
        wait_for_answers(&mut cluster, "3 pods answer when asked");
        tool(&spaces[0], "ip link set eth0 down");
        tool(&spaces[2], "ip link set eth0 address 02:00:5e:10:20:30");
        tool(&spaces[1], &format!("ip addr del {}/24 dev eth0", pods[1].1));
        // The second pod is probed, and silent in several rounds.
        let silent = |status: &Value| !detail(status).contains("answer when asked");
        status_where(&mut cluster.agents[0], silent);
        // Probes still arrive at it.
        for command in [
            "nft add table arp count",
            "nft add chain arp count in { type filter hook input priority 0 ; }",
            "nft add rule arp count in arp operation request counter",
        ] {
            tool(&spaces[1], command);
        }
        eventually(&spaces[1], "nft list chain arp count in", |shown| {
            let counted = shown.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
            counted.and_then(|count| count.parse().ok()) >= Some(4)
        });
        let status = status_where(&mut cluster.agents[0], |_| true);
        assert_eq!(status["problems"], Value::Array(vec![]), "{status:#}");
        // A drop there is reported for a pod whose end of the veth pair is unchanged.
        tool(&spaces[1], &format!("ip addr add {}/24 dev eth0", pods[1].1));
        wait_for_answers(&mut cluster, "1 pod answers when asked");
        tool(&spaces[1], "ip link set eth0 arp off");
        let said = format!("pod b eth0 ({}, {}) does not answer ARP: ", pods[1].1, pods[1].0);
        wait_for_report(&mut cluster, &[&said, "and no answer arrives from eth0"])?;
        tool(&spaces[1], "ip link set eth0 arp on");
        wait_until_not_reported(&mut cluster);
        Ok(())
    });
}

#[test]
fn answers_to_other_stations_than_the_bridge_are_no_local_loss() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a"])?;
        let added = Runtime::new(&cluster.agents[0]).add("a");
        let pod: Ipv4Addr = address(&added).parse()?;
        wait_for_answers(&mut cluster, "1 pod answers when asked");
        tool(&spaces[0], "ip link set eth0 arp off");
        let (socket, mac) = link_socket(&spaces[0])?;
        let answer = |to: [u8; 6]| {
            let head = [&to[..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &mac].concat();
            [&head[..], &pod.octets(), &[0; 10]].concat()
        };
        // A group that no bridge forwards, and a station that does not exist.
        let answers = [[1, 0x80, 0xc2, 0, 0, 0x0e], [2, 0, 0, 0, 0, 0x55]].map(answer);
        let (is_over, begun) = (AtomicBool::new(false), Instant::now());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) && begun.elapsed() < TIMEOUT {
                    answers.iter().for_each(|answer| _ = socket.send(answer));
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let named = wait_for_report(&mut cluster, &["and no answer arrives from eth0"]);
            is_over.store(true, Ordering::Relaxed);
            named
        })
    });
}

/// The report must not blame the network.
#[test]
fn cause_of_drops_at_the_overlay_device_or_the_underlay_is_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let drop = filter(&cluster.hosts[1], "1,6 0 0 2,");
        let not_carried =
            "packets to n1 (10.99.0.10) are lost on this host: they are handed to gossamer.1";
        let swallowed = "may be dropped by what is attached to gossamer.1";
        let not_leaving = "tunnel packets (UDP 8472) to n1 (10.99.0.10) do not leave this host";
        let filters = |device: &str, side: &str| {
            vec![
                format!("tc qdisc add dev {device} clsact"),
                format!("tc filter add dev {device} {side} {drop}"),
            ]
        };
        let without = |device: &str| format!("tc qdisc del dev {device} clsact");
        for (begin, end, words) in [
            (
                vec!["tc qdisc add dev gossamer.1 root blackhole".to_owned()],
                "tc qdisc del dev gossamer.1 root".to_owned(),
                [not_carried, "the queueing discipline blackhole of gossamer.1 has dropped"],
            ),
            (
                filters("gossamer.1", "egress"),
                without("gossamer.1"),
                [not_carried, "gossamer.1 has filters on its egress (bpf)"],
            ),
            (
                filters("gossamer.1", "ingress"),
                without("gossamer.1"),
                [swallowed, "gossamer.1 has filters on its ingress (bpf)"],
            ),
            (
                vec!["tc qdisc add dev eth0 root blackhole".to_owned()],
                "tc qdisc del dev eth0 root".to_owned(),
                [not_leaving, "the queueing discipline blackhole of eth0 has dropped"],
            ),
        ] {
            sh(&cluster.hosts[1], &begin.iter().map(String::as_str).collect::<Vec<_>>());
            let begun = Instant::now();
            wait_for_problem(&mut cluster.agents[1], &words);
            println!("{:>7.1?} {}", begun.elapsed(), begin.join("; "));
            tool(&cluster.hosts[1].netns, &end);
            cluster.agents.iter_mut().for_each(wait_for_path);
        }
        Ok(())
    });
}

#[test]
fn ipv6_only_pod_is_probed_by_neighbor_discovery() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--network", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let token = token_of(&mut agent)?;
        let mut cluster = Cluster { hosts: vec![host], agents: vec![agent], token };
        let (_spaces, pods) = with_pods(&mut cluster, &["a"])?;
        let (port, ip) = &pods[0];
        wait_for_answers(&mut cluster, "1 pod answers when asked");
        sh(&cluster.hosts[0], &[&format!("tc qdisc add dev {port} root blackhole")]);
        let words = [
            &*format!(
                "pod a eth0 ({ip}, {port}) does not answer neighbor discovery: the query does not"
            ),
            &*format!("the queueing discipline blackhole of {port} has dropped"),
        ];
        wait_for_report(&mut cluster, &words)?;
        // A removed pod is no problem any more.
        Runtime::new(&cluster.agents[0]).del("a");
        wait_until_not_reported(&mut cluster);
        Ok(())
    });
}

/// Such chains see no ARP query, but packets of pods between two ports.
#[test]
fn bridge_chain_that_drops_packets_between_pods_is_reported_until_removed() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.add("a");
        let other = address(&runtime.add("b"));
        let reaches = || run(&spaces[0], &format!("ping -c 1 -W 1 {other}")).status.success();
        assert!(reaches());
        let host = &cluster.hosts[0];
        let wall =
            "nft add chain bridge wall f { type filter hook forward priority 0 ; policy drop ; }";
        sh(
            host,
            &[
                "nft add table bridge wall",
                wall,
                "nft add rule bridge wall f ether type arp accept",
            ],
        );
        assert!(!reaches(), "the case is another one");
        let agent = &mut cluster.agents[0];
        let words =
            "between its own pods (IPv4): chain bridge wall f (hook forward) has the policy drop";
        wait_until("not reported", TIMEOUT, || has_problem(agent, words));
        sh(host, &["nft delete table bridge wall"]);
        wait_until("still reported", TIMEOUT, || !has_problem(agent, words));
        assert!(reaches());
        Ok(())
    });
}

//! Packets that are diverted although every entry of the overlay is correct: the agent queries the
//! kernel's routing, and reports the cause.

use std::time::Duration;

use gossamer::lab::{Agent, Lab, NetNs};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::{
    Cluster, TIMEOUT, has_problem, isolated, program, run, sh, status_where, texts, wait_until,
};

fn doctor(netns: &NetNs, agent: &Agent) -> String {
    let socket = agent.socket().display();
    let output = run(netns, &format!("{} doctor --socket {socket}", program().display()));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The report, the commands that cause the fault, and the commands that remove it. 10.42.2.0/24 stands
/// for the peer's subnet.
const FAULTS: [(&str, &str, &str); 9] = [
    (
        "remove it (ip route del local 10.42.2.0/25 table local)",
        "ip route add local 10.42.2.0/25 dev d0 proto 66",
        "ip route del local 10.42.2.0/25 table local",
    ),
    (
        "table 52 has a route for them and comes before the main table (ip rule 5270)",
        "ip route add 10.42.0.0/16 dev d0 table 52 && ip rule add lookup 52 pref 5270",
        "ip rule del pref 5270 && ip route flush table 52",
    ),
    (
        "ip rule add to 10.42.0.0/16 lookup main priority 99",
        "ip rule add iif pods to 10.42.0.0/16 prohibit pref 100",
        "ip rule del pref 100",
    ),
    (
        "takes the packets to 10.42.2.0/24, by d0: its metric is 0",
        "ip route add 10.42.2.0/24 dev d0 metric 0",
        "ip route del 10.42.2.0/24 dev d0 metric 0",
    ),
    (
        "10.42.2.128/26, by d0, because it is more specific",
        "ip route add 10.42.2.128/26 dev d0",
        "ip route del 10.42.2.128/26 dev d0",
    ),
    (
        "dropped by the blackhole route to 10.42.2.0/25",
        "ip route add blackhole 10.42.2.0/25",
        "ip route del blackhole 10.42.2.0/25",
    ),
    (
        "sysctl -w net.ipv4.conf.pods.forwarding=1",
        "sysctl -w net.ipv4.conf.pods.forwarding=0",
        "sysctl -w net.ipv4.conf.pods.forwarding=1",
    ),
    (
        "sysctl -w net.ipv4.conf.default.forwarding=1 net.ipv4.conf.pods.forwarding=1",
        "sysctl -w net.ipv4.conf.default.forwarding=0 && sysctl -w net.ipv4.conf.pods.forwarding=0",
        "sysctl -w net.ipv4.conf.default.forwarding=1 && sysctl -w net.ipv4.conf.pods.forwarding=1",
    ),
    (
        "rp_filter of eth0 drops packets of other nodes' pods to this host's own address",
        "sysctl -w net.ipv4.conf.eth0.rp_filter=1",
        "sysctl -w net.ipv4.conf.eth0.rp_filter=2",
    ),
];

/// Checks that each fault on the first host is reported, alone, until it is removed. `example` is the
/// prefix of the faults' addresses; it stands for the subnet of host number `of`.
fn check_faults_are_reported(
    lab: &mut Lab,
    faults: &[(&str, &str, &str)],
    example: &str,
    of: usize,
) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(lab, 2)?;
    let subnet = Agent::subnet(&cluster.agents[of].ask("/v1/status", TIMEOUT)?)?;
    let prefix = subnet.to_string().replace("0/24", "");
    let real = |text: &str| text.replace(example, &prefix);
    let _pods = cluster.pods()?;
    let host = &cluster.hosts[0].netns;
    sh(host, "ip link add d0 type veth peer name d1 && ip link set d0 up && ip link set d1 up");
    let agent = &mut cluster.agents[0];
    for (words, plant, remove) in faults {
        let (words, plant, remove) = (&real(words), &real(plant), &real(remove));
        sh(host, plant);
        wait_until(words, TIMEOUT, || has_problem(agent, words));
        let status = agent.ask("/v1/status", TIMEOUT)?;
        let problems = status["problems"].as_array().expect("problems");
        assert_eq!(problems.len(), 1, "one cause, one problem: {problems:#?}");
        let shown = doctor(host, agent);
        assert!(shown.contains("PROBLEM   routing"), "{shown}");
        sh(host, remove);
        wait_until("still reported", TIMEOUT, || !has_problem(agent, words));
    }
    Ok(())
}

#[test]
fn diverted_path_is_reported_with_its_cause_until_removed() {
    isolated(|lab| check_faults_are_reported(lab, &FAULTS, "10.42.2.", 1));
}

/// The same for this host's own subnet, 10.42.1.0/24, whose pods are behind a hand-made bridge.
const LOCAL_FAULTS: [(&str, &str, &str); 7] = [
    (
        "packets to 10.42.1.0/25 are delivered to this host",
        "ip route add local 10.42.1.0/25 dev lo",
        "ip route del local 10.42.1.0/25 dev lo",
    ),
    (
        "leave by d0: a route of another program in the main table takes 10.42.1.0/25",
        "ip route add 10.42.1.0/25 dev d0",
        "ip route del 10.42.1.0/25 dev d0",
    ),
    (
        "remove it (ip route del 10.42.1.77/32 dev d0 metric 0)",
        "ip route add 10.42.1.77/32 dev d0",
        "ip route del 10.42.1.77/32 dev d0",
    ),
    (
        "takes 10.42.1.9/32, a part of this node's own subnet",
        "ip addr add 192.168.77.1 peer 10.42.1.9 dev d0",
        "ip addr del 192.168.77.1 peer 10.42.1.9 dev d0",
    ),
    (
        "packets to pods here, in 10.42.1.0/24, leave by d0: table 52 has a route for them",
        "ip route add 10.42.1.64/26 dev d0 table 52 && ip rule add lookup 52 pref 5270",
        "ip rule del pref 5270 && ip route flush table 52",
    ),
    (
        "are dropped by the blackhole route to 10.42.1.32/27",
        "ip route add blackhole 10.42.1.32/27",
        "ip route del blackhole 10.42.1.32/27",
    ),
    (
        "takes 10.42.1.128/25, a part of this node's own subnet",
        "ip route add 10.42.1.128/25 dev d0",
        "ip route del 10.42.1.128/25 dev d0",
    ),
];

/// Policy rules that match only some packets of pods.
const PARTIAL_FAULTS: [(&str, &str, &str); 7] = [
    (
        "that rule 5270 selects (from 10.42.1.9/32) leave by d0: table 52 has a route for them",
        "ip route add default dev d0 table 52 && ip rule add from 10.42.1.9 lookup 52 pref 5270",
        "ip rule del pref 5270",
    ),
    (
        "that rule 5271 selects (from 10.42.1.128/26) leave by d0",
        "ip rule add from 10.42.1.128/26 lookup 52 pref 5271",
        "ip rule del pref 5271",
    ),
    (
        "that rule 5272 selects (ipproto tcp dport 8080-8090) leave by d0",
        "ip rule add ipproto tcp dport 8080-8090 lookup 52 pref 5272",
        "ip rule del pref 5272",
    ),
    (
        "that rule 5273 selects (ipproto udp sport 53) are dropped by ip rule 5273",
        "ip rule add iif pods ipproto udp sport 53 prohibit pref 5273",
        "ip rule del pref 5273",
    ),
    (
        "that rule 5274 selects (tos 0x10) leave by d0",
        "ip rule add tos 0x10 lookup 52 pref 5274",
        "ip rule del pref 5274",
    ),
    (
        "that rule 5277 selects (dport 5000-6000) leave by d0",
        "ip rule add dport 5000-6000 lookup 52 pref 5277",
        "ip rule del pref 5277",
    ),
    // As sing-box, mihomo and Clash write them.
    (
        "selects (dport 53) leave by d0",
        "ip rule add not from all dport 53 lookup main suppress_prefixlength 0 pref 5275 && \
         ip rule add not from all iif lo lookup 52 pref 5276",
        "ip rule del pref 5275 && ip rule del pref 5276",
    ),
];

/// Routes that a plain lookup does not show, or not fully. 10.42.2.0/24 is the peer's subnet.
const HIDDEN_ROUTE_FAULTS: [(&str, &str, &str); 10] = [
    (
        "takes the packets to 10.42.2.0/24 tos 0x8, by d0",
        "ip route add 10.42.2.0/24 tos 0x08 dev d0",
        "ip route del 10.42.2.0/24 tos 0x8 dev d0",
    ),
    (
        "(ip route del 10.42.2.64/26 tos 0x10 dev d0 metric 7)",
        "ip route add 10.42.2.64/26 tos 0x10 dev d0 metric 7",
        "ip route del 10.42.2.64/26 tos 0x10 dev d0 metric 7",
    ),
    (
        "(to 10.42.2.9/32 tos 0x4) are dropped by the blackhole route to 10.42.2.9/32 tos 0x4",
        "ip route add blackhole 10.42.2.9 tos 0x04",
        "ip route del blackhole 10.42.2.9/32 tos 0x4",
    ),
    (
        "selects (to 10.42.0.0/16 tos 0x8) leave by d0: table 52 has a route for them",
        "ip route add 10.42.0.0/16 tos 0x08 dev d0 table 52 && ip rule add lookup 52 pref 5270",
        "ip rule del pref 5270 && ip route flush table 52",
    ),
    (
        "by d0, because it is more specific",
        "ip route add 10.42.2.9/32 nexthop dev d0 nexthop via 10.42.2.0 dev gossamer.1 onlink",
        "ip route del 10.42.2.9/32",
    ),
    (
        "10.42.2.64/28, by d0, because it is more specific",
        "ip nexthop add id 7 dev d0 && ip route add 10.42.2.64/28 nhid 7",
        "ip route del 10.42.2.64/28 && ip nexthop del id 7",
    ),
    (
        "dropped by the prohibit route to 10.42.2.77/32",
        "ip route add prohibit 10.42.2.77",
        "ip route del prohibit 10.42.2.77",
    ),
    (
        "dropped by the throw route to 10.42.2.64/28: remove it (ip route del throw 10.42.2.64/28)",
        "ip route add throw 10.42.2.64/28",
        "ip route del throw 10.42.2.64/28",
    ),
    (
        "has that MTU, the overlay has 1450: remove it (ip route del 10.42.2.0/25 metric 0)",
        "ip route add 10.42.2.0/25 via 10.42.2.0 dev gossamer.1 onlink mtu lock 600",
        "ip route del 10.42.2.0/25 metric 0",
    ),
    (
        "packets of pods to 10.42.2.128/25 are limited to 1000 bytes",
        "ip route add 10.42.2.128/25 via 10.42.2.0 dev gossamer.1 onlink mtu 1000",
        "ip route del 10.42.2.128/25",
    ),
];

#[test]
fn route_hidden_from_a_plain_lookup_is_reported_until_removed() {
    isolated(|lab| check_faults_are_reported(lab, &HIDDEN_ROUTE_FAULTS, "10.42.2.", 1));
}

/// The same for pods on this host; one of the routes is selected by a rule.
const LOCAL_HIDDEN_ROUTE_FAULTS: [(&str, &str, &str); 2] = [
    (
        "takes 10.42.1.9/32 tos 0x8, a part of this node's own subnet: remove it (ip route del \
         10.42.1.9/32 tos 0x8 dev d0 metric 0)",
        "ip route add 10.42.1.9 tos 0x08 dev d0",
        "ip route del 10.42.1.9/32 tos 0x8 dev d0",
    ),
    (
        "that rule 5270 selects (tos 0x10) are dropped by the blackhole route to 10.42.1.128/25 tos 0x10",
        "ip rule add tos 0x10 lookup 52 pref 5270 && \
         ip route add blackhole 10.42.1.128/25 tos 0x10 table 52",
        "ip rule del pref 5270 && ip route flush table 52",
    ),
];

#[test]
fn route_with_a_tos_to_local_pods_is_reported_until_removed() {
    isolated(|lab| {
        let faults = &LOCAL_HIDDEN_ROUTE_FAULTS;
        check_faults_are_reported(lab, faults, "10.42.1.", 0)
    });
}

#[test]
fn policy_rule_matching_some_packets_of_pods_is_reported_with_its_selector() {
    isolated(|lab| check_faults_are_reported(lab, &PARTIAL_FAULTS, "10.42.1.", 0));
}

/// As multihoming and containers of other programs create them: one for each of their networks.
#[test]
fn policy_rule_behind_many_others_is_reported_with_the_number_of_skipped_ones() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        let prefix = subnet.to_string().replace("0/24", "");
        let real = |text: &str| text.replace("10.42.1.", &prefix);
        let _pods = cluster.pods()?;
        let (host, agent) = (&cluster.hosts[0].netns, &mut cluster.agents[0]);
        sh(host, "ip link add d0 type veth peer name d1 && ip link set d0 up && ip link set d1 up");
        sh(host, "ip route add default dev d0 table 52");
        let add = |number: u32, selector: &str, table: &str| {
            sh(host, &real(&format!("ip rule add {selector} lookup {table} pref {number}")));
        };
        for number in 0..50 {
            add(1_000 + number, &format!("from 192.168.{number}.0/24"), "52");
            add(2_000 + number, &format!("from 10.42.1.7 to 192.168.{number}.0/24"), "52");
            // The same selector again adds nothing.
            add(3_000 + number, "from 10.42.1.7 ipproto tcp dport 80", "main");
        }
        add(4_000, "from 10.42.1.9", "52");
        let words = &real("that rule 4000 selects (from 10.42.1.9/32) leave by d0");
        wait_until(words, TIMEOUT, || has_problem(agent, words));
        sh(host, "ip rule del pref 4000");
        let detail = |status: &Value| {
            status["kernel"]["routing"]["detail"].as_str().unwrap_or_default().to_owned()
        };
        let status = status_where(agent, |status| status["problems"] == serde_json::json!([]));
        assert!(!detail(&status).contains("not tested"), "{status:#}");
        for number in 0..36 {
            add(5_000 + number, &format!("from 10.42.1.{}", 100 + number), "main");
        }
        let words = "5 policy rules that may select packets of pods were not tested";
        let status = status_where(agent, |status| detail(status).contains(words));
        assert_eq!(status["problems"], serde_json::json!([]), "{status:#}");
        Ok(())
    });
}

#[test]
fn diverted_part_of_a_nodes_own_subnet_is_reported_until_removed() {
    isolated(|lab| check_faults_are_reported(lab, &LOCAL_FAULTS, "10.42.1.", 0));
}

/// A host that looks up packets only in its own tables.
#[test]
fn missing_rule_of_the_main_table_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _pods = cluster.pods()?;
        let (host, agent) = (&cluster.hosts[0].netns, &mut cluster.agents[0]);
        sh(
            host,
            "ip route add 10.99.0.0/16 dev eth0 table 99 && ip rule add lookup 99 pref 10000 && \
             ip rule del pref 32766",
        );
        let (words, advice) = (
            "no ip rule leads to table main",
            "ip rule add to 10.42.0.0/16 lookup main priority 32766",
        );
        wait_until(words, TIMEOUT, || has_problem(agent, words) && has_problem(agent, advice));
        sh(host, advice);
        status_where(agent, |status| status["problems"] == serde_json::json!([]));
        Ok(())
    });
}

#[test]
fn locally_diverted_packets_cause_no_advice_to_open_a_port() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[0].netns;
        sh(host, "ip link add d0 type veth peer name d1 && ip link set d0 up && ip link set d1 up");
        sh(host, "ip route add 10.42.0.0/16 dev d0 table 52 && ip rule add lookup 52 pref 5270");
        let agent = &mut cluster.agents[0];
        let status = status_where(agent, |status| {
            let state = status["paths"][0]["state"].as_str().unwrap_or_default();
            matches!(state, "unanswered" | "one-way")
        });
        assert!(!texts(&status["problems"]).contains("UDP 8472"), "{status:#}");
        let is_reported = |status: &Value| texts(&status["problems"]).contains("table 52");
        let status = status_where(agent, is_reported);
        assert!(!texts(&status["problems"]).contains("UDP 8472"), "{status:#}");
        // The state that the agent leaves is checked without the agent.
        agent.end(Signal::SIGTERM)?;
        let shown = doctor(host, agent);
        assert!(shown.contains("packets leave by another table than main"), "{shown}");
        Ok(())
    });
}

/// A VPN that takes all traffic except for more specific routes of the main table, as wg-quick sets it
/// up.
#[test]
fn policy_rules_that_pass_the_overlay_are_no_problem() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _pods = cluster.pods()?;
        let host = &cluster.hosts[0].netns;
        sh(host, "ip link add d0 type veth peer name d1 && ip link set d0 up && ip link set d1 up");
        sh(host, "ip route add default dev d0 table 51820");
        sh(
            host,
            "ip rule add not fwmark 51820 table 51820 && ip rule add table main suppress_prefixlength 0",
        );
        let agent = &mut cluster.agents[0];
        let begun = std::time::Instant::now();
        // Longer than a report takes.
        while begun.elapsed() < Duration::from_secs(4) {
            let status = agent.ask("/v1/status", TIMEOUT)?;
            assert_eq!(status["problems"], serde_json::json!([]), "{status:#}");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    });
}

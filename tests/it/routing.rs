//! What leads packets elsewhere although every entry of the overlay is right: it is asked of the kernel, and
//! named by its cause.

use std::time::Duration;

use gossamer::lab::{Agent, Lab, NetNs};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::{
    Cluster, PATIENCE, has_problem, isolated, program, run, sh, status_where, wait_until,
};

fn doctor(netns: &NetNs, agent: &Agent) -> String {
    let socket = agent.socket().display();
    let output = run(netns, &format!("{} doctor --socket {socket}", program().display()));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// What is named, how the fault is made, and how it is taken away; 10.42.2.0/24 stands for the peer's subnet.
const FAULTS: [(&str, &str, &str); 9] = [
    (
        "remove it (ip route del local 10.42.2.0/25 dev lo table local)",
        "ip route add local 10.42.2.0/25 dev lo",
        "ip route del local 10.42.2.0/25 dev lo",
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

/// Each fault on the first host is named, alone, until it is gone. `example` begins the addresses of the
/// faults, and stands for the subnet of host number `of`.
fn each_is_named_until_it_is_gone(
    lab: &mut Lab,
    faults: &[(&str, &str, &str)],
    example: &str,
    of: usize,
) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(lab, 2)?;
    let subnet = Agent::subnet(&cluster.agents[of].ask("/v1/status", PATIENCE)?)?;
    let prefix = subnet.to_string().replace("0/24", "");
    let real = |text: &str| text.replace(example, &prefix);
    let _pods = cluster.pods()?;
    let host = &cluster.hosts[0].netns;
    sh(host, "ip link add d0 type veth peer name d1 && ip link set d0 up && ip link set d1 up");
    let agent = &mut cluster.agents[0];
    for (words, plant, remove) in faults {
        let (words, plant, remove) = (&real(words), &real(plant), &real(remove));
        sh(host, plant);
        wait_until(words, PATIENCE, || has_problem(agent, words));
        let status = agent.ask("/v1/status", PATIENCE)?;
        let problems = status["problems"].as_array().expect("problems");
        assert_eq!(problems.len(), 1, "one cause, one problem: {problems:#?}");
        let shown = doctor(host, agent);
        assert!(shown.contains("PROBLEM   routing"), "{shown}");
        sh(host, remove);
        wait_until("still named", PATIENCE, || !has_problem(agent, words));
    }
    Ok(())
}

#[test]
fn a_way_that_leads_elsewhere_is_named_by_its_cause_until_it_is_gone() {
    isolated(|lab| each_is_named_until_it_is_gone(lab, &FAULTS, "10.42.2.", 1));
}

/// The same for this host's own subnet, 10.42.1.0/24, whose pods are behind a bridge made by hand.
const FAULTS_AT_HOME: [(&str, &str, &str); 7] = [
    (
        "this host keeps packets to 10.42.1.0/25 for itself",
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
        "takes 10.42.1.9/32, which is of this node's own subnet",
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
        "takes 10.42.1.128/25, which is of this node's own subnet",
        "ip route add 10.42.1.128/25 dev d0",
        "ip route del 10.42.1.128/25 dev d0",
    ),
];

/// Policy rules that take some packets of pods only.
const FAULTS_OF_SOME: [(&str, &str, &str); 7] = [
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

/// Routes of which a plain lookup shows nothing, or not what they do; 10.42.2.0/24 is the peer's subnet.
const FAULTS_BEHIND_PLAIN_LOOKUPS: [(&str, &str, &str); 10] = [
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
        "carries 600 bytes, where the overlay carries 1450; remove it (ip route del 10.42.2.0/25 metric 0)",
        "ip route add 10.42.2.0/25 via 10.42.2.0 dev gossamer.1 onlink mtu lock 600",
        "ip route del 10.42.2.0/25 metric 0",
    ),
    (
        "packets of pods to 10.42.2.128/25 have to be small",
        "ip route add 10.42.2.128/25 via 10.42.2.0 dev gossamer.1 onlink mtu 1000",
        "ip route del 10.42.2.128/25",
    ),
];

#[test]
fn route_that_a_plain_lookup_does_not_show_is_named_until_it_is_gone() {
    isolated(|lab| {
        each_is_named_until_it_is_gone(lab, &FAULTS_BEHIND_PLAIN_LOOKUPS, "10.42.2.", 1)
    });
}

/// The same to pods here, one of them by a rule that leads to it.
const FAULTS_BEHIND_PLAIN_LOOKUPS_AT_HOME: [(&str, &str, &str); 2] = [
    (
        "takes 10.42.1.9/32 tos 0x8, which is of this node's own subnet; remove it (ip route del \
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
fn route_with_a_tos_to_pods_here_is_named_until_it_is_gone() {
    isolated(|lab| {
        let faults = &FAULTS_BEHIND_PLAIN_LOOKUPS_AT_HOME;
        each_is_named_until_it_is_gone(lab, faults, "10.42.1.", 0)
    });
}

#[test]
fn policy_rule_that_takes_some_packets_of_pods_is_named_with_what_it_selects() {
    isolated(|lab| each_is_named_until_it_is_gone(lab, &FAULTS_OF_SOME, "10.42.1.", 0));
}

/// As multi-homing and containers of other programs make them: one for each of their networks.
#[test]
fn policy_rule_behind_many_is_named_and_how_many_are_not_looked_at_is_told() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", PATIENCE)?)?;
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
            // The same again selects nothing else.
            add(3_000 + number, "from 10.42.1.7 ipproto tcp dport 80", "main");
        }
        add(4_000, "from 10.42.1.9", "52");
        let words = &real("that rule 4000 selects (from 10.42.1.9/32) leave by d0");
        wait_until(words, PATIENCE, || has_problem(agent, words));
        sh(host, "ip rule del pref 4000");
        let detail = |status: &Value| {
            status["kernel"]["routing"]["detail"].as_str().unwrap_or_default().to_owned()
        };
        let status = status_where(agent, |status| status["problems"] == serde_json::json!([]));
        assert!(!detail(&status).contains("not looked at"), "{status:#}");
        for number in 0..36 {
            add(5_000 + number, &format!("from 10.42.1.{}", 100 + number), "main");
        }
        let words = "5 policy rules that may select packets of pods were not looked at";
        let status = status_where(agent, |status| detail(status).contains(words));
        assert_eq!(status["problems"], serde_json::json!([]), "{status:#}");
        Ok(())
    });
}

#[test]
fn what_takes_a_part_of_the_own_subnet_is_named_until_it_is_gone() {
    isolated(|lab| each_is_named_until_it_is_gone(lab, &FAULTS_AT_HOME, "10.42.1.", 0));
}

/// A host whose packets are looked up in tables of its own alone.
#[test]
fn missing_rule_of_the_main_table_is_named_and_the_advice_brings_the_ways_back() {
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
        wait_until(words, PATIENCE, || has_problem(agent, words) && has_problem(agent, advice));
        sh(host, advice);
        status_where(agent, |status| status["problems"] == serde_json::json!([]));
        Ok(())
    });
}

#[test]
fn nobody_is_told_to_open_a_port_while_packets_take_another_way_here() {
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
        assert!(!status["problems"].to_string().contains("UDP 8472"), "{status:#}");
        let is_named = |status: &Value| status["problems"].to_string().contains("table 52");
        let status = status_where(agent, is_named);
        assert!(!status["problems"].to_string().contains("UDP 8472"), "{status:#}");
        // What it leaves behind is asked about without it.
        agent.end(Signal::SIGTERM)?;
        let shown = doctor(host, agent);
        assert!(shown.contains("packets leave by another table than main"), "{shown}");
        Ok(())
    });
}

/// A VPN that takes all traffic but leaves what the main table knows better, as wg-quick makes it.
#[test]
fn rules_that_let_the_overlay_pass_are_no_problem() {
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
        // Longer than what it takes to name one.
        while begun.elapsed() < Duration::from_secs(4) {
            let status = agent.ask("/v1/status", PATIENCE)?;
            assert_eq!(status["problems"], serde_json::json!([]), "{status:#}");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    });
}

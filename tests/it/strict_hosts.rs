//! Hosts with strict firewalls, and hosts that were changed by hand. What affects no pod is no problem;
//! what does is reported with a remedy that works.

use std::time::{Duration, Instant};

use gossamer::lab::Agent;
use serde_json::Value;

use crate::{
    common::{
        Cluster, TIMEOUT, client, eventually, has_notice, has_problem, isolated, run, sh, skipped,
        status_where, tool, wait_until,
    },
    remote_pods::{all_answer, with_pods},
    silence_causes::{run_all, start_pair, wait_for_path, wait_for_problem},
};

/// Longer than the detection of losses to pods of other hosts takes.
const DETECTION_TIME: Duration = Duration::from_secs(45);
/// The rules that SECURITY.md advises: these ports, between members, and no ICMP.
const DOCUMENTED_RULES: &str = "nft add table inet strict && \
    nft add chain inet strict in { type filter hook input priority 0 ; policy drop ; } && \
    nft add rule inet strict in ct state established,related accept && \
    nft add rule inet strict in iif lo accept && \
    nft add rule inet strict in ip saddr 10.99.0.0/16 udp dport { 8472, 8473 } accept";

fn has_no_problem_or_notice(status: &Value) -> bool {
    status["problems"] == serde_json::json!([]) && status["notices"] == serde_json::json!([])
}

/// Checks that the status of all agents fulfills a condition for `DETECTION_TIME`.
fn assert_holds(agents: &mut [Agent], what: impl Fn(&Value) -> bool) -> anyhow::Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < DETECTION_TIME {
        for agent in &mut *agents {
            let status = agent.ask("/v1/status", TIMEOUT)?;
            assert!(what(&status), "{status:#}");
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    Ok(())
}

#[test]
fn host_open_for_members_only_is_no_problem_once_its_pods_answer() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        cluster.hosts.iter().for_each(|host| sh(&host.netns, DOCUMENTED_RULES));
        for agent in &mut cluster.agents {
            let settled = |status: &Value| {
                status["paths"][0]["pods_answer"] == true && has_no_problem_or_notice(status)
            };
            status_where(agent, settled);
        }
        assert_holds(&mut cluster.agents, |status| status["problems"] == serde_json::json!([]))?;
        let doctor = String::from_utf8(client(&cluster.agents[0], &["doctor"]).stdout)?;
        assert!(!doctor.contains("PROBLEM   paths"), "{doctor}");
        // It is a problem again once packets of pods are lost as well.
        let host = &cluster.hosts[1].netns;
        sh(host, "nft insert rule inet strict in udp dport 8472 drop");
        let words = "no probe of n2 through the tunnel is answered";
        wait_until(words, TIMEOUT, || has_problem(&mut cluster.agents[0], words));
        Ok(())
    });
}

#[test]
fn host_open_for_members_only_without_pods_is_a_notice() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        cluster.hosts.iter().for_each(|host| sh(&host.netns, DOCUMENTED_RULES));
        for (agent, other) in cluster.agents.iter_mut().zip(["n2", "n1"]) {
            let words = format!("the firewall of {other} drops ICMP and UDP 8473");
            wait_until(&words, TIMEOUT, || has_notice(agent, &words));
        }
        assert_holds(&mut cluster.agents, |status| status["problems"] == serde_json::json!([]))
    });
}

#[test]
fn rules_against_traceroute_and_against_resets_are_no_problem() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        sh(
            &cluster.hosts[0].netns,
            "nft add table ip f && \
             nft add chain ip f f { type filter hook forward priority 0 ; } && \
             nft add rule ip f f udp dport 33434-33534 drop && \
             nft add rule ip f f tcp flags & rst == rst drop",
        );
        assert_holds(&mut cluster.agents, |status| status["problems"] == serde_json::json!([]))?;
        cluster.agents.iter_mut().for_each(|agent| all_answer(agent, 1));
        Ok(())
    });
}

/// As OpenWrt's firewall writes it, with all chains in one table.
const OPENWRT_RULES: &str = "nft add table inet fw4 && \
    nft add chain inet fw4 forward { type filter hook forward priority 0 ; policy drop ; } && \
    nft add chain inet fw4 srcnat { type nat hook postrouting priority srcnat ; } && \
    nft add chain inet fw4 handle_reject && \
    nft add chain inet fw4 srcnat_wan && \
    nft add chain inet fw4 input_wan && \
    nft add rule inet fw4 input_wan udp dport { 8472, 8473 } accept && \
    nft add rule inet fw4 handle_reject reject && \
    nft add rule inet fw4 srcnat_wan masquerade && \
    nft add rule inet fw4 forward ct state established accept && \
    nft add rule inet fw4 forward jump handle_reject && \
    nft add rule inet fw4 srcnat oifname eth0 jump srcnat_wan";

#[test]
fn nat_chain_is_not_blamed_for_rejects_of_another_chain_of_its_table() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        sh(&cluster.hosts[1].netns, OPENWRT_RULES);
        let words = "chain inet fw4 forward (hook forward)";
        wait_until(words, TIMEOUT, || has_problem(&mut cluster.agents[1], words));
        assert!(!has_problem(&mut cluster.agents[1], "srcnat"), "{}", cluster.agents[1].log());
        Ok(())
    });
}

#[test]
fn masquerade_of_all_packets_on_one_host_is_no_problem_of_others() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        sh(
            &cluster.hosts[1].netns,
            "nft add table ip full && \
             nft add chain ip full post { type nat hook postrouting priority srcnat ; } && \
             nft add rule ip full post masquerade",
        );
        let words = "reach pods here under the address";
        wait_until(words, TIMEOUT, || has_notice(&mut cluster.agents[1], words));
        assert_holds(&mut cluster.agents[..1], |status| status["problems"] == serde_json::json!([]))
    });
}

#[test]
fn queue_rule_without_a_program_is_reported() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        let rule = "iptables-nft -I FORWARD -j NFQUEUE --queue-num 7";
        if !run(&cluster.hosts[0].netns, rule).status.success() {
            skipped(
                "queue_rule_without_a_program_is_reported",
                "there is no iptables-nft with NFQUEUE",
            );
            return Ok(());
        }
        let words = "chain ip filter FORWARD (hook forward) hands packets to a program (NFQUEUE)";
        wait_until(words, TIMEOUT, || has_problem(&mut cluster.agents[0], words));
        Ok(())
    });
}

#[test]
fn main_table_route_to_a_peer_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let by_object =
            ["ip nexthop add id 7 via 10.99.0.200 dev eth0", "ip route add 10.99.0.11/32 nhid 7"];
        let plain = ["ip route add 10.99.0.11/32 via 10.99.0.200 dev eth0"];
        for plant in [&by_object[..], &plain[..]] {
            run_all(&cluster.hosts[0], plant);
            let words = [
                "the route 10.99.0.11/32 via 10.99.0.200 dev eth0 of table main sends them there",
                "(ip route del 10.99.0.11/32)",
            ];
            wait_for_problem(&mut cluster.agents[0], &words);
            tool(&cluster.hosts[0].netns, "ip route del 10.99.0.11/32");
            cluster.agents.iter_mut().for_each(wait_for_path);
        }
        Ok(())
    });
}

#[test]
fn bridged_underlay_interface_is_reported_with_the_bridge_to_select() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        cluster.restart(0, &["--iface", "eth0"])?;
        wait_for_path(&mut cluster.agents[0]);
        sh(
            &cluster.hosts[0].netns,
            "ip link add br0 type bridge && ip link set br0 up && ip addr flush dev eth0 && \
             ip link set eth0 master br0 && ip addr add 10.99.0.10/16 dev br0",
        );
        let words =
            "address 10.99.0.10 is on interface br0 now, and iface = \"eth0\" forbids that one";
        wait_until(words, TIMEOUT, || has_problem(&mut cluster.agents[0], words));
        assert!(!has_problem(&mut cluster.agents[0], "ip addr add"));
        assert!(!has_problem(&mut cluster.agents[0], "once the network is back"));
        // Peers answer, so the node stays ready.
        status_where(&mut cluster.agents[0], |status| status["verdict"]["state"] == "degraded");
        Ok(())
    });
}

#[test]
fn changed_ttl_or_tos_of_the_vxlan_device_is_repaired() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        for change in ["ttl 1", "tos 0x10", "df set"] {
            let host = &cluster.hosts[0].netns;
            tool(host, &format!("ip link set gossamer.1 type vxlan id 1 {change}"));
            let is_right = |shown: &str| {
                shown.contains("vxlan id 1")
                    && ![" ttl 1 ", " tos ", " df set "].iter().any(|word| shown.contains(word))
            };
            eventually(host, "ip -d link show gossamer.1", is_right);
            wait_for_path(&mut cluster.agents[0]);
        }
        Ok(())
    });
}

//! The agent's own pod for tests of forwarding. If the agent has none although there are pods, it warns with
//! the reason and with rules that drop their packets.

use gossamer::lab::{Agent, NetNs};
use nix::sys::signal::Signal;

use crate::{
    cni::{Runtime, namespaces},
    common::{
        Cluster, TIMEOUT, has_notice, has_problem, isolated, program, run, sh, status_where, texts,
        tool, wait_until,
    },
    forwarding::{ADD_FORWARD_CHAIN, state, with_pods},
    misrouting_hosts::wait_for_notice,
};

#[test]
fn agents_test_pod_keeps_its_address_in_a_full_subnet_and_is_removed_at_the_end() {
    isolated(|lab| {
        let first = lab.host(1, "n1")?;
        let small = ["--init", "--network", "10.42.0.0/24", "--subnet-len", "29"];
        let mut agent = Agent::start(program(), &first, &small)?;
        agent.wait_converged(1, TIMEOUT)?;
        let token = crate::common::token_of(&mut agent)?;
        let mut cluster = Cluster { hosts: vec![first], agents: vec![agent], token };
        cluster.join(lab, 2)?;
        cluster.converge()?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let own = |cluster: &Cluster| {
            tool(&cluster.hosts[1].netns, "ip -o link show type veth").contains("gsp.1")
        };
        assert!(own(&cluster));
        assert_eq!(crate::cni::pods(&mut cluster.agents[1]), 1, "the agent's pod is listed");
        // A /29 has four addresses for pods, one for the gateway and one for the agent's pod.
        let _more = namespaces(&["c", "d", "e", "f"])?;
        {
            let runtime = Runtime::new(&cluster.agents[1]);
            ["c", "d", "e"].iter().for_each(|name| _ = runtime.add(name));
            let (code, why) = runtime.refused("ADD", "f", &serde_json::json!({}));
            assert!(code == 100 && why.contains("all 4 addresses"), "{code} {why}");
        }
        sh(
            &cluster.hosts[1].netns,
            &format!("{ADD_FORWARD_CHAIN} && nft add rule inet wall f reject"),
        );
        wait_until("not reported", TIMEOUT, || {
            has_problem(&mut cluster.agents[1], "does not forward packets of pods")
        });
        sh(&cluster.hosts[1].netns, "nft delete table inet wall");
        status_where(&mut cluster.agents[1], |status| state(status) == "ok");
        // The agent's pod vanishes with a killed agent, and with one that leaves the cluster.
        cluster.agents[1].end(Signal::SIGKILL)?;
        wait_until("it is left behind", TIMEOUT, || !own(&cluster));
        cluster.agents[1] = cluster.start_agent(&cluster.hosts[1], &[])?;
        cluster.agents[1].wait_converged(2, TIMEOUT)?;
        wait_until("it is not restored", TIMEOUT, || own(&cluster));
        cluster.agents[1].leave()?;
        assert!(
            !own(&cluster) && !run(&cluster.hosts[1].netns, "ip link show gsm0").status.success()
        );
        Ok(())
    });
}

#[test]
fn impossible_test_is_warned_of_where_a_pod_has_the_only_address() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let tiny = ["--init", "--network", "10.42.0.0/28", "--subnet-len", "30"];
        let mut agent = Agent::start(program(), &host, &tiny)?;
        agent.wait_converged(1, TIMEOUT)?;
        let _spaces = namespaces(&["a"])?;
        Runtime::new(&agent).add("a");
        wait_for_notice(
            &mut agent,
            &[
                "it is unknown whether this host forwards packets of pods",
                "pod a eth0 has the address",
            ],
        );
        assert_eq!(state(&agent.ask("/v1/status", TIMEOUT)?), "skipped");
        sh(&host.netns, &format!("{ADD_FORWARD_CHAIN} && nft add rule inet wall f reject"));
        wait_for_notice(&mut agent, &["chain inet wall f"]);
        Runtime::new(&agent).del("a");
        wait_until("it is still reported", TIMEOUT, || !has_notice(&mut agent, "it is unknown"));
        Ok(())
    });
}

/// Flannel's CNI plugin makes `cni0`; the agent has no pod of its own there.
#[test]
fn rules_that_drop_packets_of_pods_on_a_foreign_bridge_are_warned_of() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let subnet = Agent::subnet(&cluster.agents[1].ask("/v1/status", TIMEOUT)?)?;
        let gateway = gossamer::pods::gateway(subnet.into());
        let space = NetNs::new("a")?;
        let (host, agent) = (&cluster.hosts[1].netns, &mut cluster.agents[1]);
        sh(host, &format!("ip link add cni0 type bridge && ip addr add {gateway}/24 dev cni0"));
        sh(host, "ip link set cni0 up && ip link add va type veth peer name eth0 netns a");
        sh(host, "ip link set va master cni0 up");
        tool(&space, "ip link set eth0 up");
        wait_for_notice(
            agent,
            &[
                "it is unknown whether this host forwards packets of pods",
                "the bridge \"cni0\" of the pods belongs to another program",
            ],
        );
        let no_rules = texts(&agent.ask("/v1/status", TIMEOUT)?["notices"]);
        assert!(!no_rules.contains("chain "), "{no_rules}");
        let zones = "nft add table inet fw && nft add chain inet fw zone && \
                     nft add rule inet fw zone reject && \
                     nft add chain inet fw f { type filter hook forward priority 10 ; } && \
                     nft add rule inet fw f ct state established accept && \
                     nft add rule inet fw f jump zone";
        let tunnel = "nft add table inet fw && \
                      nft add chain inet fw f { type filter hook forward priority 10 ; } && \
                      nft add rule inet fw f iifname gossamer.1 drop";
        let nat = format!(
            "nft add table ip fw && \
             nft add chain ip fw f {{ type nat hook postrouting priority srcnat ; }} && \
             nft add rule ip fw f ip saddr {subnet} oifname != cni0 masquerade"
        );
        for (rules, family, words) in [
            (zones, "inet", "chain inet fw zone rejects packets between pods: all"),
            (tunnel, "inet", "chain inet fw f drops packets between pods: all"),
            (&nat, "ip", "chain ip fw f gives some packets between pods another source address"),
        ] {
            sh(host, rules);
            wait_for_notice(agent, &[words]);
            sh(host, &format!("nft delete table {family} fw"));
            wait_until("it is still reported", TIMEOUT, || !has_notice(agent, words));
        }
        sh(host, "ip link del cni0");
        wait_until("it is still reported", TIMEOUT, || !has_notice(agent, "it is unknown"));
        Ok(())
    });
}

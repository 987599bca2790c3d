//! Packets that a host drops where none of its own test packets passes: those of other hosts that arrive
//! without a tunnel, and those that it passes on between other hosts.

use std::process::Command;

use gossamer::lab::Agent;

use crate::{
    common::{
        Cluster, TIMEOUT, client, has_notice, has_problem, isolated, program, sh, status_where,
        token_of, tool, wait_until,
    },
    remote_pods::{all_answer, with_pods},
    silence_causes::{wait_for_path, wait_for_problem},
};

/// Commands that make a host refuse what pods of other hosts begin, and the cause that it reports.
const CLOSED_TO_OTHERS: [(&str, &str); 3] = [
    (
        "nft add chain inet wall f { type filter hook forward priority 0 ; policy drop ; } && \
         nft add rule inet wall f ct state established,related accept && \
         nft add rule inet wall f iifname gsm0 accept",
        "chain inet wall f (hook forward) has the policy drop",
    ),
    (
        "nft add chain inet wall f { type filter hook forward priority 0 ; } && \
         nft add rule inet wall f ct state established,related accept && \
         nft add rule inet wall f iifname gsm0 accept && \
         nft add rule inet wall f reject with icmpx admin-prohibited",
        "chain inet wall f (hook forward) ends in a rule that drops or rejects",
    ),
    (
        "nft add chain inet wall f { type filter hook forward priority 0 ; } && \
         nft add rule inet wall f ct state established,related accept && \
         nft add rule inet wall f iifname eth0 drop",
        "chain inet wall f (hook forward) has rules that drop or reject",
    ),
];

#[test]
fn host_without_tunnels_that_refuses_flows_of_other_hosts_reports_it_itself() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        for number in [0, 1] {
            cluster.restart(number, &["--mode", "direct"])?;
        }
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        for (close, cause) in CLOSED_TO_OTHERS {
            let host = &cluster.hosts[1].netns;
            sh(host, &format!("nft add table inet wall && {close}"));
            let there = "packets of pods here do not arrive at pods of n2 (IPv4)";
            wait_until(there, TIMEOUT, || has_problem(&mut cluster.agents[0], there));
            let here =
                "packets of pods of n1 do not arrive at pods here (IPv4), as tests from there show";
            let agent = &mut cluster.agents[1];
            wait_until(here, TIMEOUT, || has_problem(agent, here));
            wait_until(cause, TIMEOUT, || has_problem(agent, cause));
            wait_until(close, TIMEOUT, || has_notice(agent, "those that arrive by eth0 ("));
            sh(host, "nft insert rule inet wall f ip saddr 10.42.0.0/16 accept");
            for agent in &mut cluster.agents {
                all_answer(agent, 1);
            }
            sh(&cluster.hosts[1].netns, "nft delete table inet wall");
        }
        Ok(())
    });
}

#[test]
fn router_that_drops_tunnel_packets_between_other_members_reports_the_chain() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        // The first host routes between the network of the second one and that of the third one.
        let far = lab.host(3, "n3")?;
        let router = cluster.hosts[0].ip;
        sh(&far.netns, "ip link del eth0");
        sh(
            &cluster.hosts[0].netns,
            &format!(
                "ip link add lan7 type veth peer name eth0 netns {} && ip link set lan7 up && \
                 ip addr add 10.97.0.1/24 dev lan7",
                far.netns.name()
            ),
        );
        sh(
            &far.netns,
            "ip link set eth0 up && ip addr add 10.97.0.3/24 dev eth0 && \
             ip route add default via 10.97.0.1",
        );
        sh(&cluster.hosts[1].netns, &format!("ip route add 10.97.0.0/24 via {router}"));
        cluster.agents.push(cluster.start_agent(&far, &[])?);
        cluster.hosts.push(far);
        cluster.converge()?;
        let are_ok = |status: &serde_json::Value| {
            let mut paths = status["paths"].as_array().expect("paths").iter();
            paths.all(|path| path["state"] == "ok") && status["problems"] == serde_json::json!([])
        };
        for agent in &mut cluster.agents {
            status_where(agent, are_ok);
        }
        sh(
            &cluster.hosts[0].netns,
            "nft add table inet lan && \
             nft add chain inet lan f { type filter hook forward priority 0 ; } && \
             nft add rule inet lan f ip saddr 10.42.0.0/16 accept && \
             nft add rule inet lan f ip daddr 10.42.0.0/16 accept && \
             nft add rule inet lan f ct state established,related accept && \
             nft add rule inet lan f udp dport 8473 accept && \
             nft add chain inet lan f { policy drop ; }",
        );
        let agent = &mut cluster.agents[0];
        for words in [
            "tunnel packets of other members pass this host, which drops them",
            "chain inet lan f drops UDP 8472 from n",
            "(by its policy): nft insert rule inet lan f udp dport 8472 accept",
        ] {
            wait_until(words, TIMEOUT, || has_problem(agent, words));
        }
        tool(&cluster.hosts[0].netns, "nft insert rule inet lan f udp dport 8472 accept");
        for agent in &mut cluster.agents {
            status_where(agent, are_ok);
        }
        Ok(())
    });
}

#[test]
fn member_that_gossip_calls_down_while_its_packets_arrive_is_a_problem_with_the_direction() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        sh(
            &cluster.hosts[1].netns,
            "nft add table inet wall && \
             nft add chain inet wall in { type filter hook input priority 0 ; } && \
             nft add rule inet wall in iifname eth0 udp dport { 8472, 8473 } drop && \
             nft add rule inet wall in iifname eth0 udp sport 8473 drop",
        );
        let agent = &mut cluster.agents[0];
        let words = "gossip considers n2 down, but its packets arrive: the way to it, from 10.99.0.10 to \
                     10.99.0.11, is closed for UDP 8472 and 8473";
        wait_until(words, TIMEOUT, || has_problem(agent, words));
        let doctor = String::from_utf8(client(agent, &["doctor"]).stdout)?;
        assert!(!doctor.contains("gossamer forget"), "{doctor}");
        sh(&cluster.hosts[1].netns, "nft delete table inet wall");
        status_where(&mut cluster.agents[0], |status| status["problems"] == serde_json::json!([]));
        Ok(())
    });
}

/// As with ports of a switch that are isolated from each other, or a macvlan guest and its host.
#[test]
fn peer_that_only_other_members_reach_is_reported_with_its_cause() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        cluster.agents.iter_mut().for_each(wait_for_path);
        for port in ["port1", "port2"] {
            let mut isolate = Command::new("bridge");
            let isolated = isolate.args(["link", "set", "dev", port, "isolated", "on"]).status()?;
            assert!(isolated.success());
        }
        let words = [
            "no machine on eth0 answers ARP for 10.99.0.11, so packets to n2 (10.99.0.11) do not leave this \
             host",
            "gossip still gets there through other members",
        ];
        wait_for_problem(&mut cluster.agents[0], &words);
        Ok(())
    });
}

/// As on a hypervisor whose card is a port of a bridge.
#[test]
fn chain_at_the_port_of_an_underlay_bridge_is_reported_by_name() {
    isolated(|lab| {
        let hosts = [lab.host(1, "n1")?, lab.host(2, "n2")?];
        let mut first = Agent::start(program(), &hosts[0], &["--init"])?;
        first.wait_converged(1, TIMEOUT)?;
        let token = token_of(&mut first)?;
        let second = &hosts[1].netns;
        sh(
            second,
            "ip link add vmbr0 type bridge && ip link set vmbr0 up && \
             ip addr flush dev eth0 && ip link set eth0 master vmbr0 && \
             ip addr add 10.99.0.11/16 dev vmbr0",
        );
        let join = ["--iface", "vmbr0", "--join", "10.99.0.10", "--token", &token];
        let mut agent = Agent::start(program(), &hosts[1], &join)?;
        agent.wait_converged(2, TIMEOUT)?;
        wait_for_path(&mut agent);
        let chain = "netdev ddos in";
        let hook = "{ type filter hook ingress device eth0 priority -500 ; }";
        sh(second, "nft add table netdev ddos");
        tool(second, &format!("nft add chain {chain} {hook}"));
        tool(second, &format!("nft add rule {chain} udp dport 8472 drop"));
        wait_for_problem(&mut agent, &[&format!("a rule of chain {chain}"), "from n1"]);
        sh(second, "nft delete table netdev ddos");
        wait_for_path(&mut agent);
        Ok(())
    });
}

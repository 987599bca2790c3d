//! Underlays with a smaller MTU than usual are reported, and used as far as possible.

use std::{fs, net::Ipv4Addr};

use gossamer::lab::{Agent, Host, memory_mib};
use serde_json::Value;

use crate::{
    cni::{Runtime, namespaces},
    common::{
        Cluster, TIMEOUT, eventually, has_notice, has_problem, isolated, program, run,
        status_where, texts, token_of, tool, wait_until,
    },
};

fn set_mtu(host: &Host, mtu: u32) {
    tool(&host.netns, &format!("ip link set eth0 mtu {mtu}"));
}

#[test]
fn underlay_mtu_below_the_quic_minimum_is_reported_by_creator_and_joiner() {
    isolated(|lab| {
        let hosts = [lab.host(1, "n1")?, lab.host(2, "n2")?];
        hosts.iter().for_each(|host| set_mtu(host, 1_200));
        let mut creator = Agent::start(program(), &hosts[0], &["--init"])?;
        creator.wait_converged(1, TIMEOUT)?;
        let token = token_of(&mut creator)?;
        let seed = hosts[0].ip.to_string();
        let mut joiner = Agent::start(program(), &hosts[1], &["--join", &seed, "--token", &token])?;
        for agent in [&mut creator, &mut joiner] {
            wait_until("it is not reported", TIMEOUT, || {
                has_problem(agent, "interface eth0 has MTU 1200")
                    && has_problem(agent, "gossip (QUIC) needs at least 1228")
            });
        }
        hosts.iter().for_each(|host| set_mtu(host, 1_228));
        creator.wait_converged(2, TIMEOUT)?;
        joiner.wait_converged(2, TIMEOUT)?;
        assert!(!has_problem(&mut creator, "QUIC") && !has_problem(&mut joiner, "QUIC"));
        Ok(())
    });
}

#[test]
fn dual_stack_on_an_underlay_too_small_for_ipv6_carries_ipv4() {
    isolated(|lab| {
        let mut cluster =
            Cluster { hosts: vec![lab.host(1, "n1")?], agents: Vec::new(), token: String::new() };
        if !run(&cluster.hosts[0].netns, "ip addr add fd99::1/64 dev lo").status.success() {
            eprintln!("SKIPPED: the kernel has no IPv6");
            return Ok(());
        }
        set_mtu(&cluster.hosts[0], 1_300);
        let arguments = ["--init", "--network6", "fd42::/48"];
        let mut creator = Agent::start(program(), &cluster.hosts[0], &arguments)?;
        creator.wait_converged(1, TIMEOUT)?;
        cluster.token = token_of(&mut creator)?;
        cluster.agents.push(creator);
        let second = lab.host(2, "n2")?;
        set_mtu(&second, 1_300);
        cluster.agents.push(cluster.start_agent(&second, &[])?);
        cluster.hosts.push(second);
        let pods = cluster.pods()?;
        assert!(tool(&pods[0].netns, &format!("ping -c 1 -W 5 {}", pods[1].ip)).contains(" 1 rec"));
        let host = &cluster.hosts[0];
        let env = fs::read_to_string(host.dir.join("subnet.env"))?;
        assert!(env.contains("FLANNEL_SUBNET") && !env.contains("IPV6"), "{env}");
        let left_out = "IPv6 (fd42::/48) is left out on this host";
        let addresses = "ip -6 addr show gossamer.1 scope global";
        for (host, agent) in cluster.hosts.iter().zip(&mut cluster.agents) {
            assert_eq!(tool(&host.netns, addresses), "");
            status_where(agent, |status| texts(&status["problems"]).contains(left_out));
            set_mtu(host, 1_330);
            eventually(&host.netns, addresses, |shown| shown.contains("fd42:"));
            status_where(agent, |status| !texts(&status["problems"]).contains(left_out));
        }
        let routes = tool(&cluster.hosts[0].netns, "ip -6 route show proto 73");
        assert!(routes.contains("fd42:"), "{routes}");
        Ok(())
    });
}

#[test]
fn large_foreign_rule_sets_are_not_kept_in_memory() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = namespaces(&["a", "b"])?;
        Runtime::new(&cluster.agents[0]).add("a");
        Runtime::new(&cluster.agents[1]).add("b");
        let is_tried = |status: &Value| status["kernel"]["forwarding"]["state"] == "ok";
        status_where(&mut cluster.agents[0], is_tried);
        let pid = cluster.agents[0].pid();
        let before = memory_mib(pid, "VmRSS:");
        // As clusters of Kubernetes with very many Services have them: about 30 MB.
        let mut rules =
            "table ip crowd {\n chain pre { type nat hook prerouting priority -100;\n".to_owned();
        for number in 0..60_000_u32 {
            let to = Ipv4Addr::from(0x0a60_0000 + number);
            rules += &format!(
                "ip saddr != 10.42.0.0/16 ip daddr {to} tcp dport 80 counter dnat to 10.43.0.1:8080\n"
            );
        }
        rules += "}\n}\n";
        let file = cluster.hosts[0].dir.join("rules");
        fs::write(&file, rules)?;
        tool(&cluster.hosts[0].netns, &format!("nft -f {}", file.display()));
        // The agent reads all rules at once: when it reports this one, it has read the others, too.
        let proxy = "tcp dport 8080 redirect to :3128";
        let hook = "type nat hook prerouting priority -99;";
        tool(
            &cluster.hosts[0].netns,
            &format!(
                "nft add table ip proxy; add chain ip proxy pre {{ {hook} }}; add rule ip proxy pre {proxy}"
            ),
        );
        wait_until("it is not reported", TIMEOUT, || {
            has_notice(&mut cluster.agents[0], "ip proxy pre")
        });
        let peak = memory_mib(pid, "VmHWM:");
        assert!(peak < before + 50.0, "{before} MiB before, {peak} MiB now");
        Ok(())
    });
}

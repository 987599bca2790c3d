//! Modes without a tunnel, and changes of the mode.

use std::{process::Command, time::Duration};

use gossamer::lab::{Agent, Host, Lab, Pinger};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    common::{Cluster, TIMEOUT, client, has_problem, isolated, run, skipped, tool, wait_until},
    doctor::complaints,
    remote_pods::with_pods,
    silence_causes::{REPORT_TIMEOUT, run_all, wait_for_path, wait_for_problem},
};

/// Returns gossamer's routes to peers, without the one that rejects unused addresses.
fn routes(host: &Host) -> String {
    let routes = tool(&host.netns, "ip route show proto 73");
    let to_peers = routes.lines().filter(|route| !route.contains("metric 4294967295"));
    to_peers.map(|route| format!("{route}\n")).collect()
}

/// Returns neighbors and FDB entries, sorted because their order is undefined.
fn entries(host: &Host) -> Vec<String> {
    let commands = ["bridge fdb show dev gossamer.1", "ip neigh show dev gossamer.1 nud permanent"];
    let text = commands.map(|command| tool(&host.netns, command)).concat();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Restarts every agent with other arguments, as an operator who changes the mode does.
fn restart_all(cluster: &mut Cluster, arguments: &[&str]) -> anyhow::Result<()> {
    for number in 0..cluster.hosts.len() {
        cluster.agents[number].end(Signal::SIGTERM)?;
        cluster.agents[number] = cluster.start_agent(&cluster.hosts[number], arguments)?;
    }
    cluster.converge()
}

/// Adds a host behind the router of the underlay, in its own network.
fn far_host(lab: &mut Lab, number: u16) -> anyhow::Result<Host> {
    let host = lab.host(number, &format!("n{number}"))?;
    for command in [
        "ip addr flush dev eth0".to_owned(),
        format!("ip addr add 10.98.0.{number}/16 dev eth0"),
        "ip route add default via 10.98.0.1".to_owned(),
    ] {
        tool(&host.netns, &command);
    }
    let run = |command: &str| Command::new("sh").args(["-c", command]).status();
    anyhow::ensure!(run("ip addr add 10.98.0.1/16 dev underlay")?.success());
    anyhow::ensure!(run("echo 1 > /proc/sys/net/ipv4/ip_forward")?.success());
    Ok(host)
}

#[test]
fn mode_change_loses_no_packet_and_removes_the_old_entries() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let pods = cluster.pods()?;
        let tunnels: Vec<_> =
            cluster.hosts.iter().map(|host| (routes(host), entries(host))).collect();
        let mut pinger = Pinger::new(&pods[0].netns)?;
        let to = pods[1].ip;
        let pinging = std::thread::spawn(move || {
            pinger.stream(to, 600, Duration::from_millis(10)).map(|answered| (pinger, answered))
        });
        for mode in ["direct", "host-gw"] {
            restart_all(&mut cluster, &["--mode", mode])?;
            for host in &cluster.hosts {
                let routes = routes(host);
                assert_eq!(routes.matches("via 10.99.0.").count(), 2, "{mode}: {routes}");
                assert_eq!(routes.lines().count(), 2, "{mode}: {routes}");
                assert!(entries(host).is_empty(), "{mode}: {:?}", entries(host));
            }
        }
        let env = std::fs::read_to_string(cluster.hosts[0].dir.join("subnet.env"))?;
        assert!(env.contains("FLANNEL_MTU=1500"), "{env}");
        restart_all(&mut cluster, &["--mode", "vxlan"])?;
        for (host, before) in cluster.hosts.iter().zip(tunnels) {
            assert_eq!((routes(host), entries(host)), before);
        }
        let (_, answered) = pinging.join().expect("the pinger ends")?;
        assert_eq!(answered, 600);
        Ok(())
    });
}

#[test]
fn doctor_finds_nothing_on_a_healthy_host_without_tunnels() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        restart_all(&mut cluster, &["--mode", "host-gw"])?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        for host in &cluster.hosts {
            for more in ["", "--mode host-gw"] {
                assert_eq!(complaints(host, more), [Value::Null; 0], "{more}");
            }
        }
        Ok(())
    });
}

#[test]
fn direct_routes_are_restored_after_the_underlay_was_down() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let second = lab.host(2, "n2")?;
        cluster.agents.push(cluster.start_agent(&second, &["--mode", "direct"])?);
        cluster.hosts.push(second);
        cluster.converge()?;
        let host = &cluster.hosts[1];
        let before = routes(host);
        assert!(before.contains(&format!("via {} dev eth0", cluster.hosts[0].ip)), "{before}");
        for command in ["ip link set eth0 down", "ip link set eth0 up"] {
            tool(&host.netns, command);
        }
        wait_until("it is not restored", TIMEOUT, || routes(host) == before);
        let subnet = before.split_whitespace().next().expect("a subnet");
        tool(&host.netns, &format!("ip route replace {subnet} via 10.99.0.1 proto 73 metric 9"));
        wait_until("it is not restored", TIMEOUT, || routes(host) == before);
        Ok(())
    });
}

#[test]
fn peers_behind_a_router_get_a_tunnel_or_are_reported() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let far = far_host(lab, 3)?;
        cluster.agents.push(cluster.start_agent(&far, &[])?);
        cluster.hosts.push(far);
        restart_all(&mut cluster, &["--mode", "direct"])?;
        let pods = cluster.pods()?;
        for (to, via) in [(1, "dev eth0"), (2, "dev gossamer.1")] {
            let subnet = Agent::subnet(&cluster.agents[to].ask("/v1/status", TIMEOUT)?)?;
            let route = tool(&cluster.hosts[0].netns, &format!("ip route show {subnet}"));
            assert!(route.contains(via), "{route}");
            let mut pinger = Pinger::new(&pods[0].netns)?;
            wait_until("no answer", TIMEOUT, || {
                pinger.ping(pods[to].ip, Duration::from_secs(1)).is_ok_and(|got| got.is_some())
            });
        }

        cluster.agents[0].end(Signal::SIGTERM)?;
        cluster.agents[0] = cluster.start_agent(&cluster.hosts[0], &["--mode", "host-gw"])?;
        wait_until("it is not reported", TIMEOUT, || {
            has_problem(&mut cluster.agents[0], "n3 (10.98.0.3) is not on this host's underlay")
        });
        let routes = routes(&cluster.hosts[0]);
        assert_eq!(routes.matches("unreachable").count(), 1, "{routes}");
        Ok(())
    });
}

#[test]
fn direct_mode_accepts_answers_without_a_tunnel() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        restart_all(&mut cluster, &["--mode", "direct"])?;
        for agent in &mut cluster.agents {
            wait_for_path(agent);
            let doctor = String::from_utf8(client(agent, &["doctor"]).stdout)?;
            assert!(doctor.contains("ok        paths          1 of 1 ok"), "{doctor}");
        }
        Ok(())
    });
}

/// As NixOS configures it, on hosts of two modes.
#[test]
fn reverse_path_rule_is_reported_on_its_host_when_modes_differ() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.restart(0, &["--mode", "direct"])?;
        let rules = [
            "nft add table ip rpf",
            "nft add chain ip rpf pre { type filter hook prerouting priority mangle ; }",
            "nft add rule ip rpf pre fib saddr . iif oif missing drop",
        ];
        if !rules.iter().all(|command| run(&cluster.hosts[0].netns, command).status.success()) {
            skipped(
                "reverse_path_rule_is_reported_on_its_host_when_modes_differ",
                "it needs `nft` (Debian: nftables), and a kernel with fib",
            );
            return Ok(());
        }
        run_all(&cluster.hosts[1], &rules);
        let advice = "nft insert rule ip rpf pre ip saddr 10.42.0.0/16 accept";
        let ways = [["gossamer.1", "eth0"], ["eth0", "gossamer.1"]];
        for (agent, [came, goes]) in cluster.agents.iter_mut().zip(ways) {
            let ways = format!("come in by {came}, and packets to them leave by {goes}");
            wait_for_problem(agent, &["a rule of chain ip rpf pre (handle ", &ways, advice]);
            assert!(!has_problem(agent, "UDP 8472 is closed"));
        }

        // The host without such a rule reports no closed port either.
        tool(&cluster.hosts[1].netns, "nft delete table ip rpf");
        let mixed = "packets to n1 go through the tunnel, its own come without one";
        wait_until("it is not reported", REPORT_TIMEOUT, || {
            has_problem(&mut cluster.agents[1], mixed)
        });
        assert!(!has_problem(&mut cluster.agents[1], "UDP 8472 is closed"));
        tool(&cluster.hosts[0].netns, advice);
        wait_until("the advice does not help", REPORT_TIMEOUT, || {
            !has_problem(&mut cluster.agents[0], "chain ip rpf pre")
                && has_problem(&mut cluster.agents[1], "its answers arrive without")
        });
        Ok(())
    });
}

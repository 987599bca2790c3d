//! Networks of a host that overlap with the overlay's: rejected, avoided, and reported.

use std::time::{Duration, Instant};

use gossamer::lab::{Agent, Host};
use nix::sys::signal::Signal;

use crate::{
    cni::{Runtime, namespaces},
    common::{
        Cluster, TIMEOUT, client, has_problem, isolated, program, run, status_where, texts, tool,
        wait_until,
    },
    doctor::complaints,
    remote_pods::{all_answer, with_pods},
};

/// Adds an interface with an address to a host.
fn second_card(host: &Host, address: &str) {
    tool(&host.netns, "ip link add eth1 type veth peer name eth1-peer");
    tool(&host.netns, "ip link set eth1 up");
    tool(&host.netns, &format!("ip addr add {address} dev eth1"));
}

#[test]
fn init_with_an_overlapping_network_on_the_host_is_rejected() {
    isolated(|lab| {
        let cases = [
            ("inside", "ip addr add 10.42.5.7/24 dev eth0", "10.42.5.7/24 of interface eth0"),
            ("around", "ip addr add 10.1.1.1/8 dev eth0", "10.1.1.1/8 of interface eth0"),
            ("route", "ip route add 10.42.7.0/24 via 10.99.0.1", "10.42.7.0/24 of interface eth0"),
        ];
        for (number, (name, command, said)) in cases.into_iter().enumerate() {
            let host = lab.host(number as u16 + 1, name)?;
            tool(&host.netns, command);
            let mut agent = Agent::start(program(), &host, &["--init"])?;
            assert_eq!(agent.wait()?.code(), Some(1), "{name}: {}", agent.log());
            assert!(agent.log().contains(said), "{}", agent.log());
            assert!(!run(&host.netns, "ip link show gossamer.1").status.success());
        }
        // A route around the whole network does not conflict.
        let host = lab.host(9, "wide")?;
        tool(&host.netns, "ip route add 10.0.0.0/8 via 10.99.0.1");
        let mut agent = Agent::start(program(), &host, &["--init"])?;
        agent.wait_converged(1, TIMEOUT)?;
        Ok(())
    });
}

#[test]
fn joiner_avoids_overlapping_subnets_and_reports_the_overlap() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        second_card(&host, "10.42.200.7/24");
        let mut agent = cluster.start_agent(&host, &["--prefer-subnet", "10.42.200.0"])?;
        let status = agent.wait_converged(2, TIMEOUT)?;
        let subnet = Agent::subnet(&status)?;
        assert_ne!(subnet.to_string(), "10.42.200.0/24");
        status_where(&mut agent, |status| {
            texts(&status["problems"]).contains("10.42.200.7 on eth1")
        });
        let doctor = client(&agent, &["doctor"]);
        let said = String::from_utf8_lossy(&doctor.stdout);
        assert!(said.contains("10.42.200.7 on eth1"), "{said}");
        // An address in its own subnet is reported as well, until it is removed.
        let own = subnet.hosts().nth(20).expect("an address");
        tool(&host.netns, &format!("ip addr add {own}/32 dev eth1"));
        wait_until("it is not reported", TIMEOUT, || has_problem(&mut agent, &own.to_string()));
        tool(&host.netns, "ip link del eth1");
        wait_until("it is still reported", TIMEOUT, || !has_problem(&mut agent, "on eth1"));

        // After a reboot, with the card in the node's own subnet, the node moves to another subnet.
        agent.end(Signal::SIGTERM)?;
        tool(&host.netns, "ip link del gossamer.1");
        second_card(&host, &format!("{own}/24"));
        let mut agent = cluster.start_agent(&host, &[])?;
        let status = agent.wait_converged(2, TIMEOUT)?;
        assert_ne!(Agent::subnet(&status)?, subnet);
        Ok(())
    });
}

/// As libvirt creates one. Routes to subnets of nodes are more specific, so pods lose nothing.
#[test]
fn network_around_node_subnets_is_reported_with_its_effect_by_status_and_doctor() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = &cluster.hosts[0].netns;
        tool(host, "ip link add virbr0 type bridge");
        tool(host, "ip link set virbr0 up");
        tool(host, "ip addr add 10.42.0.1/16 dev virbr0");
        let agent = &mut cluster.agents[0];
        let named = |status: &serde_json::Value| texts(&status["problems"]).contains("virbr0");
        let status = status_where(agent, named);
        let problems = status["problems"].as_array().expect("problems");
        let problem = problems[0]["what"].as_str().expect("a sentence");
        assert_eq!(problems.len(), 1, "{problems:#?}");
        assert!(problem.contains("in these subnets") && !problem.contains("leave by"), "{problem}");
        tool(&pods[0].netns, &format!("ping -c 1 -W 2 {}", pods[1].ip));
        let bad = complaints(&cluster.hosts[0], "");
        assert_eq!(bad.len(), 1, "{bad:#?}");
        assert!(bad[0]["seen"].as_str().is_some_and(|seen| problem.starts_with(seen)), "{bad:#?}");
        Ok(())
    });
}

/// For example a leftover bridge of flannel, or Docker's with the same subnet, while pods are on
/// gossamer's bridge.
#[test]
fn second_bridge_in_a_nodes_own_subnet_is_reported_with_the_removal_command() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let agent = &mut cluster.agents[1];
        let subnet = Agent::subnet(&agent.ask("/v1/status", TIMEOUT)?)?;
        let host = &cluster.hosts[1].netns;
        let gateway = subnet.hosts().next().expect("an address");
        for command in [
            "ip link add cni0 type bridge",
            "ip link add old0 type veth peer name old1",
            "ip link set old0 master cni0 up",
            "ip link set old1 up",
            "ip link set cni0 up",
            &format!("ip addr add {gateway}/24 dev cni0"),
        ] {
            tool(host, command);
        }
        let _pod = namespaces(&["a"])?;
        Runtime::new(agent).add("a");
        let words = format!("{gateway} on cni0 is in this node's own subnet {subnet}");
        let status = status_where(agent, |status| texts(&status["problems"]).contains(&words));
        assert!(texts(&status["problems"]).contains("ip link del cni0"), "{status:#}");
        let doctor =
            format!("{} doctor --socket {}", program().display(), agent.socket().display());
        let doctor = String::from_utf8(run(host, &doctor).stdout)?;
        assert!(doctor.contains("PROBLEM   overlays") && doctor.contains("on cni0"), "{doctor}");
        // No wrong cause is reported, however often the check runs.
        wait_until("the wrong route is not detected", TIMEOUT, || {
            let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
            status["kernel"]["routing"]["state"] == "failing"
        });
        assert!(!has_problem(agent, "no rule was found"));
        tool(host, "ip link del cni0");
        status_where(agent, |status| status["problems"].as_array().is_some_and(Vec::is_empty));
        // A second such bridge takes no packets while the first one exists, but is reported as well.
        tool(host, "ip link add docker9 type bridge");
        tool(host, &format!("ip addr add {gateway}/24 dev docker9"));
        wait_until("it is not reported", TIMEOUT, || has_problem(agent, "on docker9"));
        Ok(())
    });
}

/// For example of a hotspot, or a bridge of other containers.
#[test]
fn interface_in_a_peers_subnet_is_reported_as_the_only_cause() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        let gateway = subnet.hosts().next().expect("an address");
        let host = &cluster.hosts[1].netns;
        let agent = &mut cluster.agents[1];
        let words = format!("{gateway} on d0 is in the overlay's network");
        // The first one takes all packets to the peer's pods, the second one those to some addresses.
        for flags in ["", " noprefixroute"] {
            tool(host, "ip link add d0 type bridge");
            tool(host, "ip link set d0 up");
            tool(host, &format!("ip addr add {gateway}/24 brd + dev d0{flags}"));
            wait_until(&words, TIMEOUT, || has_problem(agent, &words));
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(30) {
                for made_up in ["Invalid argument", "handed to gossamer.1"] {
                    assert!(!has_problem(agent, made_up), "{}", agent.log());
                }
                std::thread::sleep(Duration::from_millis(300));
            }
            tool(host, "ip link del d0");
            all_answer(agent, 1);
        }
        Ok(())
    });
}

#[test]
fn route_in_a_nodes_own_subnet_does_not_move_a_node_with_pods() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        let subnet = Agent::subnet(&cluster.agents[1].ask("/v1/status", TIMEOUT)?)?;
        let part = subnet.to_string().replace("0/24", "64/26");
        tool(&cluster.hosts[1].netns, &format!("ip route add blackhole {part}"));
        cluster.restart(1, &[])?;
        let agent = &mut cluster.agents[1];
        assert_eq!(Agent::subnet(&agent.ask("/v1/status", TIMEOUT)?)?, subnet);
        let words = format!("blackhole route to {part}");
        wait_until(&words, TIMEOUT, || has_problem(agent, &words));
        assert!(!has_problem(agent, "outside this node's subnet"), "{}", agent.log());
        Ok(())
    });
}

#[test]
fn container_bridge_in_a_nodes_own_subnet_is_no_overlap() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let pods = cluster.pods()?;
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        cluster.agents[0].end(Signal::SIGTERM)?;
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        let status = cluster.agents[0].wait_converged(1, TIMEOUT)?;
        assert_eq!(Agent::subnet(&status)?, subnet);
        assert_eq!(status["problems"].as_array().map(Vec::len), Some(0), "{status:#}");
        drop(pods);
        Ok(())
    });
}

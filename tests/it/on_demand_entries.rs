//! Entries that the kernel requests on demand: misses, and a kernel that holds only the peers in use.

use std::time::Duration;

use gossamer::lab::{Agent, NetNs, Pinger, absent_member, add_crowd};
use nix::sys::signal::Signal;

use crate::common::{
    Cluster, TIMEOUT, eventually, isolated, program, resume, run, status_where, suspend, token_of,
    tool, wait_until,
};

/// An unoptimized program takes this long to try a comparison with a thousand unreachable members.
const CONVERGE_TIMEOUT: Duration = Duration::from_secs(180);

/// Returns the numbers of gossamer's routes, neighbors and FDB entries.
fn entries(netns: &NetNs) -> [usize; 3] {
    [
        "ip route show proto 73 dev gossamer.1",
        "ip neigh show dev gossamer.1 nud permanent",
        "bridge fdb show dev gossamer.1",
    ]
    .map(|command| tool(netns, command).lines().count())
}

#[test]
fn kernel_misses_for_unknown_addresses_are_counted() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[0].netns;
        assert!(tool(host, "ip -d link show gossamer.1").contains("l2miss l3miss"));
        for command in [
            "ip neigh add 10.42.250.9 lladdr 02:00:00:00:00:99 dev gossamer.1 nud reachable",
            "ip route add 10.42.250.0/24 via 10.42.250.9 dev gossamer.1 onlink proto static",
            "ip route add 10.42.251.0/24 via 10.42.251.9 dev gossamer.1 onlink proto static",
        ] {
            tool(host, command);
        }
        wait_until("they are not counted", TIMEOUT, || {
            for unknown in ["10.42.250.5", "10.42.251.5"] {
                run(host, &format!("ping -c 1 -W 1 {unknown}"));
            }
            let status = cluster.agents[0].ask("/v1/status", TIMEOUT).expect("a status");
            status["kernel"]["misses_unknown"].as_u64() >= Some(2)
        });
        Ok(())
    });
}

#[test]
fn failed_neighbor_is_restored_from_the_view() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let subnet = Agent::subnet(&cluster.agents[1].ask("/v1/status", TIMEOUT)?)?;
        let host = &cluster.hosts[0].netns;
        // No event reports what was deleted while the agent was suspended; the kernel's miss does.
        suspend(&cluster.agents[0])?;
        tool(host, &format!("ip neigh del {} dev gossamer.1", subnet.network()));
        let mut pinger = Pinger::new(&pods[0].netns)?;
        assert_eq!(pinger.ping(pods[1].ip, Duration::from_millis(300))?, None);
        resume(&cluster.agents[0])?;
        wait_until("no answer", TIMEOUT, || {
            pinger.ping(pods[1].ip, Duration::from_millis(300)).is_ok_and(|got| got.is_some())
        });
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["misses_answered"].as_u64() >= Some(1)
                && status["kernel"]["repairs"]["miss"].as_u64() >= Some(1)
        });
        Ok(())
    });
}

#[test]
fn on_demand_mode_programs_only_the_ten_used_peers_of_a_thousand() {
    isolated(|lab| {
        let hosts = [lab.host(1, "n1")?, lab.host(2, "n2")?];
        // Otherwise a used member of the crowd would be withdrawn after a while, and forgotten later than
        // other members.
        let on_demand =
            ["--program", "on-demand", "--idle-after", "3s", "--withdraw-after", "never"];
        let bootstrap = ["--init", "--network", "10.32.0.0/12", "--subnet-len", "24"];
        let mut first = Agent::start(program(), &hosts[0], &[&bootstrap[..], &on_demand].concat())?;
        first.wait_converged(1, TIMEOUT)?;
        let token = token_of(&mut first)?;
        let seed = hosts[0].ip.to_string();
        let join = ["--join", &seed, "--token", &token];
        let mut second = Agent::start(program(), &hosts[1], &[&join[..], &on_demand].concat())?;
        second.wait_converged(2, TIMEOUT)?;
        first.end(Signal::SIGTERM)?;
        add_crowd(&hosts[0], &(1..=1_000).map(absent_member).collect::<Vec<_>>())?;
        let seed = hosts[1].ip.to_string();
        let arguments = [&["--join", &seed][..], &on_demand].concat();
        let mut first = Agent::start(program(), &hosts[0], &arguments)?;
        status_where(&mut second, |status| {
            status["members"].as_array().is_some_and(|members| members.len() == 1_002)
        });
        let mut pods = Vec::new();
        for (host, agent) in hosts.iter().zip([&mut first, &mut second]) {
            pods.push(host.pod(Agent::subnet(&agent.wait_converged(2, CONVERGE_TIMEOUT)?)?, 1450)?);
        }
        let host = &hosts[0].netns;
        assert_eq!(entries(host), [1, 0, 0], "one route for all");

        // Nine members of the crowd, which do not answer, and a peer that answers the first packet.
        for slot in 1..=9 {
            run(host, &format!("ping -c 1 -W 1 -w 1 10.32.{}.7", slot * 4));
        }
        let mut pinger = Pinger::new(&pods[0].netns)?;
        assert!(pinger.ping(pods[1].ip, Duration::from_secs(2))?.is_some(), "the first packet");
        assert_eq!(pinger.stream(pods[1].ip, 100, Duration::from_millis(5))?, 100);
        let [routes, neighbors, fdb] = entries(host);
        assert!((2..=11).contains(&routes) && neighbors <= 10 && fdb <= 10, "{routes} routes");
        eventually(host, "ip route show proto 73 dev gossamer.1", |routes| {
            routes.lines().count() == 1
        });
        assert_eq!(entries(host), [1, 0, 0], "no peer is in use any more");
        assert!(pinger.ping(pods[1].ip, Duration::from_secs(2))?.is_some(), "used again");

        // Entries that a killed agent did not remove must not disturb the next one.
        first.end(Signal::SIGKILL)?;
        let mut first = Agent::start(program(), &hosts[0], &arguments)?;
        first.wait_converged(2, CONVERGE_TIMEOUT)?;
        eventually(host, "ip route show proto 73 dev gossamer.1", |routes| {
            routes.lines().count() == 1
        });
        assert!(pinger.ping(pods[1].ip, Duration::from_secs(2))?.is_some());
        assert_eq!(pinger.stream(pods[1].ip, 100, Duration::from_millis(5))?, 100);
        let status = first.ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["kernel"]["repairs"], serde_json::json!({}), "expiry is not a repair");
        Ok(())
    });
}

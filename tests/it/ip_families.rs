//! IPv6 in overlay and underlay: each family alone, and both.

use std::io::Write as _;

use gossamer::lab::{Agent, Host, Lab, NetNs};
use ipnet::IpNet;

use crate::common::{
    TIMEOUT, eventually, has_problem, isolated, program, run, sh, status_where, texts, token_of,
    tool, wait_until,
};

/// Creates two hosts that also have an IPv6 address on the underlay. Returns None if the kernel has no
/// IPv6.
pub fn hosts(lab: &mut Lab) -> anyhow::Result<Option<[Host; 2]>> {
    let hosts = [lab.host(1, "n1")?, lab.host(2, "n2")?];
    for (n, host) in (1..).zip(&hosts) {
        let added = run(&host.netns, &format!("ip addr add fd99::{n}/64 dev eth0 nodad"));
        if !added.status.success() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: the kernel has no IPv6");
            return Ok(None);
        }
    }
    Ok(Some(hosts))
}

/// Starts a cluster on both hosts; the first one creates it.
pub fn cluster(
    hosts: &[Host; 2],
    underlays: [&str; 2],
    first: &[&str],
) -> anyhow::Result<[Agent; 2]> {
    let bootstrap = [&["--init", "--iface", underlays[0]], first].concat();
    let mut creator = Agent::start(program(), &hosts[0], &bootstrap)?;
    creator.wait_converged(1, TIMEOUT)?;
    let token = token_of(&mut creator)?;
    let arguments = ["--iface", underlays[1], "--join", underlays[0], "--token", &token];
    let mut agents = [creator, Agent::start(program(), &hosts[1], &arguments)?];
    agents.iter_mut().try_for_each(|agent| agent.wait_converged(2, TIMEOUT).map(drop))?;
    Ok(agents)
}

/// Adds a pod with the second address of the IPv6 subnet, behind a bridge with the first address.
fn pod6(host: &Host, subnet: IpNet) -> anyhow::Result<(NetNs, String)> {
    let netns = NetNs::new(&format!("{}-pod6", host.name))?;
    let base = subnet.network();
    for command in [
        "ip link add pods6 type bridge".to_owned(),
        "sysctl -w net.ipv6.conf.pods6.disable_ipv6=0".to_owned(),
        format!("ip addr add {base}1/64 dev pods6 nodad"),
        format!("ip link add pod6 type veth peer name eth0 netns {}-pod6", host.name),
        "ip link set pod6 master pods6 up".to_owned(),
        "ip link set pods6 up".to_owned(),
    ] {
        tool(&host.netns, &command);
    }
    tool(&netns, &format!("ip addr add {base}2/64 dev eth0 nodad"));
    tool(&netns, "ip link set eth0 up");
    tool(&netns, &format!("ip route add default via {base}1"));
    Ok((netns, format!("{base}2")))
}

fn subnet_of(agent: &mut Agent, field: &str) -> anyhow::Result<IpNet> {
    let status = agent.ask("/v1/status", TIMEOUT)?;
    Ok(status[field].as_str().expect("a subnet").parse()?)
}

fn assert_pings(from: &NetNs, to: &str, payload: u32) {
    // The first packet may wait for the pods' own neighbor discovery.
    run(from, &format!("ping -c 1 -W 2 {to}"));
    let said = tool(from, &format!("ping -c 1 -W 2 -s {payload} -M do {to}"));
    assert!(said.contains(" 1 received"), "{said}");
}

#[test]
fn ipv6_underlay_carries_an_ipv4_overlay() {
    isolated(|lab| {
        let Some(hosts) = hosts(lab)? else { return Ok(()) };
        let mut agents = cluster(&hosts, ["fd99::1", "fd99::2"], &[])?;
        let mut pods = Vec::new();
        for (host, agent) in hosts.iter().zip(&mut agents) {
            pods.push(host.pod(Agent::subnet(&agent.ask("/v1/status", TIMEOUT)?)?, 1430)?);
        }
        assert_pings(&pods[0].netns, &pods[1].ip.to_string(), 1402);
        let fdb = tool(&hosts[0].netns, "bridge fdb show dev gossamer.1");
        assert!(fdb.contains("dst fd99::2"), "{fdb}");
        Ok(())
    });
}

#[test]
fn dual_stack_overlay_uses_one_tunnel() {
    isolated(|lab| {
        let Some(hosts) = hosts(lab)? else { return Ok(()) };
        let underlays = hosts.each_ref().map(|host| host.ip.to_string());
        let underlays = underlays.each_ref().map(String::as_str);
        let mut agents = cluster(&hosts, underlays, &["--network6", "fd42::/48"])?;
        let mut pods = Vec::new();
        for (host, agent) in hosts.iter().zip(&mut agents) {
            let subnet = Agent::subnet(&agent.ask("/v1/status", TIMEOUT)?)?;
            pods.push((host.pod(subnet, 1450)?, pod6(host, subnet_of(agent, "subnet6")?)?));
        }
        assert_pings(&pods[0].0.netns, &pods[1].0.ip.to_string(), 1422);
        assert_pings(&pods[0].1.0, &pods[1].1.1, 1402);
        let env = std::fs::read_to_string(hosts[1].dir.join("subnet.env"))?;
        assert!(env.contains("FLANNEL_SUBNET=10.42.") && env.contains("FLANNEL_IPV6_SUBNET=fd42:"));

        // The second family is repaired as the first one, after a kernel event.
        let host = &hosts[0].netns;
        let subnet = subnet_of(&mut agents[1], "subnet6")?;
        tool(host, &format!("ip -6 route del {subnet}"));
        eventually(host, "ip -6 route show proto 73", |routes| {
            routes.contains(&subnet.to_string())
        });
        tool(host, "ip link set gossamer.1 down");
        tool(host, "ip link del gossamer.1");
        eventually(host, "ip -6 route show proto 73", |routes| {
            routes.contains(&subnet.to_string())
        });
        assert_pings(&pods[0].1.0, &pods[1].1.1, 1402);
        agents[0].leave()?;
        for left in ["ip route show proto 73", "ip -6 route show proto 73"] {
            assert_eq!(tool(host, left), "");
        }
        Ok(())
    });
}

/// IPv6 has source-specific routes, but no routes for a type of service.
#[test]
fn ipv6_route_hidden_from_a_plain_lookup_is_reported_until_removed() {
    isolated(|lab| {
        let Some(hosts) = hosts(lab)? else { return Ok(()) };
        let mut agents = cluster(&hosts, ["fd99::1", "fd99::2"], &["--network", "fd42::/48"])?;
        let [own, peer] = [
            subnet_of(&mut agents[0], "subnet")?.to_string(),
            subnet_of(&mut agents[1], "subnet")?.to_string(),
        ];
        let _pod = pod6(&hosts[0], own.parse()?)?;
        let (host, agent) = (&hosts[0].netns, &mut agents[0]);
        sh(host, "ip link add d0 type veth peer name d1 && ip link set d0 up && ip link set d1 up");
        let (part, gateway) = (peer.replace("/64", "/80"), peer.replace("/64", ""));
        let tunnel =
            format!("encap seg6 mode encap segs fd99::77 via {gateway} dev gossamer.1 onlink");
        for (words, route, more) in [
            (
                format!("takes the packets to {peer} from {own}, by d0"),
                format!("{peer} from {own} dev d0 metric 50"),
                "",
            ),
            (
                format!("dropped by the blackhole route to {part} from {own}"),
                format!("blackhole {part} from {own}"),
                "",
            ),
            (format!("takes the packets to {part}, by gossamer.1"), part, tunnel.as_str()),
        ] {
            tool(host, &format!("ip -6 route add {route} {more}"));
            wait_until(&words, TIMEOUT, || has_problem(agent, &words));
            tool(host, &format!("ip -6 route del {route}"));
            wait_until("still reported", TIMEOUT, || !has_problem(agent, &words));
        }
        Ok(())
    });
}

#[test]
fn configured_mtu_too_small_for_ipv6_is_reported_and_the_agent_starts() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        let mut agent = Agent::start(program(), &host, &["--mtu", "1200"])?;
        let status = agent.wait_converged(1, TIMEOUT)?;
        let problems = texts(&status["problems"]);
        assert!(problems.contains("settings is 1200 (IPv4 continues)"), "{status:#}");
        Ok(())
    });
}

#[test]
fn cluster_without_ipv4_connects_pods() {
    isolated(|lab| {
        let Some(hosts) = hosts(lab)? else { return Ok(()) };
        for host in &hosts {
            tool(&host.netns, "ip -4 addr flush dev eth0");
            // Hardened hosts have this setting.
            tool(&host.netns, "sysctl -w net.ipv6.conf.default.disable_ipv6=1");
        }
        let mut agents = cluster(&hosts, ["fd99::1", "fd99::2"], &["--network", "fd42::/48"])?;
        let mut pods = Vec::new();
        for (host, agent) in hosts.iter().zip(&mut agents) {
            pods.push(pod6(host, subnet_of(agent, "subnet")?)?);
        }
        assert_pings(&pods[0].0, &pods[1].1, 1382);
        // Without tunnels and back again, over the route that conflicted with the gateway's address.
        for mode in ["direct", "vxlan"] {
            for (number, (host, seed)) in hosts.iter().zip(["fd99::2", "fd99::1"]).enumerate() {
                agents[number].end(nix::sys::signal::Signal::SIGTERM)?;
                let iface = format!("fd99::{}", number + 1);
                let arguments = ["--iface", &iface, "--join", seed, "--mode", mode];
                agents[number] = Agent::start(program(), host, &arguments)?;
            }
            agents.iter_mut().try_for_each(|agent| agent.wait_converged(2, TIMEOUT).map(drop))?;
            let via = if mode == "direct" { "via fd99::2 dev eth0" } else { "dev gossamer.1" };
            let subnet = subnet_of(&mut agents[1], "subnet")?;
            let route = tool(&hosts[0].netns, &format!("ip -6 route show {subnet}"));
            assert!(route.contains(via), "{mode}: {route}");
            assert_pings(&pods[0].0, &pods[1].1, 1382);
        }
        // The result of the probe, which the peer's kernel answers.
        for agent in &mut agents {
            status_where(agent, |status| status["paths"][0]["state"] == "ok");
        }
        let env = std::fs::read_to_string(hosts[1].dir.join("subnet.env"))?;
        assert!(env.starts_with("FLANNEL_IPV6_NETWORK=fd42::/48\n"), "{env}");
        Ok(())
    });
}

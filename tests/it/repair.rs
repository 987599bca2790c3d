//! Changes by other programs to the kernel state are repaired at once, long before the periodic
//! comparison, which runs every ten seconds.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use crate::{
    cni::{Runtime, namespaces},
    common::{
        Cluster, TIMEOUT, assert_logged, eventually, has_problem, isolated, program, run,
        status_where, tool, wait_until,
    },
};
use gossamer::lab::{Agent, Host, Pod};

/// Shorter than the interval between two periodic comparisons.
const IMMEDIATE_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns all of gossamer's kernel state on a host, as the system's own tools show it.
fn tables(host: &Host) -> String {
    let shown = |command: &str| {
        let output = run(&host.netns, command);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines: Vec<&str> = text.lines().map(str::trim).collect();
        lines.sort_unstable();
        lines.join("\n")
    };
    // Without the interface's index, because a new device has a new one.
    let device = shown("ip -d -4 addr show dev gossamer.1");
    let device: Vec<&str> =
        device.lines().map(|line| line.split_once(": ").map_or(line, |(_, rest)| rest)).collect();
    [
        shown("ip -4 route show proto 73"),
        shown("ip -4 neigh show dev gossamer.1 nud permanent"),
        shown("bridge fdb show dev gossamer.1"),
        shown("ip -4 route show table local dev gossamer.1"),
        device.join("\n"),
    ]
    .join("\n--\n")
}

fn assert_both_ways(pods: &[Pod]) {
    for (from, to) in [(&pods[0], &pods[1]), (&pods[1], &pods[0])] {
        let reply = tool(&from.netns, &format!("ping -c 1 -W 2 {}", to.ip));
        assert!(reply.contains(" 1 received"), "{reply}");
    }
}

#[test]
fn deleted_changed_or_renamed_kernel_state_is_repaired_at_once() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let pods = cluster.pods()?;
        let before = tables(&cluster.hosts[0]);
        let status = cluster.agents[1].ask("/v1/status", TIMEOUT)?;
        let members = status["members"].as_array().expect("members").clone();
        let peer = members.iter().find(|member| member["me"] == true).expect("itself");
        let mac = peer["vtep_mac"].as_str().expect("a MAC");
        let subnet = Agent::subnet(&status)?;
        let (vtep, underlay) = (subnet.network(), cluster.hosts[1].ip);
        let own = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?.network();
        let changes = [
            vec![format!("bridge fdb del {mac} dev gossamer.1 dst {underlay}")],
            vec![format!("bridge fdb replace {mac} dev gossamer.1 dst 10.99.255.1")],
            vec!["bridge fdb append 02:00:00:00:00:99 dev gossamer.1 dst 10.99.255.1".to_owned()],
            vec![format!("ip neigh del {vtep} dev gossamer.1")],
            vec![format!("ip neigh replace {vtep} lladdr 02:00:00:00:00:99 dev gossamer.1")],
            vec![format!("ip neigh replace {vtep} lladdr {mac} dev gossamer.1 nud reachable")],
            vec!["ip neigh flush dev gossamer.1 nud permanent".to_owned()],
            vec![format!("ip route del {subnet}")],
            vec!["ip route flush dev gossamer.1".to_owned()],
            vec![
                "ip route add 10.42.250.0/24 via 10.42.250.0 dev gossamer.1 onlink proto 73"
                    .to_owned(),
            ],
            vec!["ip addr flush dev gossamer.1".to_owned()],
            vec![format!("ip route del local {own} table local dev gossamer.1")],
            // A remaining link-local address is no source for tunnel packets.
            vec![
                format!("ip addr del {}/16 dev eth0", cluster.hosts[0].ip),
                format!("ip addr add {}/16 dev eth0", cluster.hosts[0].ip),
                "ip route add default via 10.99.0.1".to_owned(),
            ],
            vec!["ip addr add 192.0.2.9/24 dev gossamer.1".to_owned()],
            vec!["ip link set gossamer.1 down".to_owned()],
            vec!["ip link set gossamer.1 down".to_owned(), "ip link set gossamer.1 up".to_owned()],
            vec!["ip link set gossamer.1 alias changed".to_owned()],
            vec!["ip link set gossamer.1 mtu 1300".to_owned()],
            vec!["ip link set gossamer.1 address 02:00:00:00:00:99".to_owned()],
            vec!["ip link del gossamer.1".to_owned()],
            vec![
                "ip link set gossamer.1 down".to_owned(),
                "ip link set gossamer.1 name stolen".to_owned(),
            ],
            vec!["ip link set eth0 down".to_owned(), "ip link set eth0 up".to_owned()],
        ];
        for commands in changes {
            // Some of the commands may be undone before the next one runs.
            commands.iter().for_each(|command| _ = run(&cluster.hosts[0].netns, command));
            let begun = Instant::now();
            let last = commands.last().expect("a command").clone();
            wait_until(&last, IMMEDIATE_TIMEOUT, || tables(&cluster.hosts[0]) == before);
            println!("{:>6.1?} ms  {last}", begun.elapsed().as_secs_f64() * 1000.0);
            assert_both_ways(&pods);
        }
        status_where(&mut cluster.agents[0], |status| {
            let kinds = ["FDB entry", "neighbor", "route", "address", "device", "device attribute"];
            kinds.iter().all(|kind| status["kernel"]["repairs"][*kind].as_u64() > Some(0))
        });
        assert_logged(&cluster.agents[0], "repaired changes by another program");
        Ok(())
    });
}

/// Daemons for redundant switches keep VXLAN devices of hosts without a carrier that way.
#[test]
fn device_that_a_program_keeps_without_a_carrier_gets_it_back() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = &cluster.hosts[1].netns;
        tool(host, "ip link set gossamer.1 protodown on");
        eventually(host, "ip -d link show gossamer.1", |link| !link.contains("protodown on"));
        assert_both_ways(&pods);
        Ok(())
    });
}

#[test]
fn host_with_changed_address_or_mtu_keeps_its_subnet_and_connections() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let pods = cluster.pods()?;
        assert_both_ways(&pods);
        let subnet = Agent::subnet(&cluster.agents[1].ask("/v1/status", TIMEOUT)?)?;
        let host = &cluster.hosts[1].netns;
        tool(host, "ip addr flush dev eth0");
        tool(host, "ip addr add 10.99.7.7/16 dev eth0");
        let peer = &cluster.hosts[0].netns;
        eventually(peer, "bridge fdb show dev gossamer.1", |fdb| {
            fdb.contains("dst 10.99.7.7 ") && fdb.lines().count() == 2
        });
        eventually(host, "ip -d link show gossamer.1", |link| link.contains("local 10.99.7.7 "));
        eventually(host, "ip -4 route show proto 73 dev gossamer.1", |routes| {
            routes.lines().count() == 2
        });
        assert_both_ways(&pods);
        let status = cluster.agents[1].wait_converged(3, TIMEOUT)?;
        assert_eq!(Agent::subnet(&status)?, subnet);
        assert_logged(&cluster.agents[1], "underlay changed");

        tool(host, "ip link set eth0 mtu 1400");
        eventually(host, "ip link show gossamer.1", |link| link.contains("mtu 1350 "));
        let env = cluster.hosts[1].dir.join("subnet.env");
        wait_until("subnet.env has the old MTU", IMMEDIATE_TIMEOUT, || {
            std::fs::read_to_string(&env).is_ok_and(|env| env.contains("FLANNEL_MTU=1350"))
        });
        Ok(())
    });
}

#[test]
fn foreign_route_with_a_better_metric_is_reported_until_removed() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let subnet = Agent::subnet(&cluster.agents[1].ask("/v1/status", TIMEOUT)?)?;
        let host = &cluster.hosts[0].netns;
        tool(host, &format!("ip route add {subnet} via 10.99.0.1 metric 0 proto static"));
        let said = format!("takes the packets to {subnet}");
        let named = |agent: &mut Agent| has_problem(agent, &said);
        wait_until("it is not reported", IMMEDIATE_TIMEOUT, || named(&mut cluster.agents[0]));
        assert_eq!(tool(host, &format!("ip route show {subnet}")).lines().count(), 2, "untouched");
        tool(host, &format!("ip route del {subnet} via 10.99.0.1 metric 0"));
        wait_until("it is still reported", IMMEDIATE_TIMEOUT, || !named(&mut cluster.agents[0]));
        Ok(())
    });
}

#[test]
fn removed_route_of_an_own_address_is_restored_and_one_of_the_underlay_reported() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        let status = agent.wait_converged(1, TIMEOUT)?;
        let _spaces = namespaces(&["a"])?;
        Runtime::new(&agent).add("a");
        let subnet = Agent::subnet(&status)?.network();
        let subnet6 = status["subnet6"].as_str().expect("a subnet").replace("/64", "");
        let gateway = Ipv4Addr::from(u32::from(subnet) | 1);
        for (family, address, device) in [
            ("-4", subnet.to_string(), "gossamer.1"),
            ("-6", subnet6.clone(), "gossamer.1"),
            ("-4", gateway.to_string(), "gsm0"),
            ("-6", format!("{subnet6}1"), "gsm0"),
        ] {
            let route = format!("local {address} dev {device} table local");
            let shown = format!("ip {family} route show table local type local {address}");
            wait_until("the kernel has the route", TIMEOUT, || {
                tool(&host.netns, &shown).contains(&address)
            });
            tool(&host.netns, &format!("ip {family} route del {route}"));
            let begun = Instant::now();
            // The worker of the bridge gets no notifications about routes, so it finds this by its periodic
            // comparison.
            let timeout = if device == "gsm0" { TIMEOUT } else { IMMEDIATE_TIMEOUT };
            wait_until(&route, timeout, || tool(&host.netns, &shown).contains(device));
            println!("{:>6.1?} ms  {route}", begun.elapsed().as_secs_f64() * 1000.0);
        }
        let route = format!("local {} dev eth0 table local", host.ip);
        tool(&host.netns, &format!("ip route del {route}"));
        let said = format!("does not receive packets for {}", host.ip);
        wait_until(&said, TIMEOUT, || has_problem(&mut agent, &said));
        let more = format!("proto kernel scope host src {}", host.ip);
        tool(&host.netns, &format!("ip route add {route} {more}"));
        wait_until("no problem", TIMEOUT, || !has_problem(&mut agent, &said));
        Ok(())
    });
}

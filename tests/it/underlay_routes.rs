//! Routes and settings of a host by which its tunnel packets do not reach a peer: the report names them, and
//! its command helps.

use std::time::Duration;

use gossamer::lab::Agent;

use crate::{
    common::{Cluster, TIMEOUT, has_problem, isolated, program, run, token_of, tool, wait_until},
    silence_causes::wait_for_path,
};

/// Time until a silent peer is reported: gossip takes 15 s, kernel queries 10 s.
const REPORT_TIMEOUT: Duration = Duration::from_secs(60);

/// The command that causes the fault, the report, and the command that removes it.
const REFUSALS: [[&str; 3]; 2] = [
    [
        "ip route add blackhole 10.99.0.10",
        "this host has no route to n1 (10.99.0.10) on the underlay: the blackhole route to 10.99.0.10/32 \
         refuses packets to it: remove it (ip route del blackhole 10.99.0.10/32)",
        "ip route del blackhole 10.99.0.10/32",
    ],
    [
        "ip rule add to 10.99.0.10 ipproto udp dport 8472 prohibit pref 50",
        "ip rule 50 refuses packets to it: give packets to it precedence: ip rule add to 10.99.0.10 lookup \
         main priority 49",
        "ip rule add to 10.99.0.10 lookup main priority 49",
    ],
];

#[test]
fn route_or_rule_that_refuses_packets_to_a_peer_is_reported_with_its_command() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        wait_for_path(agent);
        for [cause, report, mend] in REFUSALS {
            tool(&host.netns, cause);
            wait_until(report, REPORT_TIMEOUT, || has_problem(agent, report));
            tool(&host.netns, mend);
            wait_for_path(agent);
        }
        Ok(())
    });
}

#[test]
fn route_to_a_peer_into_the_tunnels_is_reported_before_what_drops_its_packets() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        wait_for_path(agent);
        let routes = run(&host.netns, "ip -4 route show dev gossamer.1");
        let routes = String::from_utf8(routes.stdout)?;
        let vtep = routes.split_once(" via ").and_then(|(_, rest)| rest.split_whitespace().next());
        let vtep = vtep.expect("a route to the peer's subnet");
        tool(&host.netns, "iptables -A OUTPUT -p udp --dport 8472 -j DROP");
        wait_until("the rule is not reported", REPORT_TIMEOUT, || has_problem(agent, "OUTPUT"));
        tool(&host.netns, &format!("ip route add 10.99.0.10 via {vtep} dev gossamer.1 onlink"));
        let report = "leave this host by gossamer.1, not by eth0";
        wait_until(report, REPORT_TIMEOUT, || has_problem(agent, report));
        tool(&host.netns, "ip route del 10.99.0.10");
        tool(&host.netns, "iptables -F OUTPUT");
        wait_for_path(agent);
        Ok(())
    });
}

/// Two hosts with a router between them. Nothing reports packets that it drops but its ICMP errors.
#[test]
fn small_hop_limit_to_a_peer_behind_a_router_is_reported_with_its_origin() {
    isolated(|lab| {
        let (router, far) = (lab.host(1, "router")?, lab.host(2, "n2")?);
        let near = lab.host(3, "n3")?;
        for command in [
            format!("ip link add lan3 type veth peer name lan3 netns {}", far.netns.name()),
            "ip addr add 10.98.0.1/24 dev lan3".to_owned(),
            "ip link set lan3 up".to_owned(),
            "sysctl -qw net.ipv4.ip_forward=1".to_owned(),
        ] {
            tool(&router.netns, &command);
        }
        for command in [
            "ip link del eth0",
            "ip addr add 10.98.0.2/24 dev lan3",
            "ip link set lan3 up",
            "ip route add default via 10.98.0.1",
        ] {
            tool(&far.netns, command);
        }
        tool(&near.netns, "ip route add 10.98.0.0/24 via 10.99.0.10");
        let mut first = Agent::start(program(), &near, &["--init", "--iface", "eth0"])?;
        first.wait_converged(1, TIMEOUT)?;
        let token = token_of(&mut first)?;
        let mut agent = Agent::start(program(), &far, &["--token", &token, "--iface", "lan3"])?;
        agent.wait_converged(2, TIMEOUT)?;
        wait_for_path(&mut agent);
        for [cause, report, mend] in [
            [
                "sysctl -qw net.ipv4.ip_default_ttl=1",
                "leave this host with a TTL of 1, so the first router drops them, and no answer arrives: \
                 net.ipv4.ip_default_ttl sets it: sysctl -w net.ipv4.ip_default_ttl=64",
                "sysctl -w net.ipv4.ip_default_ttl=64",
            ],
            [
                "ip route replace default via 10.98.0.1 hoplimit 1",
                "so the first router drops them, and no answer arrives: the route default sets it (hoplimit \
                 1)",
                "ip route replace default via 10.98.0.1",
            ],
        ] {
            tool(&far.netns, cause);
            wait_until(report, REPORT_TIMEOUT, || has_problem(&mut agent, report));
            tool(&far.netns, mend);
            wait_for_path(&mut agent);
        }
        Ok(())
    });
}

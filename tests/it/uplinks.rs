//! Hosts with several uplinks: the one that leads to the peers carries tunnels, and diverted tunnel
//! packets are reported.

use std::time::Duration;

use gossamer::lab::{Agent, Host};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    common::{
        Cluster, TIMEOUT, client, eventually, has_notice, has_problem, isolated, program, run, sh,
        skipped, token_of, tool, wait_until,
    },
    silence_causes,
};

/// Time until a silent peer is reported: gossip takes 15 s, kernel queries 10 s.
const REPORT_TIMEOUT: Duration = Duration::from_secs(60);
/// A better default route is used after 2 s.
const ROUTE_CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Adds a VPN tunnel without peers behind it, with an address in its own network.
fn add_vpn(host: &Host) {
    add_uplink(host, "ip addr add 10.8.0.2/24 dev tun0");
}

fn add_uplink(host: &Host, address: &str) {
    for command in [
        "ip link add tun0 type veth peer name tun1",
        address,
        "ip link set tun0 up",
        "ip link set tun1 up",
    ] {
        tool(&host.netns, command);
    }
}

fn underlay(agent: &mut Agent) -> (String, String) {
    let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
    let text = |key: &str| status["kernel"][key].as_str().unwrap_or_default().to_owned();
    (text("underlay_interface"), text("underlay_address"))
}

fn is(interface: &str, address: &str) -> (String, String) {
    (interface.to_owned(), address.to_owned())
}

#[test]
fn better_default_route_without_peers_does_not_move_the_underlay() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = &cluster.hosts[1];
        add_vpn(host);
        tool(&host.netns, "ip route del default");
        tool(&host.netns, "ip route add default via 10.99.0.1 dev eth0 metric 100");
        tool(&host.netns, "ip route add default via 10.8.0.1 dev tun0 onlink metric 50");
        std::thread::sleep(ROUTE_CHANGE_TIMEOUT);
        let eth0 = is("eth0", "10.99.0.11");
        assert_eq!(underlay(&mut cluster.agents[1]), eth0);
        // Members are known on disk, so a restart makes the same choice.
        cluster.agents[1].end(Signal::SIGTERM)?;
        cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &[])?;
        cluster.agents[1].wait_converged(2, TIMEOUT)?;
        assert_eq!(underlay(&mut cluster.agents[1]), eth0);
        tool(&pods[1].netns, &format!("ping -c 1 -W 5 {}", pods[0].ip));
        Ok(())
    });
}

#[test]
fn creator_with_a_public_default_route_moves_to_the_network_of_its_first_peer() {
    isolated(|lab| {
        let (first, second) = (lab.host(1, "n1")?, lab.host(2, "n2")?);
        for (host, address) in [(&first, "198.51.100.2"), (&second, "203.0.113.2")] {
            add_uplink(host, &format!("ip addr add {address}/24 dev tun0"));
            tool(&host.netns, "ip route replace default via 192.0.2.1 dev tun0 onlink");
        }
        let mut creator = Agent::start(program(), &first, &["--init"])?;
        creator.wait_converged(1, TIMEOUT)?;
        assert_eq!(underlay(&mut creator), is("tun0", "198.51.100.2"), "no peer is known yet");
        let token = token_of(&mut creator)?;
        let seed = first.ip.to_string();
        let mut joiner = Agent::start(program(), &second, &["--join", &seed, "--token", &token])?;
        wait_until("it stays at the public address", TIMEOUT, || {
            underlay(&mut creator) == is("eth0", "10.99.0.10")
        });
        assert_eq!(underlay(&mut joiner), is("eth0", "10.99.0.11"), "its seed is in that network");
        eventually(&second.netns, "bridge fdb show dev gossamer.1", |fdb| {
            fdb.contains("dst 10.99.0.10 ")
        });
        std::thread::sleep(ROUTE_CHANGE_TIMEOUT);
        for (agent, address) in [(&mut creator, "10.99.0.10"), (&mut joiner, "10.99.0.11")] {
            assert_eq!(underlay(agent), is("eth0", address), "it stays with its peer");
        }
        Ok(())
    });
}

#[test]
fn host_with_its_only_address_on_lo_uses_it_without_a_setting() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        for command in [
            "ip addr add 10.50.0.1/32 dev lo",
            "ip addr flush dev eth0 scope global",
            "ip route add default via 10.99.0.1 dev eth0 onlink src 10.50.0.1",
        ] {
            tool(&host.netns, command);
        }
        let mut agent = Agent::start(program(), &host, &["--init"])?;
        agent.wait_converged(1, TIMEOUT)?;
        assert_eq!(underlay(&mut agent), is("lo", "10.50.0.1"));
        Ok(())
    });
}

#[test]
fn interface_is_found_by_its_alternative_name() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let name = "enp1s0f0np0-behind-the-printer";
        if !run(&host.netns, &format!("ip link property add dev eth0 altname {name}"))
            .status
            .success()
        {
            skipped(
                "interface_is_found_by_its_alternative_name",
                "the kernel or `ip` knows no alternative names",
            );
            return Ok(());
        }
        let mut agent = Agent::start(program(), &host, &["--init", "--iface", name])?;
        agent.wait_converged(1, TIMEOUT)?;
        assert_eq!(underlay(&mut agent), is("eth0", "10.99.0.10"));
        Ok(())
    });
}

#[test]
fn ipv6_underlay_is_used_up_to_the_mtu_advertised_by_its_router() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        tool(&host.netns, "ip addr flush dev eth0 scope global");
        let added = run(&host.netns, "ip addr add 2001:db8::1/64 dev eth0 nodad");
        if !added.status.success() {
            skipped(
                "ipv6_underlay_is_used_up_to_the_mtu_advertised_by_its_router",
                "the kernel has no IPv6",
            );
            return Ok(());
        }
        let mut agent = Agent::start(program(), &host, &["--init", "--iface", "eth0"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let is_mtu = |agent: &mut Agent, mtu: u32| {
            agent.ask("/v1/status", TIMEOUT).expect("a status")["kernel"]["mtu"] == mtu
        };
        assert!(is_mtu(&mut agent, 1_430));
        tool(&host.netns, "sysctl -qw net.ipv6.conf.eth0.mtu=1400");
        wait_until("it is still 1430", REPORT_TIMEOUT, || is_mtu(&mut agent, 1_330));
        Ok(())
    });
}

/// The report, the commands that cause the fault, and the commands that remove it.
const FAULTS: [(&str, &str, &str); 5] = [
    (
        "leave this host by tun0, not by eth0, which has its address 10.99.0.11, and no answer arrives: \
         table 77 routes them there",
        "ip route add default dev tun0 table 77; ip rule add ipproto udp dport 8472 lookup 77 pref 100",
        "ip rule del pref 100; ip route flush table 77",
    ),
    (
        "table 52 routes them there (ip rule 5270), probably of Tailscale: give packets to it precedence: ip \
         rule add to 10.99.0.10 lookup main priority 5269",
        "ip route add 10.99.0.0/16 dev tun0 table 52; ip rule add lookup 52 pref 5270",
        "ip rule del pref 5270; ip route flush table 52",
    ),
    (
        "tunnel packets with the source ports 32768-60999 of flows to n1 (10.99.0.10) leave this host by \
         tun0, not by eth0, which has its address 10.99.0.11, and no answer arrives: table 77 routes them \
         there (ip rule 1000), probably of OpenVPN or another VPN",
        "ip route add default dev tun0 table 77; ip rule add ipproto udp sport 32768-60999 lookup 77 pref \
         1000",
        "ip rule del pref 1000; ip route flush table 77",
    ),
    (
        "by tun0, not by eth0, to which their route leads: ip rule 1000 (fwmark 0x7) sends packets with \
         that mark there, and a rule of this host gives it to them (nft list ruleset, iptables -t mangle -S \
         OUTPUT): give packets to it precedence: ip rule add to 10.99.0.10 lookup main priority 999",
        "ip route add default dev tun0 table 77; ip rule add fwmark 7 lookup 77 pref 1000; iptables -t \
         mangle -A OUTPUT -p udp --dport 8472 -j MARK --set-mark 7",
        "iptables -t mangle -F; ip rule del pref 1000; ip route flush table 77",
    ),
    (
        "this host has no route to n1 (10.99.0.10) on the underlay: Network is unreachable",
        "ip route del default; ip route del 10.99.0.0/16 dev eth0",
        "ip route add 10.99.0.0/16 dev eth0 src 10.99.0.11",
    ),
];

#[test]
fn diverted_tunnel_packets_are_reported_with_interface_and_table() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        add_vpn(host);
        for (named, break_it, mend_it) in FAULTS {
            break_it.split("; ").for_each(|command| _ = tool(&host.netns, command));
            wait_until(named, REPORT_TIMEOUT, || has_problem(agent, named));
            let doctor = String::from_utf8(client(agent, &["doctor"]).stdout)?;
            assert!(!doctor.contains("gossamer forget"), "{doctor}");
            let is_well = |agent: &mut Agent| {
                let status: Value = agent.ask("/v1/status", TIMEOUT).expect("a status");
                status["problems"].as_array().is_some_and(Vec::is_empty)
            };
            if let Some((_, advice)) = named.split_once("precedence: ") {
                tool(&host.netns, advice);
                wait_until("the advice does not help", REPORT_TIMEOUT, || is_well(agent));
                tool(&host.netns, &advice.replace("rule add", "rule del"));
                wait_until(named, REPORT_TIMEOUT, || has_problem(agent, named));
            }
            mend_it.split("; ").for_each(|command| _ = tool(&host.netns, command));
            wait_until("it is still reported", REPORT_TIMEOUT, || is_well(agent));
            let ping = format!("ping -c 1 -W 1 {}", pods[0].ip);
            wait_until("pods stay apart", REPORT_TIMEOUT, || {
                run(&pods[1].netns, &ping).status.success()
            });
        }
        Ok(())
    });
}

/// The router of one of two next hops is off: some flows are lost, and probes may pass.
#[test]
fn next_hop_that_answers_no_arp_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        silence_causes::wait_for_path(agent);
        tool(&host.netns, "sysctl -qw net.ipv4.fib_multipath_hash_policy=1");
        // A next hop of the other family (RFC 5549).
        let route = "10.99.0.10/32 nexthop dev eth0 nexthop via inet6 fe80::77 dev eth0";
        tool(&host.netns, &format!("ip route add {route}"));
        let words =
            "next hop fe80::77 on eth0 of the route to 10.99.0.10 answers no neighbor discovery";
        wait_until(words, REPORT_TIMEOUT, || has_problem(agent, words));
        assert!(has_problem(agent, "(ip route get fibmatch 10.99.0.10)"));
        assert!(
            !has_problem(agent, "one of several next hops"),
            "the problem of the route says it"
        );
        tool(&host.netns, &format!("ip route del {route}"));
        silence_causes::wait_for_path(agent);
        tool(
            &host.netns,
            "ip route add 10.99.0.10/32 nexthop dev eth0 nexthop via 10.99.0.77 dev eth0",
        );
        let words = "next hop 10.99.0.77 on eth0 of the route to 10.99.0.10 answers no ARP";
        wait_until(words, REPORT_TIMEOUT, || has_problem(agent, words));
        let doctor = String::from_utf8(client(agent, &["doctor"]).stdout)?;
        assert!(doctor.contains("PROBLEM   routing"), "{doctor}");
        assert!(!doctor.contains("its agent is stopped"), "{doctor}");
        tool(&host.netns, "sysctl -qw net.ipv4.fib_multipath_use_neigh=1");
        tool(&host.netns, "ip route flush cache");
        silence_causes::wait_for_path(agent);
        Ok(())
    });
}

/// A host with an address in one network whose peer is in another one that it is connected to.
#[test]
fn way_to_peer_in_another_connected_network_is_no_detour() {
    isolated(|lab| {
        let (first, second) = (lab.host(1, "n1")?, lab.host(2, "n2")?);
        for command in [
            format!("ip link add lan3 type veth peer name lan3 netns {}", second.netns.name()),
            "ip addr add 10.98.0.1/24 dev lan3".to_owned(),
            "ip link set lan3 up".to_owned(),
        ] {
            tool(&first.netns, &command);
        }
        for command in [
            "ip link del eth0",
            "ip addr add 10.98.0.2/24 dev lan3",
            "ip link set lan3 up",
            "ip route add default via 10.98.0.1",
        ] {
            tool(&second.netns, command);
        }
        let mut agents = [Agent::start(program(), &first, &["--init", "--iface", "eth0"])?];
        agents[0].wait_converged(1, TIMEOUT)?;
        let token = token_of(&mut agents[0])?;
        let mut other = Agent::start(program(), &second, &["--token", &token])?;
        other.wait_converged(2, TIMEOUT)?;
        let [agent] = &mut agents;
        silence_causes::wait_for_path(agent);
        let drop = "nft add table inet fw && \
                    nft add chain inet fw in { type filter hook input priority 0 ; } && \
                    nft add rule inet fw in udp dport 8472 drop";
        sh(&second.netns, drop);
        silence_causes::wait_for_problem(&mut other, &["a rule of chain inet fw in (handle "]);
        let silent = "UDP 8472 is closed on the way";
        wait_until("a way that works is reported", REPORT_TIMEOUT, || {
            (has_notice(agent, silent) || has_problem(agent, silent))
                && !has_problem(agent, "leave this host by lan3")
        });
        // What this host does itself is reported, whatever way packets take.
        sh(&second.netns, "nft delete table inet fw");
        silence_causes::wait_for_path(agent);
        sh(&first.netns, &drop.replace("hook input", "hook output"));
        silence_causes::wait_for_problem(agent, &["a rule of chain inet fw in (handle "]);
        Ok(())
    });
}

/// A VXLAN device of the network below, as hosts of a data centre with EVPN have it.
#[test]
fn named_vxlan_device_of_another_program_carries_tunnels() {
    isolated(|lab| {
        let hosts = [lab.host(1, "n1")?, lab.host(2, "n2")?];
        for (number, host) in hosts.iter().enumerate() {
            let other = 11 - number;
            tool(
                &host.netns,
                &format!("ip link add vx0 type vxlan id 7 dstport 4789 remote 10.99.0.{other}"),
            );
            tool(&host.netns, &format!("ip addr add 10.97.0.1{number}/24 dev vx0"));
            tool(&host.netns, "ip link set vx0 up");
        }
        let mut first = Agent::start(program(), &hosts[0], &["--init", "--iface", "vx0"])?;
        first.wait_converged(1, TIMEOUT)?;
        assert_eq!(underlay(&mut first), is("vx0", "10.97.0.10"));
        let token = token_of(&mut first)?;
        let mut second =
            Agent::start(program(), &hosts[1], &["--token", &token, "--iface", "vx0"])?;
        second.wait_converged(2, TIMEOUT)?;
        silence_causes::wait_for_path(&mut second);
        Ok(())
    });
}

/// Virtual machines, each behind its own NAT, as `VirtualBox` sets them up.
#[test]
fn token_with_an_address_that_each_host_has_is_reported_with_a_remedy() {
    isolated(|lab| {
        let (first, second) = (lab.host(1, "n1")?, lab.host(2, "n2")?);
        for host in [&first, &second] {
            add_uplink(host, "ip addr add 10.0.2.15/24 dev tun0");
            tool(&host.netns, "ip route replace default via 10.0.2.2 dev tun0 onlink");
        }
        let mut creator = Agent::start(program(), &first, &["--init"])?;
        creator.wait_converged(1, TIMEOUT)?;
        let token = token_of(&mut creator)?;
        let mut joiner = Agent::start(program(), &second, &["--token", &token])?;
        let words = "the token's address 10.0.2.15:8473 is this host's own";
        wait_until("it is not reported", REPORT_TIMEOUT, || {
            has_problem(&mut joiner, words) && has_problem(&mut joiner, "--join ADDRESS")
        });
        let doctor = String::from_utf8(client(&joiner, &["doctor"]).stdout)?;
        assert!(doctor.contains("PROBLEM   seeds          the token's address"), "{doctor}");
        assert!(!doctor.contains("no token"), "it has a token: {doctor}");
        joiner.end(Signal::SIGTERM)?;
        // The doctor detects it without an agent, too.
        let state = second.dir.join("state").display().to_string();
        let doctor = format!("{} doctor --token {token} --state-dir {state}", program().display());
        let doctor = String::from_utf8(run(&second.netns, &doctor).stdout)?;
        assert!(doctor.contains("PROBLEM   seeds          the token's address"), "{doctor}");
        let there = first.ip.to_string();
        joiner = Agent::start(program(), &second, &["--token", &token, "--join", &there])?;
        joiner.wait_converged(2, TIMEOUT)?;
        assert!(!has_problem(&mut joiner, words));
        Ok(())
    });
}

#[test]
fn hosts_all_renumbered_while_off_report_a_remedy() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        for (agent, host) in cluster.agents.iter_mut().zip(&cluster.hosts) {
            agent.end(Signal::SIGTERM)?;
            let address = host.ip.to_string().replace("10.99.", "10.98.");
            tool(&host.netns, "ip addr flush dev eth0");
            tool(&host.netns, &format!("ip addr add {address}/16 dev eth0"));
        }
        for (agent, host) in cluster.agents.iter_mut().zip(&cluster.hosts) {
            *agent = Agent::start(program(), host, &[])?;
        }
        let words = "the address of this host has changed from 10.99.0.11 to 10.98.0.11, and no member \
                     answers at the address known for it (n1 (10.99.0.10:8473))";
        for (number, words) in [(0, "from 10.99.0.10 to 10.98.0.10"), (1, words)] {
            wait_until("it is not reported", REPORT_TIMEOUT, || {
                has_problem(&mut cluster.agents[number], words)
            });
        }
        // One cause is one problem, and it is still reported after a restart.
        cluster.agents[1].end(Signal::SIGTERM)?;
        cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &[])?;
        wait_until("it is not reported again", REPORT_TIMEOUT, || {
            has_problem(&mut cluster.agents[1], words)
        });
        let status = cluster.agents[1].ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["problems"].as_array().map(Vec::len), Some(1), "{status:#}");
        cluster.agents[1].end(Signal::SIGTERM)?;
        let join = ["--join", "10.98.0.10"];
        cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &join)?;
        cluster.converge()?;
        for agent in &mut cluster.agents {
            wait_until("it is still reported", REPORT_TIMEOUT, || {
                !has_problem(agent, "has changed from")
            });
        }
        Ok(())
    });
}

/// As after a restart of an agent whose router is gone: the address still exists, but is deprecated.
#[test]
fn deprecated_only_address_is_reported_until_preferred_again() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        tool(&host.netns, "ip addr flush dev eth0 scope global");
        let add = "ip addr add 2001:db8:1::1/64 dev eth0 nodad preferred_lft 0";
        if !run(&host.netns, add).status.success() {
            skipped(
                "deprecated_only_address_is_reported_until_preferred_again",
                "the kernel has no IPv6",
            );
            return Ok(());
        }
        let mut agent = Agent::start(program(), &host, &["--init"])?;
        let words = "eth0 (2001:db8:1::1) is deprecated, so it is not used";
        wait_until(words, TIMEOUT, || has_problem(&mut agent, words));
        tool(&host.netns, "ip addr change 2001:db8:1::1/64 dev eth0 preferred_lft forever");
        agent.wait_converged(1, TIMEOUT)?;
        Ok(())
    });
}

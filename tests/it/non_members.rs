//! A host without the secret floods a member's gossip port: no member is reported down, and hosts can
//! join.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4},
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Flood, Replay, Source, StalledHandshakes};
use serde_json::Value;

use crate::{
    common::{Cluster, TIMEOUT, has_problem, isolated, program, token_of, tool, wait_until},
    ip_families,
};

const PORT: u16 = 8473;

/// Before answers to non-members were limited, 30 packets a second from unused addresses filled the
/// socket's buffer, and the flooded member was reported down after 15 s.
const FLOOD_DURATION: Duration = Duration::from_secs(25);

fn counter(status: &Value, name: &str) -> u64 {
    status["counters"][name].as_u64().expect("a counter")
}

#[test]
fn flood_from_unused_addresses_silences_no_member_and_a_host_joins() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let attacker = lab.host(66, "evil")?;
        let target = SocketAddrV4::new(cluster.hosts[0].ip, PORT);
        let flood = Flood::start(&attacker, target, Source::UnusedNeighbors, 1_000)?;
        let begun = Instant::now();
        cluster.join(lab, 4)?;
        cluster.converge()?;
        wait_until("the flood has lasted", TIMEOUT, || begun.elapsed() > FLOOD_DURATION);
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert!(
            has_problem(&mut cluster.agents[0], "non-members send"),
            "{:#}",
            status["problems"]
        );
        assert!(status["handshakes"]["retried"].as_u64() > Some(1_000), "{}", status["handshakes"]);
        assert!(flood.sent() > 1_000, "{}", flood.sent());
        drop(flood);
        for agent in &mut cluster.agents {
            let status = agent.ask("/v1/status", TIMEOUT)?;
            assert_eq!(counter(&status, "downs"), 0, "{:#}", status["members"]);
        }
        cluster.converge()?;
        Ok(())
    });
}

#[test]
fn floods_from_remote_addresses_and_one_host_block_no_joiner() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let attacker = lab.host(66, "evil")?;
        let target = SocketAddrV4::new(cluster.hosts[0].ip, PORT);
        for (number, source) in [(3, Source::Far), (4, Source::Honest)] {
            let _flood = Flood::start(&attacker, target, source, 2_000)?;
            cluster.join(lab, number)?;
            cluster.converge()?;
        }
        for agent in &mut cluster.agents {
            let status = agent.ask("/v1/status", TIMEOUT)?;
            assert_eq!(counter(&status, "downs"), 0, "{:#}", status["members"]);
        }
        Ok(())
    });
}

#[test]
fn non_members_with_stalled_handshakes_block_no_joiner() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let target = SocketAddrV4::new(cluster.hosts[0].ip, PORT);
        let attacker = lab.host(66, "evil")?;
        let addresses: Vec<IpAddr> = (66..70).map(|host| [10, 99, 66, host].into()).collect();
        for address in &addresses {
            tool(&attacker.netns, &format!("ip addr add {address}/16 dev eth0"));
        }
        // The other attacker is a user of the host itself.
        let loopback = [[127, 0, 0, 1], [127, 0, 0, 2], [127, 1, 1, 3]].map(IpAddr::from);
        let own = SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORT);
        let silences = [
            StalledHandshakes::start(&attacker.netns, target.into(), addresses)?,
            StalledHandshakes::start(&cluster.hosts[0].netns, own.into(), loopback.to_vec())?,
        ];
        wait_until("all places could be taken", TIMEOUT, || {
            silences.iter().all(|silence| silence.begun() > 300)
        });
        let begun = Instant::now();
        cluster.join(lab, 2)?;
        cluster.agents[1].wait_converged(2, TIMEOUT)?;
        println!("joined after {:?}", begun.elapsed());
        let is_reported = has_problem(&mut cluster.agents[0], "are refused or ended early");
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert!(is_reported, "{:#}", status["problems"]);
        assert!(status["handshakes"]["refused"].as_u64() > Some(100), "{}", status["handshakes"]);
        Ok(())
    });
}

#[test]
fn stalled_handshakes_of_an_address_block_no_joiner_of_its_ipv6_network() {
    isolated(|lab| {
        let Some(hosts) = ip_families::hosts(lab)? else { return Ok(()) };
        let attacker = lab.host(66, "evil")?;
        let address: Ipv6Addr = "fd99::66".parse()?;
        tool(&attacker.netns, &format!("ip addr add {address}/64 dev eth0 nodad"));
        let mut first = Agent::start(program(), &hosts[0], &["--init", "--iface", "fd99::1"])?;
        first.wait_converged(1, TIMEOUT)?;
        let target = SocketAddr::new("fd99::1".parse()?, PORT);
        let silence = StalledHandshakes::start(&attacker.netns, target, vec![address.into()])?;
        wait_until("all places could be taken", TIMEOUT, || silence.begun() > 300);
        let token = token_of(&mut first)?;
        let arguments = ["--iface", "fd99::2", "--join", "fd99::1", "--token", &token];
        let begun = Instant::now();
        let mut second = Agent::start(program(), &hosts[1], &arguments)?;
        second.wait_converged(2, TIMEOUT)?;
        println!("joined after {:?}", begun.elapsed());
        Ok(())
    });
}

#[test]
fn stalled_handshakes_of_a_user_are_reported_by_other_members() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let target = SocketAddrV4::new(cluster.hosts[0].ip, PORT);
        let own = cluster.hosts[1].ip.into();
        let _silence = StalledHandshakes::start(&cluster.hosts[1].netns, target.into(), vec![own])?;
        wait_until("it is not reported", TIMEOUT, || {
            has_problem(&mut cluster.agents[0], "are refused or ended early")
        });
        Ok(())
    });
}

/// The time of a few attempts.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

#[test]
fn replayed_proofs_of_a_host_block_no_joiner_of_its_ipv6_network() {
    isolated(|lab| {
        let Some(hosts) = ip_families::hosts(lab)? else { return Ok(()) };
        let attacker = lab.host(66, "evil")?;
        let addresses: Vec<IpAddr> = (0..64).map(|n| v6(0x100 + n)).collect();
        for address in &addresses {
            tool(&attacker.netns, &format!("ip addr add {address}/64 dev eth0 nodad"));
        }
        let mut first = Agent::start(program(), &hosts[0], &["--init", "--iface", "fd99::1"])?;
        first.wait_converged(1, TIMEOUT)?;
        let token = token_of(&mut first)?;
        let target = SocketAddr::new(v6(1), PORT);
        let replay = Replay::start(&attacker.netns, target, &addresses, 2_000)?;
        wait_until("nothing is sent", TIMEOUT, || replay.sent() > 1_000);
        let begun = Instant::now();
        let arguments = ["--iface", "fd99::2", "--join", "fd99::1", "--token", &token];
        let mut second = Agent::start(program(), &hosts[1], &arguments)?;
        assert_joins_soon(begun, &mut first, &mut second)?;
        Ok(())
    });
}

#[test]
fn replayed_proof_of_a_user_does_not_delay_the_join_of_its_host() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let joiner = lab.host(2, "n2")?;
        let target = SocketAddr::from((cluster.hosts[0].ip, PORT));
        let replay = Replay::start(&joiner.netns, target, &[joiner.ip.into()], 2_000)?;
        wait_until("nothing is sent", TIMEOUT, || replay.sent() > 1_000);
        let begun = Instant::now();
        let mut agent = cluster.start_agent(&joiner, &[])?;
        let handshakes = assert_joins_soon(begun, &mut cluster.agents[0], &mut agent)?;
        assert!(handshakes["begun"].as_u64() < Some(50), "{handshakes}");
        assert!(handshakes["repeated"].as_u64() > Some(500), "{handshakes}");
        let is_reported = has_problem(&mut cluster.agents[0], "are refused or ended early");
        assert!(is_reported, "replayed packets are not reported");
        Ok(())
    });
}

#[test]
fn stalled_handshakes_with_proofs_of_users_do_not_delay_joins() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let target = SocketAddr::from((cluster.hosts[0].ip, PORT));
        let mut agents = Vec::new();
        for number in 2..=4 {
            let joiner = lab.host(number, &format!("n{number}"))?;
            let start = |_| StalledHandshakes::start(&joiner.netns, target, vec![joiner.ip.into()]);
            let silences = (0..4).map(start).collect::<anyhow::Result<Vec<_>>>()?;
            wait_until("all places could be taken", TIMEOUT, || {
                silences.iter().all(|silence| silence.begun() > 300)
            });
            let begun = Instant::now();
            let mut agent = cluster.start_agent(&joiner, &[])?;
            assert_joins_soon(begun, &mut cluster.agents[0], &mut agent)?;
            agents.push(agent);
        }
        Ok(())
    });
}

fn v6(host: u16) -> IpAddr {
    Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, host).into()
}

/// Waits until another host has joined the first; fails if that takes more than a few attempts.
fn assert_joins_soon(
    begun: Instant,
    first: &mut Agent,
    joiner: &mut Agent,
) -> anyhow::Result<Value> {
    joiner.wait_subnet(TIMEOUT)?;
    let took = begun.elapsed();
    let handshakes = first.ask("/v1/status", TIMEOUT)?["handshakes"].take();
    println!("joined after {took:?}: {handshakes}");
    assert!(took < JOIN_TIMEOUT, "joined after {took:?}: {handshakes}");
    Ok(handshakes)
}

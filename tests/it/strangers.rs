//! A host without the secret that floods a member's gossip port: no member goes down, and hosts join.

use std::{
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use gossamer::lab::{Flood, Source};
use serde_json::Value;

use crate::common::{Cluster, PATIENCE, has_problem, isolated, wait_until};

const PORT: u16 = 8473;

/// Before answers to strangers were limited, 30 packets a second from unused addresses filled the socket's
/// buffer, and the flooded member was called down after 15 s.
const LONG: Duration = Duration::from_secs(25);

fn counter(status: &Value, name: &str) -> u64 {
    status["counters"][name].as_u64().expect("a counter")
}

#[test]
fn flood_from_unused_addresses_mutes_no_member_and_a_host_joins() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let attacker = lab.host(66, "evil")?;
        let target = SocketAddrV4::new(cluster.hosts[0].ip, PORT);
        let flood = Flood::start(&attacker, target, Source::UnusedNeighbors, 1_000)?;
        let begun = Instant::now();
        cluster.join(lab, 4)?;
        cluster.converge()?;
        wait_until("the flood has lasted", PATIENCE, || begun.elapsed() > LONG);
        let status = cluster.agents[0].ask("/v1/status", PATIENCE)?;
        assert!(has_problem(&mut cluster.agents[0], "strangers send"), "{:#}", status["problems"]);
        assert!(status["handshakes"]["retried"].as_u64() > Some(1_000), "{}", status["handshakes"]);
        assert!(flood.sent() > 1_000, "{}", flood.sent());
        drop(flood);
        for agent in &mut cluster.agents {
            let status = agent.ask("/v1/status", PATIENCE)?;
            assert_eq!(counter(&status, "downs"), 0, "{:#}", status["members"]);
        }
        cluster.converge()?;
        Ok(())
    });
}

#[test]
fn floods_from_far_addresses_and_of_one_honest_host_keep_no_host_out() {
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
            let status = agent.ask("/v1/status", PATIENCE)?;
            assert_eq!(counter(&status, "downs"), 0, "{:#}", status["members"]);
        }
        Ok(())
    });
}

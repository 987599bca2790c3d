//! The main job on a real kernel: join, reach each other's pods, restart, leave.

mod common;

use std::time::Duration;

use common::{Cluster, PATIENCE, eventually, isolated, tool};
use gossamer::lab::{Agent, Pinger};
use nix::sys::signal::Signal;

#[test]
fn pods_on_three_hosts_reach_each_other() {
    isolated("pods_on_three_hosts_reach_each_other", |lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let mut pods = Vec::new();
        for (host, agent) in cluster.hosts.iter().zip(&mut cluster.agents) {
            let status = agent.wait_converged(3, PATIENCE)?;
            pods.push(host.pod(Agent::subnet(&status)?, 1450)?);
        }
        for from in &pods {
            for to in pods.iter().filter(|to| to.ip != from.ip) {
                let reply = tool(&from.netns, &format!("ping -c 1 -W 2 {}", to.ip));
                assert!(reply.contains("1 received"), "{reply}");
                // 1,422 bytes and 28 of headers are the full MTU; nothing may be fragmented.
                let full = format!("ping -c 1 -W 2 -s 1422 -M do {}", to.ip);
                assert!(tool(&from.netns, &full).contains("1 received"));
            }
        }
        Ok(())
    });
}

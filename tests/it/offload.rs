//! Checksums that a network card should fill in and does not: detected, and worked around.

use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Pod};

use crate::common::{
    Cluster, TIMEOUT, client, eventually, isolated, resume, status_where, suspend, tool, wait_until,
};

/// Covers three lost probes, six answered ones, and six lost ones again.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(60);
const SHOW_OFFLOAD: &str = "ethtool -k gossamer.1";
const OFFLOAD_IS_OFF: &str = "tx-checksum-ip-generic: off";
const HELLO: &[u8] = b"hello";

/// Returns a rule that drops UDP packets in the tunnel whose checksum is still the sum of the pseudo
/// header (RFC 768), which the kernel leaves to the card.
fn rule_against_unfinished_checksums(from: Ipv4Addr, to: Ipv4Addr, payload: usize) -> String {
    let words = [from, to].map(u32::from).map(|ip| (ip >> 16) + (ip & 0xffff));
    let mut sum = words[0] + words[1] + 17 + 8 + payload as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Offsets from the outer UDP header: VXLAN, Ethernet, IP.
    format!("nft add rule ip card in udp dport 8472 @th,312,8 17 @th,448,16 {sum} counter drop")
}

/// Returns whether a datagram arrives from one pod at the other.
fn arrives(pods: &[Pod; 2]) -> io::Result<bool> {
    let socket = |pod: &Pod| pod.netns.run(|| UdpSocket::bind((pod.ip, 5_000)));
    let (from, to) = (socket(&pods[0])?, socket(&pods[1])?);
    to.set_read_timeout(Some(Duration::from_millis(300)))?;
    from.send_to(HELLO, (pods[1].ip, 5_000))?;
    Ok(to.recv(&mut [0; 9]).is_ok())
}

fn has_event(agent: &Agent, words: &str) -> bool {
    String::from_utf8_lossy(&client(agent, &["events"]).stdout).contains(words)
}

fn vtep(agent: &mut Agent) -> anyhow::Result<Ipv4Addr> {
    Ok(Agent::subnet(&agent.ask("/v1/status", TIMEOUT)?)?.network())
}

#[test]
fn card_that_sends_unfinished_checksums_is_detected_and_offload_is_turned_off() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods: [Pod; 2] =
            cluster.pods()?.try_into().map_err(|_| anyhow::anyhow!("not two pods"))?;
        wait_until("the pods do not reach each other", TIMEOUT, || {
            arrives(&pods).is_ok_and(|arrives| arrives)
        });
        let (from, to) = (vtep(&mut cluster.agents[0])?, vtep(&mut cluster.agents[1])?);
        let there = &cluster.hosts[1].netns;
        tool(there, "nft add table ip card");
        tool(there, "nft add chain ip card in { type filter hook prerouting priority -300 ; }");
        tool(there, &rule_against_unfinished_checksums(from, to, gossamer::probe_packet::SIZE));
        tool(there, &rule_against_unfinished_checksums(pods[0].ip, pods[1].ip, HELLO.len()));
        assert!(!arrives(&pods)?, "nothing is wrong yet");
        // What the agent knows was learned before the fault.
        cluster.restart(0, &[])?;

        let begun = Instant::now();
        let there = &cluster.hosts[1].netns;
        let host = &cluster.hosts[0].netns;
        while !arrives(&pods)? {
            assert!(begun.elapsed() < TRIAL_TIMEOUT, "{}", tool(there, "nft list table ip card"));
        }
        println!("repaired after {:?}", begun.elapsed());
        wait_until("the offload is not turned off", TRIAL_TIMEOUT, || {
            has_event(&cluster.agents[0], "is turned off")
        });
        eventually(host, SHOW_OFFLOAD, |features| features.contains(OFFLOAD_IS_OFF));
        assert!(arrives(&pods)?);
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["kernel"]["checksum_offload"], false, "{status:#}");
        assert_eq!(status["kernel"]["checksum_offload_fails"], true, "{status:#}");
        assert_eq!(status["kernel"]["repairs"], serde_json::json!({}), "no other program did it");
        // A re-created device has the offload on again, and the earlier result still applies.
        tool(host, "ip link del gossamer.1");
        eventually(host, SHOW_OFFLOAD, |features| features.contains(OFFLOAD_IS_OFF));
        assert!(arrives(&pods)?);
        Ok(())
    });
}

#[test]
fn firewall_that_drops_datagrams_leaves_the_offload_on() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        tool(&cluster.hosts[1].netns, "nft add table ip wall");
        tool(
            &cluster.hosts[1].netns,
            "nft add chain ip wall in { type filter hook input priority 0 ; }",
        );
        tool(
            &cluster.hosts[1].netns,
            "nft add rule ip wall in iifname gossamer.1 ip protocol udp drop",
        );
        cluster.restart(0, &[])?;
        let host = &cluster.hosts[0].netns;
        let wait_for_state = |state: &str| {
            let wanted = format!("tx-checksum-ip-generic: {state}");
            wait_until(state, TRIAL_TIMEOUT, || tool(host, SHOW_OFFLOAD).contains(&wanted));
        };
        wait_for_state("on");
        wait_for_state("off");
        wait_for_state("on");
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["paths"][0]["state"], "ok", "{status:#}");
        assert_eq!(status["kernel"]["repairs"], serde_json::json!({}), "{status:#}");
        Ok(())
    });
}

#[test]
fn random_loss_of_forty_percent_leaves_the_offload_on() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let there = &cluster.hosts[1].netns;
        tool(there, "nft add table inet loss");
        tool(there, "nft add chain inet loss in { type filter hook prerouting priority -300 ; }");
        tool(there, "nft add rule inet loss in udp dport 8472 numgen random mod 100 < 40 drop");
        // A restarted agent tests at once, not only after five minutes.
        cluster.restart(0, &[])?;
        let begun = Instant::now();
        while begun.elapsed() < TRIAL_TIMEOUT {
            assert!(!has_event(&cluster.agents[0], "is turned off"), "{}", cluster.agents[0].log());
            std::thread::sleep(Duration::from_millis(500));
        }
        let there = &cluster.hosts[1].netns;
        tool(there, "nft delete table inet loss");
        let host = &cluster.hosts[0].netns;
        wait_until("it stays off", TRIAL_TIMEOUT, || {
            !tool(host, SHOW_OFFLOAD).contains(OFFLOAD_IS_OFF)
        });
        Ok(())
    });
}

#[test]
fn resumed_agent_reports_no_path_problem_and_leaves_the_offload_on() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        status_where(&mut cluster.agents[0], |status| status["paths"][0]["state"] == "ok");
        for pause in [2, 6, 2, 2] {
            suspend(&cluster.agents[0])?;
            std::thread::sleep(Duration::from_secs(pause));
            resume(&cluster.agents[0])?;
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(3) {
                let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
                assert_eq!(status["paths"][0]["state"], "ok", "{status:#}");
                assert_eq!(status["kernel"]["checksum_offload"], true, "{status:#}");
            }
        }
        let log = cluster.agents[0].log();
        assert!(
            !log.contains("checksum offload changed") && !log.contains("peer withdrawn"),
            "{log}"
        );
        Ok(())
    });
}

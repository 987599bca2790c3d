//! Checksums that a network card was to fill in and did not: noticed, and cured.

use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Pod};

use crate::common::{Cluster, PATIENCE, eventually, isolated, tool, wait_until};

/// Three requests that are lost, and three more.
const TRIAL: Duration = Duration::from_secs(40);
const FEATURE: &str = "ethtool -k gossamer.1";
const HELLO: &[u8] = b"hello";

/// A rule that drops UDP in the tunnel whose checksum is still the sum of the pseudo header (RFC 768): what
/// the kernel leaves to the card.
fn drop_unfinished(from: Ipv4Addr, to: Ipv4Addr, payload: usize) -> String {
    let words = [from, to].map(u32::from).map(|ip| (ip >> 16) + (ip & 0xffff));
    let mut sum = words[0] + words[1] + 17 + 8 + payload as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Counted from the outer UDP header: VXLAN, Ethernet, IP.
    format!("nft add rule ip card in udp dport 8472 @th,312,8 17 @th,448,16 {sum} counter drop")
}

/// Whether a datagram gets from one pod to the other.
fn arrives(pods: &[Pod; 2]) -> io::Result<bool> {
    let socket = |pod: &Pod| pod.netns.run(|| UdpSocket::bind((pod.ip, 5_000)));
    let (from, to) = (socket(&pods[0])?, socket(&pods[1])?);
    to.set_read_timeout(Some(Duration::from_millis(300)))?;
    from.send_to(HELLO, (pods[1].ip, 5_000))?;
    Ok(to.recv(&mut [0; 9]).is_ok())
}

fn vtep(agent: &mut Agent) -> anyhow::Result<Ipv4Addr> {
    Ok(Agent::subnet(&agent.ask("/v1/status", PATIENCE)?)?.network())
}

#[test]
fn a_card_that_sends_unfinished_checksums_is_noticed_and_cured() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods: [Pod; 2] =
            cluster.pods()?.try_into().map_err(|_| anyhow::anyhow!("not two pods"))?;
        assert!(arrives(&pods)?);
        let (from, to) = (vtep(&mut cluster.agents[0])?, vtep(&mut cluster.agents[1])?);
        let there = &cluster.hosts[1].netns;
        tool(there, "nft add table ip card");
        tool(there, "nft add chain ip card in { type filter hook prerouting priority -300 ; }");
        tool(there, &drop_unfinished(from, to, 0));
        tool(there, &drop_unfinished(pods[0].ip, pods[1].ip, HELLO.len()));
        assert!(!arrives(&pods)?, "nothing is wrong yet");
        // What the agent knows was true before.
        cluster.restart(0, &[])?;

        let begun = Instant::now();
        let there = &cluster.hosts[1].netns;
        let host = &cluster.hosts[0].netns;
        while !arrives(&pods)? {
            assert!(begun.elapsed() < TRIAL, "{}", tool(there, "nft list table ip card"));
        }
        println!("cured after {:?}", begun.elapsed());
        wait_until("no verdict", TRIAL, || {
            let status = cluster.agents[0].ask("/v1/status", PATIENCE).expect("a status");
            status["kernel"]["repairs"]["checksum offload"] == 1
        });
        let status = cluster.agents[0].ask("/v1/status", PATIENCE)?;
        assert_eq!(status["kernel"]["checksum_offload"], false, "{status:#}");
        // A device that is made anew has it on again, and what was found out still holds.
        tool(host, "ip link del gossamer.1");
        eventually(host, FEATURE, |features| features.contains("tx-checksum-ip-generic: off"));
        assert!(arrives(&pods)?);
        Ok(())
    });
}

#[test]
fn where_a_firewall_drops_datagrams_the_offload_is_left_on() {
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
        let is = |state: &str| {
            let wanted = format!("tx-checksum-ip-generic: {state}");
            wait_until(state, TRIAL, || tool(host, FEATURE).contains(&wanted));
        };
        is("on");
        is("off");
        is("on");
        let status = cluster.agents[0].ask("/v1/status", PATIENCE)?;
        assert_eq!(status["paths"][0]["state"], "ok", "{status:#}");
        assert_eq!(status["kernel"]["repairs"], serde_json::json!({}), "{status:#}");
        Ok(())
    });
}

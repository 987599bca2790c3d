//! Packets of pods that are lost by chance between two hosts are counted, and warned of from about 20 % on.
//! Hosts with entries on demand try those that are in use.

use std::time::{Duration, Instant};

use gossamer::lab::NetNs;

use crate::{
    cni::{Runtime, address, namespaces},
    common::{Cluster, PATIENCE, has_problem, has_warning, isolated, run, sh, wait_until},
    forwarding_far::{all_answer, with_pods},
};

/// Longer than enough rounds in a hurry take.
const LONG: Duration = Duration::from_secs(70);
const LOST: &str = "are lost on their way";

/// Drops so many percent of the tunnel packets that come in, by chance.
fn lose(host: &NetNs, percent: u32) {
    sh(
        host,
        &format!(
            "nft add table ip weather && \
             nft add chain ip weather in {{ type filter hook prerouting priority -300 ; }} && \
             nft add rule ip weather in udp dport 8472 numgen random mod 100 < {percent} drop"
        ),
    );
}

#[test]
fn loss_by_chance_is_warned_of_with_its_share_and_direction_until_it_is_over() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        lose(&cluster.hosts[1].netns, 25);
        let there = "% of the packets of pods here to pods of n2 are lost on their way there";
        let here = "% of the packets of pods of n1 to pods here are lost on their way here";
        let begun = Instant::now();
        wait_until(there, 2 * PATIENCE, || has_warning(&mut cluster.agents[0], there));
        println!("told there after {:?}", begun.elapsed());
        wait_until(here, 2 * PATIENCE, || has_warning(&mut cluster.agents[1], here));
        println!("told here after {:?}", begun.elapsed());
        for (agent, other) in [(0, "way here"), (1, "way there")] {
            let status = cluster.agents[agent].ask("/v1/status", PATIENCE)?;
            let said = status["warnings"].to_string();
            let percent = said.split("about ").nth(1).and_then(|rest| rest.split(' ').next());
            let percent: u32 = percent.expect("a share").parse()?;
            assert!((10..=45).contains(&percent), "{said}");
            assert!(!said.contains(other), "the other direction: {said}");
            assert!(!status["problems"].to_string().contains("at pods of"), "{status:#}");
        }
        sh(&cluster.hosts[1].netns, "nft delete table ip weather");
        let begun = Instant::now();
        for agent in &mut cluster.agents {
            wait_until("still told", PATIENCE, || !has_warning(agent, LOST));
        }
        println!("not told after {:?}", begun.elapsed());
        Ok(())
    });
}

#[test]
fn loss_of_five_percent_is_not_warned_of() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        cluster.hosts.iter().for_each(|host| lose(&host.netns, 5));
        let begun = Instant::now();
        while begun.elapsed() < LONG {
            for agent in &mut cluster.agents {
                assert!(!has_warning(agent, LOST), "{}", agent.log());
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    });
}

#[test]
fn pods_of_peers_in_use_are_tried_where_entries_are_there_on_demand() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        for number in [0, 1] {
            cluster.restart(number, &["--program", "on-demand"])?;
        }
        // Peers in use are tried at once, and rarely after that.
        sh(
            &cluster.hosts[1].netns,
            "nft add table ip fr && \
             nft add chain ip fr p { type filter hook prerouting priority -450 ; } && \
             nft add rule ip fr p iifname gossamer.1 ip frag-off & 0x3fff != 0 drop",
        );
        let spaces = namespaces(&["a", "b"])?;
        Runtime::new(&cluster.agents[0]).add("a");
        let there = address(&Runtime::new(&cluster.agents[1]).add("b"));
        wait_until("the pod is not reached", PATIENCE, || {
            run(&spaces[0], &format!("ping -c 1 -W 1 {there}")).status.success()
        });
        let words = "packets of pods here do not arrive at pods of n2 (IPv4 fragments): ";
        wait_until(words, PATIENCE, || has_problem(&mut cluster.agents[0], words));
        sh(&cluster.hosts[1].netns, "nft delete table ip fr");
        all_answer(&mut cluster.agents[0], 1);
        Ok(())
    });
}

/// Pods get such packets and answer them, so nothing is lost.
#[test]
fn source_that_the_receiving_host_replaces_is_named_there_and_is_no_loss() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        sh(
            &cluster.hosts[1].netns,
            "nft add table ip far && \
             nft add chain ip far out { type nat hook postrouting priority 100 ; } && \
             nft add rule ip far out ip saddr 10.42.0.0/16 oifname gsm0 snat to 192.0.2.7",
        );
        let words = "reach pods here under the address 192.0.2.7";
        wait_until(words, PATIENCE, || has_warning(&mut cluster.agents[1], words));
        // Of what is tried after that, what is dropped in earnest is told alone.
        sh(
            &cluster.hosts[1].netns,
            "nft add chain ip far through { type filter hook forward priority 0 ; } && \
             nft add rule ip far through ip saddr 10.42.0.0/16 oifname gsm0 ip protocol udp \
             meta length > 1000 drop",
        );
        let words = "do not arrive at pods of n2 (IPv4 large packets";
        wait_until(words, LONG, || has_problem(&mut cluster.agents[0], words));
        Ok(())
    });
}

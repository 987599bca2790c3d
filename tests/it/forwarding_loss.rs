//! Random losses of pods' packets between two hosts are counted, and reported as a warning from about 20
//! % on. Hosts with entries on demand test the peers in use.

use std::time::{Duration, Instant};

use gossamer::lab::NetNs;

use crate::{
    cni::{Runtime, address, namespaces},
    common::{Cluster, TIMEOUT, has_notice, has_problem, isolated, run, sh, texts, wait_until},
    remote_pods::{all_answer, with_pods},
};

/// Longer than the required number of accelerated test rounds takes.
const TEST_ROUNDS_TIMEOUT: Duration = Duration::from_secs(70);
const LOSS_WARNING: &str = "are lost on their way";

/// Drops a random share of the incoming tunnel packets, in percent.
fn drop_randomly(host: &NetNs, percent: u32) {
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
fn random_loss_is_warned_of_with_share_and_direction_until_it_ends() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        drop_randomly(&cluster.hosts[1].netns, 25);
        let there = "% of the packets of pods here to pods of n2 are lost on their way there";
        let here = "% of the packets of pods of n1 to pods here are lost on their way here";
        let begun = Instant::now();
        wait_until(there, 2 * TIMEOUT, || has_notice(&mut cluster.agents[0], there));
        println!("reported by the sender after {:?}", begun.elapsed());
        wait_until(here, 2 * TIMEOUT, || has_notice(&mut cluster.agents[1], here));
        println!("reported by the receiver after {:?}", begun.elapsed());
        for (agent, other) in [(0, "way here"), (1, "way there")] {
            let status = cluster.agents[agent].ask("/v1/status", TIMEOUT)?;
            let said = texts(&status["notices"]);
            let percent = said.split("about ").nth(1).and_then(|rest| rest.split(' ').next());
            let percent: u32 = percent.expect("a share").parse()?;
            assert!((10..=45).contains(&percent), "{said}");
            assert!(!said.contains(other), "the other direction: {said}");
            assert!(!texts(&status["problems"]).contains("at pods of"), "{status:#}");
        }
        sh(&cluster.hosts[1].netns, "nft delete table ip weather");
        let begun = Instant::now();
        for agent in &mut cluster.agents {
            wait_until("still reported", TIMEOUT, || !has_notice(agent, LOSS_WARNING));
        }
        println!("no longer reported after {:?}", begun.elapsed());
        Ok(())
    });
}

#[test]
fn loss_of_five_percent_causes_no_warning() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        cluster.hosts.iter().for_each(|host| drop_randomly(&host.netns, 5));
        let begun = Instant::now();
        while begun.elapsed() < TEST_ROUNDS_TIMEOUT {
            for agent in &mut cluster.agents {
                assert!(!has_notice(agent, LOSS_WARNING), "{}", agent.log());
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    });
}

#[test]
fn pods_of_used_peers_are_tested_in_on_demand_mode() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        for number in [0, 1] {
            cluster.restart(number, &["--program", "on-demand"])?;
        }
        // Peers in use are tested at once, and rarely afterwards.
        sh(
            &cluster.hosts[1].netns,
            "nft add table ip fr && \
             nft add chain ip fr p { type filter hook prerouting priority -450 ; } && \
             nft add rule ip fr p iifname gossamer.1 ip frag-off & 0x3fff != 0 drop",
        );
        let spaces = namespaces(&["a", "b"])?;
        Runtime::new(&cluster.agents[0]).add("a");
        let there = address(&Runtime::new(&cluster.agents[1]).add("b"));
        wait_until("the pod is not reached", TIMEOUT, || {
            run(&spaces[0], &format!("ping -c 1 -W 1 {there}")).status.success()
        });
        let words = "packets of pods here do not arrive at pods of n2 (IPv4 fragments): ";
        wait_until(words, TIMEOUT, || has_problem(&mut cluster.agents[0], words));
        sh(&cluster.hosts[1].netns, "nft delete table ip fr");
        all_answer(&mut cluster.agents[0], 1);
        Ok(())
    });
}

/// Pods receive such packets and answer them, so nothing is lost.
#[test]
fn source_nat_on_the_receiving_host_is_reported_there_and_is_no_loss() {
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
        wait_until(words, TIMEOUT, || has_notice(&mut cluster.agents[1], words));
        // Of the following tests, only packets that are really dropped are reported.
        sh(
            &cluster.hosts[1].netns,
            "nft add chain ip far through { type filter hook forward priority 0 ; } && \
             nft add rule ip far through ip saddr 10.42.0.0/16 oifname gsm0 ip protocol udp \
             meta length > 1000 drop",
        );
        let words = "do not arrive at pods of n2 (IPv4 large packets";
        wait_until(words, TEST_ROUNDS_TIMEOUT, || has_problem(&mut cluster.agents[0], words));
        Ok(())
    });
}

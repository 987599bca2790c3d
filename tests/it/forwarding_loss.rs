//! Packets of pods that are lost by chance between two hosts are counted, and warned of from about 20 % on.

use std::time::{Duration, Instant};

use gossamer::lab::NetNs;

use crate::{
    common::{Cluster, PATIENCE, has_warning, isolated, sh, wait_until},
    forwarding_far::with_pods,
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

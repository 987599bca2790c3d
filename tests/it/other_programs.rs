//! What other programs and machines do to a host's settings, cards and ways: named with what helps.

use crate::common::{Cluster, PATIENCE, has_problem, isolated, sh, wait_until};

/// Settings that are turned off and on again, and what is named.
const SWITCHES: [(&str, &str); 3] = [
    (
        "net.ipv4.conf.gossamer/1.forwarding",
        "another program sets net.ipv4.conf.gossamer/1.forwarding to 0 again and again",
    ),
    ("net.ipv4.ip_forward", "another program sets net.ipv4.ip_forward to 0 again and again"),
    (
        "net.ipv6.conf.all.forwarding",
        "another program sets net.ipv6.conf.all.forwarding to 0 again and again",
    ),
];

#[test]
fn forwarding_that_is_turned_off_again_and_again_is_named_though_it_is_on() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let (host, agent) = (&cluster.hosts[0].netns, &mut cluster.agents[0]);
        for (name, words) in SWITCHES {
            for _ in 0..4 {
                sh(host, &format!("sysctl -qw {name}=0 && sysctl -qw {name}=1"));
            }
            wait_until(words, PATIENCE, || has_problem(agent, words));
        }
        Ok(())
    });
}

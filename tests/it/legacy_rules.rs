//! Rules of iptables-legacy, which are invisible to traces of nftables.

use gossamer::lab::Host;

use crate::{
    common::{Cluster, isolated, run, skipped},
    local_rules::check_owner_rules,
    silence_causes::{run_all, start_pair, wait_for_problem},
};

fn has_legacy(host: &Host) -> bool {
    let has = run(&host.netns, "sh -c iptables-legacy-save").status.success()
        && run(&host.netns, "iptables-legacy -t nat -S").status.success();
    if !has {
        skipped("legacy", "it needs `iptables-legacy` (Debian: iptables), and a kernel with it");
    }
    has
}

#[test]
fn iptables_legacy_rule_that_changes_the_tunnel_destination_is_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        if !has_legacy(host) {
            return Ok(());
        }
        let rule = "-A DOCKER -p udp -m udp --dport 8472 -j DNAT --to-destination 172.17.0.2:8472";
        run_all(
            host,
            &[
                "iptables-legacy -t nat -N DOCKER",
                "iptables-legacy -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
                &format!("iptables-legacy -t nat {rule}"),
            ],
        );
        let named = format!("iptables-legacy has `{rule}` in its table nat, which gives UDP 8472");
        let words = [
            "of n1 (10.99.0.10) arrive on eth0, and this host drops them before its guard",
            &named,
            "iptables-legacy -t nat -I DOCKER -p udp --dport 8472 -j ACCEPT",
        ];
        wait_for_problem(&mut cluster.agents[1], &words);
        Ok(())
    });
}

#[test]
fn iptables_legacy_rule_that_changes_the_tunnel_source_is_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        if !has_legacy(host) {
            return Ok(());
        }
        let rule = "-A POSTROUTING -o eth0 -j SNAT --to-source 10.99.0.99";
        run_all(
            host,
            &["ip addr add 10.99.0.99/32 dev eth0", &format!("iptables-legacy -t nat {rule}")],
        );
        let named = format!("iptables-legacy has `{rule}` in its table nat, which changes it");
        let words = [
            "leave this host under the address 10.99.0.99, not 10.99.0.11",
            &named,
            "iptables-legacy -t nat -I POSTROUTING -p udp --dport 8472 -j ACCEPT",
        ];
        wait_for_problem(&mut cluster.agents[1], &words);
        Ok(())
    });
}

/// Rules that let only programs of one user send; the report, and the advice.
const OWNER_RULES: [(&str, &str, &[&str]); 2] = [
    (
        "iptables-legacy has `-P OUTPUT DROP` in its table filter",
        "iptables-legacy -t filter -I OUTPUT -p udp --dport 8472 -j ACCEPT",
        &[
            "iptables-legacy -A OUTPUT -o lo -j ACCEPT",
            "iptables-legacy -A OUTPUT -m owner --uid-owner 0 -j ACCEPT",
            "iptables-legacy -A OUTPUT -p icmp -j ACCEPT",
            "iptables-legacy -P OUTPUT DROP",
        ],
    ),
    (
        "iptables-legacy has `-A POSTROUTING -o eth0 -p udp -m owner ! --uid-owner 0 -j DROP` in its table \
         mangle",
        "iptables-legacy -t mangle -I POSTROUTING -p udp --dport 8472 -j ACCEPT",
        &[
            "iptables-legacy -t mangle -A POSTROUTING -o eth0 -p udp -m owner ! --uid-owner 0 -j DROP",
        ],
    ),
];

#[test]
fn iptables_legacy_owner_rule_that_blocks_the_tunnel_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        if !has_legacy(&cluster.hosts[1]) {
            return Ok(());
        }
        let clear = [
            "iptables-legacy -P OUTPUT ACCEPT",
            "iptables-legacy -F OUTPUT",
            "iptables-legacy -t mangle -F POSTROUTING",
        ];
        check_owner_rules(&mut cluster, &OWNER_RULES, &clear)
    });
}

//! What a host's own rules do to packets from the tunnel, and to its ICMP errors.

use gossamer::lab::Host;

use crate::{
    common::{
        Cluster, TIMEOUT, client, has_problem, isolated, status_where, texts, tool, wait_until,
    },
    forwarding::with_pods,
};

fn run_all(host: &Host, commands: &[&str]) {
    commands.iter().for_each(|command| _ = tool(&host.netns, command));
}

#[test]
fn host_that_drops_decapsulated_packets_does_not_blame_the_network() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        // As recipes against forged sources have it.
        run_all(
            &cluster.hosts[1],
            &[
                "nft add table ip bogons",
                "nft add chain ip bogons pre { type filter hook prerouting priority raw ; }",
                "nft add rule ip bogons pre iifname gossamer.1 ip saddr 10.0.0.0/8 drop",
            ],
        );
        let agent = &mut cluster.agents[1];
        let status = status_where(agent, |status| {
            let is_lost = status["paths"][0]["state"] != "ok";
            is_lost
                && status["problems"]
                    .to_string()
                    .contains("does not forward packets of pods (IPv4 in)")
        });
        assert!(!texts(&status["problems"]).contains("UDP 8472"), "{status:#}");
        let doctor = String::from_utf8(client(agent, &["doctor"]).stdout)?;
        assert!(doctor.contains("skipped   paths          0 of 1 ok"), "{doctor}");
        Ok(())
    });
}

/// As hardened hosts have it, against scans.
#[test]
fn rule_that_drops_packet_too_large_errors_to_pods_is_reported() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        status_where(agent, |status| status["kernel"].to_string().contains("IPv4 size errors"));
        run_all(
            host,
            &[
                "nft add table ip quiet",
                "nft add chain ip quiet out { type filter hook output priority 0 ; }",
                "nft add rule ip quiet out icmp type destination-unreachable drop",
            ],
        );
        let fix = "nft insert rule ip quiet out icmp type destination-unreachable accept";
        let said = "pods do not learn that a packet is too large for the tunnel (IPv4)";
        wait_until("it is not reported", TIMEOUT, || {
            [said, "a rule of chain ip quiet out (handle ", fix]
                .iter()
                .all(|words| has_problem(agent, words))
        });
        let doctor = String::from_utf8(client(agent, &["doctor"]).stdout)?;
        assert!(doctor.contains("PROBLEM   forwarding     pods do not learn"), "{doctor}");
        tool(&host.netns, fix);
        status_where(agent, |status| status["problems"] == serde_json::json!([]));
        Ok(())
    });
}

/// Rules that let only programs of one user send, and the advice.
const OWNER_RULES: [(&str, &str, &[&str]); 2] = [
    (
        "the policy of chain inet egress out drops them",
        "nft insert rule inet egress out udp dport 8472 accept",
        &[
            "nft add table inet egress",
            "nft add chain inet egress out { type filter hook output priority 0 ; policy drop ; }",
            "nft add rule inet egress out oif lo accept",
            "nft add rule inet egress out meta skuid 0 accept",
            "nft add rule inet egress out meta l4proto { icmp, icmpv6 } accept",
        ],
    ),
    (
        "a rule of chain inet egress late (handle ",
        "nft insert rule inet egress late udp dport 8472 accept",
        &[
            "nft add table inet egress",
            "nft add chain inet egress late { type filter hook postrouting priority 0 ; }",
            "nft add rule inet egress late oifname eth0 meta skuid 0 accept",
            "nft add rule inet egress late oifname eth0 meta l4proto udp drop",
        ],
    ),
];

#[test]
fn owner_rule_that_blocks_packets_of_pods_is_reported_with_its_effect() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        check_owner_rules(&mut cluster, &OWNER_RULES, &["nft delete table inet egress"])
    });
}

/// Checks that each set of rules on the second host is reported, by a text and with a remedy that works.
/// `clear` removes what is left of the rules.
pub(crate) fn check_owner_rules(
    cluster: &mut Cluster,
    owner_rules: &[(&str, &str, &[&str])],
    clear: &[&str],
) -> anyhow::Result<()> {
    let mut spaces = Vec::new();
    with_pods(cluster, &mut spaces)?;
    let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
    let said = "packets of pods do not leave this host inside tunnel packets (IPv4)";
    for (by, fix, rules) in owner_rules {
        status_where(agent, |status| {
            status["kernel"]["forwarding"]["detail"]
                .as_str()
                .is_some_and(|detail| detail.contains("IPv4 in tunnel packets"))
        });
        run_all(host, rules);
        wait_until("it is not reported", TIMEOUT, || {
            [said, by, fix].iter().all(|words| has_problem(agent, words))
        });
        let doctor = String::from_utf8(client(agent, &["doctor"]).stdout)?;
        assert!(doctor.contains("PROBLEM   forwarding     packets of pods do not"), "{doctor}");
        tool(&host.netns, fix);
        status_where(agent, |status| status["problems"] == serde_json::json!([]));
        clear.iter().for_each(|command| _ = tool(&host.netns, command));
    }
    Ok(())
}

/// As against amplification attacks.
#[test]
fn rule_that_drops_large_datagrams_is_reported_as_a_forwarding_fault() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        status_where(agent, |status| status["kernel"].to_string().contains("IPv4 large out"));
        run_all(
            host,
            &[
                "nft add table inet ddos",
                "nft add chain inet ddos in { type filter hook prerouting priority raw ; }",
                "nft add rule inet ddos in udp length > 1024 drop",
            ],
        );
        let fix = "nft insert rule inet ddos in ip saddr 10.42.0.0/16 accept";
        let said = "does not forward packets of pods (IPv4 large out)";
        wait_until("it is not reported", TIMEOUT, || {
            [said, "chain inet ddos in (hook prerouting) has rules that drop", fix]
                .iter()
                .all(|words| has_problem(agent, words))
        });
        assert!(!has_problem(agent, "pods do not learn"), "an error that nothing was sent for");
        tool(&host.netns, fix);
        status_where(agent, |status| status["problems"] == serde_json::json!([]));
        Ok(())
    });
}

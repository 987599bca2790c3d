//! What a host itself does to answers for its next hops, and to tunnel packets that have arrived.

use crate::{
    common::{has_problem, isolated, run, skipped, tool, wait_until},
    doctor, ip_families,
    silence_causes::{
        REPORT_TIMEOUT, mac_of, run_all, run_all_unprobed, start_pair, wait_for_path,
        wait_for_problem,
    },
};

/// Texts that the other host reports when the cause is not its own.
const SEEN_BY_ARP: [&str; 2] = ["though a machine has that address: its ARP was seen here", ADVICE];
const ADVICE: &str = "The host shows its own drops in gossamer status";

#[test]
fn rule_that_drops_arp_answers_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        if !run(&host.netns, "nft add table arp wall").status.success() {
            skipped(
                "rule_that_drops_arp_answers_is_reported_and_the_advice_works",
                "it needs `nft` (Debian: nftables), and a kernel with it",
            );
            return Ok(());
        }
        let chain =
            "nft add chain arp wall in { type filter hook input priority 0 ; policy drop ; }";
        run_all(host, &[chain, "ip neigh flush dev eth0"]);
        let advice = "nft insert rule arp wall in arp saddr ip 10.99.0.10 accept";
        let words = [
            "answers of n1 (10.99.0.10) to ARP arrive on eth0, and this host drops them",
            "the policy of chain arp wall in does: ",
            advice,
        ];
        wait_for_problem(&mut cluster.agents[1], &words);
        // The other host sees that the host with the rule is alive.
        wait_for_problem(&mut cluster.agents[0], &SEEN_BY_ARP);
        tool(&host.netns, advice);
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

/// As `ifconfig eth0:0 ADDRESS -arp` of guides to LVS leaves it.
#[test]
fn interface_without_arp_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        run_all(host, &["ip link set eth0 arp off", "ip neigh flush dev eth0"]);
        let advice = "ip link set eth0 arp on";
        let words = ["eth0 resolves no addresses (it has the flag NOARP)", advice];
        wait_for_problem(&mut cluster.agents[1], &words);
        tool(&host.netns, advice);
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

#[test]
fn rule_that_drops_gossip_on_one_interface_is_named_by_status_and_doctor() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        let rule = "nft add rule inet wall in iifname eth0 udp dport 8473 drop";
        if !run(&host.netns, "nft add table inet wall").status.success() {
            skipped(
                "rule_that_drops_gossip_on_one_interface_is_named_by_status_and_doctor",
                "it needs `nft` (Debian: nftables)",
            );
            return Ok(());
        }
        let chain = "nft add chain inet wall in { type filter hook input priority 0 ; }";
        run_all(host, &[chain, rule]);
        let advice = "nft insert rule inet wall in udp dport 8473 accept";
        let words = ["chain inet wall in drops some packets to UDP 8473 on this host", advice];
        wait_until("the rule is not named", REPORT_TIMEOUT, || {
            words.iter().all(|words| has_problem(&mut cluster.agents[1], words))
        });
        let found = doctor::examine(&cluster.hosts[1], "");
        let firewall =
            found.iter().find(|finding| finding["check"] == "firewall").expect("a result");
        let seen = "chain inet wall in drops some packets to UDP 8473";
        assert_eq!((&firewall["verdict"], &firewall["seen"]), (&"notice".into(), &seen.into()));
        tool(&host.netns, advice);
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

#[test]
fn rule_that_drops_neighbor_advertisements_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let Some(hosts) = ip_families::hosts(lab)? else { return Ok(()) };
        let mut agents = ip_families::cluster(&hosts, ["fd99::1", "fd99::2"], &[])?;
        agents.iter_mut().for_each(wait_for_path);
        let host = &hosts[1];
        if !run(&host.netns, "nft add table ip6 hard").status.success() {
            skipped(
                "rule_that_drops_neighbor_advertisements_is_reported_and_the_advice_works",
                "it needs `nft` (Debian: nftables)",
            );
            return Ok(());
        }
        run_all(
            host,
            &[
                "nft add chain ip6 hard in { type filter hook input priority 0 ; policy drop ; }",
                "nft add rule ip6 hard in iif lo accept",
                "nft add rule ip6 hard in ct state established,related accept",
                "nft add rule ip6 hard in udp dport { 8472, 8473 } accept",
                "ip -6 neigh flush dev eth0",
            ],
        );
        let advice = "nft insert rule ip6 hard in icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } \
        accept";
        let words = [
            "answers of n1 (fd99::1) to neighbor discovery arrive on eth0, and this host drops them",
            "the policy of chain ip6 hard in does: ",
            advice,
        ];
        wait_for_problem(&mut agents[1], &words);
        let words = "though a machine has that address: its neighbor discovery was seen here";
        wait_for_problem(&mut agents[0], &[words, ADVICE]);
        tool(&host.netns, advice);
        agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

/// As a protection against forged ARP answers, set before the peer got another card.
#[test]
fn permanent_neighbor_entry_with_a_wrong_mac_is_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        let mac = mac_of(&cluster.hosts[0], "eth0");
        let old = "02:00:5e:10:20:30";
        // The kernel checks neither.
        for state in ["permanent", "noarp"] {
            tool(
                &host.netns,
                &format!("ip neigh replace 10.99.0.10 lladdr {old} dev eth0 nud {state}"),
            );
            let advice = "ip neigh del 10.99.0.10 dev eth0";
            let entry = format!("gives 10.99.0.10 the MAC {old}");
            let words = [&entry, &format!("{mac} answers for that address"), advice];
            wait_for_problem(&mut cluster.agents[1], &words);
            wait_for_problem(&mut cluster.agents[0], &SEEN_BY_ARP);
            tool(&host.netns, advice);
            cluster.agents.iter_mut().for_each(wait_for_path);
        }
        Ok(())
    });
}

#[test]
fn permanent_ipv6_neighbor_entry_with_a_wrong_mac_is_reported() {
    isolated(|lab| {
        let Some(hosts) = ip_families::hosts(lab)? else { return Ok(()) };
        let mut agents = ip_families::cluster(&hosts, ["fd99::1", "fd99::2"], &[])?;
        agents.iter_mut().for_each(wait_for_path);
        let mac = mac_of(&hosts[0], "eth0");
        let old = "02:00:5e:10:20:30";
        let entry = format!("ip neigh replace fd99::1 lladdr {old} dev eth0 nud permanent");
        tool(&hosts[1].netns, &entry);
        let advice = "ip neigh del fd99::1 dev eth0";
        let entry = format!("gives fd99::1 the MAC {old}");
        let words = [&entry, &format!("{mac} answers for that address"), advice];
        wait_for_problem(&mut agents[1], &words);
        tool(&hosts[1].netns, advice);
        agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

/// As a container has it that publishes the tunnel's port.
#[test]
fn rule_that_changes_the_tunnel_destination_is_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        if !run(&host.netns, "nft add table ip dock").status.success() {
            skipped(
                "rule_that_changes_the_tunnel_destination_is_reported",
                "it needs `nft` (Debian: nftables)",
            );
            return Ok(());
        }
        run_all_unprobed(
            &cluster,
            1,
            &[
                "nft add chain ip dock published",
                "nft add rule ip dock published tcp dport 8472 dnat to 172.17.0.9",
                "nft add rule ip dock published udp dport 8472 dnat to 172.17.0.2",
                "nft add chain ip dock pre { type nat hook prerouting priority dstnat ; } ; \
                 add rule ip dock pre udp dport 53 dnat to 172.17.0.3 ; \
                 add rule ip dock pre fib daddr type local jump published",
            ],
        )?;
        let words = [
            "of n1 (10.99.0.10) arrive on eth0, and this host drops them before its guard: chain ip dock \
             published gives UDP 8472 another destination",
            "nft insert rule ip dock published udp dport 8472 accept",
        ];
        wait_for_problem(&mut cluster.agents[1], &words);
        assert!(!has_problem(&mut cluster.agents[1], "chain ip dock pre"), "of another port");
        Ok(())
    });
}

/// As a container leaves it behind that published the tunnel's port.
#[test]
fn translation_that_connections_keep_without_a_rule_is_reported_with_the_command() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        if !run(&host.netns, "nft add table ip dock").status.success() {
            skipped(
                "translation_that_connections_keep_without_a_rule_is_reported_with_the_command",
                "it needs `nft` (Debian: nftables)",
            );
            return Ok(());
        }
        run_all_unprobed(
            &cluster,
            1,
            &[
                "nft add chain ip dock pre { type nat hook prerouting priority dstnat ; } ; \
                 add rule ip dock pre udp dport 8472 dnat to 172.17.0.2",
                "nft add chain ip dock in { type filter hook input priority 0 ; }",
                "nft add rule ip dock in ct state established accept",
            ],
        )?;
        wait_for_problem(&mut cluster.agents[1], &["gives UDP 8472 another destination"]);
        tool(&host.netns, "nft flush chain ip dock pre");
        let words = [
            "flows of tunnel packets of n1 (10.99.0.10) are lost on this host",
            "to the destination 172.17.0.2",
            "conntrack -D -p udp --orig-port-dst 8472",
        ];
        wait_for_problem(&mut cluster.agents[1], &words);
        tool(&host.netns, "nft delete table ip dock");
        if run(&host.netns, "which conntrack").status.success()
            && run(&host.netns, words[2]).status.success()
        {
            cluster.agents.iter_mut().for_each(wait_for_path);
        }
        Ok(())
    });
}

#[test]
fn ipsec_policy_for_arriving_tunnel_packets_is_reported_where_they_arrive_plain() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        let policy = "ip xfrm policy add src 10.99.0.10 dst 10.99.0.11 proto udp dport 8472 dir in priority \
                      300 tmpl proto esp reqid 1 mode transport";
        if !run(&host.netns, policy).status.success() {
            skipped(
                "ipsec_policy_for_arriving_tunnel_packets_is_reported_where_they_arrive_plain",
                "it needs a kernel with IPsec",
            );
            return Ok(());
        }
        let words = [
            "of n1 (10.99.0.10) arrive on eth0 without IPsec, pass the guard, and this host drops them",
            "from 10.99.0.10/32 to 10.99.0.11/32 (ip xfrm policy: dir in, priority 300)",
        ];
        wait_for_problem(&mut cluster.agents[1], &words);
        tool(&host.netns, "ip xfrm policy flush");
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

/// As switches set them that ignore the packet's own ECN field.
#[test]
fn congestion_marks_that_make_the_device_drop_packets_are_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        if !run(&host.netns, "nft add table netdev qos").status.success() {
            skipped(
                "congestion_marks_that_make_the_device_drop_packets_are_reported",
                "it needs `nft` (Debian: nftables), and a kernel with it",
            );
            return Ok(());
        }
        run_all(
            host,
            &[
                "nft add chain netdev qos in { type filter hook ingress device eth0 priority 0 ; }",
                "nft add rule netdev qos in udp dport 8472 ip ecn set ce",
            ],
        );
        let words = [
            "of n1 (10.99.0.10) arrive on eth0, and the VXLAN device drops them",
            "nft 'add table inet unmark; ",
        ];
        wait_for_problem(&mut cluster.agents[1], &words);
        run_all(
            host,
            &[
                "nft add table inet unmark",
                "nft add chain inet unmark in { type filter hook prerouting priority -300 ; }",
                "nft add rule inet unmark in udp dport 8472 ip ecn set not-ect",
            ],
        );
        wait_until("the advice does not help", REPORT_TIMEOUT, || {
            !has_problem(&mut cluster.agents[1], "the VXLAN device drops them")
        });
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

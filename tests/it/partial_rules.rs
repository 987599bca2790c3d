//! Rules that affect only some packets between pods are reported as notices, by their form and only for
//! what they do.

use crate::{
    common::{TIMEOUT, has_problem, isolated, run, sh, skipped, status_where, wait_until},
    forwarding::TwoHosts,
    misrouting_hosts::{is_healthy, wait_for_notice},
};

/// Chain of a table, rules, the warning, and the advice.
const PARTIAL_RULES: [(&str, &str, &str, &str); 9] = [
    (
        "ip crowd f { type filter hook forward priority -10 ; }",
        "ip saddr { 10.42.3.3, 203.0.113.9 } drop",
        "chain ip crowd f drops some packets between pods: those from 10.42.3.3 (rule with handle",
        "nft insert rule ip crowd f ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
    ),
    (
        "inet old f { type filter hook forward priority 0 ; }",
        "ip daddr 10.42.2.2-10.42.2.99 reject",
        "chain inet old f rejects some packets between pods: those to 10.42.2.2-10.42.2.99",
        "nft insert rule inet old f ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
    ),
    // Left by a program that has gone, or written by an administrator, in a chain that another program
    // calls.
    (
        "ip kube KUBE-POD-FW-A { type filter hook forward priority 0 ; }",
        "ip daddr 10.42.2.2 reject",
        "chain ip kube KUBE-POD-FW-A rejects some packets between pods: those to 10.42.2.2",
        "nft insert rule ip kube KUBE-POD-FW-A ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
    ),
    (
        "ip dock DOCKER-USER { type filter hook forward priority 0 ; }",
        "tcp dport 8080 drop",
        "chain ip dock DOCKER-USER drops some packets between pods: those to port 8080",
        "nft insert rule ip dock DOCKER-USER ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
    ),
    (
        "bridge guard p { type filter hook prerouting priority -300 ; }",
        "ether type ip ip saddr 10.42.3.3 drop",
        "chain bridge guard p drops some packets between pods: those from 10.42.3.3",
        "nft insert rule bridge guard p ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
    ),
    (
        "inet jumbo i { type filter hook input priority 0 ; }",
        "meta length 1501-65535 drop",
        "chain inet jumbo i drops some tunnel packets: those of 1501 to 65535 bytes",
        "nft insert rule inet jumbo i udp dport 8472 accept",
    ),
    (
        "ip flood f { type filter hook forward priority 0 ; }",
        "tcp flags & (fin|syn|rst|ack) == syn limit rate over 60/second burst 20 packets drop",
        "chain ip flood f drops some packets between pods: those that begin connections above a certain \
         rate (rule with handle",
        "nft insert rule ip flood f ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
    ),
    (
        "ip egress s { type nat hook postrouting priority 90 ; }",
        "ip saddr 10.42.3.3 snat to 192.0.2.9",
        "chain ip egress s gives some packets between pods another source address",
        "nft insert rule ip egress s ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
    ),
    (
        "inet pbr p { type filter hook prerouting priority mangle ; }",
        "tcp dport 443 meta mark set meta mark & 0xff00ffff | 0x00010000",
        "chain inet pbr p gives some packets between pods the mark 0x10000: those to port 443",
        "nft insert rule inet pbr p ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
    ),
];

/// Rules of healthy hosts.
const HEALTHY_RULES: &str = "
table inet hard {
    set bans { type ipv4_addr; flags interval; elements = { 203.0.113.0/24, 198.51.100.7 } }
    chain raw { type filter hook prerouting priority raw; policy accept;
        fib saddr . iif oif missing udp dport 99 drop
        tcp flags & (fin|syn) == fin|syn drop
        tcp flags & (fin|syn|rst|ack) != syn ct state new drop
        ip saddr @bans drop
        meta mark set ct mark
    }
    chain forward { type filter hook forward priority filter; policy accept;
        ct state invalid drop
        ct state established,related accept
        meta length 1501-65535 drop
        iifname eth0 tcp dport { 22, 445 } drop
        oifname eth0 tcp dport 25 reject
        udp dport 33434-33534 reject
        ip daddr 10.43.0.0/16 tcp dport 443 drop
        fib daddr type local tcp dport 443 drop
        tcp flags syn tcp dport 80 limit rate over 100/second counter drop
        tcp dport 22 limit rate 10/minute accept
        tcp dport 22 counter drop
        tcp dport 9 meta mark set 0x99
        ip saddr 10.42.0.0/16 accept
        tcp dport 443 drop
    }
    chain input { type filter hook input priority filter; policy accept;
        tcp dport 443 drop
        udp dport 8472 accept
        meta length 1501-65535 drop
    }
    chain out { type nat hook postrouting priority 90; policy accept;
        ip saddr 172.17.0.0/16 oifname != docker0 masquerade
        ip saddr 10.42.3.3 ip daddr != 10.42.0.0/16 masquerade
    }
}";

#[test]
fn rules_matching_some_packets_between_pods_are_warned_of_until_the_advice_is_followed() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        sh(
            host,
            "ip route add blackhole default table 99 && \
             ip rule add fwmark 0x10000/0xff0000 lookup 99 pref 999",
        );
        status_where(agent, is_healthy);
        for (chain, rule, words, advice) in PARTIAL_RULES {
            let place: Vec<&str> = chain.split(' ').collect();
            let [family, table, name] = place[..3] else { panic!("{chain}") };
            sh(host, &format!("nft add table {family} {table} && nft add chain {chain}"));
            let added = run(host, &format!("nft add rule {family} {table} {name} {rule}"));
            assert!(added.status.success(), "{added:?}");
            wait_for_notice(agent, &[words, advice]);
            sh(host, advice);
            status_where(agent, is_healthy);
            sh(host, &format!("nft delete table {family} {table}"));
        }
        Ok(())
    });
}

#[test]
fn rules_of_healthy_hosts_cause_no_notice() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("rules");
        std::fs::write(&file, HEALTHY_RULES)?;
        sh(host, &format!("nft -f {}", file.display()));
        // The agent reads all rules at once: when it reports this one, it has read the others, too.
        sh(
            host,
            "nft add table ip last && nft add chain ip last f { type filter hook forward priority 9 ; } && \
             nft add rule ip last f tcp dport 99 drop",
        );
        let said = wait_for_notice(
            agent,
            &["chain ip last f drops some packets between pods: those to port 99"],
        );
        assert!(!said.contains("inet hard"), "{said}");
        sh(host, "nft delete table ip last");
        status_where(agent, is_healthy);
        Ok(())
    });
}

#[test]
fn ipsec_policy_matching_some_pod_packets_is_warned_of_until_the_advice_is_followed() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        status_where(agent, is_healthy);
        for (policy, does) in [
            ("src 10.42.2.0/24 dst 10.42.0.0/16 proto tcp dport 80 dir out", "action block"),
            ("src 10.42.0.0/16 dst 10.42.2.9/32 dir fwd", "action block"),
            ("src 10.42.2.0/24 dst 10.42.3.0/24 proto udp dir out", "tmpl proto esp mode tunnel"),
        ] {
            if !run(host, &format!("ip xfrm policy add {policy} {does}")).status.success() {
                skipped(
                    "ipsec_policy_matching_some_pod_packets_is_warned_of_until_the_advice_is_followed",
                    "the kernel has no IPsec",
                );
                return Ok(());
            }
            // Policies for other networks, or that let all packets pass.
            sh(
                host,
                "ip xfrm policy add src 192.168.0.0/16 dst 10.42.0.0/16 dir fwd action block && \
                 ip xfrm policy add src 10.42.0.0/16 dst 10.42.9.0/24 dir out && \
                 nft add table ip change",
            );
            let mut words = policy.split(' ');
            let [_, from, _, to] = std::array::from_fn(|_| words.next().expect("a word"));
            let advice = format!("ip xfrm policy delete {policy}");
            let named = format!("some packets between pods: those from {from} to {to}");
            let said = wait_for_notice(agent, &["an IPsec policy", &named, &advice]);
            assert_eq!(said.matches("an IPsec policy").count(), 1, "{said}");
            sh(host, &format!("{advice} && nft delete table ip change"));
            status_where(agent, is_healthy);
            sh(host, "ip xfrm policy flush");
        }
        Ok(())
    });
}

/// The proxy accepts connections in place of their destination, and opens them there once the handshake
/// is complete.
#[test]
fn syn_proxy_is_no_loss_but_one_that_drops_connections_is() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        let proxy = "nft add table ip proxy && \
                     nft add chain ip proxy p { type filter hook prerouting priority raw ; } && \
                     nft add chain ip proxy f { type filter hook forward priority 0 ; } && \
                     nft add rule ip proxy p tcp flags & (syn|ack) == syn notrack && \
                     sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0";
        sh(host, proxy);
        let rule = "nft add rule ip proxy f ct state invalid,untracked meta l4proto tcp \
                    counter synproxy mss 1460 wscale 7 timestamp sack-perm";
        if !run(host, rule).status.success() {
            skipped(
                "syn_proxy_is_no_loss_but_one_that_drops_connections_is",
                "the kernel has no synproxy",
            );
            return Ok(());
        }
        sh(host, "nft add rule ip proxy f ct state invalid drop");
        let counted = || {
            let listed = run(host, "nft list chain ip proxy f").stdout;
            let listed = String::from_utf8(listed).expect("UTF-8");
            let (_, rest) = listed.split_once("counter packets ").expect("a counter");
            rest.split(' ').next().expect("a number").parse::<u64>().expect("a number")
        };
        // Several tests, each of which passes the proxy.
        wait_until("no test packets", TIMEOUT * 2, || {
            assert!(!has_problem(agent, "packets"), "{}", agent.log());
            counted() > 40
        });
        status_where(agent, |status| status["kernel"]["forwarding"]["state"] == "ok");
        // Packets of the proxy to the destination are lost.
        sh(
            host,
            "nft add chain ip proxy o { type filter hook postrouting priority 0 ; } && \
             nft add rule ip proxy o ip daddr 10.42.0.0/16 tcp flags & (syn|ack) == syn drop",
        );
        wait_until("not reported", TIMEOUT * 2, || has_problem(agent, "data of TCP connections"));
        Ok(())
    });
}

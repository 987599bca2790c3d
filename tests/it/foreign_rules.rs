//! Rules of other programs in sets, maps, behind marks, at interfaces and in iptables-legacy. Those that
//! drop packets of pods are reported as notices until the advice is followed. Rules of healthy hosts are
//! not reported.

use gossamer::lab::NetNs;

use crate::{
    common::{
        Cluster, TIMEOUT, eventually, has_problem, isolated, run, sh, skipped, status_where, tool,
        wait_until,
    },
    forwarding::TwoHosts,
    misrouting_hosts::{is_healthy, wait_for_notice},
};

/// The commands that create the rules, the expected notice, the advice, and the commands that remove the
/// rules.
const BAN_RULES: [(&[&str], &str, &str, &str); 9] = [
    (
        &[
            "ipset create f2b hash:ip",
            "ipset add f2b 10.42.3.3",
            "ipset add f2b 203.0.113.9",
            "iptables-nft -N f2b-sshd",
            "iptables-nft -A f2b-sshd -m set --match-set f2b src -j REJECT",
            "iptables-nft -A f2b-sshd -j RETURN",
            "iptables-nft -A FORWARD -j f2b-sshd",
        ],
        "chain ip filter f2b-sshd rejects some packets between pods: those from 10.42.3.3 (rule with handle",
        "iptables -I FORWARD -s 10.42.0.0/16 -d 10.42.0.0/16 -j ACCEPT",
        "nft delete table ip filter; ipset destroy f2b",
    ),
    (
        &[
            "ipset create crowd hash:net,port",
            "ipset add crowd 10.42.3.0/30,tcp:443",
            "ipset add crowd 203.0.113.0/24,tcp:80",
            "iptables-legacy -A FORWARD -m set --match-set crowd src,dst -j DROP",
        ],
        "chain FORWARD of iptables-legacy's table filter drops some packets between pods: those from \
         10.42.3.0-10.42.3.3 to port 443 (rule `-A FORWARD -m set --match-set crowd src,dst -j DROP`)",
        "iptables-legacy -t filter -I FORWARD -s 10.42.0.0/16 -d 10.42.0.0/16 -j ACCEPT",
        "iptables-legacy -F FORWARD; ipset destroy crowd",
    ),
    (
        &[
            "nft add table ip v",
            "nft add chain ip v f { type filter hook forward priority 0 ; }",
            "nft add rule ip v f ip daddr vmap { 10.42.3.3 : drop, 203.0.113.1 : drop }",
        ],
        "chain ip v f drops some packets between pods: those to 10.42.3.3",
        "nft insert rule ip v f ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
        "nft delete table ip v",
    ),
    (
        &[
            "nft add table inet v",
            "nft add chain inet v f { type filter hook forward priority 0 ; }",
            "nft add set inet v bans { type ipv4_addr . inet_service ; flags interval ; }",
            "nft add element inet v bans { 203.0.113.0/24 . 80, 10.42.3.0/30 . 440-443 }",
            "nft add rule inet v f ip saddr . tcp dport @bans reject",
        ],
        "chain inet v f rejects some packets between pods: those from 10.42.3.0-10.42.3.3 to port 440-443",
        "nft insert rule inet v f ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
        "nft delete table inet v",
    ),
    (
        &[
            "nft add table netdev e",
            "nft add chain netdev e i { type filter hook ingress device gossamer.1 priority 0 ; }",
            "nft add rule netdev e i ip saddr 10.42.3.3 drop",
        ],
        "chain netdev e i drops some packets between pods: those from 10.42.3.3",
        "nft insert rule netdev e i ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
        "nft delete table netdev e",
    ),
    (
        &[
            "nft add table netdev e",
            "nft add chain netdev e i { type filter hook ingress device eth0 priority 0 ; }",
            "nft add rule netdev e i meta length 1501-65535 drop",
        ],
        "chain netdev e i drops some tunnel packets: those of 1501 to 65535 bytes",
        "nft insert rule netdev e i udp dport 8472 accept",
        "nft delete table netdev e",
    ),
    (
        &[
            "nft add table inet m",
            "nft add chain inet m p { type filter hook prerouting priority mangle ; }",
            "nft add rule inet m p tcp dport 443 ct mark set 7",
            "nft add chain inet m f { type filter hook forward priority 0 ; }",
            "nft add rule inet m f ct mark 7 drop",
        ],
        "chain inet m f drops some packets between pods: those to port 443",
        "nft insert rule inet m f ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
        "nft delete table inet m",
    ),
    (
        &[
            "iptables-nft -A FORWARD -m hashlimit --hashlimit-above 99/sec --hashlimit-name h -j DROP",
        ],
        "chain ip filter FORWARD drops some packets between pods: those above a certain rate",
        "iptables -I FORWARD -s 10.42.0.0/16 -d 10.42.0.0/16 -j ACCEPT",
        "nft delete table ip filter",
    ),
    (
        &["iptables-legacy -A OUTPUT -p udp -m length --length 1501:65535 -j DROP"],
        "chain OUTPUT of iptables-legacy's table filter drops some tunnel packets: those of 1501 to 65535 \
         bytes",
        "iptables-legacy -t filter -I OUTPUT -p udp --dport 8472 -j ACCEPT",
        "iptables-legacy -F OUTPUT",
    ),
];

/// Returns whether all commands succeed.
fn all_succeed(host: &NetNs, commands: &[&str]) -> bool {
    commands.iter().all(|command| run(host, command).status.success())
}

#[test]
fn bans_in_sets_maps_marks_and_tables_are_warned_of_until_the_advice_is_followed() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        status_where(agent, is_healthy);
        for (commands, words, advice, remove) in BAN_RULES {
            if all_succeed(host, commands) {
                wait_for_notice(agent, &[words, advice]);
                sh(host, advice);
                status_where(agent, is_healthy);
            } else {
                skipped(
                    "bans_in_sets_maps_marks_and_tables_are_warned_of_until_the_advice_is_followed",
                    &format!("cannot be made here: {commands:?}"),
                );
            }
            remove.split("; ").for_each(|command| _ = run(host, command));
        }
        Ok(())
    });
}

/// Rules as ufw, Docker, kube-proxy and fail2ban write them. The kernel accepts them from iptables-legacy
/// and iptables-nft alike.
const HEALTHY_IPTABLES: &str = "*mangle
:PREROUTING ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
-A PREROUTING -m mark --mark 0x99 -j ACCEPT
-A PREROUTING -i eth0 -p tcp -m tcp --dport 443 -j CONNMARK --set-xmark 0x99/0xffffffff
-A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
-A POSTROUTING -o wwan0 -j TTL --ttl-set 65
-A POSTROUTING -m mark --mark 0xca6c -p udp -j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-TCOU7JCQXEZGVUNU - [0:0]
:KUBE-SEP-6E7XQMQ4RAYOWTTM - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A KUBE-SERVICES -d 10.43.0.10/32 -p udp -m comment --comment \"kube-system/kube-dns:dns cluster \
    IP\" -m udp --dport 53 -j KUBE-SVC-TCOU7JCQXEZGVUNU
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-TCOU7JCQXEZGVUNU ! -s 10.42.0.0/16 -d 10.43.0.10/32 -p udp -m udp --dport 53 -j KUBE-MARK-MASQ
-A KUBE-SVC-TCOU7JCQXEZGVUNU -m statistic --mode random --probability 0.50000000000 -j \
    KUBE-SEP-6E7XQMQ4RAYOWTTM
-A KUBE-SEP-6E7XQMQ4RAYOWTTM -s 10.42.1.7/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-6E7XQMQ4RAYOWTTM -p udp -m udp -j DNAT --to-destination 10.42.1.7:53
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-FIREWALL - [0:0]
:f2b-sshd - [0:0]
:ufw-before-forward - [0:0]
:ufw-before-input - [0:0]
:ufw-not-local - [0:0]
:ufw-user-input - [0:0]
:ufw-user-limit - [0:0]
-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd
-A INPUT -j KUBE-FIREWALL
-A INPUT -j ufw-before-input
-A FORWARD -j DOCKER-USER
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -j ufw-before-forward
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A FORWARD ! -i docker0 -o docker0 -j DROP
-A FORWARD -m set --match-set crowdsec src -j DROP
-A DOCKER-USER -i eth0 -p tcp -m tcp --dport 5432 -j DROP
-A DOCKER-USER -j RETURN
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
-A f2b-sshd -s 203.0.113.9/32 -j REJECT --reject-with icmp-port-unreachable
-A f2b-sshd -j RETURN
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -j ufw-user-input
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix \"[UFW BLOCK] \"
-A ufw-not-local -j DROP
-A ufw-user-input -p tcp -m tcp --dport 22 -m conntrack --ctstate NEW -m recent --set --name \
    DEFAULT --mask 255.255.255.255 --rsource
-A ufw-user-input -p tcp -m tcp --dport 22 -m conntrack --ctstate NEW -m recent --update \
    --seconds 30 --hitcount 6 --name DEFAULT --mask 255.255.255.255 --rsource -j ufw-user-limit
-A ufw-user-limit -j REJECT --reject-with icmp-port-unreachable
COMMIT
";

/// Rules as firewalld and the nft backend of kube-proxy write them.
const HEALTHY_NFTABLES: &str = "
table inet firewalld {
    chain mangle_PREROUTING { type filter hook prerouting priority mangle + 10; policy accept;
        icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
        meta nfproto ipv6 fib saddr . mark . iif oif missing drop
    }
    chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
        ct state vmap { established : accept, related : accept }
        ct status dnat accept
        iifname lo accept
        ct state invalid drop
        ip6 daddr { ::/96, 2002::/24 } reject with icmpv6 addr-unreachable
        iifname vmap { eth0 : goto filter_FWD_public, docker0 : accept }
    }
    chain filter_FWD_public {
        ip saddr { 203.0.113.0/24 } drop
        tcp dport 22 reject with icmpx admin-prohibited
    }
}
table ip kube-proxy {
    set cluster-ips { type ipv4_addr; elements = { 10.43.0.1, 10.43.0.10 } }
    map service-ips { type ipv4_addr . inet_proto . inet_service : verdict
        elements = { 10.43.0.10 . udp . 53 : goto service-dns }
    }
    map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict
        elements = { 10.43.0.1 . tcp . 443 : drop }
    }
    chain service-dns { meta mark set meta mark | 0x4000
        numgen random mod 2 vmap { 0 : goto endpoint-a, 1 : goto endpoint-a }
    }
    chain endpoint-a {
        meta l4proto udp dnat to 10.42.1.7:53
    }
    chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept;
        ip daddr . meta l4proto . th dport vmap @service-ips
    }
    chain filter-forward { type filter hook forward priority -110; policy accept;
        ct state new ip daddr . meta l4proto . th dport vmap @no-endpoint-services
        ip daddr @cluster-ips drop
    }
    chain nat-postrouting { type nat hook postrouting priority srcnat; policy accept;
        meta mark & 0x4000 != 0x4000 return
        meta mark set meta mark ^ 0x4000
        masquerade fully-random
    }
}
table netdev ddos {
    chain i { type filter hook ingress device eth0 priority -500; policy accept;
        ip saddr { 203.0.113.0/24, 198.51.100.0/24 } drop
        tcp flags & (fin|syn) == fin|syn drop
    }
}";

#[test]
fn rules_of_firewalls_and_kubernetes_on_healthy_hosts_cause_no_notice() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        let dir = tempfile::tempdir()?;
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).map(|()| path.display().to_string())
        };
        let (tables, nft) = (write("tables", HEALTHY_IPTABLES)?, write("nft", HEALTHY_NFTABLES)?);
        run(host, "ipset create crowdsec hash:net");
        run(host, "ipset add crowdsec 203.0.113.0/24");
        sh(host, &format!("nft -f {nft}"));
        for program in ["iptables-legacy-restore", "iptables-nft-restore"] {
            let restored = run(host, &format!("{program} -n {tables}"));
            if !restored.status.success() {
                skipped(
                    "rules_of_firewalls_and_kubernetes_on_healthy_hosts_cause_no_notice",
                    &format!("{program}: {restored:?}"),
                );
            }
        }
        // Its counter shows that it has dropped nothing; rules of iptables-legacy are read without counters.
        run(
            host,
            "iptables-nft -A FORWARD -p tcp --syn --dport 80 -m hashlimit --hashlimit-above 100/sec \
             --hashlimit-mode srcip --hashlimit-name syn -j DROP",
        );
        // The agent reads all rules at once: when it reports this one, it has read the others, too.
        sh(
            host,
            "nft add table ip last && nft add chain ip last f { type filter hook forward priority 9 ; } && \
             nft add rule ip last f tcp dport 99 drop",
        );
        let last = "chain ip last f drops some packets between pods: those to port 99";
        let said = wait_for_notice(agent, &[last]);
        assert_eq!(said.matches("chain ").count(), 1, "{said}");
        sh(host, "nft delete table ip last");
        status_where(agent, is_healthy);
        Ok(())
    });
}

/// A rule that reduces the hop limit, the expected report, and the advice.
const HOP_LIMIT_RULES: [(&str, &str, &str); 3] = [
    (
        "iptables-legacy -t mangle -A POSTROUTING -o gossamer.1 -j TTL --ttl-set 1",
        "chain POSTROUTING of iptables-legacy's table mangle lowers the TTL or hop limit of packets between \
         pods to 1",
        "iptables-legacy -t mangle -I POSTROUTING -s 10.42.0.0/16 -d 10.42.0.0/16 -j ACCEPT",
    ),
    (
        "iptables-nft -t mangle -A POSTROUTING -j TTL --ttl-set 1",
        "chain ip mangle POSTROUTING lowers the TTL or hop limit of packets between pods to 1",
        "iptables -t mangle -I POSTROUTING -s 10.42.0.0/16 -d 10.42.0.0/16 -j ACCEPT",
    ),
    (
        "nft add table ip hops && \
         nft add chain ip hops f { type filter hook forward priority mangle ; } && \
         nft add rule ip hops f ip ttl set 1",
        "chain ip hops f lowers the TTL or hop limit of packets between pods to 1",
        "nft insert rule ip hops f ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
    ),
];

#[test]
fn rule_that_reduces_the_hop_limit_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let spaces = crate::remote_pods::with_pods(&mut cluster, &["a", "b"])?;
        let shown = tool(&spaces[0], "ip -4 -br addr show eth0");
        let address = shown.split_whitespace().nth(2).expect("an address");
        let ping = format!("ping -c 1 -W 1 {}", address.split('/').next().expect("an address"));
        let (host, agent) = (&cluster.hosts[1].netns, &mut cluster.agents[1]);
        if !all_succeed(host, &["iptables-nft -t mangle -S", "iptables-legacy -t mangle -S"]) {
            skipped(
                "rule_that_reduces_the_hop_limit_is_reported_and_the_advice_works",
                "it needs iptables-nft and iptables-legacy",
            );
            return Ok(());
        }
        for (rule, words, advice) in HOP_LIMIT_RULES {
            sh(host, rule);
            assert!(
                !run(&spaces[1], &ping).status.success(),
                "the fault is a different one: {rule}"
            );
            wait_for_notice(agent, &[words, advice]);
            // Once packets are known to be lost, this is reported as the cause.
            wait_until(words, TIMEOUT, || has_problem(agent, words));
            tool(host, advice);
            eventually(&spaces[1], &ping, |shown| shown.contains(" 0% packet loss"));
            status_where(agent, is_healthy);
            for program in ["iptables-nft", "iptables-legacy"] {
                run(host, &format!("{program} -t mangle -F"));
            }
            run(host, "nft delete table ip hops");
        }
        Ok(())
    });
}

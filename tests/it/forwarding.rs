//! The agent tests with packets whether a host forwards packets of pods, and reports what drops them.

use gossamer::lab::{Agent, Lab, NetNs};
use serde_json::Value;

use crate::{
    cni::{Runtime, namespaces},
    common::{
        Cluster, TIMEOUT, eventually, has_problem, isolated, program, run, sh, status_where, texts,
        tool, wait_until,
    },
};

/// Returns the state of the check of forwarding.
pub fn state(status: &Value) -> &str {
    status["kernel"]["forwarding"]["state"].as_str().unwrap_or_default()
}

fn detail(status: &Value) -> &str {
    status["kernel"]["forwarding"]["detail"].as_str().unwrap_or_default()
}

/// Adds a pod on each of two hosts, and waits until both agents have seen their test packets pass.
pub fn with_pods(cluster: &mut Cluster, spaces: &mut Vec<NetNs>) -> anyhow::Result<()> {
    spaces.extend(namespaces(&["a", "b"])?);
    for (agent, name) in cluster.agents.iter_mut().zip(["a", "b"]) {
        Runtime::new(agent).add(name);
        status_where(agent, |status| {
            let detail = detail(status);
            detail.contains("IPv4 out") && detail.contains("IPv4 in") && state(status) == "ok"
        });
    }
    Ok(())
}

/// A cluster of two hosts with a pod each, for tests of the second host.
pub struct TwoHosts {
    cluster: Cluster,
    _spaces: Vec<NetNs>,
}

impl TwoHosts {
    pub fn new(lab: &mut Lab) -> anyhow::Result<Self> {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        Ok(Self { cluster, _spaces: spaces })
    }

    /// Returns the second host and its agent.
    pub fn second(&mut self) -> (&NetNs, &mut Agent) {
        (&self.cluster.hosts[1].netns, &mut self.cluster.agents[1])
    }
}

/// Commands that create a forward chain without rules.
pub const ADD_FORWARD_CHAIN: &str = "nft add table inet wall && \
                     nft add chain inet wall f { type filter hook forward priority 0 ; }";

/// The directions that are lost, the reported cause, and the commands that close them.
const BLOCKING_RULES: [(&str, &str, &str); 12] = [
    (
        "(IPv4 out, IPv4 in)",
        "chain inet wall f (hook forward) ends in a rule that drops or rejects",
        "nft add rule inet wall f ct state established,related accept && \
         nft add rule inet wall f iifname lo accept && \
         nft add rule inet wall f reject with icmpx admin-prohibited",
    ),
    (
        "(IPv4 out, IPv4 in)",
        "nft insert rule inet wall f ip saddr 10.42.0.0/16 accept",
        "nft add chain inet wall f { policy drop ; }",
    ),
    (
        "(IPv4 in)",
        "chain inet wall f (hook forward) has rules that drop or reject",
        "nft add rule inet wall f iifname gossamer.1 ct state new drop",
    ),
    (
        "(IPv4 out)",
        "chain inet wall f (hook forward) has rules that drop or reject",
        "nft add rule inet wall f iifname gsm0 ct state new drop",
    ),
    (
        "(IPv4 TCP out, IPv4 TCP in)",
        "chain inet wall f (hook forward) has rules that drop or reject",
        "nft add rule inet wall f tcp flags & (fin|syn|rst|ack) == syn drop",
    ),
    (
        "(IPv4 TCP in)",
        "chain inet wall f (hook forward) has rules that drop or reject",
        "nft add chain inet wall pre { type filter hook prerouting priority raw ; } && \
         nft add rule inet wall pre iifname gossamer.1 tcp dport 1-65535 notrack && \
         nft add rule inet wall f ct state untracked drop",
    ),
    (
        "(IPv4 TCP out, IPv4 TCP in)",
        "chain inet wall proxy sends packets to other addresses (redirect or DNAT)",
        "nft add chain inet wall proxy { type nat hook prerouting priority dstnat ; } && \
         nft add rule inet wall proxy meta l4proto tcp redirect to :7892",
    ),
    (
        "(IPv4 TCP out, IPv4 TCP in)",
        "packets with mark 0x100/0x3f00 leave by eth0, because ip rule 2001 (fwmark 0x100/0x3f00)",
        "nft add chain inet wall m { type filter hook prerouting priority mangle ; } && \
         nft add rule inet wall m meta l4proto tcp meta mark set 0x100 && \
         ip rule add fwmark 0x100/0x3f00 lookup 101 pref 2001 && \
         ip route add default via 10.99.0.1 dev eth0 table 101",
    ),
    (
        "(IPv4 UDP out, IPv4 UDP in)",
        "chain inet wall f (hook forward) has rules that drop or reject",
        "nft add rule inet wall f meta l4proto udp reject",
    ),
    (
        "(IPv4 out)",
        "chain bridge wall in (hook input) has the policy drop",
        "nft add table bridge wall && \
         nft add chain bridge wall in { type filter hook input priority 0 ; policy drop ; } && \
         nft add rule bridge wall in ether type arp accept",
    ),
    (
        "(IPv4 out)",
        "chain netdev wall in (hook ingress)",
        "nft add table netdev wall && \
         nft add chain netdev wall in { type filter hook ingress device gsm0 priority 0 ; } && \
         nft add rule netdev wall in ip saddr 10.42.0.0/16 drop",
    ),
    (
        "(IPv4 in)",
        "chain ip raw PREROUTING (hook prerouting) has rules that drop or reject",
        "nft add table ip raw && \
         nft add chain ip raw PREROUTING { type filter hook prerouting priority -300 ; } && \
         nft add rule ip raw PREROUTING iifname { gsm0, gossamer.1 } ip ttl > 0 drop",
    ),
];

#[test]
fn blocked_forwarding_is_detected_with_packets_and_reported_until_unblocked() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        for (ways, words, wall) in BLOCKING_RULES {
            sh(host, ADD_FORWARD_CHAIN);
            sh(host, wall);
            let said = format!("does not forward packets of pods {ways}");
            wait_until(wall, TIMEOUT, || has_problem(agent, &said) && has_problem(agent, words));
            let doctor =
                format!("{} doctor --socket {}", program().display(), agent.socket().display());
            let shown = String::from_utf8(run(host, &doctor).stdout)?;
            assert!(shown.contains("PROBLEM   forwarding"), "{shown}");
            for table in ["inet wall", "bridge wall", "netdev wall", "ip raw"] {
                run(host, &format!("nft delete table {table}"));
            }
            wait_until("still reported", TIMEOUT, || !has_problem(agent, "does not forward"));
        }
        // Rules that look closed but let pods pass are no problem, in any form.
        sh(host, ADD_FORWARD_CHAIN);
        sh(
            host,
            "nft add chain inet wall pods && \
                  nft add rule inet wall pods meta mark and 0 == 0 accept && \
                  nft add chain inet wall f { policy drop ; } && \
                  nft add rule inet wall f jump pods",
        );
        // Nor is a rule that drops echoes only.
        sh(host, "nft insert rule inet wall pods meta l4proto icmp drop");
        sh(
            host,
            "nft add table ip count && nft add chain ip count f { type filter hook forward priority 9 ; } && \
                  nft add rule ip count f udp dport 61475 counter",
        );
        eventually(host, "nft list chain ip count f", |text| {
            text.contains("counter packets") && !text.contains("counter packets 0 ")
        });
        let status = agent.ask("/v1/status", TIMEOUT)?;
        assert_eq!(
            (state(&status), &status["problems"]),
            ("ok", &serde_json::json!([])),
            "{status:#}"
        );
        Ok(())
    });
}

#[test]
fn forwarding_test_covers_each_family() {
    isolated(|lab| {
        let first = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &first, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let token = crate::common::token_of(&mut agent)?;
        let mut cluster = Cluster { hosts: vec![first], agents: vec![agent], token };
        cluster.join(lab, 2)?;
        cluster.converge()?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let host = &cluster.hosts[1].netns;
        let agent = &mut cluster.agents[1];
        status_where(agent, |status| detail(status).contains("IPv6 in"));
        sh(
            host,
            "nft add table ip6 wall && \
                  nft add chain ip6 wall f { type filter hook forward priority 0 ; policy drop ; }",
        );
        wait_until("not reported", TIMEOUT, || {
            has_problem(agent, "(IPv6 out, IPv6 in)") && has_problem(agent, "ip6 saddr fd42::/48")
        });
        let routes = tool(host, "ip -6 route show proto 73");
        let subnet = routes.split_whitespace().find(|word| word.ends_with("::/64"));
        let half = subnet.expect("the peer's subnet").replace("/64", "/65");
        sh(host, &format!("nft delete table ip6 wall && ip -6 route add blackhole {half}"));
        let words = format!("blackhole route to {half}");
        wait_until(&words, TIMEOUT, || has_problem(agent, &words));
        Ok(())
    });
}

#[test]
fn rule_that_drops_tcp_timestamps_is_reported() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        let rule = "nft add rule inet wall f tcp option timestamp exists drop";
        sh(host, &format!("{ADD_FORWARD_CHAIN} && {rule}"));
        wait_until("not reported", TIMEOUT, || {
            has_problem(agent, "does not forward packets of pods")
        });
        let status = agent.ask("/v1/status", TIMEOUT)?;
        assert!(texts(&status["problems"]).contains("chain inet wall f"), "{status:#}");
        Ok(())
    });
}

#[test]
fn silent_peer_is_not_reported_as_a_forwarding_fault_of_this_host() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        // The peer does not answer at all, and this host's tunnel packets do not reach it.
        sh(&cluster.hosts[0].netns, "ip link set gossamer.1 down && ip link set eth0 down");
        let host = &cluster.hosts[1].netns;
        // A change of the rules triggers a test at once.
        for number in 0..4 {
            let before = tool(host, "cat /proc/net/snmp");
            sh(host, &format!("nft add table ip t{number}"));
            wait_until("it is not tested", TIMEOUT, || tool(host, "cat /proc/net/snmp") != before);
        }
        let status = cluster.agents[1].ask("/v1/status", TIMEOUT)?;
        assert!(!texts(&status["problems"]).contains("does not forward"), "{status:#}");
        Ok(())
    });
}

#[test]
fn source_nat_between_pods_is_reported_until_removed() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        // One for a foreign network, and one for all packets.
        sh(
            host,
            "nft add table ip nat && \
             nft add chain ip nat POSTROUTING { type nat hook postrouting priority srcnat ; } && \
             nft add chain ip nat docker && \
             nft add rule ip nat docker ip saddr 172.17.0.0/16 masquerade && \
             nft add rule ip nat POSTROUTING jump docker && \
             nft add rule ip nat POSTROUTING masquerade",
        );
        let words = "chain ip nat POSTROUTING: iptables -t nat -I POSTROUTING -s 10.42.0.0/16 \
                     -d 10.42.0.0/16 -j ACCEPT";
        wait_until("not reported", TIMEOUT, || {
            has_problem(agent, "leave under the address 10.42.") && has_problem(agent, words)
        });
        let status = agent.ask("/v1/status", TIMEOUT)?;
        assert!(!texts(&status["problems"]).contains("ip nat docker"), "{status:#}");
        let doctor =
            format!("{} doctor --socket {}", program().display(), agent.socket().display());
        let shown = String::from_utf8(run(host, &doctor).stdout)?;
        assert!(shown.contains("PROBLEM   forwarding"), "{shown}");
        // The advice, in the syntax of nft.
        sh(
            host,
            "nft insert rule ip nat POSTROUTING ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
        );
        status_where(agent, |status| {
            state(status) == "ok" && status["problems"] == serde_json::json!([])
        });
        Ok(())
    });
}

/// The report, the commands that keep pods from resolving their gateway, and the commands that undo this.
const GATEWAY_FAULTS: [(&str, &str, &str); 5] = [
    (
        "net.ipv4.conf.gsm0.arp_ignore is 8",
        "sysctl -w net.ipv4.conf.gsm0.arp_ignore=8",
        "sysctl -w net.ipv4.conf.gsm0.arp_ignore=0",
    ),
    (
        "net.ipv4.conf.all.arp_ignore is 8",
        "sysctl -w net.ipv4.conf.all.arp_ignore=8",
        "sysctl -w net.ipv4.conf.all.arp_ignore=0",
    ),
    ("ip link set gsm0 arp on", "ip link set gsm0 arp off", "ip link set gsm0 arp on"),
    (
        "chain arp wall in (hook input) has the policy drop",
        "nft add table arp wall && \
         nft add chain arp wall in { type filter hook input priority 0 ; policy drop ; }",
        "nft delete table arp wall",
    ),
    (
        "chain bridge wall in (hook input) has rules that drop",
        "nft add table bridge wall && \
         nft add chain bridge wall in { type filter hook input priority 0 ; } && \
         nft add rule bridge wall in ether type arp drop",
        "nft delete table bridge wall",
    ),
];

#[test]
fn unresolved_gateway_is_reported_with_the_cause_until_resolved() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        status_where(agent, |status| detail(status).contains("IPv4 gateway"));
        for (words, plant, remove) in GATEWAY_FAULTS {
            sh(host, plant);
            // A change of the rules triggers a test at once.
            sh(host, "nft add table ip change");
            wait_until(words, TIMEOUT, || {
                has_problem(agent, "pods do not find their gateway 10.42.")
                    && has_problem(agent, "it answers no ARP")
                    && has_problem(agent, words)
            });
            let status = agent.ask("/v1/status", TIMEOUT)?;
            let problems = texts(&status["problems"]);
            assert!(!problems.contains("no rule was found"), "no other cause: {problems}");
            let doctor =
                format!("{} doctor --socket {}", program().display(), agent.socket().display());
            let shown = String::from_utf8(run(host, &doctor).stdout)?;
            assert!(shown.contains("PROBLEM   forwarding"), "{shown}");
            sh(host, &format!("{remove} && nft delete table ip change"));
            wait_until("still reported", TIMEOUT, || {
                let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
                status["problems"] == serde_json::json!([])
            });
        }
        Ok(())
    });
}

#[test]
fn unresolved_ipv6_gateway_is_reported() {
    isolated(|lab| {
        let first = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &first, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let _spaces = namespaces(&["a"])?;
        Runtime::new(&agent).add("a");
        // This test needs no peer.
        status_where(&mut agent, |status| detail(status).contains("IPv6 gateway"));
        let host = &first.netns;
        sh(
            host,
            "nft add table ip6 wall && \
             nft add chain ip6 wall in { type filter hook input priority 0 ; policy drop ; }",
        );
        wait_until("not reported", TIMEOUT, || {
            has_problem(&mut agent, "pods do not find their gateway fd42:")
                && has_problem(&mut agent, "chain ip6 wall in (hook input) has the policy drop")
        });
        assert!(!has_problem(&mut agent, "pods do not find their gateway 10."));
        sh(host, "nft delete table ip6 wall");
        wait_until("still reported", TIMEOUT, || !has_problem(&mut agent, "do not find"));
        Ok(())
    });
}

/// Docker and Kubernetes enable this, with their own policy for forwarded packets.
#[test]
fn rules_that_drop_bridged_packets_between_pods_are_reported() {
    isolated(|lab| {
        let test = "rules_that_drop_bridged_packets_between_pods_are_reported";
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let host = &cluster.hosts[1].netns;
        if !run(host, "sysctl -w net.bridge.bridge-nf-call-iptables=1").status.success() {
            crate::common::skipped(test, "br_netfilter is not loaded");
            return Ok(());
        }
        let agent = &mut cluster.agents[1];
        spaces.extend(namespaces(&["c", "d"])?);
        let _c = Runtime::new(agent).add("c");
        let d = Runtime::new(agent).add("d");
        let address = d["ips"][0]["address"].as_str().expect("an address");
        let ping = format!("ping -c 1 -W 1 {}", address.split('/').next().expect("an address"));
        let reaches = || run(&spaces[2], &ping).status.success();
        // Only packets through the tunnel may pass.
        let wall = "nft add table ip filter && \
                    nft add chain ip filter FORWARD \
                    { type filter hook forward priority 0 ; policy drop ; } && \
                    nft add rule ip filter FORWARD iifname gossamer.1 accept && \
                    nft add rule ip filter FORWARD oifname gossamer.1 accept";
        sh(host, wall);
        assert!(!reaches(), "the case is another one");
        wait_until("not reported", TIMEOUT, || {
            has_problem(agent, "does not forward packets between its own pods (IPv4)")
                && has_problem(agent, "net.bridge.bridge-nf-call-iptables is 1")
                && has_problem(agent, "chain ip filter FORWARD (hook forward) has the policy drop")
        });
        let status = agent.ask("/v1/status", TIMEOUT)?;
        assert!(detail(&status).contains("lost: IPv4 between pods"), "{status:#}");
        assert_eq!(status["problems"].as_array().map(Vec::len), Some(1), "{status:#}");
        let doctor =
            format!("{} doctor --socket {}", program().display(), agent.socket().display());
        let shown = String::from_utf8(run(host, &doctor).stdout)?;
        assert!(
            shown.contains("PROBLEM   forwarding") && shown.contains("between its own pods"),
            "{shown}"
        );
        // The reported advice.
        sh(host, "nft insert rule ip filter FORWARD ip saddr 10.42.0.0/16 accept");
        wait_until("still reported", TIMEOUT, || !has_problem(agent, "does not forward"));
        assert!(reaches());
        // Where bridged packets pass no rule, this is not tested.
        sh(host, "sysctl -w net.bridge.bridge-nf-call-iptables=0 && nft delete table ip filter");
        sh(host, wall);
        assert!(reaches());
        status_where(agent, |status| {
            state(status) == "ok" && !detail(status).contains("IPv4 between")
        });
        // A bridge has its own setting for this.
        if run(host, "ip link set gsm0 type bridge nf_call_iptables 1").status.success() {
            sh(host, "nft add table ip change");
            wait_until("not reported", TIMEOUT, || {
                has_problem(agent, "ip link set gsm0 type bridge nf_call_iptables 0")
            });
        }
        Ok(())
    });
}

#[test]
fn ipsec_policies_that_match_packets_of_pods_are_reported() {
    isolated(|lab| {
        let test = "ipsec_policies_that_match_packets_of_pods_are_reported";
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        let policy =
            "ip xfrm policy add dir fwd src 10.42.0.0/16 dst 10.0.0.0/8 action block priority 7";
        if !run(host, policy).status.success() {
            crate::common::skipped(test, "the kernel has no IPsec");
            return Ok(());
        }
        sh(host, "ip xfrm policy add dir out src 192.168.0.0/16 dst 192.168.0.0/16 action block");
        sh(host, "nft add table ip change");
        wait_until("not reported", TIMEOUT, || {
            has_problem(
                agent,
                "an IPsec policy matches packets from 10.42.0.0/16 to 10.0.0.0/8 (ip xfrm policy: dir fwd, \
                 priority 7)",
            )
        });
        assert!(!has_problem(agent, "192.168.0.0/16"));
        Ok(())
    });
}

//! Hosts on which all entries of the overlay are correct, but packets of pods are lost or diverted. The
//! cause is reported, and each advice is tried.

use gossamer::lab::{Agent, Host};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    cni::Runtime,
    common::{
        Cluster, TIMEOUT, client, has_problem, isolated, program, run, sh, skipped, status_where,
        texts, tool, wait_until,
    },
    forwarding::{TwoHosts, with_pods},
};

pub fn is_healthy(status: &Value) -> bool {
    let has_none = |kind: &str| status[kind] == serde_json::json!([]);
    status["kernel"]["forwarding"]["state"] == "ok" && has_none("problems") && has_none("notices")
}

/// Waits until the agent, `gossamer status` and the doctor all show the notice. Returns the notices.
pub fn wait_for_notice(agent: &mut Agent, words: &[&str]) -> String {
    let has = |status: &Value| {
        let said = texts(&status["notices"]);
        words.iter().all(|words| said.contains(words))
    };
    let status = status_where(agent, has);
    for command in ["status", "doctor"] {
        let said = String::from_utf8(client(agent, &[command]).stdout).expect("UTF-8");
        // Lines are wrapped.
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        let first = words[0].split(' ').next().expect("a word");
        assert!(said.contains("notice ") && said.contains(first), "{command}: {said}");
    }
    texts(&status["notices"])
}

/// Adds a second uplink that leads nowhere.
fn add_uplink(host: &Host) {
    sh(
        &host.netns,
        "ip link add up1 type veth peer name up2 && ip link set up1 up && ip link set up2 up && \
         ip addr add 192.0.2.2/24 dev up1",
    );
}

/// Rules that mark packets of pods, policy rules that use the mark, and the report.
const MARKS: [(&str, &str, &str); 4] = [
    (
        "type filter hook forward priority mangle",
        "ip route add default via 192.0.2.1 dev up1 table 99",
        "tunnel packets with mark 0x7 leave by up1, because ip rule 1000 (fwmark 0x7) sends them to table 99",
    ),
    (
        "type filter hook forward priority mangle",
        "ip route add blackhole default table 99",
        "tunnel packets with mark 0x7 have no route",
    ),
    (
        "type filter hook prerouting priority mangle",
        "ip route add default via 192.0.2.1 dev up1 table 99",
        "packets with mark 0x7 leave by up1, because ip rule 1000 (fwmark 0x7) sends them to table 99",
    ),
    (
        "type filter hook prerouting priority mangle",
        "ip route add blackhole default table 99",
        "packets with mark 0x7 have no route",
    ),
];

#[test]
fn mark_that_diverts_packets_of_pods_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let host = &cluster.hosts[1];
        add_uplink(host);
        let addresses = spaces.iter().map(|pod| {
            let shown = tool(pod, "ip -4 -br addr show eth0");
            let address = shown.split_whitespace().nth(2).expect("an address");
            address.split('/').next().expect("an address").to_owned()
        });
        let addresses: Vec<String> = addresses.collect();
        let ping = format!("ping -c 1 -W 1 {}", addresses[0]);
        for (chain, route, words) in MARKS {
            sh(&host.netns, &format!("{route} && ip rule add fwmark 7 lookup 99 pref 1000"));
            sh(
                &host.netns,
                &format!(
                    "nft add table ip qos && nft add chain ip qos m {{ {chain} ; }} && \
                     nft add rule ip qos m iifname gsm0 meta mark set 0x7"
                ),
            );
            assert!(
                !run(&spaces[1], &ping).status.success(),
                "the fault is a different one: {words}"
            );
            let agent = &mut cluster.agents[1];
            wait_until(words, TIMEOUT, || has_problem(agent, words));
            let status = agent.ask("/v1/status", TIMEOUT)?;
            let problems = texts(&status["problems"]);
            let problem = problems.lines().find(|problem| problem.contains(words));
            let advice = problem.and_then(|problem| problem.rsplit_once("precedence: "));
            let (_, advice) = advice.expect("an advice");
            advice.split("; ").for_each(|command| _ = tool(&host.netns, command));
            wait_until(advice, TIMEOUT, || run(&spaces[1], &ping).status.success());
            status_where(agent, is_healthy);
            for command in advice.split("; ") {
                tool(&host.netns, &command.replace("rule add", "rule del"));
            }
            sh(
                &host.netns,
                "nft delete table ip qos && ip rule del pref 1000 && ip route flush table 99",
            );
            status_where(agent, is_healthy);
        }
        Ok(())
    });
}

/// Rules for a transparent proxy: TCP of pods is delivered to this host.
#[test]
fn transparent_proxy_that_intercepts_pods_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let host = &cluster.hosts[1];
        sh(
            &host.netns,
            "ip route add local default dev lo table 99 && ip rule add fwmark 7 lookup 99 pref 1000 && \
             iptables -t mangle -A PREROUTING -i gsm0 -p tcp -j TPROXY --on-port 9999 --tproxy-mark 7",
        );
        let words = "packets with mark 0x7 are delivered to this host, because ip rule 1000";
        let agent = &mut cluster.agents[1];
        wait_until(words, TIMEOUT, || has_problem(agent, words));
        let problems = texts(&agent.ask("/v1/status", TIMEOUT)?["problems"]);
        let problem =
            problems.lines().find(|problem| problem.contains(words)).expect("the problem");
        let (_, advice) = problem.rsplit_once("in iptables, ").expect("an advice");
        tool(&host.netns, advice);
        status_where(agent, is_healthy);
        Ok(())
    });
}

/// Packets of the two pods leave by any of several uplinks.
#[test]
fn several_next_hops_to_a_peer_are_no_problem() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[1];
        add_uplink(host);
        let peer = cluster.hosts[0].ip;
        sh(
            &host.netns,
            &format!(
                "sysctl -w net.ipv4.fib_multipath_hash_policy=1 && \
                 ip route add {peer} nexthop dev eth0 nexthop via 192.0.2.1 dev up1"
            ),
        );
        let _spaces = crate::cni::namespaces(&["b"])?;
        let agent = &mut cluster.agents[1];
        Runtime::new(agent).add("b");
        let begun = std::time::Instant::now();
        // Longer than a report takes.
        while begun.elapsed() < std::time::Duration::from_secs(8) {
            assert!(
                !has_problem(agent, "tunnel packets that carry packets of pods"),
                "{}",
                agent.ask("/v1/status", TIMEOUT)?
            );
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        Ok(())
    });
}

/// Rules that match single ports of packets between pods, with the report.
const PROXIES: [(&str, &str); 4] = [
    (
        "tcp dport 80 redirect to :3128",
        "chain ip proxy pre sends packets to port 80 between pods of different hosts",
    ),
    (
        "iifname gsm0 tcp dport { 80, 443 } redirect to :3128",
        "nft insert rule ip proxy pre ip daddr 10.42.0.0/16 accept",
    ),
    (
        "ip daddr != 127.0.0.0/8 udp dport 53 dnat to 192.0.2.53",
        "chain ip proxy pre sends packets to port 53",
    ),
    ("jump more", "chain ip proxy more sends packets to port 8080"),
];

/// Rules of Docker, kube-proxy, a local resolver and others, which do not match packets between pods.
const HARMLESS: [&str; 8] = [
    "fib daddr type local tcp dport 80 redirect to :3128",
    "fib daddr type local jump more",
    "ip daddr 10.43.0.0/16 tcp dport 80 dnat to 10.42.7.7",
    "ip daddr . meta l4proto . th dport vmap { 10.43.0.1 . tcp . 443 : jump more }",
    "iifname eth0 tcp dport 80 redirect to :3128",
    "ip daddr != 10.0.0.0/8 tcp dport 80 redirect to :3128",
    "ip saddr 172.17.0.0/16 tcp dport 80 redirect to :3128",
    "meta mark 0x1 tcp dport 80 redirect to :3128",
];

#[test]
fn redirected_ports_between_pods_are_warned_of_until_the_advice_is_followed() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        let table = "nft add table ip proxy && \
                     nft add chain ip proxy pre { type nat hook prerouting priority dstnat ; } && \
                     nft add chain ip proxy more && \
                     nft add rule ip proxy more tcp dport 8080 redirect to :3128";
        for (rule, words) in PROXIES {
            sh(host, table);
            sh(host, &format!("nft add rule ip proxy pre {rule}"));
            wait_for_notice(agent, &["chain ip proxy", words]);
            let status = agent.ask("/v1/status", TIMEOUT)?;
            assert_eq!(status["kernel"]["forwarding"]["state"], "ok", "{status:#}");
            assert_eq!(status["converged"], true);
            sh(host, "nft insert rule ip proxy pre ip daddr 10.42.0.0/16 accept");
            status_where(agent, is_healthy);
            sh(host, "nft delete table ip proxy");
        }
        for rule in HARMLESS {
            sh(host, table);
            sh(host, &format!("nft add rule ip proxy pre {rule}"));
            // In a chain after the one above. The agent reads all rules at once: when it reports this
            // one, it has read them all.
            sh(host, "nft add chain ip proxy last { type nat hook prerouting priority 0 ; }");
            sh(host, "nft add rule ip proxy last tcp dport 99 redirect to :1");
            let said = wait_for_notice(agent, &["chain ip proxy last sends packets to port 99"]);
            assert!(!said.contains("proxy pre") && !said.contains("proxy more"), "{rule}: {said}");
            sh(host, "nft delete table ip proxy");
            status_where(agent, is_healthy);
        }
        // As iptables writes them, with its own matches.
        let iptables = |rule: &str| run(host, &format!("iptables -t nat {rule}"));
        let proxy = "-p tcp --dport 80 -j REDIRECT --to-ports 3128";
        if !iptables(&format!("-A PREROUTING {proxy}")).status.success() {
            skipped(
                "redirected_ports_between_pods_are_warned_of_until_the_advice_is_followed",
                "it needs `iptables`",
            );
            return Ok(());
        }
        let advice = "iptables -t nat -I PREROUTING -d 10.42.0.0/16 -j ACCEPT";
        wait_for_notice(agent, &["sends packets to port 80", advice]);
        tool(host, advice);
        status_where(agent, is_healthy);
        iptables("-F PREROUTING");
        iptables("-N DOCKER");
        for rule in [
            "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
            "-A DOCKER -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
        ] {
            let done = iptables(rule);
            assert!(done.status.success(), "{done:?}");
        }
        sh(host, table);
        sh(host, "nft add rule ip proxy pre tcp dport 99 redirect to :1");
        let said = wait_for_notice(agent, &["chain ip proxy pre sends packets to port 99"]);
        assert!(!said.contains("DOCKER"), "{said}");
        Ok(())
    });
}

#[test]
fn destination_nat_of_incoming_pod_packets_is_warned_of_with_the_chain() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        sh(
            host,
            "nft add table ip nat && \
             nft add chain ip nat POSTROUTING { type nat hook postrouting priority srcnat ; } && \
             nft add rule ip nat POSTROUTING oifname gsm0 masquerade",
        );
        wait_for_notice(
            agent,
            &[
                "packets of pods of other hosts reach pods here under the address 10.42.",
                "chain ip nat POSTROUTING: iptables -t nat -I POSTROUTING -s 10.42.0.0/16",
            ],
        );
        sh(
            host,
            "nft insert rule ip nat POSTROUTING ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept",
        );
        status_where(agent, is_healthy);
        Ok(())
    });
}

#[test]
fn host_closed_to_its_pods_or_cut_off_from_them_is_warned_of_with_the_chain() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        let of_host = |status: &Value| {
            let detail = status["kernel"]["forwarding"]["detail"].as_str().unwrap_or_default();
            detail.contains("to this host") && detail.contains("from this host")
        };
        status_where(agent, of_host);
        sh(
            host,
            "nft add table inet wall && \
             nft add chain inet wall in { type filter hook input priority 0 ; policy drop ; } && \
             nft add rule inet wall in iifname { lo, eth0, gossamer.1 } accept",
        );
        wait_for_notice(
            agent,
            &[
                "pods do not reach their own host",
                "chain inet wall in (hook input) has the policy drop",
                "nft insert rule inet wall in ip saddr 10.42.0.0/16 accept",
            ],
        );
        let status = agent.ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["problems"], serde_json::json!([]), "{status:#}");
        assert_eq!(status["kernel"]["forwarding"]["state"], "ok", "{status:#}");
        // A host that admits pods to some of its ports, and answers echoes, is not closed.
        sh(host, "nft add rule inet wall in icmp type echo-request accept");
        status_where(agent, is_healthy);
        sh(host, "nft delete table inet wall");
        sh(
            host,
            "nft add table inet wall && \
             nft add chain inet wall out { type filter hook output priority 0 ; policy drop ; } && \
             nft add rule inet wall out oifname { lo, eth0, gossamer.1 } accept",
        );
        wait_for_notice(
            agent,
            &[
                "this host does not reach its own pods",
                "nft insert rule inet wall out ip daddr 10.42.0.0/16 accept",
            ],
        );
        sh(host, "nft insert rule inet wall out ip daddr 10.42.0.0/16 accept");
        status_where(agent, is_healthy);
        Ok(())
    });
}

#[test]
fn impossible_forwarding_test_is_warned_of_with_the_dropping_chain() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let host = &cluster.hosts[1].netns;
        let limit = "/proc/sys/user/max_net_namespaces";
        let before = std::fs::read_to_string(limit)?;
        cluster.agents[1].end(Signal::SIGTERM)?;
        if std::fs::write(limit, "0").is_err() {
            skipped(
                "impossible_forwarding_test_is_warned_of_with_the_dropping_chain",
                "it cannot be set here",
            );
            return Ok(());
        }
        sh(
            host,
            "nft add table ip filter && \
             nft add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }",
        );
        cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &[])?;
        let agent = &mut cluster.agents[1];
        wait_for_notice(
            agent,
            &[
                "it is unknown whether this host forwards packets of pods",
                "raise user.max_net_namespaces",
                "chain ip filter FORWARD (hook forward) has the policy drop, and no rule in it seems to \
                 accept packets of pods: iptables -I FORWARD -s 10.42.0.0/16 -j ACCEPT",
            ],
        );
        let status = agent.ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["kernel"]["forwarding"]["state"], "skipped", "{status:#}");
        std::fs::write(limit, before.trim())?;
        wait_until("not reported", TIMEOUT, || {
            has_problem(agent, "does not forward packets of pods")
        });
        Ok(())
    });
}

/// By chance, a probe of this one address of the peer's subnet would take minutes.
#[test]
fn specific_route_older_than_the_agent_is_reported_soon() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let subnet = Agent::subnet(&cluster.agents[1].ask("/v1/status", TIMEOUT)?)?;
        let prefix = subnet.to_string().replace("0/24", "");
        let _pods = cluster.pods()?;
        cluster.agents[0].end(Signal::SIGTERM)?;
        let host = &cluster.hosts[0];
        add_uplink(host);
        sh(
            &host.netns,
            &format!(
                "ip route add {prefix}77/32 dev up1 && ip route add blackhole {prefix}201 && \
                 ip route add local {prefix}31 dev lo"
            ),
        );
        cluster.agents[0] = Agent::start(program(), host, &[])?;
        let agent = &mut cluster.agents[0];
        let words = [
            format!("{prefix}77/32, by up1, because it is more specific"),
            format!("dropped by the blackhole route to {prefix}201/32"),
            format!("ip route del local {prefix}31/32 table local"),
        ];
        for words in &words {
            wait_until(words, TIMEOUT, || has_problem(agent, words));
        }
        Ok(())
    });
}

#[test]
fn overlay_device_is_removed_from_a_foreign_bridge_and_repetition_is_reported() {
    isolated(|lab| {
        let mut scene = TwoHosts::new(lab)?;
        let (host, agent) = scene.second();
        sh(host, "ip link add br-foreign type bridge && ip link set br-foreign up");
        let is_out = || !tool(host, "ip -o link show gossamer.1").contains("master");
        let plug = "ip link set gossamer.1 master br-foreign";
        sh(host, plug);
        wait_until("it stays in the bridge", TIMEOUT, is_out);
        let repairs =
            |status: &Value| status["kernel"]["repairs"]["device attribute"].as_u64() > Some(0);
        status_where(agent, repairs);
        wait_until("the repeated change is not reported", TIMEOUT, || {
            run(host, plug);
            wait_until("it stays in the bridge", TIMEOUT, is_out);
            has_problem(agent, "gossamer's entries in the kernel")
        });
        Ok(())
    });
}

#[test]
fn vxlan_device_that_does_not_share_the_port_is_reported() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        sh(&host.netns, "ip link add ovs0 type vxlan external dstport 8472 && ip link set ovs0 up");
        let mut agent = cluster.start_agent(&host, &[])?;
        assert_eq!(agent.wait()?.code(), Some(1));
        let log = agent.log();
        assert!(log.contains("UDP port 8472 is taken by the VXLAN device ovs0"), "{log}");
        assert!(log.contains("ip link del ovs0"), "{log}");
        Ok(())
    });
}

#[test]
fn vanished_underlay_address_is_reported_with_its_interface() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[1].netns;
        let agent = &mut cluster.agents[1];
        // As a DHCP client does whose lease has expired.
        sh(host, "ip addr flush dev eth0");
        let words = "address 10.99.0.11 has vanished from interface eth0 (there now: no IPv4 address): the \
                     agent waits until an interface with a default route has an IPv4 address";
        wait_until(words, TIMEOUT, || has_problem(agent, words));
        sh(host, "ip addr add 10.99.0.11/16 dev eth0 && ip route add default via 10.99.0.1");
        wait_until("still reported", TIMEOUT, || !has_problem(agent, "vanished"));
        Ok(())
    });
}

//! The reasons why a peer is silent are found and reported, on the host that has the cause.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use gossamer::lab::{Agent, Host, Lab};

use crate::{
    common::{
        Cluster, TIMEOUT, client, eventually, has_problem, isolated, program, resume, run, skipped,
        suspend, tool, wait_until,
    },
    ip_families,
};

/// A silent peer is detected after some seconds and then observed twice for 2.5 s; a busy machine takes
/// longer.
pub const REPORT_TIMEOUT: Duration = Duration::from_secs(60);

/// Starts a cluster of two hosts that reach each other.
pub fn start_pair(lab: &mut Lab) -> anyhow::Result<Cluster> {
    let mut cluster = Cluster::start(lab, 2)?;
    cluster.agents.iter_mut().for_each(wait_for_path);
    Ok(cluster)
}

/// Waits until the first path of the agent is `ok` and no problem is reported.
pub fn wait_for_path(agent: &mut Agent) {
    wait_until("the path is not ok", REPORT_TIMEOUT, || {
        let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
        status["paths"][0]["state"] == "ok" && status["problems"] == serde_json::json!([])
    });
}

pub fn run_all(host: &Host, commands: &[&str]) {
    commands.iter().for_each(|command| _ = tool(&host.netns, command));
}

/// Runs commands on a host while no agent sends probes. A flow that begins after the first rule for
/// connections, and before the rule that translates it, is never translated.
pub fn run_all_unprobed(cluster: &Cluster, number: usize, commands: &[&str]) -> anyhow::Result<()> {
    cluster.agents.iter().try_for_each(suspend)?;
    run_all(&cluster.hosts[number], commands);
    cluster.agents.iter().try_for_each(resume)
}

/// Waits until the agent reports all given texts, and the doctor reports a problem as well.
pub fn wait_for_problem(agent: &mut Agent, words: &[&str]) {
    let what = format!("never named: {words:?}");
    wait_until(&what, REPORT_TIMEOUT, || words.iter().all(|words| has_problem(agent, words)));
    let doctor = String::from_utf8(client(agent, &["doctor"]).stdout).expect("UTF-8");
    // The path may have recovered by then, although the cause still exists.
    let is_reported = ["paths", "underlay", "agent"]
        .iter()
        .any(|check| doctor.contains(&format!("PROBLEM   {check}")));
    assert!(is_reported, "{doctor}");
}

pub fn mac_of(host: &Host, interface: &str) -> String {
    let link = tool(&host.netns, &format!("ip -br link show dev {interface}"));
    link.split_whitespace().nth(2).expect("a MAC").to_owned()
}

/// Texts that the second host reports, commands that cause the fault there, and commands that remove it.
const RULE_FAULTS: [(&[&str], &[&str], &[&str]); 4] = [
    (
        &["the policy of chain inet hard out drops tunnel packets on this host, UDP 8472 to n1 \
             (10.99.0.10): nft insert rule inet hard out udp dport { 8472, 8473 } accept"],
        &[
            "nft add table inet hard",
            "nft add chain inet hard out { type filter hook output priority 0 ; policy drop ; }",
            "nft add rule inet hard out oifname lo accept",
            "nft add rule inet hard out udp dport 8473 accept",
            "nft add rule inet hard out udp sport 8473 accept",
        ],
        &["nft delete table inet hard"],
    ),
    (
        &["a rule of chain inet deep odd (handle ", "UDP 8472 to n1"],
        &[
            "nft add table inet deep",
            "nft add chain inet deep odd",
            "nft add rule inet deep odd meta mark 0 drop",
            "nft add chain inet deep late { type filter hook postrouting priority 300 ; }",
            "nft add rule inet deep late udp dport 8000-9000 udp dport != 8473 jump odd",
        ],
        &["nft delete table inet deep"],
    ),
    (
        &["a rule of chain netdev ddos in (handle ", "UDP 8472 from n1 (10.99.0.10)"],
        &[
            "nft add table netdev ddos",
            "nft add chain netdev ddos in { type filter hook ingress device eth0 priority -500 ; }",
            "nft add rule netdev ddos in udp dport { 53, 123, 8472 } drop",
        ],
        &["nft delete table netdev ddos"],
    ),
    (
        &[
            "leave this host under the address 10.99.0.99, not 10.99.0.11",
            "chain ip vip out changes it",
            "nft insert rule ip vip out udp dport 8472 accept",
        ],
        &[
            "ip addr add 10.99.0.99/32 dev eth0",
            "nft add table ip vip",
            "nft add chain ip vip out { type nat hook postrouting priority 100 ; } ; \
             add rule ip vip out oifname eth0 snat to 10.99.0.99",
        ],
        &["nft delete table ip vip", "ip addr del 10.99.0.99/32 dev eth0"],
    ),
];

#[test]
fn rule_that_drops_or_rewrites_tunnel_packets_is_reported_with_its_chain() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        if !run(&host.netns, "nft list tables").status.success() {
            skipped(
                "rule_that_drops_or_rewrites_tunnel_packets_is_reported_with_its_chain",
                "it needs `nft` (Debian: nftables)",
            );
            return Ok(());
        }
        for (words, fault_commands, repair_commands) in RULE_FAULTS {
            run_all_unprobed(&cluster, 1, fault_commands)?;
            wait_for_problem(&mut cluster.agents[1], words);
            if words[0].contains("under the address") {
                let on_peer = ["of n2 (10.99.0.11) arrive under the address 10.99.0.99"];
                wait_for_problem(&mut cluster.agents[0], &on_peer);
            }
            let tables = tool(&host.netns, "nft list tables");
            assert!(words[0].contains("inet") || !tables.is_empty(), "{tables}");
            run_all(host, repair_commands);
            cluster.agents.iter_mut().for_each(wait_for_path);
        }
        wait_until("a table of traces is left", TIMEOUT, || {
            !tool(&host.netns, "nft list tables").contains("trace")
        });
        Ok(())
    });
}

/// Programs that ban addresses create such rules.
#[test]
fn banned_peer_is_reported_on_both_hosts_and_the_advice_admits_it() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        if !run(&host.netns, "nft list tables").status.success() {
            skipped(
                "banned_peer_is_reported_on_both_hosts_and_the_advice_admits_it",
                "it needs `nft` (Debian: nftables)",
            );
            return Ok(());
        }
        run_all(
            host,
            &[
                "nft add table ip ban",
                "nft add chain ip ban in { type filter hook input priority -10 ; }",
                "nft add rule ip ban in ip saddr { 10.99.0.10, 203.0.113.7 } drop",
            ],
        );
        let advice = "nft insert rule ip ban in udp dport { 8472, 8473 } accept";
        wait_for_problem(&mut cluster.agents[1], &["a rule of chain ip ban in (handle ", advice]);
        let alone = "no other member answers this host: n2 (10.99.0.11:8473) down: its tunnel packets arrive";
        wait_until("the isolated host does not report it", REPORT_TIMEOUT, || {
            has_problem(&mut cluster.agents[0], alone)
        });
        let doctor = String::from_utf8(client(&cluster.agents[0], &["doctor"]).stdout)?;
        assert!(doctor.contains("PROBLEM   members        no other member answers"), "{doctor}");
        tool(&host.netns, advice);
        cluster.agents.iter_mut().for_each(wait_for_path);
        cluster.converge()
    });
}

#[test]
fn udp_rate_limit_is_reported_with_its_rule_on_the_host_that_has_it() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let [first, second] = &cluster.hosts[..] else { anyhow::bail!("two hosts") };
        if !run(&second.netns, "nft list tables").status.success() {
            skipped(
                "udp_rate_limit_is_reported_with_its_rule_on_the_host_that_has_it",
                "it needs `nft` (Debian: nftables)",
            );
            return Ok(());
        }
        run_all(
            second,
            &[
                "nft add table inet flood",
                "nft add chain inet flood in { type filter hook input priority -10 ; }",
                "nft add rule inet flood in udp dport 8472 limit rate over 2/second burst 2 packets drop",
            ],
        );
        let subnet = Agent::subnet(&cluster.agents[1].ask("/v1/status", TIMEOUT)?)?;
        let mut ping = Command::new("ping");
        ping.args(["-q", "-i", "0.01", &subnet.network().to_string()]).stdout(Stdio::null());
        let mut load = first.netns.spawn(&mut ping)?;
        let words = ["a rule of chain inet flood in (handle ", "UDP 8472 from n1 (10.99.0.10)"];
        wait_for_problem(&mut cluster.agents[1], &words);
        let socket = cluster.agents[1].socket().display().to_string();
        let doctor = format!("{} doctor --socket {socket}", program().display());
        let doctor = String::from_utf8(run(&second.netns, &doctor).stdout)?;
        let notice = "notice    firewall       chain inet flood in drops UDP 8472 above some rate";
        assert!(doctor.contains(notice), "{doctor}");
        load.kill()?;
        load.wait()?;
        tool(&second.netns, "nft delete table inet flood");
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

#[test]
fn iptables_legacy_rule_that_drops_tunnel_packets_is_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        let rule = "OUTPUT -p udp -m udp --dport 8472 -j DROP";
        if !has_iptables_legacy(host)
            || !run(&host.netns, &format!("iptables-legacy -A {rule}")).status.success()
        {
            skipped(
                "iptables_legacy_rule_that_drops_tunnel_packets_is_reported",
                "it needs `iptables-legacy` (Debian: iptables), and a kernel with it",
            );
            return Ok(());
        }
        let named = format!("iptables-legacy has `-A {rule}` in its table filter");
        let fix = "-I OUTPUT -p udp -m multiport --dports 8472,8473 -j ACCEPT";
        wait_for_problem(&mut cluster.agents[1], &["do not leave this host", &named, fix]);
        tool(&host.netns, &format!("iptables-legacy -D {rule}"));
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

fn has_iptables_legacy(host: &Host) -> bool {
    run(&host.netns, "sh -c iptables-legacy-save").status.success()
}

#[test]
fn tc_filter_that_drops_tunnel_packets_is_reported_with_its_direction() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        let filter =
            "protocol ip u32 match ip protocol 17 0xff match ip dport 8472 0xffff action drop";
        let add = |side: &str| format!("tc filter add dev eth0 {side} {filter}");
        let made = ["tc qdisc add dev eth0 clsact".to_owned(), add("egress")];
        if !made.iter().all(|command| run(&host.netns, command).status.success()) {
            skipped(
                "tc_filter_that_drops_tunnel_packets_is_reported_with_its_direction",
                "it needs `tc` (Debian: iproute2), and a kernel with filters",
            );
            return Ok(());
        }
        let words = ["do not leave this host", "eth0 has filters on its egress (u32)"];
        wait_for_problem(&mut cluster.agents[1], &words);
        run_all(host, &["tc filter del dev eth0 egress", &add("ingress")]);
        let words = ["arrive on eth0, and this host drops them", "filters on its ingress (u32)"];
        wait_for_problem(&mut cluster.agents[1], &words);
        tool(&host.netns, "tc qdisc del dev eth0 clsact");
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

#[test]
fn reverse_path_filter_is_reported_with_the_interface_of_arrival() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let [first, second] = &cluster.hosts[..] else { anyhow::bail!("two hosts") };
        let made = run(&second.netns, "ip link add eth1 link eth0 type macvlan mode bridge");
        if !made.status.success() {
            skipped(
                "reverse_path_filter_is_reported_with_the_interface_of_arrival",
                "the kernel has no macvlan",
            );
            return Ok(());
        }
        run_all(second, &["ip addr add 10.99.0.111/16 dev eth1", "ip link set eth1 up"]);
        for interface in ["all", "eth0", "eth1"] {
            second.netns.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "1")?;
        }
        let mac = mac_of(second, "eth1");
        let entry = format!("ip neigh replace 10.99.0.11 lladdr {mac} dev eth0 nud permanent");
        tool(&first.netns, &entry);
        let words = [
            "rp_filter of eth1 drops the packets of n1 (10.99.0.10), which arrive on eth1, not on eth0",
            "sysctl -w net.ipv4.conf.eth1.rp_filter=2",
        ];
        wait_for_problem(&mut cluster.agents[1], &words);
        second.netns.sysctl("net/ipv4/conf/eth1/rp_filter", "2")?;
        wait_until("the advice does not help", REPORT_TIMEOUT, || {
            !has_problem(&mut cluster.agents[1], "rp_filter of eth1")
        });
        Ok(())
    });
}

#[test]
fn duplicate_mac_address_of_two_hosts_is_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let mac = mac_of(&cluster.hosts[0], "eth0");
        tool(&cluster.hosts[1].netns, &format!("ip link set eth0 address {mac}"));
        tool(&cluster.hosts[0].netns, "ip neigh flush dev eth0");
        let words = format!("have the same MAC address {mac} on eth0");
        cluster.agents.iter_mut().for_each(|agent| wait_for_problem(agent, &[&words]));
        Ok(())
    });
}

#[test]
fn duplicate_ip_address_is_reported_on_its_host_and_on_peers() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let other = lab.host(3, "n3")?;
        tool(&other.netns, "ip addr add 10.99.0.11/16 dev eth0");
        let mac = mac_of(&other, "eth0");
        let entry = format!("ip neigh replace 10.99.0.11 lladdr {mac} dev eth0 nud permanent");
        tool(&cluster.hosts[0].netns, &entry);
        let claimed = format!("a card with MAC {mac} claims it on eth0");
        let words = ["another machine has the address 10.99.0.11 of this host, too", &claimed];
        wait_for_problem(&mut cluster.agents[1], &words);
        let words = ["several cards answer for the address of n2 (10.99.0.11) on eth0", &mac];
        wait_for_problem(&mut cluster.agents[0], &words);
        Ok(())
    });
}

#[test]
fn gateway_to_an_on_link_peer_and_unresolved_peer_are_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        run_all(
            host,
            &[
                "ip route add default via 10.99.0.200 dev eth0 table 200",
                "ip rule add from 10.99.0.11 lookup 200 pref 200",
            ],
        );
        let words = [
            "tunnel packets to n1 (10.99.0.10) leave this host by the gateway 10.99.0.200, though 10.99.0.10 \
             is in the network of eth0 itself",
            "table 200 routes them there",
        ];
        wait_for_problem(&mut cluster.agents[1], &words);
        tool(&host.netns, "ip rule del pref 200");
        cluster.agents.iter_mut().for_each(wait_for_path);
        lab.set_veth(1, false)?;
        tool(&cluster.hosts[1].netns, "ip neigh flush dev eth0");
        let words = ["no machine on eth0 answers ARP for 10.99.0.10, so packets to n1"];
        wait_for_problem(&mut cluster.agents[1], &words);
        lab.set_veth(1, true)?;
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

/// As with a home router that is plugged in with its factory address.
#[test]
fn gateway_whose_address_another_machine_has_is_named() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let (router, other) = (lab.host(3, "n3")?, lab.host(4, "n4")?);
        for machine in [&router, &other] {
            tool(&machine.netns, "ip addr add 10.99.0.77/16 dev eth0");
        }
        tool(&router.netns, "sysctl -qw net.ipv4.ip_forward=0");
        tool(&cluster.hosts[1].netns, "ip route add 10.99.0.10 via 10.99.0.77 dev eth0");
        tool(&other.netns, "sysctl -qw net.ipv4.ip_forward=0");
        let [first, second] = [mac_of(&router, "eth0"), mac_of(&other, "eth0")];
        let words =
            ["several machines answer ARP for 10.99.0.77, the gateway, on eth0: ", &first, &second];
        let agent = &mut cluster.agents[1];
        wait_until("the gateway is not named", REPORT_TIMEOUT, || {
            words.iter().all(|words| has_problem(agent, words))
        });
        Ok(())
    });
}

/// As with an external address of a service that is an address of a node (kube-proxy with IPVS).
#[test]
fn address_of_a_peer_on_this_host_is_reported_with_the_command_that_removes_it() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let host = &cluster.hosts[1];
        tool(&host.netns, "ip addr add 10.99.0.10/32 dev lo");
        let remove = "ip addr del 10.99.0.10/32 dev lo";
        let words = "the address 10.99.0.10/32 of lo makes 10.99.0.10 an address of this host";
        wait_for_problem(&mut cluster.agents[1], &[words, &format!("remove it ({remove})")]);
        tool(&host.netns, remove);
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

/// The kernel checks an IPv6 address again when its interface comes up.
#[test]
fn duplicate_ipv6_address_is_reported_by_a_running_agent() {
    isolated(|lab| {
        let Some(hosts) = ip_families::hosts(lab)? else { return Ok(()) };
        let mut agents = ip_families::cluster(&hosts, ["fd99::1", "fd99::2"], &[])?;
        agents.iter_mut().for_each(wait_for_path);
        let clone = lab.host(9, "clone")?;
        tool(&clone.netns, "ip addr add fd99::2/64 dev eth0 nodad");
        let host = &hosts[1];
        host.netns.sysctl("net/ipv6/conf/eth0/keep_addr_on_down", "1")?;
        // An address that was added without detection keeps that.
        run_all(host, &["ip addr del fd99::2/64 dev eth0", "ip addr add fd99::2/64 dev eth0"]);
        run_all(host, &["ip link set eth0 down", "ip link set eth0 up"]);
        let words = "another machine has the address of eth0 (fd99::2), too";
        wait_until("it is not reported", REPORT_TIMEOUT, || has_problem(&mut agents[1], words));
        assert!(!has_problem(&mut agents[0], "an address translator"));
        assert!(!has_problem(&mut agents[1], "is closed on the way"));
        tool(&clone.netns, "ip addr del fd99::2/64 dev eth0");
        run_all(host, &["ip addr del fd99::2/64 dev eth0", "ip addr add fd99::2/64 dev eth0"]);
        agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

#[test]
fn duplicate_ipv6_address_is_reported_by_an_agent_without_underlay() {
    isolated(|lab| {
        let (first, second) = (lab.host(1, "n1")?, lab.host(2, "n2")?);
        for host in [&first, &second] {
            tool(&host.netns, "ip addr flush dev eth0 scope global");
        }
        let added = run(&first.netns, "ip addr add 2001:db8::1/64 dev eth0 nodad");
        if !added.status.success() {
            skipped(
                "duplicate_ipv6_address_is_reported_by_an_agent_without_underlay",
                "the kernel has no IPv6",
            );
            return Ok(());
        }
        tool(&second.netns, "ip addr add 2001:db8::1/64 dev eth0");
        eventually(&second.netns, "ip -6 addr show dev eth0", |shown| shown.contains("dadfailed"));
        let agent = Agent::start(program(), &second, &["--init", "--iface", "eth0"])?;
        let words = "another machine has the address of eth0 (2001:db8::1), too";
        wait_until("it is not reported", REPORT_TIMEOUT, || agent.log().contains(words));
        Ok(())
    });
}

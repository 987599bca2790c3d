//! gossamer's nftables table: allowed senders at the VXLAN port, masquerade, and the repair of the table
//! after changes by other programs. Also the report of other rules and settings of a host that drop
//! packets.

use std::{
    fs,
    net::UdpSocket,
    time::{Duration, Instant},
};

use gossamer::{
    dataplane::{
        firewall::{Firewall, Guard},
        kernel::FirewallTable,
    },
    lab::{Agent, Host, Lab, NetNs, Pinger, Pod},
};

use crate::{
    common::{
        Cluster, TIMEOUT, echoes, eventually, has_problem, isolated, new_token, program, run,
        skipped, status_where, tool, wait_until,
    },
    forwarding::with_pods,
};

/// Shorter than the interval between two periodic comparisons.
const IMMEDIATE_TIMEOUT: Duration = Duration::from_secs(5);

/// Chains of other programs are read every ten seconds, and less often if that takes long.
const RULE_CHECK_TIMEOUT: Duration = Duration::from_secs(90);

/// Returns the table as `nft` shows it, without counters.
fn table(netns: &NetNs) -> String {
    let shown = run(netns, "nft -s list table inet gossamer.1");
    String::from_utf8(shown.stdout).expect("UTF-8")
}

/// Makes a non-member send VXLAN packets to the first host, as a member does.
fn send_forged_packets(non_member: &Host, victim: &Host, to: &Pod) {
    let link = tool(&victim.netns, "ip -br link show gossamer.1");
    let mac = link.split_whitespace().nth(2).expect("a MAC");
    let exists = run(&non_member.netns, "ip link show forged").status.success();
    if !exists {
        for command in [
            format!(
                "ip link add forged type vxlan id 1 dstport 8472 local {} dev eth0 nolearning",
                non_member.ip
            ),
            "ip addr add 10.42.254.0/32 dev forged".to_owned(),
            "ip link set forged up".to_owned(),
            format!("bridge fdb add {mac} dev forged dst {}", victim.ip),
            format!("ip neigh add 10.42.253.0 lladdr {mac} dev forged nud permanent"),
            format!("ip route add {} via 10.42.253.0 dev forged onlink", to.ip),
        ] {
            tool(&non_member.netns, &command);
        }
    }
    run(&non_member.netns, &format!("ping -c 3 -i 0.1 -W 1 {}", to.ip));
}

#[test]
fn tunnel_packets_of_non_members_are_dropped_and_those_of_a_new_member_pass() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let non_member = lab.host(3, "n3")?;
        cluster.restart(0, &["--guard", "false"])?;
        assert_eq!(table(&cluster.hosts[0].netns), "", "no table without a guard");
        wait_until("the forged packet does not pass an open host", TIMEOUT, || {
            send_forged_packets(&non_member, &cluster.hosts[0], &pods[0]);
            echoes(&pods[0].netns) >= 3
        });
        let open = echoes(&pods[0].netns);

        cluster.restart(0, &[])?;
        send_forged_packets(&non_member, &cluster.hosts[0], &pods[0]);
        assert_eq!(echoes(&pods[0].netns), open, "let in");
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["non_members_dropped"].as_u64() >= Some(3)
        });

        // Fragmented packets do not pass either.
        tool(&non_member.netns, "ip link set eth0 mtu 576");
        run(&non_member.netns, &format!("ping -c 3 -i 0.1 -W 1 -s 1200 {}", pods[0].ip));
        assert_eq!(echoes(&pods[0].netns), open, "let in as fragments");
        tool(&non_member.netns, "ip link set eth0 mtu 1500");

        // The same host as a member.
        tool(&non_member.netns, "ip link del forged");
        let mut joiner = cluster.start_agent(&non_member, &[])?;
        let subnet = Agent::subnet(&joiner.wait_converged(3, TIMEOUT)?)?;
        let pod = non_member.pod(subnet, 1450)?;
        cluster.agents[0].wait_converged(3, TIMEOUT)?;
        let mut pinger = Pinger::new(&pod.netns)?;
        // The first packet waits for the pods' own ARP.
        assert!(pinger.ping(pods[0].ip, Duration::from_secs(2))?.is_some());
        assert_eq!(pinger.stream(pods[0].ip, 50, Duration::from_millis(10))?, 50);

        joiner.leave()?;
        let gone = |table: &str| !table.contains(&non_member.ip.to_string());
        eventually(&cluster.hosts[0].netns, "nft list set inet gossamer.1 members4", gone);
        assert_eq!(table(&non_member.netns), "", "a leaver leaves nothing");
        Ok(())
    });
}

#[test]
fn guard_passes_foreign_vxlan_networks_at_the_same_port() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let host = &cluster.hosts[0];
        let non_member = lab.host(2, "n2")?;
        // Another VXLAN network that ends on this host, and one that this host only forwards.
        tool(&host.netns, "ip link add other type vxlan id 9 dstport 8472 dev eth0 nolearning");
        let behind = NetNs::new("behind")?;
        for (netns, command) in [
            (&host.netns, "ip addr add 10.60.0.1/24 dev other".to_owned()),
            (&host.netns, "ip link set other up".to_owned()),
            (
                &host.netns,
                format!("bridge fdb add 00:00:00:00:00:00 dev other dst {}", non_member.ip),
            ),
            (&host.netns, "ip link add inside type veth peer name eth0 netns behind".to_owned()),
            (&host.netns, "ip addr add 10.70.0.1/24 dev inside".to_owned()),
            (&host.netns, "ip link set inside up".to_owned()),
            (&behind, "ip addr add 10.70.0.2/24 dev eth0".to_owned()),
            (&behind, "ip link set eth0 up".to_owned()),
            (&behind, "ip route add default via 10.70.0.1".to_owned()),
            (
                &behind,
                "ip link add vx type vxlan id 1 dstport 8472 dev eth0 remote 10.99.0.11".to_owned(),
            ),
            (&behind, "ip addr add 10.61.0.1/24 dev vx".to_owned()),
            (&behind, "ip link set vx up".to_owned()),
            (&non_member.netns, format!("ip route add 10.70.0.0/24 via {}", host.ip)),
            (
                &non_member.netns,
                format!(
                    "ip link add other type vxlan id 9 dstport 8472 dev eth0 remote {}",
                    host.ip
                ),
            ),
            (&non_member.netns, "ip addr add 10.60.0.2/24 dev other".to_owned()),
            (&non_member.netns, "ip link set other up".to_owned()),
            (
                &non_member.netns,
                "ip link add vx type vxlan id 1 dstport 8472 dev eth0 remote 10.70.0.2".to_owned(),
            ),
            (&non_member.netns, "ip addr add 10.61.0.2/24 dev vx".to_owned()),
            (&non_member.netns, "ip link set vx up".to_owned()),
        ] {
            tool(netns, &command);
        }
        for to in ["10.60.0.1", "10.61.0.1"] {
            tool(&non_member.netns, &format!("ping -c 2 -i 0.2 -W 2 {to}"));
        }
        Ok(())
    });
}

#[test]
fn waiting_agent_uses_little_cpu_while_foreign_tables_change() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let token = new_token()?;
        let arguments = ["--join", "10.99.0.99", "--token", &token];
        let mut agent = Agent::start(program(), &host, &arguments)?;
        agent.ask("/v1/status", TIMEOUT)?;
        tool(&host.netns, "nft add table inet mine");
        let used = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", agent.pid())).expect("stat");
            let fields: Vec<&str> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
            fields[11].parse::<u64>().expect("ticks") + fields[12].parse::<u64>().expect("ticks")
        };
        let before = used();
        std::thread::sleep(Duration::from_secs(1));
        // In hundredths of a second.
        assert!(used() - before < 30, "{} ticks in a second", used() - before);
        Ok(())
    });
}

#[test]
fn firewall_table_is_repaired_after_every_change() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.restart(0, &["--ip-masq"])?;
        let host = &cluster.hosts[0].netns;
        let whole = table(host);
        assert!(
            whole.contains("@members4") && whole.contains("masquerade fully-random"),
            "{whole}"
        );
        let member = cluster.hosts[1].ip;
        let faults = [
            "nft flush ruleset".to_owned(),
            "nft delete table inet gossamer.1".to_owned(),
            "nft flush chain inet gossamer.1 guard".to_owned(),
            "nft insert rule inet gossamer.1 guard accept".to_owned(),
            "nft add chain inet gossamer.1 mine".to_owned(),
            format!("nft delete element inet gossamer.1 members4 {{ {member} }}"),
            "nft add element inet gossamer.1 members4 { 192.0.2.66 }".to_owned(),
        ];
        for fault in &faults {
            tool(host, fault);
            let begun = Instant::now();
            wait_until(fault, IMMEDIATE_TIMEOUT, || table(host) == whole);
            println!("{:>4} ms after {fault}", begun.elapsed().as_millis());
        }
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["repairs"]["firewall"].as_u64() == Some(faults.len() as u64)
        });
        Ok(())
    });
}

#[test]
fn restart_with_other_settings_replaces_the_firewall_table() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let plain = table(&cluster.hosts[0].netns);
        cluster.restart(0, &["--ip-masq"])?;
        cluster.restart(0, &[])?;
        assert_eq!(table(&cluster.hosts[0].netns), plain);
        cluster.restart(0, &["--guard", "false"])?;
        assert_eq!(table(&cluster.hosts[0].netns), "");
        Ok(())
    });
}

#[test]
fn lenient_guard_keeps_known_members_and_admits_no_others() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let wanted = |members: &[u8], lenient| Firewall {
            table: "gossamer.1".to_owned(),
            guard: Some(Guard {
                port: 8472,
                vni: 1,
                members: members.iter().map(|last| [192, 0, 2, *last].into()).collect(),
                lenient,
                interfaces: ["gossamer.1", "gsm0"].map(str::to_owned),
                networks: vec!["10.42.0.0/16".parse().expect("a network")],
                tunnels: ["gossamer.1".to_owned()].into(),
            }),
            port: 8472,
            masquerade: Vec::new(),
            leases: None,
        };
        let members = || {
            let set = tool(&host.netns, "nft list set inet gossamer.1 members4");
            let found: Vec<u8> =
                (1..9).filter(|last| set.contains(&format!("192.0.2.{last}"))).collect();
            found
        };
        let open = || host.netns.run(FirewallTable::open);
        open()?.write(&wanted(&[1, 2], false))?;
        // Another process, which does not know member 2 yet.
        let mut table = open()?;
        table.verify(&wanted(&[1], true))?;
        assert_eq!(members(), [1, 2]);
        for fault in [
            "nft delete table inet gossamer.1",
            "nft add element inet gossamer.1 members4 { 192.0.2.7 }",
        ] {
            tool(&host.netns, fault);
            assert!(table.verify(&wanted(&[1], true))?.repaired, "{fault}");
            assert_eq!(members(), [1, 2], "{fault}");
        }
        // The process learns of member 2, which then leaves.
        table.verify(&wanted(&[1, 2], true))?;
        table.verify(&wanted(&[1], true))?;
        assert_eq!(members(), [1]);
        Ok(())
    });
}

/// Starts counting packets that arrive from an address.
fn count_from(netns: &NetNs, source: &str) {
    tool(netns, "nft add table ip seen");
    tool(netns, "nft flush table ip seen");
    tool(netns, "nft add chain ip seen input { type filter hook input priority 0 ; }");
    tool(netns, &format!("nft add rule ip seen input ip saddr {source} counter"));
}

fn has_counted(netns: &NetNs) -> bool {
    !tool(netns, "nft list table ip seen").contains("packets 0 ")
}

#[test]
fn masquerade_connects_pods_to_the_outside_and_hosts_to_remote_pods() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let router = "10.99.0.1".parse()?;
        let mut pinger = Pinger::new(&pods[0].netns)?;
        assert_eq!(
            pinger.ping(router, Duration::from_millis(500))?,
            None,
            "the router knows no pods"
        );
        cluster.restart(0, &["--ip-masq"])?;
        wait_until("no answer from outside", TIMEOUT, || {
            pinger.ping(router, Duration::from_millis(500)).is_ok_and(|answer| answer.is_some())
        });
        let env = fs::read_to_string(cluster.hosts[0].dir.join("subnet.env"))?;
        assert!(env.contains("FLANNEL_IPMASQ=true"), "{env}");

        // No address is changed between pods. A host's own address is changed on the way to a remote pod.
        count_from(&pods[1].netns, &pods[0].ip.to_string());
        assert!(pinger.ping(pods[1].ip, Duration::from_secs(2))?.is_some());
        assert!(has_counted(&pods[1].netns), "the address of the pod was changed");
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        count_from(&pods[1].netns, &subnet.network().to_string());
        let host = &cluster.hosts[0];
        let said = tool(&host.netns, &format!("ping -c 1 -W 2 -I {} {}", host.ip, pods[1].ip));
        assert!(said.contains(" 1 received") && has_counted(&pods[1].netns), "{said}");

        // Packets of a pod to a member's tunnel port must not have a member's source address.
        let [here, there] = [0, 1].map(|n| &cluster.hosts[n]);
        for command in [
            "nft add table ip probe",
            "nft add chain ip probe in { type filter hook prerouting priority -400 ; }",
            &format!("nft add rule ip probe in ip saddr {} udp sport 5555 counter", here.ip),
            &format!("nft add rule ip probe in ip saddr {} udp sport 5555 counter", pods[0].ip),
        ] {
            tool(&there.netns, command);
        }
        pods[0].netns.run(|| {
            let socket = UdpSocket::bind((pods[0].ip, 5555))?;
            (0..5).try_for_each(|_| socket.send_to(&[8; 60], (there.ip, 8472)).map(drop))
        })?;
        let counted = eventually(&there.netns, "nft list chain ip probe in", |text| {
            text.contains("packets 5 ")
        });
        assert!(counted.contains("packets 0 "), "some pass for a member's: {counted}");
        Ok(())
    });
}

#[test]
fn chains_and_sysctls_that_block_pods_are_reported_with_a_remedy() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = &cluster.hosts[0].netns;
        for command in [
            "sysctl -w net.ipv4.ip_forward=0",
            // Docker 28 adds such a rule for each container on a user-defined bridge.
            "nft add table ip raw",
            "nft add chain ip raw PREROUTING { type filter hook prerouting priority -300 ; }",
            "nft add rule ip raw PREROUTING iifname != docker0 ip daddr 10.42.1.5 counter drop",
        ] {
            tool(host, command);
        }
        let agent = &mut cluster.agents[0];
        for said in [
            "sysctl -w net.ipv4.ip_forward=1",
            "chain ip raw PREROUTING drops what other hosts send to containers",
            "trusted_host_interfaces=gossamer.1",
        ] {
            wait_until(said, RULE_CHECK_TIMEOUT, || has_problem(agent, said));
        }
        let host = &cluster.hosts[0].netns;
        let forwarding = "cat /proc/sys/net/ipv4/ip_forward";
        assert_eq!(tool(host, forwarding), "0\n", "named, and not changed");
        tool(host, "sysctl -w net.ipv4.ip_forward=1");
        tool(host, "nft flush chain ip raw PREROUTING");
        // Rules about addresses outside the overlay, and about sources, are not Docker's.
        tool(host, "nft add rule ip raw PREROUTING ip daddr 172.17.0.2 drop");
        tool(host, "nft add rule ip raw PREROUTING iifname eth0 ip saddr 10.42.0.0/15 drop");
        wait_until("still reported", RULE_CHECK_TIMEOUT, || {
            ["ip_forward", "PREROUTING"].iter().all(|word| !has_problem(agent, word))
        });
        Ok(())
    });
}

#[test]
fn set_sysctls_option_sets_and_restores_sysctls() {
    isolated(|lab: &mut Lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = &cluster.hosts[0].netns;
        for name in ["ip_forward=0", "conf.all.rp_filter=1"] {
            tool(host, &format!("sysctl -w net.ipv4.{name}"));
        }
        cluster.restart(0, &["--set-sysctls", "--mode", "direct"])?;
        let host = &cluster.hosts[0].netns;
        let right = |name: &str, value: &str| {
            eventually(host, &format!("cat /proc/sys/net/ipv4/{name}"), |now| now.trim() == value);
        };
        right("ip_forward", "1");
        right("conf/gossamer.1/rp_filter", "2");
        right("conf/eth0/rp_filter", "2");
        tool(host, "sysctl -w net.ipv4.ip_forward=0");
        right("ip_forward", "1");
        Ok(())
    });
}

/// The largest table that the test fills; larger ones take too long.
const MAX_TABLE_ENTRIES: usize = 300_000;

#[test]
fn full_connection_tracking_table_is_reported_until_it_has_room() {
    isolated(|lab| {
        let name = "firewall::full_connection_tracking_table_is_reported_until_it_has_room";
        let most = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max");
        let most: usize = most.ok().and_then(|most| most.trim().parse().ok()).unwrap_or(0);
        let mut cluster = Cluster::start(lab, 2)?;
        if !run(&cluster.hosts[0].netns, "conntrack -C").status.success()
            || !(1..=MAX_TABLE_ENTRIES).contains(&most)
        {
            skipped(name, "it needs `conntrack`, and a table of at most 300,000 entries");
            return Ok(());
        }
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let Cluster { hosts, agents, .. } = &mut cluster;
        let (host, agent) = (&hosts[0].netns, &mut agents[0]);
        // Connections are tracked only if a rule uses their states, as any stateful firewall does.
        for command in [
            "nft add table ip wall",
            "nft add chain ip wall f { type filter hook forward priority 0 ; }",
            "nft add rule ip wall f ct state established accept",
        ] {
            tool(host, command);
        }
        let entry = |number: usize| {
            let (address, port) = (number / 60_000 + 1, number % 60_000 + 1);
            format!(
                "-I -t 600 -u SEEN_REPLY,ASSURED -s 192.0.2.{address} -d 192.0.2.100 -p udp \
                 --sport {port} --dport 9\n"
            )
        };
        let file = hosts[0].dir.join("entries");
        fs::write(&file, (0..most).map(entry).collect::<String>())?;
        // The command fails at the first entry for which there is no room.
        run(host, &format!("conntrack -R {}", file.display()));
        let words = format!("table of connections is full ({most} of {most})");
        wait_until("not reported", 2 * TIMEOUT, || has_problem(agent, &words));
        let blamed = ["bonds", "no rule was found"];
        let status = agent.ask("/v1/status", TIMEOUT)?;
        assert!(!blamed.iter().any(|word| status.to_string().contains(word)), "{status:#}");
        tool(host, "conntrack -F");
        wait_until("still reported", 2 * TIMEOUT, || !has_problem(agent, &words));
        agent.wait_converged(2, TIMEOUT)?;
        Ok(())
    });
}

//! Our table of nftables: who may send to the VXLAN port, masquerade, and what becomes of the table when
//! others lay hands on it. And what else of a host keeps packets from passing.

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
        Cluster, PATIENCE, echoes, eventually, gossamer_token, has_problem, isolated, program, run,
        skipped, status_where, tool, wait_until,
    },
    forwarding::with_pods,
};

/// Shorter than the pause between two slow comparisons.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Chains of others are read every ten seconds, and less often where that takes long.
const RARELY: Duration = Duration::from_secs(90);

/// The table as `nft` shows it, without its counts.
fn table(netns: &NetNs) -> String {
    let shown = run(netns, "nft -s list table inet gossamer.1");
    String::from_utf8(shown.stdout).expect("UTF-8")
}

/// A host that is no member speaks VXLAN to the first host, as if it were one.
fn forge(stranger: &Host, victim: &Host, to: &Pod) {
    let link = tool(&victim.netns, "ip -br link show gossamer.1");
    let mac = link.split_whitespace().nth(2).expect("a MAC");
    let exists = run(&stranger.netns, "ip link show forged").status.success();
    if !exists {
        for command in [
            format!(
                "ip link add forged type vxlan id 1 dstport 8472 local {} dev eth0 nolearning",
                stranger.ip
            ),
            "ip addr add 10.42.254.0/32 dev forged".to_owned(),
            "ip link set forged up".to_owned(),
            format!("bridge fdb add {mac} dev forged dst {}", victim.ip),
            format!("ip neigh add 10.42.253.0 lladdr {mac} dev forged nud permanent"),
            format!("ip route add {} via 10.42.253.0 dev forged onlink", to.ip),
        ] {
            tool(&stranger.netns, &command);
        }
    }
    run(&stranger.netns, &format!("ping -c 3 -i 0.1 -W 1 {}", to.ip));
}

#[test]
fn tunnel_packets_of_strangers_are_dropped_and_those_of_a_new_member_pass_at_once() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let stranger = lab.host(3, "n3")?;
        cluster.restart(0, &["--guard", "false"])?;
        assert_eq!(table(&cluster.hosts[0].netns), "", "no table without a guard");
        wait_until("the forgery is none", PATIENCE, || {
            forge(&stranger, &cluster.hosts[0], &pods[0]);
            echoes(&pods[0].netns) >= 3
        });
        let open = echoes(&pods[0].netns);

        cluster.restart(0, &[])?;
        forge(&stranger, &cluster.hosts[0], &pods[0]);
        assert_eq!(echoes(&pods[0].netns), open, "let in");
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["strangers_dropped"].as_u64() >= Some(3)
        });

        // Nor do they pass piecemeal.
        tool(&stranger.netns, "ip link set eth0 mtu 576");
        run(&stranger.netns, &format!("ping -c 3 -i 0.1 -W 1 -s 1200 {}", pods[0].ip));
        assert_eq!(echoes(&pods[0].netns), open, "let in as fragments");
        tool(&stranger.netns, "ip link set eth0 mtu 1500");

        // The same host as a member.
        tool(&stranger.netns, "ip link del forged");
        let mut joiner = cluster.start_agent(&stranger, &[])?;
        let subnet = Agent::subnet(&joiner.wait_converged(3, PATIENCE)?)?;
        let pod = stranger.pod(subnet, 1450)?;
        cluster.agents[0].wait_converged(3, PATIENCE)?;
        let mut pinger = Pinger::new(&pod.netns)?;
        // The first packet waits for the pods' own ARP.
        assert!(pinger.ping(pods[0].ip, Duration::from_secs(2))?.is_some());
        assert_eq!(pinger.stream(pods[0].ip, 50, Duration::from_millis(10))?, 50);

        joiner.leave()?;
        let gone = |table: &str| !table.contains(&stranger.ip.to_string());
        eventually(&cluster.hosts[0].netns, "nft list set inet gossamer.1 members4", gone);
        assert_eq!(table(&stranger.netns), "", "a leaver leaves nothing");
        Ok(())
    });
}

#[test]
fn networks_of_others_at_the_same_port_are_none_of_the_guards_business() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let host = &cluster.hosts[0];
        let stranger = lab.host(2, "n2")?;
        // Another network for this host itself, and one that it only forwards, to what is behind it.
        tool(&host.netns, "ip link add other type vxlan id 9 dstport 8472 dev eth0 nolearning");
        let behind = NetNs::new("behind")?;
        for (netns, command) in [
            (&host.netns, "ip addr add 10.60.0.1/24 dev other".to_owned()),
            (&host.netns, "ip link set other up".to_owned()),
            (
                &host.netns,
                format!("bridge fdb add 00:00:00:00:00:00 dev other dst {}", stranger.ip),
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
            (&stranger.netns, format!("ip route add 10.70.0.0/24 via {}", host.ip)),
            (
                &stranger.netns,
                format!(
                    "ip link add other type vxlan id 9 dstport 8472 dev eth0 remote {}",
                    host.ip
                ),
            ),
            (&stranger.netns, "ip addr add 10.60.0.2/24 dev other".to_owned()),
            (&stranger.netns, "ip link set other up".to_owned()),
            (
                &stranger.netns,
                "ip link add vx type vxlan id 1 dstport 8472 dev eth0 remote 10.70.0.2".to_owned(),
            ),
            (&stranger.netns, "ip addr add 10.61.0.2/24 dev vx".to_owned()),
            (&stranger.netns, "ip link set vx up".to_owned()),
        ] {
            tool(netns, &command);
        }
        for to in ["10.60.0.1", "10.61.0.1"] {
            tool(&stranger.netns, &format!("ping -c 2 -i 0.2 -W 2 {to}"));
        }
        Ok(())
    });
}

#[test]
fn an_agent_that_waits_for_its_cluster_costs_nothing_while_others_change_their_tables() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let token = gossamer_token()?;
        let arguments = ["--join", "10.99.0.99", "--token", &token];
        let mut agent = Agent::start(program(), &host, &arguments)?;
        agent.ask("/v1/status", PATIENCE)?;
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
fn the_table_is_put_right_whatever_is_done_to_it() {
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
        let deeds = [
            "nft flush ruleset".to_owned(),
            "nft delete table inet gossamer.1".to_owned(),
            "nft flush chain inet gossamer.1 guard".to_owned(),
            "nft insert rule inet gossamer.1 guard accept".to_owned(),
            "nft add chain inet gossamer.1 mine".to_owned(),
            format!("nft delete element inet gossamer.1 members4 {{ {member} }}"),
            "nft add element inet gossamer.1 members4 { 192.0.2.66 }".to_owned(),
        ];
        for deed in &deeds {
            tool(host, deed);
            let begun = Instant::now();
            wait_until(deed, AT_ONCE, || table(host) == whole);
            println!("{:>4} ms after {deed}", begun.elapsed().as_millis());
        }
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["repairs"]["firewall"].as_u64() == Some(deeds.len() as u64)
        });
        Ok(())
    });
}

#[test]
fn a_restart_with_other_settings_leaves_nothing_of_the_old_table() {
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
fn with_partial_knowledge_those_let_in_before_stay_and_nobody_else_comes_in() {
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
        // Another process, which has not heard of 2.
        let mut table = open()?;
        table.verify(&wanted(&[1], true))?;
        assert_eq!(members(), [1, 2]);
        for deed in [
            "nft delete table inet gossamer.1",
            "nft add element inet gossamer.1 members4 { 192.0.2.7 }",
        ] {
            tool(&host.netns, deed);
            assert!(table.verify(&wanted(&[1], true))?.repaired, "{deed}");
            assert_eq!(members(), [1, 2], "{deed}");
        }
        // It is heard of, and leaves.
        table.verify(&wanted(&[1, 2], true))?;
        table.verify(&wanted(&[1], true))?;
        assert_eq!(members(), [1]);
        Ok(())
    });
}

/// Counts packets from an address that come in.
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
fn pods_reach_the_outside_and_hosts_reach_remote_pods_by_masquerade() {
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
        wait_until("no answer from outside", PATIENCE, || {
            pinger.ping(router, Duration::from_millis(500)).is_ok_and(|answer| answer.is_some())
        });
        let env = fs::read_to_string(cluster.hosts[0].dir.join("subnet.env"))?;
        assert!(env.contains("FLANNEL_IPMASQ=true"), "{env}");

        // Between pods no address is changed, and a host's own is, on its way to a remote pod.
        count_from(&pods[1].netns, &pods[0].ip.to_string());
        assert!(pinger.ping(pods[1].ip, Duration::from_secs(2))?.is_some());
        assert!(has_counted(&pods[1].netns), "the address of the pod was changed");
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", PATIENCE)?)?;
        count_from(&pods[1].netns, &subnet.network().to_string());
        let host = &cluster.hosts[0];
        let said = tool(&host.netns, &format!("ping -c 1 -W 2 -I {} {}", host.ip, pods[1].ip));
        assert!(said.contains(" 1 received") && has_counted(&pods[1].netns), "{said}");

        // What a pod sends to a member's tunnel port must not come from a member's address.
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
fn chains_and_sysctls_that_keep_pods_apart_are_named_with_what_helps() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = &cluster.hosts[0].netns;
        for command in [
            "sysctl -w net.ipv4.ip_forward=0",
            // What Docker 28 does for each container on a bridge of its own.
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
            wait_until(said, RARELY, || has_problem(agent, said));
        }
        let host = &cluster.hosts[0].netns;
        let forwarding = "cat /proc/sys/net/ipv4/ip_forward";
        assert_eq!(tool(host, forwarding), "0\n", "named, and not changed");
        tool(host, "sysctl -w net.ipv4.ip_forward=1");
        tool(host, "nft flush chain ip raw PREROUTING");
        // One that drops what is of nobody here is none of our business.
        tool(host, "nft add rule ip raw PREROUTING ip daddr 172.17.0.2 drop");
        wait_until("still named", RARELY, || {
            ["ip_forward", "PREROUTING"].iter().all(|word| !has_problem(agent, word))
        });
        Ok(())
    });
}

#[test]
fn sysctls_are_set_where_the_operator_wants_that() {
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

/// Entries of the table that are filled in by the test itself; with more it takes too long.
const MOST_ENTRIES: usize = 300_000;

#[test]
fn full_table_of_connections_is_named_until_it_has_room() {
    isolated(|lab| {
        let name = "firewall::full_table_of_connections_is_named_until_it_has_room";
        let most = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max");
        let most: usize = most.ok().and_then(|most| most.trim().parse().ok()).unwrap_or(0);
        let mut cluster = Cluster::start(lab, 2)?;
        if !run(&cluster.hosts[0].netns, "conntrack -C").status.success()
            || !(1..=MOST_ENTRIES).contains(&most)
        {
            skipped(name, "it needs `conntrack`, and a table of at most 300,000 entries");
            return Ok(());
        }
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let Cluster { hosts, agents, .. } = &mut cluster;
        let (host, agent) = (&hosts[0].netns, &mut agents[0]);
        // As any firewall with states has them: without one nothing is tracked.
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
        // It ends with the entry for which there is no room.
        run(host, &format!("conntrack -R {}", file.display()));
        let words = format!("table of connections is full ({most} of {most})");
        wait_until("not named", 2 * PATIENCE, || has_problem(agent, &words));
        let blamed = ["bonds", "no rule was found"];
        let status = agent.ask("/v1/status", PATIENCE)?;
        assert!(!blamed.iter().any(|word| status.to_string().contains(word)), "{status:#}");
        tool(host, "conntrack -F");
        wait_until("still named", 2 * PATIENCE, || !has_problem(agent, &words));
        agent.wait_converged(2, PATIENCE)?;
        Ok(())
    });
}

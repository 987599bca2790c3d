//! The agent monitors whether packets arrive, and distinguishes a dead agent from a dead host.

use std::{
    net::Ipv4Addr,
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    common::{
        Cluster, TIMEOUT, client, eventually, has_notice, has_problem, isolated, run, skipped,
        tool, wait_until,
    },
    remote_pods::with_pods,
};
use gossamer::lab::{Agent, NetNs, Pinger};
use nix::sys::signal::Signal;

/// Time until a lost probe changes the state: probes are sent every 15 seconds while a path is healthy.
const DETECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// One flow is probed every 15 seconds while a path is healthy, and half of the flows are lost.
const FLOW_LOSS_TIMEOUT: Duration = Duration::from_secs(90);
/// The default of `withdraw_after`.
const WITHDRAW_AFTER: Duration = Duration::from_secs(10);

fn path(agent: &mut Agent, name: &str) -> String {
    let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
    let paths = status["paths"].as_array().expect("paths").clone();
    let path = paths.iter().find(|path| path["name"] == name);
    path.map(|path| path["state"].to_string()).unwrap_or_default()
}

#[test]
fn member_with_a_dead_agent_and_live_kernel_loses_no_packet() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let subnet = Agent::subnet(&cluster.agents[1].wait_converged(3, TIMEOUT)?)?;
        let pod = cluster.hosts[1].pod(subnet, 1450)?;
        cluster.agents[1].end(Signal::SIGKILL)?;
        // Longer than gossip takes to report the member down, and than `withdraw_after`.
        let mut pinger = Pinger::new(&cluster.hosts[0].netns)?;
        let answered = pinger.stream(pod.ip, 2_500, Duration::from_millis(10))?;
        assert_eq!(answered, 2_500, "packets were lost");
        let members = client(&cluster.agents[0], &["members"]);
        let members = String::from_utf8(members.stdout)?;
        let line = members.lines().find(|line| line.starts_with("n2 ")).expect("n2");
        assert!(line.contains("down") && line.contains(" ms"), "{members}");
        Ok(())
    });
}

#[test]
fn host_without_power_is_withdrawn_and_restored_when_back() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let subnet = Agent::subnet(&cluster.agents[1].wait_converged(3, TIMEOUT)?)?;
        let pod = cluster.hosts[1].pod(subnet, 1450)?;
        let host = &cluster.hosts[0].netns;
        let show = format!("ip route show proto 73 {subnet}");
        // A peer that has never answered is not withdrawn.
        wait_until("the path is not known", TIMEOUT, || {
            path(&mut cluster.agents[0], "n2").contains("ok")
        });
        lab.set_veth(2, false)?;
        let begun = Instant::now();
        eventually(host, &show, |route| route.starts_with("unreachable"));
        println!("withdrawn after {:?}", begun.elapsed());
        assert!(path(&mut cluster.agents[0], "n2").contains("withdrawn"));
        let refused = run(host, &format!("ping -c 1 -W 5 {}", pod.ip));
        let said = String::from_utf8_lossy(&[refused.stdout, refused.stderr].concat()).into_owned();
        assert!(said.contains("No route to host") || said.contains("Unreachable"), "{said}");
        lab.set_veth(2, true)?;
        eventually(host, &show, |route| route.contains("via"));
        // The peer's kernel may wait a second for another ARP answer on the underlay.
        for netns in [host, &cluster.hosts[1].netns] {
            eventually(netns, "ip route show proto 73", |routes| {
                // The third route rejects unused addresses of this node's subnet.
                routes.matches(" via ").count() == 2 && routes.lines().count() == 3
            });
        }
        let ping = format!("ping -c 1 -W 1 {}", pod.ip);
        wait_until("the pod is not reached", DETECTION_TIMEOUT, || {
            run(host, &ping).status.success()
        });
        Ok(())
    });
}

#[test]
fn blocked_tunnel_is_reported_with_both_possible_causes() {
    isolated(|lab| {
        if Command::new("nft").arg("--version").output().is_err() {
            eprintln!("SKIPPED: blocking a port needs `nft` (Debian: nftables)");
            return Ok(());
        }
        let mut cluster = Cluster::start(lab, 2)?;
        let [here, there] = [0, 1].map(|n: usize| cluster.hosts[n].ip);
        wait_until("the path is not known", TIMEOUT, || {
            path(&mut cluster.agents[0], "n2").contains("ok")
                && path(&mut cluster.agents[1], "n1").contains("ok")
        });
        let host = &cluster.hosts[1].netns;
        tool(host, "nft add table inet block");
        tool(host, "nft add chain inet block input { type filter hook input priority 0 ; }");
        tool(host, "nft add rule inet block input udp dport 8472 drop");
        let between = |a: Ipv4Addr, b: Ipv4Addr| {
            let way = [format!("way from {a} to {b}"), format!("way between {a} and {b}")];
            move |agent: &mut Agent| {
                let is_reported = way.iter().any(|way| has_notice(agent, way));
                is_reported && has_notice(agent, "drops ICMP and UDP 8473")
            }
        };
        let is_reported = between(here, there);
        wait_until("it is not reported", DETECTION_TIMEOUT, || is_reported(&mut cluster.agents[0]));
        // The other host does not receive the answers to its own probes, and has the rule.
        let of_rule = "a rule of chain inet block input (handle ";
        wait_until("it is not reported", 2 * DETECTION_TIMEOUT, || {
            has_problem(&mut cluster.agents[1], of_rule)
        });
        assert!(!has_problem(&mut cluster.agents[0], of_rule), "the rule is on the other host");
        tool(host, "nft delete table inet block");
        wait_until("it is still reported", TIMEOUT, || {
            !has_notice(&mut cluster.agents[0], "8472")
                && !has_problem(&mut cluster.agents[1], "8472")
        });
        Ok(())
    });
}

/// Rules of a host that accepts only the documented ports.
const DOCUMENTED_RULES: [&str; 3] =
    ["ct state established,related accept", "iif lo accept", "udp dport { 8472, 8473 } accept"];

fn add_filter_chain(host: &NetNs, hook: &str, policy: &str, rules: &[&str]) {
    tool(host, &format!("nft add table inet wall_{hook}"));
    let chain = format!("type filter hook {hook} priority 0 ; policy {policy} ;");
    tool(host, &format!("nft add chain inet wall_{hook} wall {{ {chain} }}"));
    rules.iter().for_each(|rule| {
        tool(host, &format!("nft add rule inet wall_{hook} wall {rule}"));
    });
}

fn is_down(agent: &Agent, name: &str) -> bool {
    let members = String::from_utf8(client(agent, &["members"]).stdout).expect("UTF-8");
    members.lines().any(|line| line.starts_with(name) && line.contains("down"))
}

/// Checks that a pod answers for twice as long as `withdraw_after`.
fn assert_stays_reachable(from: &NetNs, pod: Ipv4Addr) -> anyhow::Result<()> {
    let mut pinger = Pinger::new(from)?;
    let begun = Instant::now();
    while begun.elapsed() < 2 * WITHDRAW_AFTER {
        let answer = pinger.ping(pod, Duration::from_secs(2))?;
        assert!(answer.is_some(), "cut off after {:?}", begun.elapsed());
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[test]
fn pods_of_a_host_with_only_documented_ports_stay_reachable_when_its_agent_ends() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        wait_until("the path is not known", TIMEOUT, || {
            path(&mut cluster.agents[0], "n2").contains("ok")
        });
        add_filter_chain(&cluster.hosts[1].netns, "input", "drop", &DOCUMENTED_RULES);
        // The echo is lost, but the datagram to the agent proves the path.
        let mut seen = Instant::now();
        while seen.elapsed() < DETECTION_TIMEOUT {
            assert!(
                path(&mut cluster.agents[0], "n2").contains("ok"),
                "{}",
                cluster.agents[0].log()
            );
            assert!(!has_problem(&mut cluster.agents[0], "8472"));
            std::thread::sleep(Duration::from_millis(200));
        }
        cluster.agents[1].end(Signal::SIGTERM)?;
        assert_stays_reachable(&pods[0].netns, pods[1].ip)?;
        assert!(is_down(&cluster.agents[0], "n2"));
        // An unused path is not withdrawn either.
        seen = Instant::now();
        while seen.elapsed() < 2 * WITHDRAW_AFTER {
            let route = tool(&cluster.hosts[0].netns, "ip route show proto 73");
            assert!(route.contains("via"), "{route}");
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    });
}

#[test]
fn pods_with_incoming_packets_stay_reachable_when_echoes_are_filtered() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        wait_until("the path is not known", TIMEOUT, || {
            path(&mut cluster.agents[0], "n2").contains("ok")
        });
        cluster.agents[1].end(Signal::SIGKILL)?;
        wait_until("it is not down", TIMEOUT, || is_down(&cluster.agents[0], "n2"));
        // Neither echoes nor ICMP errors arrive: only packets of its pods prove that the host is alive.
        let only_pods = ["iifname gossamer.1 drop"];
        add_filter_chain(&cluster.hosts[1].netns, "input", "accept", &only_pods);
        assert_stays_reachable(&pods[0].netns, pods[1].ip)?;
        assert!(path(&mut cluster.agents[0], "n2").contains("one-way"));
        // Without power, these packets stop as well.
        lab.set_veth(2, false)?;
        eventually(&cluster.hosts[0].netns, "ip route show proto 73", |route| {
            route.contains("unreachable")
        });
        Ok(())
    });
}

#[test]
fn pods_of_a_host_without_icmp_stay_reachable_when_its_agent_ends() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = &cluster.hosts[1].netns;
        let rules = ["icmp type echo-reply counter drop", "meta l4proto icmp drop"];
        add_filter_chain(host, "output", "accept", &rules);
        wait_until("no echoes are lost", DETECTION_TIMEOUT, || {
            let rules = tool(host, "nft list table inet wall_output");
            let count = rules.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
            count.is_some_and(|count| count.parse::<u32>().is_ok_and(|count| count >= 3))
        });
        // The agent stays up for longer than the last packets of a host without power would count.
        std::thread::sleep(Duration::from_secs(7));
        assert!(path(&mut cluster.agents[0], "n2").contains("ok"));
        cluster.agents[1].end(Signal::SIGKILL)?;
        assert_stays_reachable(&pods[0].netns, pods[1].ip)
    });
}

#[test]
fn path_mtu_below_the_underlay_mtu_is_reported() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        // A bridge silently drops packets that are too large for its port.
        let host = lab.host(2, "n2")?;
        let narrow = Command::new("ip").args(["link", "set", "port2", "mtu", "1400"]).status()?;
        assert!(narrow.success());
        let _agent = cluster.start_agent(&host, &[])?;
        wait_until("it is not reported", TIMEOUT, || {
            // Between what fits, with 4 bytes for a VLAN, and the precision of the search.
            (1_347..=1_354).any(|fits| {
                let words = format!("those of {fits} arrive");
                has_problem(&mut cluster.agents[0], &words)
                    && has_problem(
                        &mut cluster.agents[0],
                        &format!("set mtu = {fits} on all nodes"),
                    )
            })
        });
        assert!(path(&mut cluster.agents[0], "n2").contains("mtu-too-large"));
        let words = "A filter of long UDP packets has the same effect";
        assert!(has_problem(&mut cluster.agents[0], words));
        // The route is limited to what arrives, for as long as the limit exists.
        let routes = "ip route show proto 73 dev gossamer.1";
        eventually(&cluster.hosts[0].netns, routes, |shown| shown.contains(" mtu 13"));
        let wide = Command::new("ip").args(["link", "set", "port2", "mtu", "1500"]).status()?;
        assert!(wide.success());
        wait_until("the route is still limited", TIMEOUT, || {
            !tool(&cluster.hosts[0].netns, routes).contains(" mtu ")
        });
        Ok(())
    });
}

/// Full-size packets are probed after minutes, unless packets of a pod are lost.
#[test]
fn silently_reduced_path_mtu_is_reported_as_soon_as_pod_packets_are_lost() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        let narrow = Command::new("ip").args(["link", "set", "port2", "mtu", "1400"]).status()?;
        assert!(narrow.success());
        let agent = &mut cluster.agents[0];
        wait_until("it is not reported", TIMEOUT, || {
            assert!(!has_problem(agent, "do not arrive at pods"), "{}", agent.log());
            has_problem(agent, "packets of 1450 bytes to n2 are lost, those of 13")
        });
        let routes = "ip route show proto 73 dev gossamer.1";
        eventually(&cluster.hosts[0].netns, routes, |shown| shown.contains(" mtu 13"));
        cluster.agents.iter_mut().for_each(|agent| {
            wait_until("pods do not answer", TIMEOUT, || {
                let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
                status["kernel"]["forwarding"]["state"] == "ok"
            });
        });
        Ok(())
    });
}

/// A link with a smaller MTU behind a router, which fragments tunnel packets.
#[test]
fn path_mtu_reported_by_a_router_limits_the_peers_route() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let (router, far) = (lab.host(9, "router")?, lab.host(2, "n2")?);
        for command in [
            "ip link add narrow mtu 1400 type veth peer name wan mtu 1400 netns n2",
            "ip addr add 10.98.0.1/24 dev narrow",
            "ip link set narrow up",
        ] {
            tool(&router.netns, command);
        }
        for command in [
            "ip link del eth0",
            "ip addr add 10.98.0.2/24 dev wan",
            "ip link set wan up",
            "ip route add default via 10.98.0.1",
        ] {
            tool(&far.netns, command);
        }
        let near = &cluster.hosts[0].netns;
        tool(near, &format!("ip route add 10.98.0.0/24 via {}", router.ip));
        let mut agent = cluster.start_agent(&far, &[])?;
        cluster.converge_with(&mut agent, 2)?;
        let subnet = Agent::subnet(&agent.ask("/v1/status", TIMEOUT)?)?;
        let there = far.pod(subnet, 1_350)?;
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        let here = cluster.hosts[0].pod(subnet, 1_450)?;
        let near = &cluster.hosts[0].netns;
        wait_until("the route is not limited", TIMEOUT, || {
            tool(near, "ip route show proto 73").contains(" mtu 1350")
        });
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["paths"][0]["mtu"], 1_350);
        // The pod learns the size that fits.
        let said = run(&here.netns, &format!("ping -c 1 -W 2 -M do -s 1400 {}", there.ip));
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.contains("mtu = 1350") || said.contains("mtu=1350"), "{said}");
        tool(&here.netns, &format!("ping -c 1 -W 5 -M do -s 1322 {}", there.ip));
        Ok(())
    });
}

/// A link aggregation with a dead member link: it drops packets by a bit of the source port.
#[test]
fn flows_lost_on_a_dead_aggregation_link_are_counted() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        wait_until("the path is not known", TIMEOUT, || {
            path(&mut cluster.agents[0], "n2").contains("ok")
        });
        let nft = |command: &str| {
            let done = Command::new("nft").arg(command).status();
            done.is_ok_and(|status| status.success())
        };
        if !nft("add table bridge lag") {
            skipped(
                "flows_lost_on_a_dead_aggregation_link_are_counted",
                "it needs `nft` (Debian: nftables), and a kernel with bridge tables",
            );
            return Ok(());
        }
        let lost = "flows do not get through, the others do";
        // Each of eight flows uses a link at random, so all may use the same one with a single bit.
        let is_reported = [15, 14, 13].into_iter().any(|bit| {
            assert!(nft("add chain bridge lag f { type filter hook forward priority 0 ; }"));
            assert!(nft(&format!(
                "add rule bridge lag f ip protocol udp udp dport 8472 @th,{bit},1 1 drop"
            )));
            let begun = Instant::now();
            while begun.elapsed() < FLOW_LOSS_TIMEOUT {
                if has_problem(&mut cluster.agents[0], lost) {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            assert!(nft("flush chain bridge lag f"));
            false
        });
        assert!(is_reported, "it is not reported");
        assert!(path(&mut cluster.agents[0], "n2").contains("partly-lost"));
        let doctor = String::from_utf8(client(&cluster.agents[0], &["doctor"]).stdout)?;
        assert!(
            doctor.contains("PROBLEM   paths          packets to n2 are partly lost"),
            "{doctor}"
        );
        assert!(nft("delete table bridge lag"));
        wait_until("it is still reported", FLOW_LOSS_TIMEOUT, || {
            !has_problem(&mut cluster.agents[0], lost)
        });
        Ok(())
    });
}

#[test]
fn answers_on_another_path_are_reported() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        let (here, there) = (cluster.hosts[0].ip, &cluster.hosts[1].netns);
        tool(there, &format!("ip route add {}/32 via {here} dev eth0", subnet.network()));
        let said = "its answers arrive without";
        wait_until("it is not reported", TIMEOUT, || has_problem(&mut cluster.agents[0], said));
        assert!(path(&mut cluster.agents[0], "n2").contains("asymmetric"));
        tool(there, &format!("ip route del {}/32", subnet.network()));
        wait_until("it is still reported", DETECTION_TIMEOUT, || {
            !has_problem(&mut cluster.agents[0], said)
        });
        Ok(())
    });
}

#[test]
fn ping_command_shows_underlay_overlay_and_pod_path() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.pods()?;
        let ping = |agent: &Agent, node: &str| {
            let output = client(agent, &["ping", node, "-c", "2", "-i", "10ms"]);
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            (output.status.code(), text + &String::from_utf8_lossy(&output.stderr))
        };
        let (code, said) = ping(&cluster.agents[0], "n2");
        assert_eq!((code, said.matches(" ms").count()), (Some(0), 6), "{said}");
        assert!(said.contains("10.99.0.11:8473") && said.contains("2 of 2"), "{said}");

        let host = &cluster.hosts[0].netns;
        tool(host, "nft add table inet block");
        tool(host, "nft add chain inet block out { type filter hook output priority 0 ; }");
        tool(host, "nft add rule inet block out udp dport 8472 drop");
        let (code, said) = ping(&cluster.agents[0], "n2");
        assert_eq!((code, said.matches("no answer").count()), (Some(1), 4), "{said}");
        assert!(said.contains("no packet passes the tunnel"), "{said}");

        cluster.agents[1].end(Signal::SIGKILL)?;
        tool(host, "nft delete table inet block");
        let (code, said) = ping(&cluster.agents[0], "n2");
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("but its kernel forwards"), "{said}");
        let (code, said) = ping(&cluster.agents[0], "n9");
        assert_eq!(code, Some(1));
        assert!(said.contains("no member is called n9"), "{said}");
        Ok(())
    });
}

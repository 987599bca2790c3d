//! The main use on a real kernel: join, reach pods on other hosts, restart, leave.
//!
//! Results are checked with `ip`, `bridge` and `ping`, not with gossamer's own reader.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::common::{Cluster, TIMEOUT, client, eventually, isolated, program, run, tool};
use gossamer::lab::{Agent, Host, NetNs, Pinger, Pod};
use nix::sys::signal::Signal;

fn assert_pings(from: &Pod, to: &Pod) {
    let reply = tool(&from.netns, &format!("ping -c 1 -W 10 {}", to.ip));
    assert!(reply.contains(" 1 received"), "{reply}");
}

/// `ip monitor` and `bridge monitor` in a namespace, recording until `seen` is called.
struct Monitor(Vec<Child>);

impl Monitor {
    fn start(netns: &NetNs) -> anyhow::Result<Self> {
        let watch = |program: &str, arguments: &[&str]| {
            netns.spawn(Command::new(program).args(arguments).stdout(Stdio::piped()))
        };
        let monitors = vec![
            watch("ip", &["monitor", "link", "route", "neigh", "address"])?,
            watch("bridge", &["monitor", "fdb"])?,
        ];
        Ok(Self(monitors))
    }

    fn seen(self) -> anyhow::Result<String> {
        let mut seen = String::new();
        for mut child in self.0 {
            child.kill()?;
            seen += &String::from_utf8(child.wait_with_output()?.stdout)?;
        }
        Ok(seen)
    }
}

#[test]
fn pods_on_three_hosts_reach_each_other() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let pods = cluster.pods()?;
        for from in &pods {
            for to in pods.iter().filter(|to| to.ip != from.ip) {
                assert_pings(from, to);
                // 1,422 bytes and 28 bytes of headers are the full MTU; nothing may be fragmented.
                let full = format!("ping -c 1 -W 10 -s 1422 -M do {}", to.ip);
                assert!(tool(&from.netns, &full).contains(" 1 received"));
            }
        }
        Ok(())
    });
}

#[test]
fn kernel_entries_equal_those_of_flannel() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let status = cluster.agents[1].wait_converged(2, TIMEOUT)?;
        let peer = status["members"].as_array().expect("members").iter().find(|m| m["me"] == true);
        let peer = peer.expect("the second node itself");
        let (mac, underlay) = (peer["vtep_mac"].as_str(), peer["underlay"].as_str());
        let (mac, underlay) = (mac.expect("mac"), underlay.expect("underlay"));
        let subnet = Agent::subnet(&status)?;
        let vtep = subnet.network();

        let first = &cluster.hosts[0].netns;
        let route = tool(first, "ip -4 route show dev gossamer.1");
        assert!(route.contains(&format!("{subnet} via {vtep} proto 73")), "{route}");
        assert!(route.contains("onlink") && route.lines().count() == 1, "{route}");
        let neighbor = tool(first, "ip -4 neigh show dev gossamer.1");
        assert_eq!(neighbor.trim(), format!("{vtep} lladdr {mac} PERMANENT"));
        let fdb = tool(first, "bridge fdb show dev gossamer.1");
        assert_eq!(fdb.trim(), format!("{mac} dst {underlay} self permanent"));

        let second = &cluster.hosts[1].netns;
        let device = tool(second, "ip -d addr show dev gossamer.1");
        for words in [
            format!("link/ether {mac}"),
            "mtu 1450".to_owned(),
            format!("vxlan id 1 local {underlay} srcport"),
            "dstport 8472 nolearning".to_owned(),
            format!("inet {vtep}/32 scope global gossamer.1"),
        ] {
            assert!(device.contains(&words), "{words:?} is missing in\n{device}");
        }
        assert!(!device.contains("inet6"), "no IPv6 address of its own:\n{device}");
        let env = fs::read_to_string(cluster.hosts[1].dir.join("subnet.env"))?;
        let gateway = subnet.hosts().next().expect("addresses");
        assert_eq!(
            env,
            format!(
                "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET={gateway}/24\n\
                 FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
            )
        );
        Ok(())
    });
}

#[test]
fn ten_hosts_started_at_once_get_distinct_subnets() {
    isolated(|lab| {
        let token =
            String::from_utf8(Command::new(program()).args(["token", "--new"]).output()?.stdout)?;
        let token = token.trim();
        let hosts: Vec<Host> =
            (1..=10).map(|n| lab.host(n, &format!("n{n}"))).collect::<Result<_, _>>()?;
        let seed = hosts[0].ip.to_string();
        let mut agents = Vec::new();
        for (n, host) in hosts.iter().enumerate() {
            let arguments: &[&str] = if n == 0 {
                &["--init", "--token", token]
            } else {
                &["--join", &seed, "--token", token]
            };
            agents.push(Agent::start(program(), host, arguments)?);
        }
        let mut subnets = std::collections::BTreeSet::new();
        for agent in &mut agents {
            subnets.insert(Agent::subnet(&agent.wait_converged(10, TIMEOUT)?)?);
        }
        assert_eq!(subnets.len(), 10);
        for host in &hosts {
            eventually(&host.netns, "ip route show proto 73 dev gossamer.1", |routes| {
                routes.lines().count() == 9
            });
        }
        Ok(())
    });
}

#[test]
fn agent_restarts_lose_no_packet_and_change_no_entry() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let pods = cluster.pods()?;
        let before = tool(&cluster.hosts[1].netns, "bridge fdb show dev gossamer.1");
        let monitor = Monitor::start(&cluster.hosts[1].netns)?;
        let mut pinger = Pinger::new(&pods[0].netns)?;
        let target = pods[1].ip;
        let stream =
            std::thread::spawn(move || pinger.stream(target, 300, Duration::from_millis(10)));
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            cluster.agents[1].end(signal)?;
            // With its state on disk, the agent needs neither seeds nor a token.
            cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &[])?;
            cluster.agents[1].wait_converged(3, TIMEOUT)?;
        }
        let answered = stream.join().expect("no panic")?;
        assert_eq!(answered, 300, "packets were lost");
        let seen = monitor.seen()?;
        assert!(!seen.contains("gossamer.1"), "the kernel was touched:\n{seen}");
        assert_eq!(tool(&cluster.hosts[1].netns, "bridge fdb show dev gossamer.1"), before);
        Ok(())
    });
}

/// Sends one byte back and forth over one connection, every 10 ms until `stop` is set. The thread returns
/// the number of round trips.
fn exchange_bytes(
    from: &Pod,
    to: &Pod,
    stop: Arc<AtomicBool>,
) -> io::Result<JoinHandle<io::Result<u32>>> {
    let listener = to.netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9_000)))?;
    let there = to.ip;
    let mut here = from.netns.run(move || TcpStream::connect((there, 9_000)))?;
    let (mut echo, _) = listener.accept()?;
    std::thread::spawn(move || io::copy(&mut echo.try_clone()?, &mut echo));
    here.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(std::thread::spawn(move || {
        let mut came_back = 0;
        while !stop.load(Ordering::Relaxed) {
            here.write_all(&[7])?;
            here.read_exact(&mut [0])?;
            came_back += 1;
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(came_back)
    }))
}

#[test]
fn rolling_upgrade_loses_no_packet_and_no_connection() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let pods = cluster.pods()?;
        let stop = Arc::new(AtomicBool::new(false));
        let exchange = exchange_bytes(&pods[0], &pods[1], stop.clone())?;
        let mut pinger = Pinger::new(&pods[2].netns)?;
        let target = pods[0].ip;
        let stream =
            std::thread::spawn(move || pinger.stream(target, 300, Duration::from_millis(10)));
        for number in 0..3 {
            cluster.agents[number].end(Signal::SIGTERM)?;
            cluster.agents[number] = Agent::start(program(), &cluster.hosts[number], &[])?;
            cluster.agents[number].wait_converged(3, TIMEOUT)?;
        }
        assert_eq!(stream.join().expect("no panic")?, 300, "packets were lost");
        stop.store(true, Ordering::Relaxed);
        assert!(exchange.join().expect("no panic")? > 50, "the connection stalled");
        Ok(())
    });
}

#[test]
fn killed_and_restarted_node_is_never_reported_down() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        // Of any two nodes, the one with the smaller id opens the connection. Restarting each node in
        // turn checks that neither side waits for a timeout of the connection to the killed process.
        for n in 0..3 {
            cluster.agents[n].end(Signal::SIGKILL)?;
            cluster.agents[n] = Agent::start(program(), &cluster.hosts[n], &[])?;
            cluster.converge()?;
        }
        std::thread::sleep(Duration::from_secs(8));
        let log: String = cluster.agents.iter().map(Agent::log).collect();
        assert!(!log.contains("member down"), "{log}");
        Ok(())
    });
}

#[test]
fn monitor_reports_changes_of_the_kernel() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 2)?;
        let netns = &cluster.hosts[0].netns;
        let monitor = Monitor::start(netns)?;
        std::thread::sleep(Duration::from_millis(200));
        tool(netns, "ip neigh replace 10.42.0.9 lladdr 02:00:00:00:00:09 dev gossamer.1");
        tool(netns, "bridge fdb add 02:00:00:00:00:09 dev gossamer.1 dst 10.99.0.99");
        std::thread::sleep(Duration::from_millis(200));
        let seen = monitor.seen()?;
        assert!(seen.matches("02:00:00:00:00:09").count() >= 2, "{seen}");
        Ok(())
    });
}

#[test]
fn restarted_host_without_peers_restores_its_subnet_and_entries() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let netns = |cluster: &Cluster, command: &str| tool(&cluster.hosts[1].netns, command);
        let subnet = Agent::subnet(&cluster.agents[1].wait_converged(3, TIMEOUT)?)?;
        let device = netns(&cluster, "ip -br link show dev gossamer.1");
        cluster.agents[1].end(Signal::SIGTERM)?;
        // As after a reboot with the veth pair unplugged: no device, no file, no reachable peer.
        netns(&cluster, "ip link del gossamer.1");
        fs::remove_file(cluster.hosts[1].dir.join("subnet.env"))?;
        lab.set_veth(2, false)?;
        cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &[])?;
        assert_eq!(cluster.agents[1].wait_subnet(TIMEOUT)?, subnet);
        let netns = &cluster.hosts[1].netns;
        eventually(netns, "ip -4 route show proto 73 dev gossamer.1", |routes| {
            routes.lines().count() == 2
        });
        let mac = |line: &str| line.split_whitespace().nth(2).map(str::to_owned);
        let now = tool(netns, "ip -br link show dev gossamer.1");
        assert_eq!(mac(&now), mac(&device), "the VTEP is the same");
        let env = fs::read_to_string(cluster.hosts[1].dir.join("subnet.env"))?;
        assert!(env.contains(&format!("FLANNEL_SUBNET={}", subnet.hosts().next().expect("hosts"))));
        lab.set_veth(2, true)?;
        cluster.converge()
    });
}

#[test]
fn leaving_node_removes_its_state_and_peers_remove_its_entries() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let leaver = &cluster.hosts[2];
        let answer = cluster.agents[2].leave()?;
        assert_eq!(answer["left"], true);
        assert!(!run(&leaver.netns, "ip link show gossamer.1").status.success(), "device is gone");
        assert!(!leaver.dir.join("subnet.env").exists());
        assert_eq!(fs::read_dir(leaver.dir.join("state"))?.count(), 0, "no state is left");
        for host in &cluster.hosts[..2] {
            for (command, entries) in [
                ("ip -4 route show proto 73 dev gossamer.1", 1),
                ("ip -4 neigh show dev gossamer.1", 1),
                ("bridge fdb show dev gossamer.1", 1),
            ] {
                eventually(&host.netns, command, |output| output.lines().count() == entries);
            }
        }
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["slots"]["leased"], 2);
        assert_eq!(status["slots"]["free"], 253);
        // A node that has left may come back, as a new node.
        cluster.agents[2] = cluster.start_agent(&cluster.hosts[2], &[])?;
        cluster.converge()
    });
}

#[test]
fn stale_entries_of_a_killed_agent_are_removed_once_a_peer_confirms() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        cluster.agents[0].end(Signal::SIGKILL)?;
        cluster.agents[2].leave()?;
        let show = "ip route show proto 73 dev gossamer.1";
        let stale = tool(&cluster.hosts[0].netns, show);
        assert_eq!(stale.lines().count(), 2, "the dead agent's entries remain");
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        let routes =
            eventually(&cluster.hosts[0].netns, show, |routes| routes.lines().count() == 1);
        let subnet = Agent::subnet(&cluster.agents[1].wait_converged(2, TIMEOUT)?)?;
        assert!(routes.contains(&subnet.to_string()), "{routes}");
        Ok(())
    });
}

#[test]
fn agent_started_at_once_after_leave_or_signal_waits_for_the_earlier_one() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        assert!(client(&cluster.agents[1], &["leave"]).status.success());
        // The earlier process is not awaited.
        let mut next = cluster.start_agent(&cluster.hosts[1], &[])?;
        cluster.agents[1].wait()?;
        next.wait_converged(2, TIMEOUT)?;
        next.signal(Signal::SIGTERM)?;
        let mut last = cluster.start_agent(&cluster.hosts[1], &[])?;
        assert!(next.wait()?.success());
        last.wait_converged(2, TIMEOUT)?;
        Ok(())
    });
}

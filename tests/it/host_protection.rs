//! Protection of the host: what pods, and gossamer itself, must not do to the machine they run on.

mod bridge;
mod read_only;

use std::{
    fs, io,
    net::{Ipv6Addr, SocketAddrV6},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Host, NetNs, Pinger};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        Cluster, TIMEOUT, client, eventually, isolated, program, run, status_where, texts, tool,
        wait_until,
    },
};

/// `ICMPv6` types (RFC 4861).
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;

/// Sends a router advertisement from `eth0` of a namespace.
fn advertise(netns: &NetNs) -> anyhow::Result<()> {
    let mut message = [0; 16];
    message[0] = ROUTER_ADVERTISEMENT;
    message[4] = 64;
    message[6..8].copy_from_slice(&1_800_u16.to_be_bytes());
    send_to_all_nodes(netns, &message)
}

/// Announces an address at the MAC of `eth0`, overriding existing entries.
fn announce_address(netns: &NetNs, address: Ipv6Addr) -> anyhow::Result<()> {
    let link = tool(netns, "ip -br link show dev eth0");
    let mac: Vec<u8> = link
        .split_whitespace()
        .nth(2)
        .expect("a MAC")
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
        .collect();
    let override_flag = [0x20, 0, 0, 0];
    let head = [NEIGHBOR_ADVERTISEMENT, 0, 0, 0];
    send_to_all_nodes(
        netns,
        &[&head[..], &override_flag, &address.octets(), &[2, 1], &mac].concat(),
    )
}

/// Sends an `ICMPv6` message to all nodes; the kernel fills in the checksum.
fn send_to_all_nodes(netns: &NetNs, message: &[u8]) -> anyhow::Result<()> {
    Ok(netns.run(|| {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
        socket.set_multicast_hops_v6(255)?;
        socket.bind_device(Some(b"eth0"))?;
        let index = nix::net::if_::if_nametoindex("eth0").map_err(io::Error::from)?;
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        socket.send_to(message, &SocketAddrV6::new(all_nodes, 0, 0, index).into()).map(drop)
    })?)
}

/// Waits until an interface has a usable link-local address.
fn wait_for_link_local(netns: &NetNs, interface: &str) {
    eventually(netns, &format!("ip -6 addr show dev {interface} scope link"), |text| {
        text.contains("fe80:") && !text.contains("tentative")
    });
}

fn sysctl(netns: &NetNs, name: &str) -> String {
    let path = PathBuf::from("/proc/sys").join(name);
    netns.run(|| fs::read_to_string(path)).expect("a sysctl").trim().to_owned()
}

fn problems(agent: &mut Agent) -> String {
    texts(&agent.ask("/v1/status", TIMEOUT).expect("a status")["problems"])
}

/// Makes a host accept router advertisements, as a host without IPv6 forwarding does.
fn disable_forwarding(host: &Host) {
    tool(&host.netns, "sysctl -qw net.ipv6.conf.all.forwarding=0");
    tool(&host.netns, "sysctl -qw net.ipv6.conf.eth0.accept_ra=1");
}

/// Returns a wrapper that runs the agent in its own mount namespace, after these commands.
fn with_mounts(host: &Host, commands: &str) -> io::Result<PathBuf> {
    let script = host.dir.join("with-mounts");
    let program = program().display();
    let text = format!(
        "#!/bin/sh\nexec unshare --mount sh -ec '{commands}; exec \"$@\"' sh {program} \"$@\"\n"
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script)
}

/// A program that repeats a command until it is dropped.
struct CompetingProgram(std::process::Child);

impl CompetingProgram {
    /// Starts it as a process called `name`, under which the agent finds it.
    fn start(host: &Host, name: &str, fault: &str) -> io::Result<Self> {
        let shell = host.dir.join(name);
        fs::copy("/bin/sh", &shell)?;
        fs::set_permissions(&shell, fs::Permissions::from_mode(0o755))?;
        let mut command = Command::new(shell);
        let script = format!("while :; do {fault} 2>/dev/null; sleep 0.2; done");
        command.args(["-c", &script]).stdin(Stdio::null());
        Ok(Self(host.netns.spawn(&mut command)?))
    }
}

impl Drop for CompetingProgram {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn router_advertisement_of_a_pod_adds_no_route_to_its_host() {
    isolated(|lab| {
        for (number, more) in [(1, &[][..]), (2, &["--network6", "fd42::/48"])] {
            let host = lab.host(number, &format!("n{number}"))?;
            disable_forwarding(&host);
            let mut agent = Agent::start(program(), &host, &[&["--init"], more].concat())?;
            agent.wait_converged(1, TIMEOUT)?;
            let name = format!("pod{number}");
            let space = NetNs::new(&name)?;
            let added = Runtime::new(&agent).add(&name);
            let port = added["interfaces"][1]["name"].as_str().expect("a name").to_owned();
            wait_for_link_local(&space, "eth0");
            advertise(&space)?;
            // When the host answers the echo, it has received the advertisement.
            let gateway = added["ips"][0]["gateway"].as_str().expect("a gateway");
            tool(&space, &format!("ping -c 1 -W 2 {gateway}"));
            assert_eq!(tool(&host.netns, "ip -6 route show default"), "");
            for interface in ["gsm0", "gossamer.1", &port] {
                for name in ["ipv6/conf/IF/accept_ra", "ipv6/conf/IF/accept_redirects"]
                    .into_iter()
                    .chain(["ipv4/conf/IF/accept_redirects", "ipv4/conf/IF/proxy_arp"])
                {
                    let name = format!("net/{}", name.replace("IF", interface));
                    assert_eq!(sysctl(&host.netns, &name), "0", "{name}");
                }
            }
            let on_bridge = tool(&host.netns, "ip -6 addr show dev gsm0");
            if more.is_empty() {
                assert_eq!(on_bridge, "", "no IPv6 address without an IPv6 subnet");
            } else {
                let gateway = added["ips"][1]["gateway"].as_str().expect("a gateway");
                tool(&space, &format!("ping -c 1 -W 2 {gateway}"));
                // From the host, and forwarded: for that, the bridge queries from its link-local address.
                let pod = added["ips"][1]["address"].as_str().expect("an address");
                let pod = pod.split('/').next().expect("an address");
                tool(&host.netns, "ip addr add fd99::1/64 dev eth0 nodad");
                tool(&host.netns, "sysctl -qw net.ipv6.conf.all.forwarding=1");
                tool(&host.netns, "ip -6 neigh flush dev gsm0");
                let outside = lab.host(9, "outside")?;
                tool(&outside.netns, "ip addr add fd99::9/64 dev eth0 nodad");
                tool(&outside.netns, &format!("ip route add {pod} via fd99::1"));
                tool(&outside.netns, &format!("ping -c 1 -W 5 {pod}"));
            }
        }
        Ok(())
    });
}

#[test]
fn changed_protective_sysctls_are_restored_or_reported() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _space = NetNs::new("a")?;
        Runtime::new(&cluster.agents[0]).add("a");
        let host = &cluster.hosts[0].netns;
        tool(host, "sysctl -qw net.ipv6.conf.gsm0.accept_ra=2");
        // The kernel announces this change, but not the change of a sysctl alone.
        tool(host, "ip link set gsm0 down");
        wait_until("the setting is not repaired", TIMEOUT, || {
            sysctl(host, "net/ipv6/conf/gsm0/accept_ra") == "0"
        });
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["repairs"]["sysctl"].as_u64() >= Some(1)
        });
        assert_eq!(problems(&mut cluster.agents[0]), "");

        let other = lab.host(2, "n2")?;
        let _space = NetNs::new("b")?;
        tool(&other.netns, "sysctl -qw net.ipv6.conf.default.forwarding=0");
        let read_only = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys";
        let wrapped = with_mounts(&other, read_only)?;
        // Without the guard, because the guard drops the advertisements of pods, which is equally safe.
        let mut agent = Agent::start(&wrapped, &other, &["--init", "--guard", "false"])?;
        status_where(&mut agent, |status| {
            let named = texts(&status["problems"]);
            named.contains("net.ipv6.conf.gossamer/1.accept_ra is 1 and cannot be set to 0")
                && named.contains("sysctl -w net.ipv6.conf.gossamer/1.accept_ra=0")
        });
        Runtime::new(&agent).add("b");
        status_where(&mut agent, |status| {
            texts(&status["problems"]).contains("net.ipv6.conf.gsm0.accept_ra")
        });
        Ok(())
    });
}

#[test]
fn host_that_starts_ipv6_forwarding_keeps_its_routes_from_advertisements() {
    isolated(|lab| {
        let router = lab.host(9, "router")?;
        wait_for_link_local(&router.netns, "eth0");
        let overlay = ["--init", "--network6", "fd42::/48"];
        let mut hosts = Vec::new();
        for number in 1..=3 {
            let host = lab.host(number, &format!("n{number}"))?;
            disable_forwarding(&host);
            wait_for_link_local(&host.netns, "eth0");
            hosts.push(host);
        }
        advertise(&router.netns)?;
        let learned = |host: &Host| tool(&host.netns, "ip -6 route show default proto ra");
        hosts.iter().for_each(|host| {
            eventually(&host.netns, "ip -6 route show default proto ra", |text| !text.is_empty());
        });
        let forwards = |host: &Host| sysctl(&host.netns, "net/ipv6/conf/all/forwarding") == "1";

        let setting = [&overlay[..], &["--set-sysctls"]].concat();
        let mut agent = Agent::start(program(), &hosts[0], &setting)?;
        agent.wait_converged(1, TIMEOUT)?;
        wait_until("it does not forward", TIMEOUT, || forwards(&hosts[0]));
        assert_ne!(learned(&hosts[0]), "");
        assert_eq!(sysctl(&hosts[0].netns, "net/ipv6/conf/eth0/accept_ra"), "2");
        assert_eq!(sysctl(&hosts[0].netns, "net/ipv6/conf/gossamer.1/accept_ra"), "0");

        // If this cannot be preserved, the host does not start to forward, and the reason is reported.
        let setting_of_it = "/proc/sys/net/ipv6/conf/eth0/accept_ra";
        let fixed = format!(
            "echo 1 > /run/lab/n2/one; mount --bind /run/lab/n2/one {setting_of_it}; \
             mount -o remount,bind,ro {setting_of_it}"
        );
        let wrapped = with_mounts(&hosts[1], &fixed)?;
        let mut agent = Agent::start(&wrapped, &hosts[1], &setting)?;
        let command = "run sysctl -w net.ipv6.conf.eth0.accept_ra=2";
        status_where(&mut agent, |status| {
            let named = texts(&status["problems"]);
            named.contains("eth0 has routes or addresses") && named.contains(command)
        });
        assert!(!forwards(&hosts[1]) && !learned(&hosts[1]).is_empty());

        // The advised command preserves it as well.
        let mut agent = Agent::start(program(), &hosts[2], &overlay)?;
        let advice = "sysctl -w net.ipv6.conf.eth0.accept_ra=2 net.ipv6.conf.all.forwarding=1";
        status_where(&mut agent, |status| texts(&status["problems"]).contains(advice));
        tool(&hosts[2].netns, &advice.replace("-w", "-qw"));
        assert!(forwards(&hosts[2]) && !learned(&hosts[2]).is_empty());
        Ok(())
    });
}

#[test]
fn packets_to_unused_addresses_of_the_subnet_are_rejected_locally() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(
            program(),
            &host,
            &["--init", "--network6", "fd42::/48", "--prefer-subnet", "10.42.7.0"],
        )?;
        agent.wait_converged(1, TIMEOUT)?;
        tool(&host.netns, "ip addr add fd99::1/64 dev eth0 nodad");
        tool(&host.netns, "ip -6 route add default via fd99::9");
        let way = |to: &str| {
            let output = run(&host.netns, &format!("ip route get {to}"));
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
        };
        let unused = ["10.42.7.77", "fd42:0:0:7::77"];
        let refused = |to: &&str| {
            let way = way(to);
            way.contains("No route to host") || way.contains("unreachable")
        };
        assert!(unused.iter().all(refused), "{:?}", unused.map(way));
        // Repaired as any other entry, and no difference to the desired state.
        tool(&host.netns, "ip route del unreachable 10.42.7.0/24");
        wait_until("it was not repaired", TIMEOUT, || refused(&unused[0]));
        assert!(client(&agent, &["routes"]).status.success());

        // As soon as there are pods, packets go to the bridge.
        let spaces = namespaces(&["a"])?;
        let added = Runtime::new(&agent).add("a");
        assert!(
            unused.map(way).iter().all(|way| way.contains("dev gsm0")),
            "{:?}",
            unused.map(way)
        );
        tool(&host.netns, &format!("ping -c 1 -W 2 {}", address(&added)));
        tool(&spaces[0], "ping -c 1 -W 2 10.42.7.1");
        assert_eq!(problems(&mut agent), "");
        agent.leave()?;
        for family in ["-4", "-6"] {
            assert_eq!(tool(&host.netns, &format!("ip {family} route show proto 73")), "");
        }
        Ok(())
    });
}

/// Returns the number of repairs of one kind.
fn repairs(agent: &mut Agent, kind: &str) -> u64 {
    let status: Value = agent.ask("/v1/status", TIMEOUT).expect("a status");
    status["kernel"]["repairs"][kind].as_u64().unwrap_or(0)
}

#[test]
fn program_that_undoes_repairs_is_reported_and_repairs_slow_down() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _space = NetNs::new("a")?;
        let added = Runtime::new(&cluster.agents[0]).add("a");
        let port = added["interfaces"][1]["name"].as_str().expect("a name").to_owned();
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        let fault = format!("ip link set {port} nomaster");
        let on_ports = CompetingProgram::start(&cluster.hosts[0], "connmand", &fault)?;
        let fault = format!("ip route del {subnet}");
        let on_routes = CompetingProgram::start(&cluster.hosts[1], "keepalived", &fault)?;
        let said = |agent: &mut Agent, words: &[&str]| {
            let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
            let problems = status["problems"].as_array().expect("a list").clone();
            let has = |problem: &Value| words.iter().all(|word| problem.to_string().contains(word));
            problems.iter().any(has)
        };
        let port_named = ["keeps changing", &port, "repaired 10 times", "connmand"];
        wait_until(
            "the repeated change of the port is not reported",
            Duration::from_secs(40),
            || said(&mut cluster.agents[0], &port_named),
        );
        let subnet_named = ["keeps changing", "route", "repaired 10 times", "keepalived"];
        wait_until(
            "the repeated change of the route is not reported",
            Duration::from_secs(40),
            || said(&mut cluster.agents[1], &subnet_named),
        );
        let examined = client(&cluster.agents[0], &["doctor"]);
        assert!(
            !examined.status.success() && String::from_utf8_lossy(&examined.stdout).contains(&port)
        );
        // The other program acts five times a second; repairs must be slower.
        let (before, begun) = (repairs(&mut cluster.agents[0], "bridge"), Instant::now());
        wait_until("repairs have stopped", TIMEOUT, || {
            repairs(&mut cluster.agents[0], "bridge") >= before + 5
        });
        assert!(begun.elapsed() > Duration::from_secs(3), "{:?}", begun.elapsed());
        let log = cluster.agents[0].log();
        let lines = log.lines().filter(|line| line.contains("repaired changes")).count();
        assert!(lines <= 6, "{log}");
        // When the other program ends, gossamer's state is restored.
        drop((on_ports, on_routes));
        let host = &cluster.hosts[0].netns;
        eventually(host, &format!("ip link show {port}"), |text| text.contains("master gsm0"));
        Ok(())
    });
}

#[test]
fn pod_cannot_use_an_unassigned_address_or_mac() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let overlay = ["--init", "--network6", "fd42::/48", "--prefer-subnet", "10.42.7.0"];
        let mut agent = Agent::start(program(), &host, &overlay)?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a", "b"])?;
        let (a, b) = (Runtime::new(&agent).add("a"), Runtime::new(&agent).add("b"));
        let ip = |added: &Value, n: usize| {
            let text = added["ips"][n]["address"].as_str().expect("an address");
            text.split('/').next().expect("an address").to_owned()
        };
        let mac = a["interfaces"][2]["mac"].as_str().expect("a MAC").to_owned();
        let (a4, a6, b4, b6) = (ip(&a, 0), ip(&a, 1), ip(&b, 0), ip(&b, 1));
        let reaches = |from: &str, to: &str| {
            run(&spaces[0], &format!("ping -c 1 -W 1 -I {from} {to}")).status.success()
        };
        let all_works = || {
            for to in [&b4, "10.42.7.1", &b6, "fd42:0:0:7::1"] {
                let from = if to.contains(':') { &a6 } else { &a4 };
                wait_until(to, TIMEOUT, || reaches(from, to));
            }
        };
        all_works();

        // Addresses that were not assigned to the pod, of its own subnet and of another.
        for malformed in ["10.42.7.99/24", "10.43.0.9/32", "fd42:0:0:7::99/64"] {
            tool(&spaces[0], &format!("ip addr add {malformed} dev eth0"));
            let from = malformed.split('/').next().expect("an address");
            let to = if from.contains(':') { &b6 } else { &b4 };
            assert!(!reaches(from, to), "{from} to {to}");
            tool(&spaces[0], &format!("ip addr del {malformed} dev eth0"));
        }
        // The address of another pod, taken while that pod is known to all neighbors.
        let known = |address: &str| tool(&host.netns, &format!("ip neigh show {address} dev gsm0"));
        let lladdr = |address: &str| {
            let text = known(address);
            let words: Vec<&str> = text.split_whitespace().map(str::trim).collect();
            words.windows(2).find(|pair| pair[0] == "lladdr").map(|pair| pair[1].to_owned())
        };
        tool(&host.netns, &format!("ping -c 1 -W 2 {b6}"));
        let of_b = lladdr(&b6);
        assert_ne!(of_b, Some(mac.clone()), "{}", known(&b6));
        announce_address(&spaces[0], b6.parse()?)?;
        assert!(reaches(&a6, "fd42:0:0:7::1"), "earlier packets have been processed");
        assert_eq!(lladdr(&b6), of_b);
        // The same with the other pod's link-local address, and the gateway's.
        let link_local_of = |netns: &NetNs, interface: &str| {
            let shown = tool(netns, &format!("ip -6 -br addr show dev {interface} scope link"));
            let address = shown.split_whitespace().nth(2).and_then(|text| text.split('/').next());
            address.expect("a link-local address").to_owned()
        };
        wait_for_link_local(&spaces[1], "eth0");
        let local = link_local_of(&spaces[1], "eth0");
        tool(&host.netns, &format!("ping -c 1 -W 2 {local}%gsm0"));
        let of_b = lladdr(&local);
        assert!(of_b.is_some(), "{}", known(&local));
        announce_address(&spaces[0], local.parse()?)?;
        let of_gateway = link_local_of(&host.netns, "gsm0");
        tool(&spaces[1], &format!("ping -c 1 -W 2 {of_gateway}%eth0"));
        let seen = || tool(&spaces[1], &format!("ip neigh show {of_gateway} dev eth0"));
        announce_address(&spaces[0], of_gateway.parse()?)?;
        assert!(reaches(&a6, "fd42:0:0:7::1"), "earlier packets have been processed");
        assert_eq!(lladdr(&local), of_b);
        tool(&spaces[1], "ping -c 1 -W 2 fd42:0:0:7::1");
        assert!(!seen().contains(&mac), "{}", seen());
        // A different MAC.
        tool(&spaces[0], "ip link set eth0 address 02:00:00:00:00:99");
        assert!(!reaches(&a4, "10.42.7.1") && !reaches(&a4, &b4));
        tool(&spaces[0], &format!("ip link set eth0 address {mac}"));
        all_works();

        // Changes by other programs are repaired, and none of them remains.
        let show = "nft -s list table bridge gossamer.1";
        let table = || tool(&host.netns, show);
        let wanted = words_of(&table());
        for command in [
            "nft flush chain bridge gossamer.1 pods",
            "nft delete table bridge gossamer.1",
            "nft add element bridge gossamer.1 macs { \"gsm1\" . 02:00:00:00:00:99 }",
            "nft flush set bridge gossamer.1 macs",
        ] {
            tool(&host.netns, command);
            eventually(&host.netns, show, |text| words_of(text) == wanted);
            all_works();
        }
        status_where(&mut agent, |status| {
            status["kernel"]["repairs"]["anti-spoofing"].as_u64() >= Some(4)
        });
        assert_eq!(problems(&mut agent), "");
        Runtime::new(&agent).del("b");
        eventually(&host.netns, show, |text| !text.contains(&b4));
        assert!(table().contains(&a4));

        // A restart loses no packet, and needs no saved state.
        let mut pinger = Pinger::new(&spaces[0])?;
        let pinging = std::thread::spawn(move || {
            pinger.stream([10, 42, 7, 1].into(), 300, Duration::from_millis(10))
        });
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        agent = Agent::start(program(), &host, &[])?;
        agent.wait_converged(1, TIMEOUT)?;
        assert_eq!(pinging.join().expect("the pinger ends")?, 300);
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        agent = Agent::start(program(), &host, &["--anti-spoofing", "false"])?;
        agent.wait_converged(1, TIMEOUT)?;
        eventually(&host.netns, "nft list tables", |text| !text.contains("bridge"));
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        agent = Agent::start(program(), &host, &[])?;
        eventually(&host.netns, "nft list tables", |text| text.contains("bridge gossamer.1"));
        agent.leave()?;
        assert_eq!(tool(&host.netns, "nft list tables"), "");
        Ok(())
    });
}

/// Returns the words of `nft`'s output, sorted, because the elements of a set have no order.
fn words_of(table: &str) -> Vec<String> {
    let mut words: Vec<String> = table
        .split(|c: char| c.is_whitespace() || ",{}".contains(c))
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    words.sort_unstable();
    words
}

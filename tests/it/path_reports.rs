//! Forged ICMP messages "fragmentation needed", sent by a host that sees none of the traffic.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use gossamer::lab::{Agent, Host, NetNs, Pod};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        Cluster, TIMEOUT, checksum, eventually, has_problem, isolated, program, run, tool,
        wait_until,
    },
};

/// Returns the message that a tunnel packet from one host to another was too large.
fn path_mtu_report(from: Ipv4Addr, to: Ipv4Addr, mtu: u16) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 5, 220, 0, 1, 0x40, 0, 64, 17, 0, 0];
    ip.extend(from.octets());
    ip.extend(to.octets());
    let sum = checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    let [high, low] = 8472_u16.to_be_bytes();
    let udp = [0xc0, 0, high, low, 5, 200, 0, 0];
    let vxlan = [8, 0, 0, 0, 0, 0, 1, 0];
    let [first, second] = mtu.to_be_bytes();
    let mut icmp = [&[3, 4, 0, 0, 0, 0, first, second][..], &ip, &udp, &vxlan].concat();
    let sum = checksum(&icmp).to_be_bytes();
    icmp[2..4].copy_from_slice(&sum);
    icmp
}

/// Returns the message that an echo reply from a host to a pod was too large.
fn pod_path_mtu_report(from: Ipv4Addr, pod: Ipv4Addr, mtu: u16) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 84, 0, 1, 0x40, 0, 64, 1, 0, 0];
    ip.extend(from.octets());
    ip.extend(pod.octets());
    let sum = checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    let [first, second] = mtu.to_be_bytes();
    let echo_reply = [0, 0, 0, 0, 0, 1, 0, 1];
    let mut icmp = [&[3, 4, 0, 0, 0, 0, first, second][..], &ip, &echo_reply].concat();
    let sum = checksum(&icmp).to_be_bytes();
    icmp[2..4].copy_from_slice(&sum);
    icmp
}

/// Returns the message that an echo reply from a host to a pod was too large, as IPv6 packets: one packet, or
/// two fragments, of which the first ends before the address of the pod.
fn pod_path_mtu_report6(
    sender: Ipv6Addr,
    host: Ipv6Addr,
    pod: Ipv6Addr,
    in_fragments: bool,
) -> Vec<Vec<u8>> {
    let header = |next: u8, length: usize, from: Ipv6Addr, to: Ipv6Addr| {
        let head = [0x60, 0, 0, 0, 0, length as u8, next, 64];
        [&head[..], &from.octets(), &to.octets()].concat()
    };
    let quoted = [&header(58, 8, host, pod)[..], &[129, 0, 0, 0, 0, 1, 0, 1]].concat();
    let mut icmp = [&[2, 0, 0, 0, 0, 0, 5, 0][..], &quoted].concat();
    let pseudo = [&[0, icmp.len() as u8, 0, 58][..], &sender.octets(), &host.octets()].concat();
    let sum = checksum(&[&pseudo[..], &icmp].concat()).to_be_bytes();
    icmp[2..4].copy_from_slice(&sum);
    if !in_fragments {
        return vec![[&header(58, icmp.len(), sender, host)[..], &icmp].concat()];
    }
    let parts = [(&icmp[..8], [58, 0, 0, 1, 0, 0, 0, 7]), (&icmp[8..], [58, 0, 0, 8, 0, 0, 0, 7])];
    let fragment = |(part, extension): (&[u8], [u8; 8])| {
        [&header(44, 8 + part.len(), sender, host)[..], &extension, part].concat()
    };
    parts.map(fragment).to_vec()
}

fn send_forged_report(
    attacker: &NetNs,
    victim: &Host,
    peer: &Host,
    mtu: u16,
) -> anyhow::Result<()> {
    send_forged_report_to(victim.ip, attacker, victim, peer, mtu)
}

/// Sends the message to one of several addresses of the victim.
fn send_forged_report_to(
    to: Ipv4Addr,
    attacker: &NetNs,
    victim: &Host,
    peer: &Host,
    mtu: u16,
) -> anyhow::Result<()> {
    Ok(attacker.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
        let to = SocketAddrV4::new(to, 0);
        socket.send_to(&path_mtu_report(victim.ip, peer.ip, mtu), &to.into()).map(drop)
    })?)
}

#[test]
fn forged_ipv6_path_mtu_is_removed() {
    isolated(|_| {
        let (near, far) = (NetNs::new("near")?, NetNs::new("far")?);
        tool(&near, "ip link add eth0 type veth peer name eth0 netns far");
        for (netns, address) in [(&near, "fd00::1"), (&far, "fd00::2")] {
            tool(netns, &format!("ip addr add {address}/64 dev eth0 nodad"));
            tool(netns, "ip link set eth0 up");
        }
        eventually(&near, "ping -c 1 -W 1 fd00::2", |said| said.contains(" 0% packet loss"));
        let host: Ipv6Addr = "fd00::2".parse()?;
        far.run(|| {
            // The quoted packet: an echo request of the near host.
            let own: Ipv6Addr = "fd00::1".parse().expect("an address");
            let head = [0x60, 0, 0, 0, 5, 200, 58, 64];
            let quoted = [&head[..], &own.octets(), &host.octets(), &[128, 0, 0, 0, 0, 9, 0, 1]];
            let message = [&[2, 0, 0, 0, 0, 0, 5, 0][..], &quoted.concat()].concat();
            let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
            socket.send_to(&message, &SocketAddrV6::new(own, 0, 0, 0).into()).map(drop)
        })?;
        let way = "ip -6 route get fd00::2";
        eventually(&near, way, |shown| shown.contains("mtu 1280"));
        near.netlink()?.forget_path(host)?;
        assert!(!tool(&near, way).contains("mtu"), "{}", tool(&near, way));
        Ok(())
    });
}

#[test]
fn forged_path_mtu_is_removed_and_reported_when_repeated() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let attacker = lab.host(66, "evil")?;
        let (victim, peer) = (&cluster.hosts[0], &cluster.hosts[1]);
        let way = format!("ip route get {} from {}", peer.ip, victim.ip);
        for mtu in [552, 1_000] {
            wait_until("the kernel does not accept it", TIMEOUT, || {
                send_forged_report(&attacker.netns, victim, peer, mtu).is_ok()
                    && tool(&victim.netns, &way).contains(&format!("mtu {mtu}"))
            });
            eventually(&victim.netns, &way, |shown| !shown.contains("mtu"));
            assert!(!tool(&victim.netns, "ip route show proto 73").contains("mtu"));
        }
        let large = format!("ping -c 1 -W 2 -M do -s 1422 {}", pods[1].ip);
        wait_until("full packets do not pass", TIMEOUT, || {
            run(&victim.netns, &large).status.success()
        });
        // Repeatedly.
        let is_over = AtomicBool::new(false);
        let agent = &mut cluster.agents[0];
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let _ = send_forged_report(&attacker.netns, victim, peer, 552);
                    thread::sleep(Duration::from_millis(200));
                }
            });
            let named = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                wait_until("it is not reported", TIMEOUT, || {
                    has_problem(agent, "forges ICMP type 3")
                });
            }));
            is_over.store(true, Ordering::Relaxed);
            named.expect("it is reported");
        });
        wait_until("it is still reported", TIMEOUT, || !has_problem(agent, "forges ICMP type 3"));
        Ok(())
    });
}

#[test]
fn path_mtu_reported_by_a_pod_is_ignored() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let (victim, peer) = (&cluster.hosts[0], &cluster.hosts[1]);
        let gateway = Ipv4Addr::from(u32::from(pods[0].ip) & !0xff | 1);
        let way = format!("ip route get {}", peer.ip);
        for pod in &pods {
            let answers = format!("ping -c 1 -W 1 {gateway}");
            eventually(&pod.netns, &answers, |said| said.contains(" 0% packet loss"));
            for _ in 0..3 {
                send_forged_report_to(gateway, &pod.netns, victim, peer, 552)?;
            }
            // The echoes arrive after the reports, so the reports have been processed.
            eventually(&pod.netns, &answers, |said| said.contains(" 0% packet loss"));
            assert!(!tool(&victim.netns, &way).contains("mtu"), "{}", pod.ip);
        }
        Ok(())
    });
}

#[test]
fn path_mtu_to_a_pod_reported_to_its_peers_host_is_ignored() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let attacker = lab.host(66, "evil")?;
        let gateway = |pod: &Pod| Ipv4Addr::from(u32::from(pod.ip) & !0xff | 1);
        for (what, sender, victim, to, about) in [
            ("from a pod to its own host", &pods[0].netns, 0, gateway(&pods[0]), pods[1].ip),
            ("through the tunnel", &pods[0].netns, 1, gateway(&pods[1]), pods[0].ip),
            ("from the underlay", &attacker.netns, 0, cluster.hosts[0].ip, pods[1].ip),
        ] {
            let answers = format!("ping -c 1 -W 1 {to}");
            eventually(sender, &answers, |said| said.contains(" 0% packet loss"));
            for _ in 0..3 {
                sender.run(|| {
                    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
                    let report = pod_path_mtu_report(to, about, 68);
                    socket.send_to(&report, &SocketAddrV4::new(to, 0).into()).map(drop)
                })?;
            }
            // The echoes arrive after the reports, so the reports have been processed.
            eventually(sender, &answers, |said| said.contains(" 0% packet loss"));
            let route = tool(&cluster.hosts[victim].netns, &format!("ip route get {about}"));
            assert!(!route.contains("mtu"), "{what}: {route}");
        }
        Ok(())
    });
}

#[test]
fn ipv6_path_mtu_to_a_pod_reported_to_its_peers_host_is_ignored() {
    isolated(|lab| {
        let mut cluster = Cluster::start_with(lab, 2, &["--network6", "fd42::/48"])?;
        let pods = cluster.pods()?;
        let mut addresses = Vec::new();
        for ((agent, pod), host) in cluster.agents.iter_mut().zip(&pods).zip(&cluster.hosts) {
            let host = &host.netns;
            let status = agent.wait_converged(2, TIMEOUT)?;
            let subnet = status["subnet6"].as_str().expect("a subnet").to_owned();
            let prefix = subnet.split('/').next().expect("a prefix").to_owned();
            let (gateway, address) = (format!("{prefix}1"), format!("{prefix}99"));
            tool(host, &format!("ip addr add {gateway}/64 dev pods nodad"));
            tool(&pod.netns, &format!("ip addr add {address}/64 dev eth0 nodad"));
            tool(&pod.netns, &format!("ip -6 route add default via {gateway}"));
            addresses.push((gateway.parse::<Ipv6Addr>()?, address.parse::<Ipv6Addr>()?));
        }
        let [(gateway, own), (_, about)] = addresses[..] else { unreachable!("two hosts") };
        for in_fragments in [false, true] {
            let answers = format!("ping -c 1 -W 1 {gateway}");
            eventually(&pods[0].netns, &answers, |said| said.contains(" 0% packet loss"));
            for packet in pod_path_mtu_report6(own, gateway, about, in_fragments) {
                pods[0].netns.run(|| {
                    let raw = Some(Protocol::from(255));
                    let socket = Socket::new(Domain::IPV6, Type::RAW, raw)?;
                    let to = SocketAddrV6::new(gateway, 0, 0, 0);
                    socket.send_to(&packet, &to.into()).map(drop)
                })?;
            }
            eventually(&pods[0].netns, &answers, |said| said.contains(" 0% packet loss"));
            let route = tool(&cluster.hosts[0].netns, &format!("ip -6 route get {about}"));
            assert!(!route.contains("mtu"), "fragments {in_fragments}: {route}");
        }
        Ok(())
    });
}

#[test]
fn path_mtu_reported_by_a_pod_to_another_pod_is_ignored() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let [attacker, victim, _] = &spaces[..] else { unreachable!("three namespaces") };
        let runtime = Runtime::new(&agent);
        let mut addresses = Vec::new();
        for (name, space) in ["a", "b", "c"].into_iter().zip(&spaces) {
            let address: Ipv4Addr = address(&runtime.add(name)).parse()?;
            let ipv6 = tool(space, "ip -6 -o addr show dev eth0 scope global");
            let ipv6 = ipv6.split_whitespace().find_map(|word| word.strip_suffix("/64"));
            addresses.push((address, ipv6.expect("an address").parse::<Ipv6Addr>()?));
        }
        let [(own, own6), (to, to6), (about, about6)] = addresses[..] else {
            unreachable!("three pods")
        };
        // The kernel takes a report about a datagram of any of its sockets. The report names this port.
        let socket = victim.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0xc000)))?;
        for in_fragments in [false, true] {
            attacker.run(|| {
                let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
                raw.send_to(&path_mtu_report(to, about, 600), &SocketAddrV4::new(to, 0).into())?;
                let raw = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::from(255)))?;
                let receiver = SocketAddrV6::new(to6, 0, 0, 0).into();
                let packets = pod_path_mtu_report6(own6, to6, about6, in_fragments);
                packets.iter().try_for_each(|packet| raw.send_to(packet, &receiver).map(drop))
            })?;
            // The echoes arrive after the reports, so the reports have been processed.
            for to in [to.to_string(), to6.to_string()] {
                let echoes = format!("ping -c 1 -W 1 {to}");
                eventually(attacker, &echoes, |said| said.contains(" 0% packet loss"));
            }
            let route = tool(victim, &format!("ip route get {about}"));
            assert!(!route.contains("mtu"), "{route}");
            let route = tool(victim, &format!("ip -6 route get {about6}"));
            assert!(!route.contains("mtu"), "fragments {in_fragments}: {route}");
        }
        // A pod still reports that a datagram to it found no socket.
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.connect((own, 9))?;
        socket.send(b"to a closed port")?;
        let error = socket.recv(&mut [0; 8]).expect_err("no socket answers");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        Ok(())
    });
}

#[test]
fn pod_learns_the_smaller_mtu_of_a_peer_in_direct_mode() {
    isolated(|lab| {
        let mut cluster = Cluster::start_with(lab, 2, &["--mode", "host-gw"])?;
        let mut pods = Vec::new();
        for ((host, agent), mtu) in
            cluster.hosts.iter().zip(&mut cluster.agents).zip([1_500, 1_400])
        {
            let status = agent.wait_converged(2, TIMEOUT)?;
            pods.push(host.pod(Agent::subnet(&status)?, mtu)?);
        }
        let large = format!("ping -c 1 -W 1 -M do -s 1472 {}", pods[1].ip);
        let route = format!("ip route get {}", pods[1].ip);
        wait_until("the pod does not learn the MTU", TIMEOUT, || {
            run(&pods[0].netns, &large);
            tool(&pods[0].netns, &route).contains("mtu 1400")
        });
        assert!(!tool(&cluster.hosts[0].netns, &route).contains("mtu"));
        Ok(())
    });
}

#[test]
fn mtu_of_a_local_route_is_used_and_not_reported_as_forged() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _pods = cluster.pods()?;
        let (host, peer) = (&cluster.hosts[0].netns, cluster.hosts[1].ip);
        tool(host, &format!("ip route add {peer} dev eth0 mtu 1300"));
        let overlay = "ip route show proto 73 dev gossamer.1";
        eventually(host, overlay, |shown| shown.contains("mtu 1250"));
        // Longer than a reported MTU is under test.
        let agent = &mut cluster.agents[0];
        for _ in 0..50 {
            assert!(!has_problem(agent, "forges"), "{}", agent.log());
            thread::sleep(Duration::from_millis(100));
        }
        assert!(tool(host, overlay).contains("mtu 1250"));
        tool(host, &format!("ip route del {peer} dev eth0 mtu 1300"));
        eventually(host, overlay, |shown| !shown.contains("mtu"));
        Ok(())
    });
}

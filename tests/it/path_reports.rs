//! Forged ICMP messages "fragmentation needed", sent by a host that sees none of the traffic.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use gossamer::lab::{Host, NetNs};
use socket2::{Domain, Protocol, Socket, Type};

use crate::common::{
    Cluster, TIMEOUT, checksum, eventually, has_problem, isolated, run, tool, wait_until,
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

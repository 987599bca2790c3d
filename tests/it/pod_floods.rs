//! Pods that use up shared resources of their host: the agent's memory stays small, it serves other pods,
//! and a full resource is reported.

use std::{io, net::Ipv4Addr};

use gossamer::{
    lab::{NetNs, memory_mib},
    netlink::{Netlink, Request, monitor::Monitor},
};
use rtnetlink::{LinkUnspec, packet_route::RouteNetlinkMessage};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        Cluster, TIMEOUT, eventually, has_problem, isolated, resume, sh, suspend, wait_until,
    },
};

/// Sets an interface of this thread's namespace down and up, `times` times.
fn set_down_and_up(netlink: &mut Netlink, name: &str, times: usize) -> io::Result<()> {
    let index = netlink.index_of(name)?;
    let set = |link: rtnetlink::LinkMessageBuilder<LinkUnspec>| Request {
        message: RouteNetlinkMessage::SetLink(link.build()),
        flags: 0,
    };
    for _ in 0..times {
        let link = || LinkUnspec::new_with_index(index);
        let refused = netlink.apply(vec![set(link().down()), set(link().up())])?;
        refused.first().map_or(Ok(()), |refused| Err(refused.to_io()))?;
    }
    Ok(())
}

#[test]
fn pod_that_flaps_its_interface_does_not_grow_the_agents_memory() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let (agent, host) = (&cluster.agents[0], &cluster.hosts[0].netns);
        let spaces = namespaces(&["a", "b"])?;
        let given = Runtime::new(agent).add("a");
        let peak = || memory_mib(agent.pid(), "VmHWM:");
        let before = peak();
        // More events than the agent's sockets hold, so it finds them overrun.
        suspend(agent)?;
        spaces[0].run(|| set_down_and_up(&mut Netlink::open()?, "eth0", 10_000))?;
        resume(agent)?;
        Runtime::new(agent).add("b");
        let gateway = given["ips"][0]["gateway"].as_str().expect("a gateway");
        eventually(&spaces[0], &format!("ping -c 1 -W 2 {gateway}"), |said| {
            said.contains(" 1 received")
        });
        eventually(host, "ip -o link show type veth master gsm0 up", |shown| {
            shown.lines().filter(|line| line.contains(": gsm")).count() >= 2
        });
        let after = peak();
        assert!(after < before + 12.0, "{before:.1} MiB before, {after:.1} after");
        Ok(())
    });
}

#[test]
fn notifications_beyond_the_limit_of_one_read_come_with_the_next() {
    isolated(|_| {
        NetNs::unnamed("flapping")?.run(|| {
            let (mut monitor, mut netlink) = (Monitor::of_interfaces()?, Netlink::open()?);
            set_down_and_up(&mut netlink, "lo", 1_000)?;
            let mut turns = Vec::new();
            loop {
                let mut count = 0;
                let overrun = monitor.read(|_| count += 1)?;
                assert!(!overrun, "{turns:?}");
                if count == 0 {
                    break;
                }
                turns.push(count);
            }
            assert!(turns.len() > 1 && turns.iter().all(|count| *count <= 1_024), "{turns:?}");
            assert!(turns.iter().sum::<usize>() >= 2_000, "{turns:?}");
            Ok(())
        })?;
        Ok(())
    });
}

/// Sends the first fragments of `count` UDP datagrams, without the remaining fragments.
fn send_first_fragments(netns: &NetNs, from: Ipv4Addr, to: Ipv4Addr, count: u16) -> io::Result<()> {
    netns.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP))?;
        socket.set_header_included_v4(true)?;
        for id in 0..count {
            let [high, low] = id.to_be_bytes();
            // "More fragments", TTL, UDP; the kernel fills in length and checksum.
            let head = [0x45, 0, 0, 0, high, low, 0x20, 0, 64, 17, 0, 0];
            let packet = [&head[..], &from.octets(), &to.octets(), &[0; 1_000]].concat();
            socket.send_to(&packet, &std::net::SocketAddrV4::new(to, 0).into())?;
        }
        Ok(())
    })
}

#[test]
fn fragment_memory_filled_by_a_pod_is_reported() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a"])?;
        let given = Runtime::new(&cluster.agents[0]).add("a");
        let gateway: Ipv4Addr = given["ips"][0]["gateway"].as_str().expect("a gateway").parse()?;
        let own: Ipv4Addr = address(&given).parse()?;
        sh(
            &cluster.hosts[0].netns,
            "sysctl -qw net.ipv4.ipfrag_low_thresh=200000 && \
             sysctl -qw net.ipv4.ipfrag_high_thresh=300000",
        );
        let agent = &mut cluster.agents[0];
        wait_until("it is not reported", TIMEOUT, || {
            send_first_fragments(&spaces[0], own, gateway, 600).expect("sent");
            has_problem(agent, "the kernel's memory for IPv4 fragments is full")
        });
        Ok(())
    });
}

/// The agent's own pod must have room for the fragments of other hosts.
#[test]
fn fragments_of_a_pod_do_not_reach_the_agents_own_pod() {
    isolated(|lab| {
        let cluster = Cluster::start_with(lab, 1, &["--network6", "fd42::/48"])?;
        let spaces = namespaces(&["a"])?;
        let given = Runtime::new(&cluster.agents[0]).add("a");
        for (number, separator, places) in [(0, '.', ["1", "254"]), (1, ':', ["1", "fe"])] {
            let given = given["ips"][number]["address"].as_str().expect("an address");
            let (subnet, _) = given.rsplit_once(separator).expect("an address");
            let [gateway, own] = places.map(|place| format!("{subnet}{separator}{place}"));
            let ping = |size: u32, to: &str, said: &str| {
                let command = format!("ping -c 2 -i 0.2 -W 1 -s {size} {to}");
                eventually(&spaces[0], &command, |shown| shown.contains(said));
            };
            ping(56, &own, " 0% packet loss");
            ping(3_000, &own, "100% packet loss");
            ping(3_000, &gateway, " 0% packet loss");
            // The data of a later fragment is no ICMP header of these types.
            for pattern in ["03", "0304", "0b00", "0c04", "01", "0200"] {
                let command = format!("ping -c 2 -i 0.2 -W 1 -s 3000 -p {pattern} {gateway}");
                eventually(&spaces[0], &command, |shown| shown.contains(" 0% packet loss"));
            }
        }
        Ok(())
    });
}

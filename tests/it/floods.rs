//! Pods that use what their host has for all: the agent stays small and serves others, and what is full is
//! named.

use std::{io, net::Ipv4Addr};

use gossamer::{
    lab::{NetNs, memory_mib},
    netlink::{Netlink, Request, monitor::Monitor},
};
use rtnetlink::{LinkUnspec, packet_route::RouteNetlinkMessage};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    cni::{Runtime, address, namespaces},
    common::{Cluster, PATIENCE, eventually, freeze, has_problem, isolated, sh, thaw, wait_until},
};

/// Sets an interface of this thread's namespace down and up, so often.
fn flap(netlink: &mut Netlink, name: &str, times: usize) -> io::Result<()> {
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
fn pod_that_sets_its_interface_down_and_up_takes_no_memory_of_the_agent() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let (agent, host) = (&cluster.agents[0], &cluster.hosts[0].netns);
        let spaces = namespaces(&["a", "b"])?;
        let given = Runtime::new(agent).add("a");
        let peak = || memory_mib(agent.pid(), "VmHWM:");
        let before = peak();
        // More than its sockets hold: it finds them full.
        freeze(agent)?;
        spaces[0].run(|| flap(&mut Netlink::open()?, "eth0", 10_000))?;
        thaw(agent)?;
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
fn changes_that_are_more_than_one_turn_takes_come_with_the_next() {
    isolated(|_| {
        NetNs::unnamed("flapping")?.run(|| {
            let (mut monitor, mut netlink) = (Monitor::of_interfaces()?, Netlink::open()?);
            flap(&mut netlink, "lo", 1_000)?;
            let mut turns = Vec::new();
            loop {
                let mut told = 0;
                let overrun = monitor.read(|_| told += 1)?;
                assert!(!overrun, "{turns:?}");
                if told == 0 {
                    break;
                }
                turns.push(told);
            }
            assert!(turns.len() > 1 && turns.iter().all(|told| *told <= 1_024), "{turns:?}");
            assert!(turns.iter().sum::<usize>() >= 2_000, "{turns:?}");
            Ok(())
        })?;
        Ok(())
    });
}

/// Sends the first fragments of so many UDP datagrams, and nothing more of them.
fn send_first_fragments(netns: &NetNs, from: Ipv4Addr, to: Ipv4Addr, count: u16) -> io::Result<()> {
    netns.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP))?;
        socket.set_header_included_v4(true)?;
        for id in 0..count {
            let [high, low] = id.to_be_bytes();
            // "More fragments", time to live, UDP; the kernel fills in length and checksum.
            let head = [0x45, 0, 0, 0, high, low, 0x20, 0, 64, 17, 0, 0];
            let packet = [&head[..], &from.octets(), &to.octets(), &[0; 1_000]].concat();
            socket.send_to(&packet, &std::net::SocketAddrV4::new(to, 0).into())?;
        }
        Ok(())
    })
}

#[test]
fn memory_for_fragments_that_a_pod_fills_is_named() {
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
        wait_until("it is not told", PATIENCE, || {
            send_first_fragments(&spaces[0], own, gateway, 600).expect("sent");
            has_problem(agent, "the kernel's memory for IPv4 fragments is full")
        });
        Ok(())
    });
}

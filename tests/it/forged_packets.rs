//! Forged packets of pods: past the bridge's rules to their host, and to addresses of no lease.

use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
    time::Duration,
};

use gossamer::lab::{Agent, Host, NetNs, Pinger};

use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        TIMEOUT, eventually, isolated, link_socket, program, status_where, token_of, tool,
        wait_until,
    },
};

const PORT: u16 = 5_555;

/// Returns the source of the next datagram at a host's socket, or None on a timeout.
fn next_source(socket: &UdpSocket) -> Option<Ipv4Addr> {
    let mut bytes = [0; 64];
    match socket.recv_from(&mut bytes) {
        Ok((_, from)) => Some(from.ip().to_string().parse().expect("IPv4")),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

fn send_from(netns: &NetNs, source: Ipv4Addr, to: Ipv4Addr) {
    let sent = netns.run(|| UdpSocket::bind((source, 0))?.send_to(b"from a pod", (to, PORT)));
    sent.expect("sent");
}

#[test]
fn frame_of_a_pod_to_a_link_local_group_is_dropped() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent =
            Agent::start(program(), &host, &["--init", "--prefer-subnet", "10.42.7.0"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a"])?;
        let own: Ipv4Addr = address(&Runtime::new(&agent).add("a")).parse()?;
        let (gateway, forged) = (Ipv4Addr::new(10, 42, 7, 1), Ipv4Addr::new(192, 0, 2, 9));
        tool(&spaces[0], &format!("ip addr add {forged}/32 dev eth0"));
        let socket = host.netns.run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
            Ok(socket)
        })?;
        wait_until("the host receives nothing from its pod", TIMEOUT, || {
            send_from(&spaces[0], own, gateway);
            next_source(&socket) == Some(own)
        });
        while next_source(&socket).is_some() {}
        // Frames to these groups pass the bridge on a separate path (IEEE 802.1D, 7.12.6).
        for group in ["01:80:c2:00:00:02", "01:80:c2:00:00:0e"] {
            let claim = format!("ip neigh replace {gateway} lladdr {group} dev eth0 nud permanent");
            tool(&spaces[0], &claim);
            for source in [forged, own] {
                send_from(&spaces[0], source, gateway);
                assert_eq!(next_source(&socket), None, "{source} by {group}");
            }
        }
        tool(&spaces[0], &format!("ip neigh del {gateway} dev eth0"));
        wait_until("the host no longer receives packets of its pod", TIMEOUT, || {
            send_from(&spaces[0], own, gateway);
            next_source(&socket) == Some(own)
        });
        Ok(())
    });
}

#[test]
fn senders_of_arp_requests_to_link_local_groups_do_not_become_neighbors() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let overlay = ["--init", "--prefer-subnet", "10.42.7.0"];
        let mut agent = Agent::start(program(), &host, &overlay)?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a"])?;
        Runtime::new(&agent).add("a");
        let links = tool(&host.netns, "ip -br link show type veth");
        let mut names = links.lines().filter_map(|line| line.split(['@', ' ']).next());
        let port = names.find(|name| name.starts_with("gsm")).expect("the pod's port");
        let (socket, mac) = link_socket(&spaces[0])?;
        let answers = "ping -c 1 -W 1 10.42.7.1";
        eventually(&spaces[0], answers, |said| said.contains(" 0% packet loss"));
        // The sysctls of the port are set after the pod is connected.
        wait_until("the host stores the senders as neighbors", TIMEOUT, || {
            tool(&host.netns, &format!("ip -4 neigh flush dev {port}"));
            for number in 1..=20 {
                let group = [1, 0x80, 0xc2, 0, 0, 0x0e];
                let head = [&group[..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac].concat();
                let addresses = [11, 0, 0, number, 0, 0, 0, 0, 0, 0, 10, 42, 7, 1];
                socket.send(&[&head[..], &addresses].concat()).expect("sent");
            }
            // The answer arrives after the requests, so the requests have been processed.
            eventually(&spaces[0], answers, |said| said.contains(" 0% packet loss"));
            tool(&host.netns, &format!("ip -4 neigh show dev {port} nud all")).is_empty()
        });
        // The host still knows its pod on the bridge.
        assert!(tool(&host.netns, "ip -4 neigh show dev gsm0").contains("10.42.7.2"));
        Ok(())
    });
}

/// The kernel takes another host's duplicate address detection for an address as a conflict, while it
/// checks this address itself.
#[test]
fn pod_cannot_block_the_address_of_another_by_duplicate_address_detection() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&agent);
        runtime.add("a");
        runtime.add("b");
        let [victim, other] = &spaces[..] else { unreachable!("two namespaces") };
        let own = |text: &str| -> Option<String> {
            let at = text.split_whitespace().skip_while(|word| *word != "inet6").nth(1)?;
            Some(at.to_owned())
        };
        let of_link = "ip -6 -o addr show dev eth0 scope link";
        let address = own(&tool(victim, of_link)).expect("a link-local address");
        // The victim's detection takes long, and the other pod's starts at once.
        for (space, name, value) in
            [(victim, "dad_transmits", "8"), (other, "router_solicitation_delay", "0")]
        {
            space.sysctl(&format!("net/ipv6/conf/eth0/{name}"), value)?;
        }
        tool(victim, "ip link set eth0 down");
        tool(victim, "ip link set eth0 up");
        eventually(victim, of_link, |text| text.contains(&address) && text.contains("tentative"));
        for _ in 0..3 {
            tool(other, &format!("ip -6 addr add {address} dev eth0"));
            std::thread::sleep(Duration::from_millis(300));
            assert!(tool(victim, of_link).contains("tentative"), "too slow to see anything");
            tool(other, &format!("ip -6 addr del {address} dev eth0"));
        }
        let found = eventually(victim, of_link, |text| {
            text.contains("dadfailed") || !text.contains("tentative")
        });
        assert!(!found.contains("dadfailed"), "{found}");
        Ok(())
    });
}

/// Returns the number of neighbors that the kernel resolves on the overlay's device.
fn resolving_neighbors(host: &Host) -> usize {
    tool(&host.netns, "ip neigh show dev gossamer.1")
        .lines()
        .filter(|line| line.ends_with("INCOMPLETE") || line.ends_with("FAILED"))
        .count()
}

#[test]
fn packets_to_unleased_subnets_create_no_neighbors_in_on_demand_mode() {
    isolated(|lab| {
        let hosts = [lab.host(1, "n1")?, lab.host(2, "n2")?];
        let on_demand = ["--program", "on-demand"];
        let first = [&["--init", "--prefer-subnet", "10.42.7.0"][..], &on_demand].concat();
        let mut first = Agent::start(program(), &hosts[0], &first)?;
        first.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a", "b"])?;
        let own: Ipv4Addr = address(&Runtime::new(&first).add("a")).parse()?;
        let flood = || {
            spaces[0].run(|| {
                let socket = UdpSocket::bind((own, 0))?;
                let subnets = (1..=250).filter(|subnet| ![7, 9].contains(subnet));
                for to in subnets.flat_map(|subnet| (2..8).map(move |at| [10, 42, subnet, at])) {
                    // The kernel eventually reports that none of them is reachable.
                    let _ = socket.send_to(b"x", (Ipv4Addr::from(to), PORT));
                }
                Ok(())
            })
        };
        flood()?;
        assert_eq!(resolving_neighbors(&hosts[0]), 0);
        // A host that joins later is reached all the same.
        let (token, seed) = (token_of(&mut first)?, hosts[0].ip.to_string());
        let second = ["--join", &seed, "--token", &token, "--prefer-subnet", "10.42.9.0"];
        let mut second = Agent::start(program(), &hosts[1], &[&second[..], &on_demand].concat())?;
        second.wait_converged(2, TIMEOUT)?;
        first.wait_converged(2, TIMEOUT)?;
        let pod: Ipv4Addr = address(&Runtime::new(&second).add("b")).parse()?;
        assert_eq!(pod.octets()[..3], [10, 42, 9]);
        let mut pinger = Pinger::new(&spaces[0])?;
        wait_until("the new host's pod is not reached", TIMEOUT, || {
            pinger.ping(pod, Duration::from_secs(1)).is_ok_and(|got| got.is_some())
        });
        flood()?;
        assert_eq!(resolving_neighbors(&hosts[0]), 0);
        // Its subnet has no lease any more.
        second.leave()?;
        first.wait_converged(1, TIMEOUT)?;
        wait_until("the subnet is not refused", TIMEOUT, || {
            let _ = pinger.ping(pod, Duration::from_millis(200));
            resolving_neighbors(&hosts[0]) == 0
        });
        tool(&hosts[0].netns, "nft delete table inet gossamer.1");
        status_where(&mut first, |status| {
            status["kernel"]["repairs"]["firewall"].as_u64() >= Some(1)
        });
        assert!(tool(&hosts[0].netns, "nft list table inet gossamer.1").contains("@leases4"));
        Ok(())
    });
}

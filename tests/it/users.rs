//! Users of a host who are not root: they send no tunnel packets of their own, and reach pods as ever.

use std::{
    fs, io,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use gossamer::lab::{Agent, Host, NetNs};
use nix::{
    libc::MSG_MORE,
    unistd::{Uid, setfsuid},
};

use crate::{
    common::{
        Cluster, PATIENCE, checksum, echoes, eventually, isolated, run, sh, skipped, status_where,
        tool, wait_until,
    },
    families,
};

const USER: &str = "setpriv --reuid 1234 --regid 1234 --clear-groups";

/// Whether a user, or root, can send what is in a file as one datagram.
fn sends(netns: &NetNs, as_whom: &str, file: &str, to: &str, port: u16) -> bool {
    let script = format!("/bin/cat<{file}>/dev/udp/{to}/{port}");
    run(netns, &format!("{as_whom} bash -c {script}")).status.success()
}

/// A tunnel packet with an echo request in the name of a pod that is nowhere.
fn forgery(mac: &str, to: [u8; 4]) -> Vec<u8> {
    let mac: Vec<u8> = mac.split(':').map(|b| u8::from_str_radix(b, 16).expect("hex")).collect();
    let mut echo = vec![8, 0, 0, 0, 0, 1, 0, 1];
    let sum = checksum(&echo).to_be_bytes();
    echo[2..4].copy_from_slice(&sum);
    let mut ip = vec![0x45, 0, 0, 28, 0, 1, 0, 0, 64, 1, 0, 0, 10, 42, 254, 9];
    ip.extend(to);
    let sum = checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    let vxlan = [8, 0, 0, 0, 0, 0, 1, 0];
    [&vxlan[..], &mac, &[2, 0, 0, 0, 0, 9, 8, 0], &ip, &echo].concat()
}

/// Sends datagrams from a host to all of its neighbors: to a group and by broadcast.
fn send_to_all(host: &Host, bytes: &[u8], port: u16) {
    let sent = host.netns.run(|| {
        let socket = UdpSocket::bind((host.ip, 0))?;
        socket.set_broadcast(true)?;
        socket2::SockRef::from(&socket).set_multicast_if_v4(&host.ip)?;
        let [a, b, ..] = host.ip.octets();
        for to in [[224, 0, 0, 1], [a, b, 255, 255], [255; 4]].map(Ipv4Addr::from) {
            socket.send_to(bytes, (to, port))?;
        }
        io::Result::Ok(())
    });
    sent.expect("sent");
}

#[test]
fn tunnel_packets_to_several_hosts_are_dropped_and_counted_though_a_member_sends_them() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let link = tool(&cluster.hosts[1].netns, "ip -br link show gossamer.1");
        let mac = link.split_whitespace().nth(2).expect("a MAC");
        let forgery = forgery(mac, pods[1].ip.octets());
        send_to_all(&cluster.hosts[0], &forgery, 8472);
        status_where(&mut cluster.agents[1], |status| {
            status["kernel"]["strangers_dropped"].as_u64() == Some(3)
        });
        assert_eq!(echoes(&pods[1].netns), 0, "let in");
        // Networks of others may use groups at this port.
        let mut of_others = forgery;
        of_others[6] = 9;
        send_to_all(&cluster.hosts[0], &of_others, 8472);
        assert!(run(&pods[0].netns, &format!("ping -c 1 -W 2 {}", pods[1].ip)).status.success());
        let status = cluster.agents[1].ask("/v1/status", PATIENCE)?;
        assert_eq!(status["kernel"]["strangers_dropped"].as_u64(), Some(3));
        Ok(())
    });
}

#[test]
fn user_of_a_host_cannot_speak_as_a_pod_and_reaches_pods() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = &cluster.hosts[0].netns;
        if !run(host, &format!("{USER} true")).status.success() {
            skipped("users", "there are no users but root here");
            return Ok(());
        }
        let link = tool(&cluster.hosts[1].netns, "ip -br link show gossamer.1");
        let mac = link.split_whitespace().nth(2).expect("a MAC");
        let victim = pods[1].ip.octets();
        let file = readable(&forgery(mac, victim))?;
        let path = file.path().display().to_string();
        let peer = cluster.hosts[1].ip.to_string();

        // What root can do in any case, to see that the forgery is one.
        assert!(sends(host, "env", &path, &peer, 8472));
        wait_until("the forgery is none", PATIENCE, || echoes(&pods[1].netns) == 1);
        let way = |words: &str| tool(host, &format!("ip route get {peer} {words}"));
        // Also where the user names the interface, packets come back to this host.
        for (port, user, is_back) in [(8472, 1234, true), (8474, 1234, false), (8472, 0, false)] {
            for output in ["", "oif eth0"] {
                let way = way(&format!("{output} uid {user} ipproto udp dport {port}"));
                assert_eq!(way.starts_with("local"), is_back, "{way}");
                assert_eq!(way.contains("src 127.0.0.1"), is_back, "{way}");
            }
        }
        sends(host, USER, &path, &peer, 8472);
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["strangers_dropped"].as_u64() == Some(1)
        });
        assert!(sends(host, USER, &path, &peer, 8474));
        assert!(sends(host, USER, &path, &pods[1].ip.to_string(), 9));
        assert!(run(host, &format!("{USER} ping -c 1 -W 2 {}", pods[1].ip)).status.success());
        assert_eq!(echoes(&pods[1].netns), 2);

        // It is put right, and says that another program was at it.
        let is_there = |shown: &str| {
            shown.contains("lookup 847273 proto 73") && shown.contains("prohibit proto 73")
        };
        eventually(host, "ip rule show", is_there);
        tool(host, "ip rule del pref 73");
        eventually(host, "ip rule show", is_there);
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["repairs"]["firewall"].as_u64() == Some(1)
        });
        tool(host, "ip rule del pref 72");
        eventually(host, "ip rule show", is_there);
        let routes = "ip route show table 847273";
        tool(host, "ip route flush table 847273");
        eventually(host, routes, |shown| shown.contains("local default dev eth0"));
        // Interfaces come and go.
        tool(host, "ip link add later type bridge");
        tool(host, "ip link set later up");
        eventually(host, routes, |shown| shown.contains("local default dev later"));
        tool(host, "ip link set later down");
        tool(host, "ip link set later up");
        eventually(host, routes, |shown| shown.contains("local default dev later"));
        cluster.restart(0, &["--guard", "false"])?;
        eventually(&cluster.hosts[0].netns, "ip rule show", |shown| !is_there(shown));
        cluster.restart(0, &[])?;
        eventually(&cluster.hosts[0].netns, "ip rule show", is_there);
        let leaver: &mut Agent = &mut cluster.agents[0];
        leaver.leave()?;
        assert!(!tool(&cluster.hosts[0].netns, "ip rule show").contains("proto 73"));
        let left = run(&cluster.hosts[0].netns, routes).stdout;
        assert!(left.is_empty(), "{}", String::from_utf8_lossy(&left));
        Ok(())
    });
}

/// A file that users may read; its bytes are what they send.
fn readable(bytes: &[u8]) -> io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::Builder::new().tempfile()?;
    file.write_all(bytes)?;
    fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    Ok(file)
}

/// Classes of queueing disciplines (HTB, say) are chosen by all bits of the priority.
#[test]
fn packets_of_users_keep_the_class_that_rules_of_others_give_them() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = &cluster.hosts[0].netns;
        if !run(host, &format!("{USER} true")).status.success() {
            skipped("packets_of_users_keep_their_class", "there are no users but root here");
            return Ok(());
        }
        let other = NetNs::new("other")?;
        sh(
            host,
            "ip link add br9 type bridge && ip addr add 10.9.0.1/24 dev br9 && \
             ip link add port9 type veth peer name eth0 netns other && \
             ip link set port9 master br9 up && ip link set br9 up && \
             ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:09 dev br9 && \
             nft add table inet class && \
             nft add chain inet class out { type filter hook output priority 0 ; } && \
             nft add rule inet class out udp dport 9 meta priority set 1:10 && \
             nft add rule inet class out oifname gossamer.1 meta priority set 1:8010 && \
             nft add rule inet class out udp dport 8472 meta priority 1:8010 counter && \
             nft add table bridge seen && \
             nft add chain bridge seen out { type filter hook postrouting priority 0 ; } && \
             nft add rule bridge seen out ip daddr 10.9.0.2 udp dport 9 meta priority 1:10 counter && \
             nft add rule bridge seen out ip daddr 10.9.0.2 udp dport 7 meta priority 0:0 counter",
        );
        tool(&other, "ip link set eth0 up");
        eventually(host, "bridge link show dev port9", |text| text.contains("state forwarding"));
        eventually(host, "nft list table inet gossamer.1", |text| text.contains("chain users"));
        let file = readable(b"x")?;
        let path = file.path().display().to_string();
        for port in [9, 7] {
            assert!(sends(host, USER, &path, "10.9.0.2", port));
        }
        let seen = tool(host, "nft list table bridge seen");
        assert_eq!(seen.matches("counter packets 1 ").count(), 2, "{seen}");
        // Those of the tunnel have the class of what is inside them.
        tool(host, &format!("{USER} ping -c 1 -W 2 {}", pods[1].ip));
        let seen = tool(host, "nft list table inet class");
        assert!(seen.contains("counter packets 1 "), "{seen}");
        let status = cluster.agents[0].ask("/v1/status", PATIENCE)?;
        assert_eq!(status["kernel"]["strangers_dropped"].as_u64(), Some(0));
        Ok(())
    });
}

#[test]
fn users_send_into_tunnels_of_others_by_whatever_is_on_top_of_them() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[0].netns;
        if !run(host, &format!("{USER} true")).status.success() {
            skipped("users_send_into_tunnels_of_others", "there are no users but root here");
            return Ok(());
        }
        for (own, other) in [(0, 1), (1, 0)] {
            let remote = cluster.hosts[other].ip;
            let vxlan = |id: u8| {
                format!("ip link add vx{id} type vxlan id {id} dstport 8472 remote {remote}")
            };
            let netns = &cluster.hosts[own].netns;
            sh(
                netns,
                &format!(
                    "{} && ip link add br7 type bridge && ip link set br7 up && \
                     ip link set vx7 master br7 up && ip addr add 10.7.0.{}/24 dev br7 && \
                     {} && ip link set vx8 up && \
                     ip link add mac8 link vx8 type macvlan mode bridge && ip link set mac8 up && \
                     ip addr add 10.8.0.{}/24 dev mac8",
                    vxlan(7),
                    own + 1,
                    vxlan(8),
                    own + 1,
                ),
            );
        }
        for to in ["10.7.0.2", "10.8.0.2"] {
            wait_until(to, PATIENCE, || {
                run(host, &format!("{USER} ping -c 1 -W 1 {to}")).status.success()
            });
        }
        Ok(())
    });
}

/// Sends datagrams to the VXLAN port by a socket that has got its route by another port.
fn send_by_a_known_route(netns: &NetNs, user: u32, bytes: &[u8], to: IpAddr) -> io::Result<()> {
    netns.run(|| {
        // Of this thread alone.
        setfsuid(Uid::from_raw(user));
        let any: IpAddr = match to {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((to, 9))?;
        let other = SocketAddr::new(to, 8472);
        // In IPv6 the route of a connected socket is that of other ports, too. Some of this is refused.
        let _ = socket.send_to(bytes, other);
        // What is held back keeps its route, wherever the socket is connected to by then.
        let socket = socket2::SockRef::from(&socket);
        socket.send_with_flags(bytes, MSG_MORE)?;
        let _ = socket.connect(&other.into());
        let _ = socket.send(&[]);
        Ok(())
    })
}

/// Of two hosts that reach each other under these addresses.
fn no_user_speaks_as_a_pod(
    hosts: &[Host; 2],
    underlays: [&str; 2],
    test: &str,
) -> anyhow::Result<()> {
    let mut agents = families::cluster(hosts, underlays, &[])?;
    let host = &hosts[0].netns;
    if !run(host, &format!("{USER} true")).status.success() {
        skipped(test, "there are no users but root here");
        return Ok(());
    }
    let pod = hosts[1].pod(Agent::subnet(&agents[1].ask("/v1/status", PATIENCE)?)?, 1430)?;
    let link = tool(&hosts[1].netns, "ip -br link show gossamer.1");
    let forgery = forgery(link.split_whitespace().nth(2).expect("a MAC"), pod.ip.octets());
    let to = underlays[1].parse()?;
    let dropped = |agents: &mut [Agent; 2]| {
        let status = agents[0].ask("/v1/status", PATIENCE).expect("a status");
        status["kernel"]["strangers_dropped"].as_u64().unwrap_or_default()
    };
    send_by_a_known_route(host, 0, &forgery, to)?;
    wait_until("the forgery is none", PATIENCE, || echoes(&pod.netns) > 0);
    let (heard, before) = (echoes(&pod.netns), dropped(&mut agents));
    send_by_a_known_route(host, 1234, &forgery, to)?;
    wait_until("nothing is dropped", PATIENCE, || dropped(&mut agents) > before);
    assert_eq!(echoes(&pod.netns), heard, "a user speaks as a pod");
    // What the kernel puts into the tunnel for a user still belongs to the user's socket.
    let before = dropped(&mut agents);
    tool(host, &format!("{USER} ping -c 3 -i 0.2 -W 2 -s 1300 {}", pod.ip));
    assert_eq!(dropped(&mut agents), before);
    Ok(())
}

#[test]
fn user_cannot_speak_as_a_pod_by_a_socket_that_has_a_route_already() {
    isolated(|lab| {
        let hosts = [lab.host(1, "n1")?, lab.host(2, "n2")?];
        let underlays = hosts.each_ref().map(|host| host.ip.to_string());
        let test = "user_cannot_speak_as_a_pod_by_a_socket_that_has_a_route_already";
        no_user_speaks_as_a_pod(&hosts, underlays.each_ref().map(String::as_str), test)
    });
}

#[test]
fn user_cannot_speak_as_a_pod_by_a_socket_that_has_a_route_already_in_ipv6() {
    isolated(|lab| {
        let Some(hosts) = families::hosts(lab)? else { return Ok(()) };
        let test = "user_cannot_speak_as_a_pod_by_a_socket_that_has_a_route_already_in_ipv6";
        no_user_speaks_as_a_pod(&hosts, ["fd99::1", "fd99::2"], test)
    });
}

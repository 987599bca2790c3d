//! Changes by other programs and machines to a host's settings, cards and routes are reported with a
//! remedy.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use gossamer::lab::NetNs;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    cni::namespaces,
    common::{Cluster, TIMEOUT, has_problem, isolated, sh, status_where, tool, wait_until},
    forwarding::with_pods,
    misrouting_hosts::{is_healthy, wait_for_notice},
    silence_causes::{start_pair, wait_for_path, wait_for_problem},
};

/// Settings that are turned off and on repeatedly, and the report.
const SETTINGS: [(&str, &str); 3] = [
    (
        "net.ipv4.conf.gossamer/1.forwarding",
        "another program repeatedly sets net.ipv4.conf.gossamer/1.forwarding to 0",
    ),
    ("net.ipv4.ip_forward", "another program repeatedly sets net.ipv4.ip_forward to 0"),
    (
        "net.ipv6.conf.all.forwarding",
        "another program repeatedly sets net.ipv6.conf.all.forwarding to 0",
    ),
];

#[test]
fn repeatedly_disabled_forwarding_is_reported_while_enabled() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let (host, agent) = (&cluster.hosts[0].netns, &mut cluster.agents[0]);
        for (name, words) in SETTINGS {
            for _ in 0..4 {
                sh(host, &format!("sysctl -qw {name}=0 && sysctl -qw {name}=1"));
            }
            wait_until(words, TIMEOUT, || has_problem(agent, words));
        }
        Ok(())
    });
}

#[test]
fn bpf_program_on_an_overlay_interface_is_warned_of_until_removed() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let host = &cluster.hosts[1];
        // The program lets all packets pass (`TC_ACT_UNSPEC`), and needs no compiler.
        let path = host.dir.join("pass.bpf");
        std::fs::write(&path, "1,6 0 0 4294967295,")?;
        let path = path.display();
        for device in ["gossamer.1", "gsm0"] {
            sh(
                &host.netns,
                &format!(
                    "tc qdisc add dev {device} clsact && tc filter add dev {device} egress protocol all bpf \
                     direct-action bytecode-file {path}"
                ),
            );
            let words =
                format!("{device} has eBPF programs on its egress (bpf): tc filter show dev");
            wait_for_notice(
                &mut cluster.agents[1],
                &["eBPF programs may drop packets of pods that no test sends", &words],
            );
            sh(&host.netns, &format!("tc qdisc del dev {device} clsact"));
            status_where(&mut cluster.agents[1], is_healthy);
        }
        // Programs on the card belong to other software, as on each host with Cilium.
        sh(
            &host.netns,
            &format!(
                "tc qdisc add dev eth0 clsact && tc filter add dev eth0 ingress protocol all bpf \
                 direct-action bytecode-file {path}"
            ),
        );
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_secs(12) {
            let status = cluster.agents[1].ask("/v1/status", TIMEOUT)?;
            assert!(is_healthy(&status), "{status:#}");
            std::thread::sleep(Duration::from_millis(300));
        }
        Ok(())
    });
}

#[test]
fn bridged_card_that_keeps_its_address_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let (host, agent) = (&cluster.hosts[1].netns, &mut cluster.agents[1]);
        sh(
            host,
            "ip link add br0 type bridge && ip link set br0 up && ip link set eth0 master br0",
        );
        let words = "eth0 is a port of br0 and nevertheless has the address 10.99.0.11/16";
        let advice = "ip addr del 10.99.0.11/16 dev eth0; ip addr add 10.99.0.11/16 dev br0";
        wait_until(words, TIMEOUT, || has_problem(agent, words) && has_problem(agent, advice));
        advice.split("; ").for_each(|command| _ = tool(host, command));
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

#[test]
fn macvlan_that_takes_all_incoming_packets_is_reported() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let _space = namespaces(&["vm"])?;
        let host = &cluster.hosts[1].netns;
        sh(
            host,
            "ip link add mv0 link eth0 type macvlan mode passthru && ip link set mv0 netns vm && \
             ip -n vm link set mv0 up && ip neigh flush all",
        );
        let words =
            "eth0 is promiscuous and no port of a bridge. A macvlan or macvtap in mode passthru";
        wait_for_problem(&mut cluster.agents[1], &[words]);
        sh(host, "ip -n vm link del mv0");
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

/// Returns the Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes
        .chunks(2)
        .map(|start_pair| u32::from(u16::from_be_bytes([start_pair[0], start_pair[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (!(folded as u16)).to_be_bytes()
}

/// Sends an ICMP redirect (RFC 792): packets to `peer` should use this gateway.
fn redirect(
    router: &NetNs,
    host: Ipv4Addr,
    peer: Ipv4Addr,
    gateway: Ipv4Addr,
) -> anyhow::Result<()> {
    let mut packet = vec![5, 1, 0, 0];
    packet.extend(gateway.octets());
    // Quotes a packet of the agent: the kernel ignores redirects for packets that it has not sent.
    packet.extend([0x45, 0, 0, 100, 0, 1, 0, 0, 64, 17, 0, 0]);
    packet.extend(host.octets());
    packet.extend(peer.octets());
    [8473_u16, 8473, 80, 0].iter().for_each(|word| packet.extend(word.to_be_bytes()));
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum);
    let socket = router.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)))?;
    socket.send_to(&packet, &SocketAddr::from((host, 0)).into())?;
    Ok(())
}

#[test]
fn icmp_redirect_to_a_non_forwarding_machine_is_reported_and_the_advice_works() {
    isolated(|lab| {
        let mut cluster = start_pair(lab)?;
        let router = lab.host(9, "router")?;
        let (host, peer) = (&cluster.hosts[1].netns, cluster.hosts[0].ip);
        sh(&router.netns, "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0");
        sh(&router.netns, "sysctl -qw net.ipv4.conf.eth0.send_redirects=0");
        let settings = ["all", "eth0"].map(|name| {
            format!(
                "net.ipv4.conf.{name}.accept_redirects=1 net.ipv4.conf.{name}.secure_redirects=0"
            )
        });
        sh(host, &format!("sysctl -qw {}", settings.join(" ")));
        sh(
            host,
            &format!(
                "ip route add {peer} via {} dev eth0 && \
                 ip neigh add 10.99.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
                router.ip
            ),
        );
        cluster.agents.iter_mut().for_each(wait_for_path);
        let (here, there) = (cluster.hosts[1].ip, peer);
        let get = format!("ip route get {there}");
        let gateway = Ipv4Addr::new(10, 99, 0, 77);
        wait_until("the redirect was not taken", TIMEOUT, || {
            redirect(&router.netns, here, there, gateway).expect("sent");
            tool(host, &get).contains("10.99.0.77")
        });
        let words = "an ICMP redirect leads tunnel packets to n1 (10.99.0.10) by 10.99.0.77";
        let advice = "sysctl -w net.ipv4.conf.all.accept_redirects=0 \
                      net.ipv4.conf.eth0.accept_redirects=0";
        wait_for_problem(&mut cluster.agents[1], &[words, advice]);
        sh(host, &format!("{advice} && ip route flush cache"));
        cluster.agents.iter_mut().for_each(wait_for_path);
        Ok(())
    });
}

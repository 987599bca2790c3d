//! Ports of other programs on the pods' bridge are reported, and cannot use the addresses and MACs of
//! pods.

use std::time::Duration;

use gossamer::lab::{NetNs, Pinger};

use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        Cluster, TIMEOUT, checksum, eventually, has_notice, has_problem, isolated, link_socket,
        tool, wait_until,
    },
};

/// Timeout for packets that are expected to be lost.
const LOSS_TIMEOUT: Duration = Duration::from_secs(1);

#[test]
fn foreign_bridge_port_is_reported_and_cannot_spoof_pods() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b", "guest"])?;
        let socket = cluster.agents[0].socket().to_owned();
        let runtime = Runtime::at(&socket);
        let (first, second) = (runtime.add("a"), runtime.add("b"));
        let [first, taken] = [&first, &second].map(address);
        let mut interfaces = second["interfaces"].as_array().expect("a list").iter();
        let inside = interfaces.find(|one| one["name"] == "eth0").expect("its own end");
        let mac = inside["mac"].as_str().expect("a MAC");
        let host = &cluster.hosts[0].netns;
        tool(host, "ip link add guest0 type veth peer name eth0 netns guest");
        tool(host, "ip link set guest0 master gsm0 up");
        let guest = &spaces[2];
        tool(guest, "ip link set eth0 up");
        let (subnet, _) = first.rsplit_once('.').expect("dots");
        let [gateway, unused, of_agent] = [1, 200, 254].map(|last| format!("{subnet}.{last}"));
        let own = "02:00:00:00:00:77";
        let reaches = |mac: &str, ip: &str| {
            tool(guest, "ip addr flush dev eth0 scope global");
            tool(guest, &format!("ip link set eth0 address {mac}"));
            tool(guest, &format!("ip addr add {ip}/24 dev eth0"));
            let to = first.parse().expect("an address");
            let answered = Pinger::new(guest).and_then(|mut pinger| pinger.ping(to, LOSS_TIMEOUT));
            answered.expect("asked").is_some()
        };
        let agent = &mut cluster.agents[0];
        wait_until("it is not reported", TIMEOUT, || {
            has_notice(agent, "guest0 on the pods' bridge")
        });
        assert!(!has_problem(agent, "guest0"), "an intended port is no problem");
        wait_until("an address that no pod has", TIMEOUT, || reaches(own, &unused));
        assert!(!reaches(own, &taken), "the address of a pod");
        assert!(!reaches(own, &gateway), "the address of the gateway");
        assert!(!reaches(own, &of_agent), "the address of the agent's own pod");
        assert!(!reaches(mac, &unused), "the MAC of a pod");
        let ping = Pinger::new(&spaces[1])?.ping(first.parse()?, TIMEOUT)?;
        assert!(ping.is_some(), "pods are cut off");
        // Its address is free once the pod is gone.
        runtime.del("b");
        wait_until("the address of a pod that is gone", TIMEOUT, || reaches(own, &taken));
        tool(host, "ip link set guest0 nomaster");
        wait_until("it is still reported", TIMEOUT, || !has_notice(agent, "guest0"));
        Ok(())
    });
}

/// Returns a frame with an ARP request of a sender, for hardware of this type.
fn arp_request(kind: u8, mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let head = [&[0xff; 6][..], &mac, &[8, 6, 0, kind, 8, 0, 6, 4, 0, 1]].concat();
    [&head[..], &mac, &sender, &[0; 6], &target].concat()
}

/// Returns a frame with a router advertisement of a default router and a network for addresses.
fn router_advertisement(mac: [u8; 6]) -> Vec<u8> {
    let source = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xde, 0xad];
    let group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let router = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let prefix = [3, 4, 64, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x20, 1, 0xd, 0xb8, 0, 0x66];
    let mut message = [&router[..], &prefix, &[0; 10]].concat();
    let pseudo = [&source[..], &group, &[0, 0, 0, message.len() as u8, 0, 0, 0, 58], &message];
    let sum = checksum(&pseudo.concat()).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    let link = [&[0x33, 0x33, 0, 0, 0, 1][..], &mac, &[0x86, 0xdd]].concat();
    let head = [0x60, 0, 0, 0, 0, message.len() as u8, 58, 255];
    [&link[..], &head, &source, &group, &message].concat()
}

/// Linux accepts ARP for IEEE 802 networks (type 6) on Ethernet.
#[test]
fn foreign_bridge_port_gives_pods_neither_gateway_nor_routes() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b", "guest"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let [first, second] = ["a", "b"].map(|pod| address(&runtime.add(pod)));
        let host = &cluster.hosts[0].netns;
        tool(host, "ip link add guest0 type veth peer name eth0 netns guest");
        tool(host, "ip link set guest0 master gsm0 up");
        let (pod, guest): (&NetNs, &NetNs) = (&spaces[0], &spaces[2]);
        tool(guest, "ip link set eth0 up");
        let (subnet, _) = first.rsplit_once('.').expect("dots");
        tool(guest, &format!("ip addr add {subnet}.200/24 dev eth0"));
        let agent = &mut cluster.agents[0];
        wait_until("it is not reported", TIMEOUT, || {
            has_notice(agent, "guest0 on the pods' bridge")
        });
        let octets = |ip: &str| ip.parse::<std::net::Ipv4Addr>().map(|ip| ip.octets());
        let gateway = format!("{subnet}.1");
        let (socket, mac) = link_socket(guest)?;
        let shown = mac.map(|byte| format!("{byte:02x}")).join(":");
        // The pod learns the MAC of the guest, which is not excluded from everything.
        eventually(guest, &format!("ping -c 1 -W 1 {first}"), |said| said.contains(" 0% packet"));
        tool(pod, &format!("ping -c 1 -W 5 {gateway}"));
        tool(pod, &format!("ping -c 1 -W 5 {second}"));
        for _ in 0..5 {
            for kind in [1, 6] {
                for taken in [&gateway, &second] {
                    socket.send(&arp_request(kind, mac, octets(taken)?, octets(&first)?))?;
                }
            }
            socket.send(&router_advertisement(mac))?;
            // The answer arrives after the frames, so the pod has processed them.
            tool(guest, &format!("ping -c 1 -W 5 {first}"));
        }
        let neighbors = tool(pod, "ip -4 neigh show");
        let wrong = |line: &&str| line.contains(&shown) && !line.contains(".200 ");
        assert_eq!(neighbors.lines().find(wrong), None, "{neighbors}");
        let learned =
            tool(pod, "ip -6 route show proto ra") + &tool(pod, "ip -6 addr show dynamic");
        assert_eq!(learned, "");
        Ok(())
    });
}

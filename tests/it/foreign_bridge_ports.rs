//! Ports of other programs on the pods' bridge are reported, and cannot use the addresses and MACs of
//! pods.

use std::time::Duration;

use gossamer::lab::Pinger;

use crate::{
    cni::{Runtime, address, namespaces},
    common::{Cluster, TIMEOUT, has_notice, has_problem, isolated, tool, wait_until},
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

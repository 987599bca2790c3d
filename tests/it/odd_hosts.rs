//! Hosts that work in an unusual way, and filters whose effect looks like another fault: the agent's words
//! and verdict must fit them.

use gossamer::lab::{Agent, Host};
use serde_json::Value;

use crate::{
    common::{
        Cluster, TIMEOUT, has_notice, has_problem, isolated, program, run, status_where, texts,
        tool, wait_until,
    },
    forwarding,
    underlay::{connect_to_switch, run_in_lab},
};

/// Returns the answer of the doctor, which runs on the host.
fn doctor(host: &Host, agent: &Agent) -> Value {
    let (program, socket) = (program().display(), agent.socket().display());
    let state_dir = host.dir.join("state");
    let state_dir = state_dir.display();
    let command = format!("{program} doctor -o json --socket {socket} --state-dir {state_dir}");
    serde_json::from_slice(&run(&host.netns, &command).stdout).expect("JSON")
}

/// Checks that status and doctor have the same verdict, and returns it.
fn one_verdict(host: &Host, agent: &mut Agent) -> String {
    let said = doctor(host, agent);
    let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
    assert_eq!(said["verdict"], status["verdict"], "{said:#}");
    said["verdict"]["text"].as_str().expect("a text").to_owned()
}

#[test]
fn interface_without_carrier_is_a_notice_while_peers_answer_by_another() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.restart(1, &["--iface", "eth0"])?;
        let pods = cluster.pods()?;
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        connect_to_switch(host, "second", "eth1", "");
        tool(&host.netns, "ip route add 10.99.0.10/32 dev eth1 src 10.99.0.11");
        let ping = format!("ping -c 1 -W 5 {}", pods[0].ip);
        tool(&pods[1].netns, &ping);
        run_in_lab("ip link set port2 down");
        let words = "peers answer by another way than the interface that was chosen for tunnels: iface: \
                     eth0 has no carrier";
        status_where(agent, |status| {
            assert_ne!(status["verdict"]["state"], "not-ready", "{status:#}");
            texts(&status["notices"]).contains(words)
        });
        tool(&pods[1].netns, &ping);
        let status = status_where(agent, |status| status["problems"] == serde_json::json!([]));
        assert_eq!(status["verdict"]["state"], "healthy");
        assert_eq!(one_verdict(host, agent), "healthy");
        // Once the other way is dead, the missing carrier is the cause.
        run_in_lab("ip link set second down");
        let status = status_where(agent, |status| status["verdict"]["state"] == "not-ready");
        let said = texts(&status["problems"]);
        assert!(said.contains("no underlay: iface: eth0 has no carrier"), "{said}");
        assert!(!has_notice(agent, words));
        run_in_lab("ip link set port2 up");
        run_in_lab("ip link set second up");
        wait_until("it is still reported", TIMEOUT, || {
            !has_problem(agent, "carrier") && !has_notice(agent, "no carrier")
        });
        Ok(())
    });
}

#[test]
fn mtu_lowered_at_run_time_has_the_same_verdict_everywhere() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        forwarding::with_pods(&mut cluster, &mut spaces)?;
        // The overlay follows; a pod that runs learns the size from its host.
        tool(&cluster.hosts[1].netns, "ip link set eth0 mtu 1400");
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        status_where(agent, |status| status["kernel"]["mtu"] == 1350);
        wait_until("the device does not follow", TIMEOUT, || {
            tool(&host.netns, "ip link show gossamer.1").contains("mtu 1350")
        });
        assert_eq!(one_verdict(host, agent), "healthy");
        let said = doctor(host, agent).to_string();
        assert!(said.contains("has MTU 1450, the overlay 1350"), "{said}");

        // The setting does not fit any more.
        tool(&host.netns, "ip link set eth0 mtu 1500");
        cluster.restart(1, &["--mtu", "1450"])?;
        tool(&cluster.hosts[1].netns, "ip link set eth0 mtu 1400");
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        let words = "mtu: 1450 does not fit interface eth0 with MTU 1400: use at most 1350";
        let status = status_where(agent, |status| {
            assert_ne!(status["verdict"]["state"], "not-ready", "{status:#}");
            texts(&status["problems"]).contains(words)
        });
        assert_eq!(status["problems"][0]["code"], "underlay-mtu");
        assert_eq!(one_verdict(host, agent), "degraded: 1 problem");
        tool(&host.netns, "ip link set eth0 mtu 1500");
        wait_until("it is still reported", TIMEOUT, || !has_problem(agent, "mtu: "));
        assert_eq!(one_verdict(host, agent), "healthy");
        Ok(())
    });
}

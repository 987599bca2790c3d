//! The underlay follows the host: interfaces that disappear and return, better and worse routes, no
//! network at boot, and addresses that must never carry tunnels.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Host, Lab, Pod};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    cni::Runtime,
    common::{
        Cluster, TIMEOUT, client, eventually, has_problem, isolated, program, run, status_where,
        texts, token_of, tool, wait_until,
    },
};

/// Time until the tunnel works again after an event; a busy machine takes longer.
const FAILOVER_TIMEOUT: Duration = Duration::from_secs(8);

/// Runs a command in the lab's own namespace, which contains the switch.
pub fn run_in_lab(command: &str) {
    let mut words = command.split_whitespace();
    let mut tool = Command::new(words.next().expect("a command"));
    assert!(tool.args(words).status().expect("it runs").success(), "{command}");
}

/// Connects a host to the switch by another interface.
pub fn connect_to_switch(host: &Host, port: &str, name: &str, address: &str) {
    run_in_lab(&format!("ip link add {port} type veth peer name {name} netns {}", host.name));
    run_in_lab(&format!("ip link set {port} master underlay up"));
    tool(&host.netns, &format!("ip link set {name} up"));
    if !address.is_empty() {
        tool(&host.netns, &format!("ip addr add {address} dev {name}"));
    }
}

fn underlay(status: &Value) -> (String, String) {
    let text = |key: &str| status["kernel"][key].as_str().unwrap_or_default().to_owned();
    (text("underlay_interface"), text("underlay_address"))
}

fn status(agent: &mut Agent) -> Value {
    agent.ask("/v1/status", TIMEOUT).expect("a status")
}

fn is_on(agent: &mut Agent, interface: &str, address: &str) -> bool {
    underlay(&status(agent)) == (interface.to_owned(), address.to_owned())
}

fn reaches(from: &Pod, to: &Pod) -> bool {
    run(&from.netns, &format!("ping -c1 -W1 {}", to.ip)).status.success()
}

fn wait_for_ping(from: &Pod, to: &Pod) {
    wait_until("the pods do not reach each other", FAILOVER_TIMEOUT, || reaches(from, to));
}

/// Starts an agent that creates a cluster, and waits for its underlay.
fn start_creator(host: &Host, arguments: &[&str]) -> anyhow::Result<Agent> {
    let mut agent = Agent::start(program(), host, &[&["--init"], arguments].concat())?;
    agent.wait_converged(1, TIMEOUT)?;
    Ok(agent)
}

#[test]
fn interface_created_again_under_its_name_carries_tunnels_again() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        wait_for_ping(&pods[0], &pods[1]);
        let host = &cluster.hosts[1];
        let device = tool(&host.netns, "ip -o link show gossamer.1");
        tool(&host.netns, "ip link del eth0");
        wait_until("the loss is not reported", FAILOVER_TIMEOUT, || {
            has_problem(&mut cluster.agents[1], "no underlay")
        });
        connect_to_switch(host, "again", "eth0", "10.99.0.11/16");
        wait_for_ping(&pods[0], &pods[1]);
        status_where(&mut cluster.agents[1], |status| {
            underlay(status).0 == "eth0" && status["problems"].as_array().is_some_and(Vec::is_empty)
        });
        let now = tool(&host.netns, "ip -o link show gossamer.1");
        let index = |line: &str| line.split(':').next().map(str::to_owned);
        assert_eq!(index(&now), index(&device), "the VXLAN device was not created again");
        Ok(())
    });
}

#[test]
fn address_missing_for_half_a_second_changes_nothing() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[1].netns;
        // systemd-networkd does this when it is restarted.
        tool(host, "ip addr del 10.99.0.11/16 dev eth0");
        std::thread::sleep(Duration::from_millis(400));
        tool(host, "ip addr add 10.99.0.11/16 dev eth0");
        tool(host, "ip route add default via 10.99.0.1");
        // Longer than the agent would have waited.
        std::thread::sleep(Duration::from_millis(1500));
        assert!(is_on(&mut cluster.agents[1], "eth0", "10.99.0.11"));
        let log = cluster.agents[1].log();
        assert!(!log.contains("underlay lost") && !log.contains("underlay changed"), "{log}");
        cluster.converge()
    });
}

#[test]
fn failed_uplink_is_replaced_until_it_returns() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = &cluster.hosts[1];
        let subnet = Agent::subnet(&status(&mut cluster.agents[1]))?;
        connect_to_switch(host, "lte", "wwan0", "10.99.9.9/16");
        tool(&host.netns, "ip route add default via 10.99.0.1 dev wwan0 metric 700");
        std::thread::sleep(Duration::from_millis(2500));
        assert!(is_on(&mut cluster.agents[1], "eth0", "10.99.0.11"), "it is the worse one");

        // The veth pair is unplugged, and a network manager removes address and routes.
        run_in_lab("ip link set port2 down");
        tool(&host.netns, "ip addr flush dev eth0");
        wait_until("no failover", FAILOVER_TIMEOUT, || {
            is_on(&mut cluster.agents[1], "wwan0", "10.99.9.9")
        });
        wait_for_ping(&pods[0], &pods[1]);

        run_in_lab("ip link set port2 up");
        tool(&host.netns, "ip addr add 10.99.0.11/16 dev eth0");
        tool(&host.netns, "ip route add default via 10.99.0.1 dev eth0");
        wait_until("not back to the better one", Duration::from_secs(10), || {
            is_on(&mut cluster.agents[1], "eth0", "10.99.0.11")
        });
        wait_for_ping(&pods[0], &pods[1]);
        let now = cluster.agents[1].wait_converged(2, TIMEOUT)?;
        assert_eq!(Agent::subnet(&now)?, subnet);
        Ok(())
    });
}

#[test]
fn carrier_loss_with_address_and_route_in_place_fails_over() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[1];
        connect_to_switch(host, "lte", "wwan0", "10.99.9.9/16");
        tool(&host.netns, "ip route add default via 10.99.0.1 dev wwan0 metric 700");
        // A static configuration: nothing is removed, but the kernel marks the route.
        run_in_lab("ip link set port2 down");
        eventually(&host.netns, "ip route show default", |routes| routes.contains("linkdown"));
        wait_until("no failover", FAILOVER_TIMEOUT, || {
            is_on(&mut cluster.agents[1], "wwan0", "10.99.9.9")
        });
        run_in_lab("ip link set port2 up");
        wait_until("not back", Duration::from_secs(10), || {
            is_on(&mut cluster.agents[1], "eth0", "10.99.0.11")
        });
        Ok(())
    });
}

/// A bridge has a carrier if one of its ports forwards.
#[test]
fn bridge_in_forward_delay_is_reported_with_its_ports_state() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        for command in [
            "ip link add br0 type bridge stp_state 1 forward_delay 3000",
            "ip addr flush dev eth0",
            "ip link set eth0 master br0",
            "ip addr add 10.99.0.10/24 dev br0",
            "ip link set br0 up",
        ] {
            tool(&host.netns, command);
        }
        let mut agent = Agent::start(program(), &host, &["--init", "--iface", "br0"])?;
        let words =
            "br0 has no carrier: it is a bridge, and its port eth0 is still listening (STP)";
        wait_until("the state is not reported", FAILOVER_TIMEOUT, || {
            has_problem(&mut agent, words)
        });
        tool(&host.netns, "ip link set br0 type bridge stp_state 0");
        tool(&host.netns, "ip link set eth0 nomaster");
        wait_until("no port", FAILOVER_TIMEOUT, || {
            has_problem(&mut agent, "it is a bridge without a port")
        });
        tool(&host.netns, "ip link set eth0 master br0");
        wait_until("it is still reported", FAILOVER_TIMEOUT, || !has_problem(&mut agent, "br0"));
        Ok(())
    });
}

#[test]
fn flapping_carrier_is_reported_even_while_it_is_up() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let agent = &mut cluster.agents[1];
        let words = "the carrier of eth0 flaps: it was lost";
        for _ in 0..2 {
            run_in_lab("ip link set port2 down");
            run_in_lab("ip link set port2 up");
        }
        wait_until("no underlay", FAILOVER_TIMEOUT, || !has_problem(agent, "no underlay"));
        assert!(!has_problem(agent, words), "twice may be a restart of the switch");
        run_in_lab("ip link set port2 down");
        wait_until("it is not reported", FAILOVER_TIMEOUT, || has_problem(agent, words));
        run_in_lab("ip link set port2 up");
        wait_until("it is not back", FAILOVER_TIMEOUT, || !has_problem(agent, "no underlay"));
        assert!(has_problem(agent, words), "it was back before, too");
        Ok(())
    });
}

#[test]
fn only_uplink_without_carrier_or_down_is_reported_until_it_returns() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[1].netns;
        run_in_lab("ip link set port2 down");
        wait_until("the lost carrier is not reported", FAILOVER_TIMEOUT, || {
            has_problem(&mut cluster.agents[1], "eth0 has no carrier")
        });
        run_in_lab("ip link set port2 up");
        wait_until("it is still reported", FAILOVER_TIMEOUT, || {
            !has_problem(&mut cluster.agents[1], "no underlay")
        });
        tool(host, "ip link set eth0 down");
        wait_until("the interface that is down is not reported", FAILOVER_TIMEOUT, || {
            has_problem(&mut cluster.agents[1], "no underlay")
        });
        tool(host, "ip link set eth0 up");
        tool(host, "ip route add default via 10.99.0.1");
        cluster.converge()?;
        wait_until("it is still reported", FAILOVER_TIMEOUT, || {
            !has_problem(&mut cluster.agents[1], "no underlay")
        });
        Ok(())
    });
}

#[test]
fn known_node_without_network_serves_its_pods_and_connects_later() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.agents[1].end(Signal::SIGTERM)?;
        let host = &cluster.hosts[1];
        tool(&host.netns, "ip addr flush dev eth0");
        // A reboot leaves nothing of the overlay.
        tool(&host.netns, "ip link del gossamer.1");
        cluster.agents[1] = Agent::start(program(), host, &[])?;
        let reported = status_where(&mut cluster.agents[1], |status| {
            texts(&status["problems"]).contains("no underlay")
        });
        assert_eq!(reported["kernel"]["mtu"], 1450, "of the last network");
        let said = client(&cluster.agents[1], &["status"]);
        assert!(String::from_utf8_lossy(&said.stdout).contains("underlay  none"), "{said:?}");
        let netns = gossamer::lab::NetNs::new("c1")?;
        let runtime = Runtime::new(&cluster.agents[1]);
        let added = runtime.add("c1");
        let subnet = Agent::subnet(&reported)?;
        let gateway = subnet.hosts().next().expect("a gateway");
        assert!(run(&netns, &format!("ping -c1 -W1 {gateway}")).status.success(), "{added}");

        tool(&host.netns, "ip addr add 10.99.0.11/16 dev eth0");
        tool(&host.netns, "ip route add default via 10.99.0.1");
        let came = Instant::now();
        let status = cluster.agents[1].wait_converged(2, TIMEOUT)?;
        println!("connected after {:?}", came.elapsed());
        // Gossip may use the address before the agent has read the host's addresses again.
        wait_until("the underlay is not known", FAILOVER_TIMEOUT, || {
            is_on(&mut cluster.agents[1], "eth0", "10.99.0.11")
        });
        assert_eq!(Agent::subnet(&status)?, subnet);
        Ok(())
    });
}

#[test]
fn new_node_without_network_reports_the_reason_and_joins_later() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        tool(&host.netns, "ip addr flush dev eth0");
        let mut agent = cluster.start_agent(&host, &[])?;
        let waits = status_where(&mut agent, |status| {
            texts(&status["problems"]).contains("waiting for the network")
        });
        assert_eq!(waits["phase"], "waiting");
        assert!(client(&agent, &["status"]).status.code() == Some(3));
        assert!(!client(&agent, &["leave"]).status.success());
        tool(&host.netns, "ip addr add 10.99.0.11/16 dev eth0");
        tool(&host.netns, "ip route add default via 10.99.0.1");
        agent.wait_converged(2, TIMEOUT)?;
        cluster.converge_with(&mut agent, 2)?;

        // The agent also waits for an interface that does not exist, and reports it. A signal ends the
        // wait.
        let third = lab.host(3, "n3")?;
        let mut agent = cluster.start_agent(&third, &["--iface", "usb0"])?;
        status_where(&mut agent, |status| {
            let waits = texts(&status["problems"]);
            waits.contains("no interface usb0") && waits.contains("10.99.0.12")
        });
        assert!(agent.end(Signal::SIGTERM)?.success());
        Ok(())
    });
}

#[test]
fn listen_address_that_is_absent_is_reported_until_it_appears() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--listen", "10.99.0.88"])?;
        let absent = "listen: this host has no address 10.99.0.88; it has eth0 (10.99.0.10)";
        let waits = status_where(&mut agent, |status| texts(&status["problems"]).contains(absent));
        assert_eq!(waits["phase"], "waiting");
        tool(&host.netns, "ip addr add 10.99.0.88/16 dev eth0");
        agent.wait_converged(1, TIMEOUT)?;
        assert!(is_on(&mut agent, "eth0", "10.99.0.88"));

        // A member serves its pods meanwhile.
        agent.end(Signal::SIGTERM)?;
        tool(&host.netns, "ip addr del 10.99.0.88/16 dev eth0");
        let mut agent = Agent::start(program(), &host, &["--listen", "10.99.0.88"])?;
        status_where(&mut agent, |status| texts(&status["problems"]).contains(absent));
        tool(&host.netns, "ip addr add 10.99.0.88/16 dev eth0");
        status_where(&mut agent, |status| texts(&status["problems"]).is_empty());
        assert!(is_on(&mut agent, "eth0", "10.99.0.88"));
        Ok(())
    });
}

#[test]
fn address_that_the_kernel_does_not_use_as_source_is_not_selected() {
    isolated(|lab| {
        // A floating address next to one from DHCP, as keepalived adds it.
        let host = lab.host(1, "vip")?;
        for command in [
            "ip addr flush dev eth0",
            "ip addr add 10.99.0.10/16 dev eth0 valid_lft 3600 preferred_lft 3600",
            "ip addr add 10.99.0.100/32 dev eth0",
            "ip route add default via 10.99.0.1",
        ] {
            tool(&host.netns, command);
        }
        assert!(is_on(&mut start_creator(&host, &[])?, "eth0", "10.99.0.10"));
        // The route itself specifies the source.
        let host = lab.host(2, "src")?;
        for command in [
            "ip addr add 10.99.0.50/16 dev eth0",
            "ip route replace default via 10.99.0.1 src 10.99.0.50",
        ] {
            tool(&host.netns, command);
        }
        assert!(is_on(&mut start_creator(&host, &[])?, "eth0", "10.99.0.50"));
        Ok(())
    });
}

#[test]
fn uplinks_of_all_interface_types_are_found() {
    isolated(|lab: &mut Lab| {
        let found =
            |lab: &mut Lab, number: u16, name: &str, commands: &[&str], arguments: &[&str]| {
                let host = lab.host(number, name)?;
                connect_to_switch(&host, &format!("{name}-1"), "eth1", "");
                commands.iter().for_each(|command| _ = tool(&host.netns, command));
                anyhow::Ok(underlay(&status(&mut start_creator(&host, arguments)?)))
            };
        let is = |interface: &str, address: &str| (interface.to_owned(), address.to_owned());
        let multipath = [
            "ip addr add 10.98.0.1/16 dev eth1",
            "ip route replace default nexthop via 10.99.0.1 dev eth0 nexthop via 10.98.0.9 dev eth1",
        ];
        assert_eq!(found(lab, 1, "multi", &multipath, &[])?, is("eth0", "10.99.0.10"));
        let on_lo = ["ip addr add 10.50.0.1/32 dev lo"];
        let chosen = found(lab, 2, "loop", &on_lo, &["--iface", "10.50.0.1"])?;
        assert_eq!(chosen, is("lo", "10.50.0.1"));
        let bridged = [
            "ip link add br0 type bridge",
            "ip link set br0 up",
            "ip addr flush dev eth0",
            "ip link set eth0 master br0",
            "ip addr add 10.99.0.12/16 dev br0",
            "ip route add default via 10.99.0.1",
        ];
        assert_eq!(found(lab, 3, "bridged", &bridged, &[])?, is("br0", "10.99.0.12"));
        let by_rule = [
            "ip route del default",
            "ip route add default via 10.99.0.1 table 100",
            "ip rule add lookup 100 pref 40000",
            "ip link add docker0 type bridge",
            "ip link set docker0 up",
            "ip addr add 172.17.0.1/16 dev docker0",
        ];
        assert_eq!(found(lab, 4, "rule", &by_rule, &[])?, is("eth0", "10.99.0.13"));
        let only = [
            "ip route del default",
            "ip link add docker0 type bridge",
            "ip link set docker0 up",
            "ip addr add 172.17.0.1/16 dev docker0",
        ];
        assert_eq!(found(lab, 5, "only", &only, &[])?, is("eth0", "10.99.0.14"));
        Ok(())
    });
}

#[test]
fn link_local_address_on_a_pods_interface_is_never_the_underlay() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = start_creator(&host, &[])?;
        let _pod = gossamer::lab::NetNs::new("c1")?;
        Runtime::new(&agent).add("c1");
        let links = tool(&host.netns, "ip -br link");
        let port = links.lines().find(|line| line.starts_with("gsm") && line.contains('@'));
        let port = port.and_then(|line| line.split('@').next()).expect("the pod's interface");
        // dhcpcd does this to every interface on which it gets no answer.
        tool(&host.netns, &format!("ip addr add 169.254.7.7/16 dev {port}"));
        tool(&host.netns, &format!("ip route add default dev {port} metric 1005"));
        tool(&host.netns, "ip addr flush dev eth0");
        status_where(&mut agent, |status| texts(&status["problems"]).contains("no underlay"));
        tool(&host.netns, "ip addr add 10.99.0.10/16 dev eth0");
        tool(&host.netns, "ip route add default via 10.99.0.1");
        status_where(&mut agent, |status| status["problems"].as_array().is_some_and(Vec::is_empty));
        assert!(is_on(&mut agent, "eth0", "10.99.0.10"));
        assert!(!agent.log().contains(port), "{}", agent.log());
        Ok(())
    });
}

#[test]
fn ipv6_renumbering_moves_tunnels_to_the_preferred_address() {
    isolated(|lab| {
        let mut hosts = Vec::new();
        for number in 1..=2 {
            let host = lab.host(number, &format!("n{number}"))?;
            tool(&host.netns, "ip addr flush dev eth0 scope global");
            let address = format!("2001:db8:1::{number}/64");
            if !run(&host.netns, &format!("ip addr add {address} dev eth0 nodad")).status.success()
            {
                return Ok(());
            }
            hosts.push(host);
        }
        let mut first = start_creator(&hosts[0], &["--iface", "eth0"])?;
        let token = token_of(&mut first)?;
        let join = ["--iface", "eth0", "--join", "2001:db8:1::1", "--token", &token];
        let mut second = Agent::start(program(), &hosts[1], &join)?;
        second.wait_converged(2, TIMEOUT)?;
        // The provider assigns another prefix: the old one is deprecated and stays valid for a while.
        for (number, host) in hosts.iter().enumerate() {
            let number = number + 1;
            tool(&host.netns, &format!("ip addr add 2001:db8:2::{number}/64 dev eth0 nodad"));
            let old = format!("2001:db8:1::{number}/64");
            tool(&host.netns, &format!("ip addr change {old} dev eth0 preferred_lft 0"));
        }
        wait_until("it stays at the old address", FAILOVER_TIMEOUT, || {
            is_on(&mut second, "eth0", "2001:db8:2::2")
        });
        eventually(&hosts[0].netns, "bridge fdb show dev gossamer.1", |fdb| {
            fdb.contains("dst 2001:db8:2::2 ")
        });
        second.wait_converged(2, TIMEOUT)?;
        Ok(())
    });
}

#[test]
fn seed_name_with_dead_addresses_delays_no_join() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        // Packets to the first two addresses are lost, without an ICMP error.
        let names = "10.99.0.200 seeds\n10.99.0.201 seeds\n10.99.0.10 seeds\n127.0.0.1 localhost\n";
        std::fs::write("/run/lab/hosts", names)?;
        run_in_lab("mount --bind /run/lab/hosts /etc/hosts");
        for dead in ["10.99.0.200", "10.99.0.201"] {
            tool(&host.netns, &format!("ip neigh add {dead} lladdr 02:00:00:00:00:01 dev eth0"));
        }
        let came = Instant::now();
        let arguments = ["--join", "seeds", "--token", &cluster.token];
        let mut agent = Agent::start(program(), &host, &arguments)?;
        agent.wait_converged(2, TIMEOUT)?;
        // One after the other, they would take four seconds each.
        assert!(came.elapsed() < Duration::from_secs(4), "{:?}", came.elapsed());
        cluster.converge_with(&mut agent, 2)
    });
}

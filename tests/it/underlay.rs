//! The underlay follows the host: interfaces that go and come back, better and worse routes, no network at
//! boot, and addresses that must never carry tunnels.

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
        Cluster, PATIENCE, client, eventually, has_problem, isolated, program, run, status_where,
        token_of, tool, wait_until,
    },
};

/// The tunnel is back within so long after the event; a machine under load takes longer.
const SOON: Duration = Duration::from_secs(8);

/// Runs a command in the lab's own namespace, where the switch is.
fn outside(command: &str) {
    let mut words = command.split_whitespace();
    let mut tool = Command::new(words.next().expect("a command"));
    assert!(tool.args(words).status().expect("it runs").success(), "{command}");
}

/// Plugs a host into the switch by one more interface.
fn plug(host: &Host, port: &str, name: &str, address: &str) {
    outside(&format!("ip link add {port} type veth peer name {name} netns {}", host.name));
    outside(&format!("ip link set {port} master underlay up"));
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
    agent.ask("/v1/status", PATIENCE).expect("a status")
}

fn is_on(agent: &mut Agent, interface: &str, address: &str) -> bool {
    underlay(&status(agent)) == (interface.to_owned(), address.to_owned())
}

fn reaches(from: &Pod, to: &Pod) -> bool {
    run(&from.netns, &format!("ping -c1 -W1 {}", to.ip)).status.success()
}

fn wait_for_ping(from: &Pod, to: &Pod) {
    wait_until("the pods do not reach each other", SOON, || reaches(from, to));
}

/// Starts an agent that creates a cluster, and waits for its underlay.
fn alone(host: &Host, arguments: &[&str]) -> anyhow::Result<Agent> {
    let mut agent = Agent::start(program(), host, &[&["--init"], arguments].concat())?;
    agent.wait_converged(1, PATIENCE)?;
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
        wait_until("the loss is not told", SOON, || {
            has_problem(&mut cluster.agents[1], "no underlay")
        });
        plug(host, "again", "eth0", "10.99.0.11/16");
        wait_for_ping(&pods[0], &pods[1]);
        status_where(&mut cluster.agents[1], |status| {
            underlay(status).0 == "eth0" && status["problems"].as_array().is_some_and(Vec::is_empty)
        });
        let now = tool(&host.netns, "ip -o link show gossamer.1");
        let index = |line: &str| line.split(':').next().map(str::to_owned);
        assert_eq!(index(&now), index(&device), "the VXLAN device was not made again");
        Ok(())
    });
}

#[test]
fn address_away_for_half_a_second_changes_nothing() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[1].netns;
        // What systemd-networkd does when it is restarted.
        tool(host, "ip addr del 10.99.0.11/16 dev eth0");
        std::thread::sleep(Duration::from_millis(400));
        tool(host, "ip addr add 10.99.0.11/16 dev eth0");
        tool(host, "ip route add default via 10.99.0.1");
        // Longer than the agent would have waited.
        std::thread::sleep(Duration::from_millis(1500));
        assert!(is_on(&mut cluster.agents[1], "eth0", "10.99.0.11"));
        let log = cluster.agents[1].log();
        assert!(!log.contains("no underlay") && !log.contains("underlay has changed"), "{log}");
        cluster.converge()
    });
}

#[test]
fn uplink_that_fails_is_replaced_and_the_better_one_taken_again() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = &cluster.hosts[1];
        let subnet = Agent::subnet(&status(&mut cluster.agents[1]))?;
        plug(host, "lte", "wwan0", "10.99.9.9/16");
        tool(&host.netns, "ip route add default via 10.99.0.1 dev wwan0 metric 700");
        std::thread::sleep(Duration::from_millis(2500));
        assert!(is_on(&mut cluster.agents[1], "eth0", "10.99.0.11"), "it is the worse one");

        // The cable is pulled: a network manager takes address and routes away.
        outside("ip link set port2 down");
        tool(&host.netns, "ip addr flush dev eth0");
        wait_until("no failover", SOON, || is_on(&mut cluster.agents[1], "wwan0", "10.99.9.9"));
        wait_for_ping(&pods[0], &pods[1]);

        outside("ip link set port2 up");
        tool(&host.netns, "ip addr add 10.99.0.11/16 dev eth0");
        tool(&host.netns, "ip route add default via 10.99.0.1 dev eth0");
        wait_until("not back to the better one", Duration::from_secs(10), || {
            is_on(&mut cluster.agents[1], "eth0", "10.99.0.11")
        });
        wait_for_ping(&pods[0], &pods[1]);
        let now = cluster.agents[1].wait_converged(2, PATIENCE)?;
        assert_eq!(Agent::subnet(&now)?, subnet);
        Ok(())
    });
}

#[test]
fn carrier_loss_with_address_and_route_left_in_place_fails_over() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[1];
        plug(host, "lte", "wwan0", "10.99.9.9/16");
        tool(&host.netns, "ip route add default via 10.99.0.1 dev wwan0 metric 700");
        // A static configuration: nothing is taken away, the kernel marks the route.
        outside("ip link set port2 down");
        eventually(&host.netns, "ip route show default", |routes| routes.contains("linkdown"));
        wait_until("no failover", SOON, || is_on(&mut cluster.agents[1], "wwan0", "10.99.9.9"));
        outside("ip link set port2 up");
        wait_until("not back", Duration::from_secs(10), || {
            is_on(&mut cluster.agents[1], "eth0", "10.99.0.11")
        });
        Ok(())
    });
}

/// A bridge has a carrier where a port of it forwards.
#[test]
fn bridge_whose_port_waits_for_its_forward_delay_is_named_with_the_state_of_the_port() {
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
        wait_until("the state is not named", SOON, || has_problem(&mut agent, words));
        tool(&host.netns, "ip link set br0 type bridge stp_state 0");
        tool(&host.netns, "ip link set eth0 nomaster");
        wait_until("no port", SOON, || has_problem(&mut agent, "it is a bridge without a port"));
        tool(&host.netns, "ip link set eth0 master br0");
        wait_until("it is still named", SOON, || !has_problem(&mut agent, "br0"));
        Ok(())
    });
}

#[test]
fn carrier_that_comes_and_goes_is_named_and_stays_so_where_it_is_back() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let agent = &mut cluster.agents[1];
        let words = "the carrier of eth0 comes and goes: it was lost";
        for _ in 0..2 {
            outside("ip link set port2 down");
            outside("ip link set port2 up");
        }
        wait_until("no underlay", SOON, || !has_problem(agent, "no underlay"));
        assert!(!has_problem(agent, words), "twice may be a restart of the switch");
        outside("ip link set port2 down");
        wait_until("it is not named", SOON, || has_problem(agent, words));
        outside("ip link set port2 up");
        wait_until("it is not back", SOON, || !has_problem(agent, "no underlay"));
        assert!(has_problem(agent, words), "it was back before, too");
        Ok(())
    });
}

#[test]
fn only_uplink_without_carrier_or_down_is_named_until_it_is_back() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[1].netns;
        outside("ip link set port2 down");
        wait_until("the lost carrier is not named", SOON, || {
            has_problem(&mut cluster.agents[1], "eth0 has no carrier")
        });
        outside("ip link set port2 up");
        wait_until("it is still named", SOON, || {
            !has_problem(&mut cluster.agents[1], "no underlay")
        });
        tool(host, "ip link set eth0 down");
        wait_until("the interface that is down is not named", SOON, || {
            has_problem(&mut cluster.agents[1], "no underlay")
        });
        tool(host, "ip link set eth0 up");
        tool(host, "ip route add default via 10.99.0.1");
        cluster.converge()?;
        wait_until("it is still named", SOON, || {
            !has_problem(&mut cluster.agents[1], "no underlay")
        });
        Ok(())
    });
}

#[test]
fn known_node_without_network_serves_its_pods_and_connects_when_it_comes() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.agents[1].end(Signal::SIGTERM)?;
        let host = &cluster.hosts[1];
        tool(&host.netns, "ip addr flush dev eth0");
        // A reboot leaves nothing of the overlay.
        tool(&host.netns, "ip link del gossamer.1");
        cluster.agents[1] = Agent::start(program(), host, &[])?;
        let told = status_where(&mut cluster.agents[1], |status| {
            status["problems"].to_string().contains("no underlay")
        });
        assert_eq!(told["kernel"]["mtu"], 1450, "of the last network");
        let said = client(&cluster.agents[1], &["status"]);
        assert!(String::from_utf8_lossy(&said.stdout).contains("underlay  none"), "{said:?}");
        let netns = gossamer::lab::NetNs::new("c1")?;
        let runtime = Runtime::new(&cluster.agents[1]);
        let added = runtime.add("c1");
        let subnet = Agent::subnet(&told)?;
        let gateway = subnet.hosts().next().expect("a gateway");
        assert!(run(&netns, &format!("ping -c1 -W1 {gateway}")).status.success(), "{added}");

        tool(&host.netns, "ip addr add 10.99.0.11/16 dev eth0");
        tool(&host.netns, "ip route add default via 10.99.0.1");
        let came = Instant::now();
        let status = cluster.agents[1].wait_converged(2, PATIENCE)?;
        println!("connected after {:?}", came.elapsed());
        assert_eq!(underlay(&status), ("eth0".to_owned(), "10.99.0.11".to_owned()));
        assert_eq!(Agent::subnet(&status)?, subnet);
        Ok(())
    });
}

#[test]
fn new_node_without_network_says_what_it_waits_for_and_joins_when_it_comes() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        tool(&host.netns, "ip addr flush dev eth0");
        let mut agent = cluster.start_agent(&host, &[])?;
        let waits = status_where(&mut agent, |status| {
            status["problems"].to_string().contains("waiting for the network")
        });
        assert_eq!(waits["phase"], "waiting");
        assert!(client(&agent, &["status"]).status.code() == Some(3));
        assert!(!client(&agent, &["leave"]).status.success());
        tool(&host.netns, "ip addr add 10.99.0.11/16 dev eth0");
        tool(&host.netns, "ip route add default via 10.99.0.1");
        agent.wait_converged(2, PATIENCE)?;
        cluster.converge_with(&mut agent, 2)?;

        // An interface that does not exist is waited for, too, and named. A signal ends that.
        let third = lab.host(3, "n3")?;
        let mut agent = cluster.start_agent(&third, &["--iface", "usb0"])?;
        status_where(&mut agent, |status| {
            let waits = status["problems"].to_string();
            waits.contains("no interface usb0") && waits.contains("10.99.0.12")
        });
        assert!(agent.end(Signal::SIGTERM)?.success());
        Ok(())
    });
}

#[test]
fn address_that_the_kernel_would_not_use_as_source_is_not_chosen() {
    isolated(|lab| {
        // A floating address beside one from DHCP, as keepalived adds it.
        let host = lab.host(1, "vip")?;
        for command in [
            "ip addr flush dev eth0",
            "ip addr add 10.99.0.10/16 dev eth0 valid_lft 3600 preferred_lft 3600",
            "ip addr add 10.99.0.100/32 dev eth0",
            "ip route add default via 10.99.0.1",
        ] {
            tool(&host.netns, command);
        }
        assert!(is_on(&mut alone(&host, &[])?, "eth0", "10.99.0.10"));
        // The route itself names the source.
        let host = lab.host(2, "src")?;
        for command in [
            "ip addr add 10.99.0.50/16 dev eth0",
            "ip route replace default via 10.99.0.1 src 10.99.0.50",
        ] {
            tool(&host.netns, command);
        }
        assert!(is_on(&mut alone(&host, &[])?, "eth0", "10.99.0.50"));
        Ok(())
    });
}

#[test]
fn uplinks_of_all_shapes_are_found() {
    isolated(|lab: &mut Lab| {
        let found =
            |lab: &mut Lab, number: u16, name: &str, commands: &[&str], arguments: &[&str]| {
                let host = lab.host(number, name)?;
                plug(&host, &format!("{name}-1"), "eth1", "");
                commands.iter().for_each(|command| _ = tool(&host.netns, command));
                anyhow::Ok(underlay(&status(&mut alone(&host, arguments)?)))
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
        let mut agent = alone(&host, &[])?;
        let _pod = gossamer::lab::NetNs::new("c1")?;
        Runtime::new(&agent).add("c1");
        let links = tool(&host.netns, "ip -br link");
        let port = links.lines().find(|line| line.starts_with("gsm") && line.contains('@'));
        let port = port.and_then(|line| line.split('@').next()).expect("the pod's interface");
        // dhcpcd does this to every interface that gets no answer.
        tool(&host.netns, &format!("ip addr add 169.254.7.7/16 dev {port}"));
        tool(&host.netns, &format!("ip route add default dev {port} metric 1005"));
        tool(&host.netns, "ip addr flush dev eth0");
        status_where(&mut agent, |status| status["problems"].to_string().contains("no underlay"));
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
        let mut first = alone(&hosts[0], &["--iface", "eth0"])?;
        let token = token_of(&mut first)?;
        let join = ["--iface", "eth0", "--join", "2001:db8:1::1", "--token", &token];
        let mut second = Agent::start(program(), &hosts[1], &join)?;
        second.wait_converged(2, PATIENCE)?;
        // The provider gives another prefix: the old one is deprecated and stays valid for a while.
        for (number, host) in hosts.iter().enumerate() {
            let number = number + 1;
            tool(&host.netns, &format!("ip addr add 2001:db8:2::{number}/64 dev eth0 nodad"));
            let old = format!("2001:db8:1::{number}/64");
            tool(&host.netns, &format!("ip addr change {old} dev eth0 preferred_lft 0"));
        }
        wait_until("it stays at the old address", SOON, || {
            is_on(&mut second, "eth0", "2001:db8:2::2")
        });
        eventually(&hosts[0].netns, "bridge fdb show dev gossamer.1", |fdb| {
            fdb.contains("dst 2001:db8:2::2 ")
        });
        second.wait_converged(2, PATIENCE)?;
        Ok(())
    });
}

#[test]
fn seed_name_with_dead_addresses_delays_no_join() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        // Packets to the first two are lost, and no ICMP says so.
        let names = "10.99.0.200 seeds\n10.99.0.201 seeds\n10.99.0.10 seeds\n127.0.0.1 localhost\n";
        std::fs::write("/run/lab/hosts", names)?;
        outside("mount --bind /run/lab/hosts /etc/hosts");
        for dead in ["10.99.0.200", "10.99.0.201"] {
            tool(&host.netns, &format!("ip neigh add {dead} lladdr 02:00:00:00:00:01 dev eth0"));
        }
        let came = Instant::now();
        let arguments = ["--join", "seeds", "--token", &cluster.token];
        let mut agent = Agent::start(program(), &host, &arguments)?;
        agent.wait_converged(2, PATIENCE)?;
        // One after the other they would take four seconds each.
        assert!(came.elapsed() < Duration::from_secs(4), "{:?}", came.elapsed());
        cluster.converge_with(&mut agent, 2)
    });
}

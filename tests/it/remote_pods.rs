//! Packets of pods that are lost anywhere between two hosts are detected by packets from the agent's own
//! pod of one host to that of the other.

use std::{
    net::{IpAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use gossamer::{
    lab::{Agent, Lab, NetNs},
    pods::last_address,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    cni::{Runtime, namespaces},
    common::{
        Cluster, TIMEOUT, client, has_problem, isolated, resume, run, sh, skipped, status_where,
        suspend, wait_until,
    },
    pod_ports::longer_than,
};

fn detail(status: &Value) -> &str {
    status["kernel"]["forwarding"]["detail"].as_str().unwrap_or_default()
}

/// Adds a pod on each host. Waits until the agents' pods of all other hosts have answered each agent's.
pub fn with_pods(cluster: &mut Cluster, names: &[&str]) -> anyhow::Result<Vec<NetNs>> {
    let spaces = namespaces(names)?;
    for (agent, name) in cluster.agents.iter_mut().zip(names) {
        Runtime::new(agent).add(name);
    }
    let others = names.len() - 1;
    for agent in &mut cluster.agents {
        all_answer(agent, others);
    }
    Ok(spaces)
}

pub fn all_answer(agent: &mut Agent, others: usize) {
    let words = match others {
        1 => "pods of 1 other host answer".to_owned(),
        count => format!("pods of {count} other hosts answer"),
    };
    status_where(agent, |status| {
        detail(status).contains(&words) && status["problems"] == serde_json::json!([])
    });
}

/// Commands that block the second host's way, the reports of its agent, the report of the first host's
/// agent, and commands that unblock it.
struct Fault {
    close: &'static str,
    here: &'static [&'static str],
    there: &'static str,
    open: &'static str,
}

const TUNNEL_FAULTS: [Fault; 10] = [
    // The mark of a tunnel packet is also the mark of its inner packet.
    Fault {
        close: "nft add table ip m && \
                nft add chain ip m p { type filter hook prerouting priority mangle ; } && \
                nft add rule ip m p iifname eth0 udp dport 8472 meta mark set 0x77 && \
                ip rule add fwmark 0x77 lookup 177 pref 500 && \
                ip route add blackhole default table 177",
        here: &["and their answers do not come back (IPv4): packets with mark 0x77 have no route"],
        there: "packets of pods here do not arrive at pods of n2 (IPv4): ",
        open: "nft delete table ip m && ip rule del pref 500 && ip route flush table 177",
    },
    // And in the other direction.
    Fault {
        close: "nft add table ip m && \
                nft add chain ip m f { type filter hook forward priority mangle ; } && \
                nft add rule ip m f ip saddr 10.42.0.0/16 meta mark set 0x78 && \
                ip rule add fwmark 0x78 lookup 178 pref 500 && \
                ip route add blackhole default table 178",
        here: &[],
        there: "packets of pods here arrive at pods of n2, and their answers do not come back (IPv4): ",
        open: "nft delete table ip m && ip rule del pref 500 && ip route flush table 178",
    },
    Fault {
        close: "nft add table ip fr && \
                nft add chain ip fr p { type filter hook prerouting priority -450 ; } && \
                nft add rule ip fr p iifname gossamer.1 ip frag-off & 0x3fff != 0 drop",
        here: &["do not come back (IPv4 fragments): chain ip fr p (hook prerouting)"],
        there: "do not arrive at pods of n2 (IPv4 fragments): ",
        open: "nft delete table ip fr",
    },
    Fault {
        close: "tc qdisc add dev gsm0 root tbf rate 100mbit burst 1000 latency 50ms",
        here: &[
            "do not come back (IPv4 large packets, fragments): the queueing discipline tbf of gsm0",
        ],
        there: "do not arrive at pods of n2 (IPv4 large packets, fragments): ",
        open: "tc qdisc del dev gsm0 root",
    },
    Fault {
        close: "nft add table ip len && \
                nft add chain ip len f { type filter hook forward priority 0 ; } && \
                nft add rule ip len f iifname gossamer.1 ip length 1000-65535 drop",
        here: &["do not come back (IPv4 large packets, fragments): chain ip len f (hook forward)"],
        there: "do not arrive at pods of n2 (IPv4 large packets, fragments): ",
        open: "nft delete table ip len",
    },
    // TCP sends several segments in one packet, which is segmented late.
    Fault {
        close: "nft add table ip gso && \
                nft add chain ip gso f { type filter hook forward priority 0 ; } && \
                nft add rule ip gso f iifname gossamer.1 ip length > 1500 drop",
        here: &[
            "do not come back (IPv4 packets of several segments): chain ip gso f (hook forward)",
        ],
        there: "do not arrive at pods of n2 (IPv4 packets of several segments): ",
        open: "nft delete table ip gso",
    },
    // Connections are established, but carry no data.
    Fault {
        close: "nft add table ip psh && \
                nft add chain ip psh f { type filter hook forward priority 0 ; } && \
                nft add rule ip psh f iifname gossamer.1 tcp flags & psh == psh drop",
        here: &["do not come back (IPv4 data of TCP connections): chain ip psh f (hook forward)"],
        there: "do not arrive at pods of n2 (IPv4 data of TCP connections): ",
        open: "nft delete table ip psh",
    },
    // Only large segments are rejected.
    Fault {
        close: "nft add table ip len && \
                nft add chain ip len f { type filter hook forward priority 0 ; } && \
                nft add rule ip len f iifname gossamer.1 meta l4proto tcp ip length > 1000 \
                reject with tcp reset",
        here: &["do not come back (IPv4 data of TCP connections): chain ip len f (hook forward)"],
        there: "do not arrive at pods of n2 (IPv4 data of TCP connections): ",
        open: "nft delete table ip len",
    },
    // The same by a program: drop if the length exceeds 1514.
    Fault {
        close: "tc qdisc add dev gossamer.1 clsact && \
                tc filter add dev gossamer.1 ingress LONGER",
        here: &["(IPv4 packets of several segments): gossamer.1 has filters on its ingress (bpf)"],
        there: "do not arrive at pods of n2 (IPv4 packets of several segments): ",
        open: "tc qdisc del dev gossamer.1 clsact",
    },
    // This host also drops large packets that leave. Its own test reports this once.
    Fault {
        close: "nft add table ip len && \
                nft add chain ip len f { type filter hook forward priority 0 ; } && \
                nft add rule ip len f ip length 1000-65535 drop",
        here: &["does not forward packets of pods (IPv4 large out): chain ip len f (hook forward)"],
        there: "do not arrive at pods of n2 (IPv4 large packets, fragments): ",
        open: "nft delete table ip len",
    },
];

const DIRECT_ROUTE_FAULTS: [Fault; 2] = [
    Fault {
        close: "nft add table ip d && \
                nft add chain ip d f { type filter hook forward priority 0 ; } && \
                nft add rule ip d f iifname eth0 oifname gsm0 drop",
        here: &["and their answers do not come back (IPv4): chain ip d f (hook forward)"],
        there: "packets of pods here do not arrive at pods of n2 (IPv4): ",
        open: "nft delete table ip d",
    },
    // Packets to the host's own address in the subnet are dropped as well.
    Fault {
        close: "nft add table ip d && \
                nft add chain ip d p { type filter hook prerouting priority -400 ; } && \
                nft add rule ip d p iifname eth0 ip daddr 10.42.0.0/16 drop",
        here: &[
            "go to 10.99.0.10 without a tunnel, and are not answered: chain ip d p (hook prerouting)",
        ],
        there: "go to 10.99.0.11 without a tunnel, and are not answered: ",
        open: "nft delete table ip d",
    },
];

/// Blocks and unblocks each way in turn.
fn check_faults(cluster: &mut Cluster, faults: &[Fault]) -> anyhow::Result<()> {
    let host = &cluster.hosts[1].netns;
    for Fault { close, here, there, open } in faults {
        sh(host, &close.replace("LONGER", &longer_than(&cluster.hosts[1], 1_514)));
        wait_until(there, TIMEOUT, || has_problem(&mut cluster.agents[0], there));
        for words in *here {
            wait_until(words, TIMEOUT, || has_problem(&mut cluster.agents[1], words));
            // One cause is one problem.
            status_where(&mut cluster.agents[1], |status| {
                status["problems"].as_array().is_some_and(|problems| problems.len() == 1)
            });
        }
        assert!(!has_problem(&mut cluster.agents[0], "its own come through one"), "{close}");
        if there.contains("at pods of") {
            let doctor = String::from_utf8(client(&cluster.agents[0], &["doctor"]).stdout)?;
            assert!(doctor.contains("PROBLEM   forwarding     packets of pods here"), "{doctor}");
        }
        sh(host, open);
        for agent in &mut cluster.agents {
            all_answer(agent, 1);
        }
    }
    Ok(())
}

fn check_tunnel_faults(lab: &mut Lab, faults: &[Fault]) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(lab, 2)?;
    let _spaces = with_pods(&mut cluster, &["a", "b"])?;
    check_faults(&mut cluster, faults)
}

#[test]
fn packets_of_marked_tunnels_and_fragments_lost_at_the_other_host_are_reported() {
    isolated(|lab| check_tunnel_faults(lab, &TUNNEL_FAULTS[..3]));
}

#[test]
fn long_packets_lost_at_the_other_host_are_reported() {
    isolated(|lab| check_tunnel_faults(lab, &TUNNEL_FAULTS[3..6]));
}

#[test]
fn data_of_connections_lost_at_the_other_host_is_reported() {
    isolated(|lab| check_tunnel_faults(lab, &TUNNEL_FAULTS[6..8]));
}

#[test]
fn packets_lost_by_filters_of_both_directions_are_reported() {
    isolated(|lab| check_tunnel_faults(lab, &TUNNEL_FAULTS[8..]));
}

/// These rules are on the path, but match other packets than the lost ones.
#[test]
fn local_rules_that_do_not_match_the_lost_packets_are_not_blamed() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        let host = &cluster.hosts[0].netns;
        sh(
            host,
            "nft add table inet own && \
             nft add chain inet own f { type filter hook forward priority 0 ; } && \
             nft add chain inet own more && \
             nft add rule inet own f tcp flags & (syn|fin) == syn|fin drop && \
             nft add rule inet own f udp dport 137 drop && \
             nft add rule inet own f ip saddr 192.168.0.0/16 drop && \
             nft add rule inet own f oifname docker0 drop && \
             nft add rule inet own f iifname docker0 jump more && \
             nft add rule inet own more drop",
        );
        let wall = &TUNNEL_FAULTS[2];
        sh(&cluster.hosts[1].netns, wall.close);
        let unknown = "none of its rules seems to drop them";
        let agent = &mut cluster.agents[0];
        wait_until(wall.there, TIMEOUT, || has_problem(agent, wall.there));
        wait_until(unknown, TIMEOUT, || has_problem(agent, unknown));
        // A rule that may be the cause is still reported.
        sh(host, "nft add rule inet own f udp dport 1-65535 ip length 60000 drop");
        let named = "chain inet own f (hook forward) has rules that drop or reject";
        wait_until(named, TIMEOUT, || has_problem(agent, named));
        Ok(())
    });
}

#[test]
fn lost_packets_between_pods_are_detected_without_a_tunnel() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        for number in [0, 1] {
            cluster.restart(number, &["--mode", "direct"])?;
        }
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        check_faults(&mut cluster, &DIRECT_ROUTE_FAULTS)
    });
}

#[test]
fn faulty_host_is_one_problem_with_its_name_on_all_other_hosts() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let _spaces = with_pods(&mut cluster, &["a", "b", "c"])?;
        let host = &cluster.hosts[1].netns;
        let wall = &TUNNEL_FAULTS[2];
        sh(host, wall.close);
        for number in [0, 2] {
            let agent = &mut cluster.agents[number];
            wait_until(wall.there, TIMEOUT, || has_problem(agent, wall.there));
            let status = agent.ask("/v1/status", TIMEOUT)?;
            assert_eq!(status["problems"].as_array().map(Vec::len), Some(1), "{status:#}");
        }
        // A fault that all other hosts see is reported once.
        let words = "at pods of n1 and n3, and their answers do not come back";
        let other = "at pods of n3 and n1, and their answers do not come back";
        wait_until(words, TIMEOUT, || {
            let agent = &mut cluster.agents[1];
            has_problem(agent, words) || has_problem(agent, other)
        });
        Ok(())
    });
}

/// Each of these conditions suppresses packets or answers for longer than the detection takes.
#[test]
fn suspended_or_restarted_or_empty_host_is_no_problem_of_other_hosts() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        let assert_no_loss_reported = |agent: &mut Agent| {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(25) {
                assert!(!has_problem(agent, "at pods of"), "{}", agent.log());
                std::thread::sleep(Duration::from_millis(200));
            }
        };
        suspend(&cluster.agents[1])?;
        assert_no_loss_reported(&mut cluster.agents[0]);
        resume(&cluster.agents[1])?;
        all_answer(&mut cluster.agents[0], 1);
        cluster.restart(1, &[])?;
        all_answer(&mut cluster.agents[0], 1);
        cluster.agents[1].end(Signal::SIGKILL)?;
        assert_no_loss_reported(&mut cluster.agents[0]);
        cluster.agents[1] = cluster.start_agent(&cluster.hosts[1], &[])?;
        cluster.agents[1].wait_converged(2, TIMEOUT)?;
        all_answer(&mut cluster.agents[0], 1);
        // Without pods there is no bridge, and the agent has no pod.
        Runtime::new(&cluster.agents[1]).del("b");
        assert_no_loss_reported(&mut cluster.agents[0]);
        Ok(())
    });
}

#[test]
fn random_losses_and_long_round_trips_are_no_problem() {
    isolated(|lab| {
        let test = "random_losses_and_long_round_trips_are_no_problem";
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = with_pods(&mut cluster, &["a", "b"])?;
        for weather in ["loss 5%", "delay 1500ms"] {
            for host in &cluster.hosts {
                let netem = format!("tc qdisc replace dev eth0 root netem {weather}");
                if !run(&host.netns, &netem).status.success() {
                    skipped(test, "the kernel has no netem");
                    return Ok(());
                }
            }
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(40) {
                for agent in &mut cluster.agents {
                    assert!(!has_problem(agent, "at pods of"), "{weather}: {}", agent.log());
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        Ok(())
    });
}

/// In dual stack, the last address for pods differs: both families use the same places.
#[test]
fn dual_stack_cluster_whose_pods_answer_has_no_problem() {
    isolated(|lab| {
        let mut cluster = Cluster::start_with(lab, 2, &["--network6", "fd42::/48"])?;
        for host in &cluster.hosts {
            sh(&host.netns, "sysctl -qw net.ipv6.conf.all.forwarding=1");
        }
        let spaces = namespaces(&["a", "b"])?;
        let begun = Instant::now();
        for (agent, name) in cluster.agents.iter_mut().zip(["a", "b"]) {
            Runtime::new(agent).add(name);
        }
        for agent in &mut cluster.agents {
            all_answer(agent, 1);
            status_where(agent, |status| detail(status).contains("IPv6 out"));
        }
        // A loss is reported within half a minute.
        while begun.elapsed() < Duration::from_secs(35) {
            for agent in &mut cluster.agents {
                assert!(!has_problem(agent, "at pods of"), "{}", agent.log());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        drop(spaces);
        Ok(())
    });
}

/// Unexpected packets at the port of the agent's own pod.
#[test]
fn agents_test_pod_answers_only_hosts_and_never_amplifies() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let spaces = with_pods(&mut cluster, &["a", "b"])?;
        let there = own_pod_of(&mut cluster.agents[1])?;
        let host = &cluster.hosts[0].netns;
        let ask = |netns: &NetNs, payload: &[u8]| {
            let socket = netns.run(|| UdpSocket::bind(("0.0.0.0", 0)))?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            socket.send_to(payload, (there, 61_476))?;
            let mut buffer = [0; 2_000];
            anyhow::Ok(socket.recv(&mut buffer).ok())
        };
        let question = [&b"gsmF?\x01\0\0"[..], &[1, 2, 3, 4], &[0; 20]].concat();
        assert_eq!(ask(host, &question)?, Some(question.len()));
        assert_eq!(ask(&spaces[0], &question)?, None);
        // An invalid request, and an answer.
        assert_eq!(ask(host, b"gsmF? cut")?, None);
        let answer = [&b"gsmF!\x01\0\0"[..], &[1, 2, 3, 4], &[0; 20]].concat();
        assert_eq!(ask(host, &answer)?, None);
        Ok(())
    });
}

/// Returns the address of the agent's own pod on that host.
fn own_pod_of(agent: &mut Agent) -> anyhow::Result<IpAddr> {
    let subnet = Agent::subnet(&agent.ask("/v1/status", TIMEOUT)?)?;
    Ok(last_address(subnet.into()))
}

/// Sets a flag when dropped, also if the test fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Calls `send` in a pod's namespace repeatedly while `then` runs.
fn while_pod_sends<T>(
    pod: &NetNs,
    send: impl Fn() + Send + Sync,
    then: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pod.run(|| {
                while !is_over.load(Relaxed) {
                    send();
                }
                Ok(())
            })
        });
        let _over = SetOnDrop(&is_over);
        then()
    })
}

/// Between two tests, far more packets arrive than a socket buffer holds.
#[test]
fn connections_of_a_pod_to_a_remote_test_pod_do_not_fail_its_tests() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let spaces = with_pods(&mut cluster, &["a", "b"])?;
        let there = own_pod_of(&mut cluster.agents[1])?;
        let connect = || _ = TcpStream::connect((there, 80));
        while_pod_sends(&spaces[0], connect, || {
            // A change of the rules triggers a test at once; lost packets are sent again each second.
            sh(&cluster.hosts[1].netns, "nft add table ip changed");
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(15) {
                let agent = &mut cluster.agents[1];
                assert!(!has_problem(agent, "does not forward"), "{}", agent.log());
                std::thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        })
    });
}

/// Sends many more datagrams than a socket buffer holds.
fn burst(socket: &UdpSocket, payload: &[u8], to: (IpAddr, u16)) {
    for _ in 0..600 {
        let _ = socket.send_to(payload, to);
    }
    std::thread::sleep(Duration::from_millis(10));
}

/// Requests with an id that the agent there never answers.
#[test]
fn requests_of_a_pod_do_not_hide_lost_packets_to_another_host() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let spaces = with_pods(&mut cluster, &["a", "b"])?;
        let there = own_pod_of(&mut cluster.agents[1])?;
        let question = [&b"gsmF?\x01\0\0"[..], &[0, 0, 0, 7], &[0; 20]].concat();
        let socket = spaces[0].run(|| UdpSocket::bind(("0.0.0.0", 0)))?;
        while_pod_sends(
            &spaces[0],
            || burst(&socket, &question, (there, 61_476)),
            || {
                let Fault { close, there, .. } = &TUNNEL_FAULTS[4];
                sh(&cluster.hosts[1].netns, close);
                wait_until(there, TIMEOUT, || has_problem(&mut cluster.agents[0], there));
                Ok(())
            },
        )
    });
}

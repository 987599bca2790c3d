//! A faulty or malicious member, over the real protocol: other members continue to work, and report it.

mod member;

use std::{
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use gossamer::{
    lab::cpu_seconds,
    model::{Identity, Incarnation, Mac, NodeId, Run, Slot, SlotRecord, SlotState, Version},
    wire::{Facts, Refusal, Response},
};
use serde_json::Value;

use self::member::{HostileMember, Order};

use crate::{
    common::{
        Cluster, TIMEOUT, eventually, has_problem, isolated, run, status_where, texts, tool,
        wait_until,
    },
    metrics::PORT as HTTP,
};

/// No answer of an agent takes longer, whatever a member sends; a machine may be busy.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Clients that read one agent's status without end.
const READERS: usize = 32;
/// Time for which they read: a member that does not gossip is called down earlier.
const LOAD_TIME: Duration = Duration::from_secs(10);
/// Invented members with subnets, and the CPU time that they cost an unoptimized agent in [`LOAD_TIME`]: it
/// takes half of this.
const SILENT_MEMBERS: u16 = 4_000;
const MAX_CPU_SECONDS: f64 = 3.0;

fn status(cluster: &mut Cluster, agent: usize) -> Value {
    let begun = Instant::now();
    let status = cluster.agents[agent].ask("/v1/status", TIMEOUT).expect("a status");
    assert!(begun.elapsed() < ANSWER_TIMEOUT, "the loop did not turn for {:?}", begun.elapsed());
    status
}

/// Checks that the agents still serve their clients.
fn assert_agents_work(cluster: &mut Cluster) {
    for number in 0..cluster.agents.len() {
        let status =
            status_where(&mut cluster.agents[number], |status| status["converged"] == true);
        assert_eq!(status["kernel"]["in_sync"], true, "{status:#}");
        let host = &cluster.hosts[number];
        let socket = host.dir.join("gossamer.sock");
        let config = format!(
            r#"{{"cniVersion":"1.1.0","name":"n","type":"gossamer","socket":"{}"}}"#,
            socket.display()
        );
        let mut plugin = std::process::Command::new(crate::common::program());
        plugin.env("CNI_COMMAND", "STATUS").env("CNI_PATH", "/opt/cni/bin");
        plugin.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = plugin.spawn().expect("the plugin runs");
        let mut input = child.stdin.take().expect("piped");
        io::Write::write_all(&mut input, config.as_bytes()).expect("written");
        drop(input);
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

fn node_of(cluster: &mut Cluster, agent: usize) -> NodeId {
    let status = cluster.agents[agent].ask("/v1/status", TIMEOUT).expect("a status");
    status["node"].as_str().expect("an id").parse().expect("an id")
}

#[test]
fn impossible_address_of_a_member_is_reported_as_that_members_fault() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = lab.host(9, "evil")?;
        let mut hostile = HostileMember::new(&host, &cluster.token)?;
        let n1 = node_of(&mut cluster, 0);
        let own: IpAddr = cluster.hosts[0].ip.into();
        for (underlay, why) in [
            ("fe80::1".parse()?, "link-local"),
            ("224.0.0.5".parse()?, "multicast"),
            ("10.42.9.1".parse()?, "inside the overlay's own network"),
            ("fd99::9".parse()?, "another family"),
            (own, "is this node's"),
        ] {
            let mut member = hostile.record();
            member.vtep.underlay = underlay;
            let (_, answer) = hostile.greet(&cluster.hosts[0], member)?;
            let Response::Refused(Refusal::UnusableRecord(said)) = answer else {
                panic!("{answer:?}")
            };
            assert!(said.as_str().contains(why), "{said}");
        }
        assert_eq!(status(&mut cluster, 0)["members"].as_array().map(Vec::len), Some(2));

        // It joins with a valid record, and changes it afterwards.
        let (_, answer) = hostile.greet(&cluster.hosts[0], hostile.record())?;
        assert!(matches!(answer, Response::Welcome(_)), "{answer:?}");
        let fdb = "bridge fdb show dev gossamer.1";
        let evil = format!("dst {} ", host.ip);
        let n2 = format!("dst {} ", cluster.hosts[1].ip);
        eventually(&cluster.hosts[1].netns, fdb, |fdb| fdb.contains(&evil));
        for (underlay, why) in [
            ("127.0.0.1", "a loopback address"),
            ("0.0.0.0", "unspecified"),
            ("255.255.255.255", "the broadcast address"),
        ] {
            hostile.push_self(n1, &cluster.hosts[0], |record| {
                record.vtep.underlay = underlay.parse().expect("an address");
            });
            wait_until(why, TIMEOUT, || has_problem(&mut cluster.agents[0], why));
        }
        let mac = Mac::of_node(node_of(&mut cluster, 1));
        hostile.push_self(n1, &cluster.hosts[0], |record| record.vtep.mac = mac);
        wait_until("MAC", TIMEOUT, || {
            has_problem(&mut cluster.agents[0], "which follows from its key")
        });
        hostile.push_self(n1, &cluster.hosts[0], |record| record.address.set_port(0));
        wait_until("port", TIMEOUT, || has_problem(&mut cluster.agents[0], "its port is 0"));
        let entries = tool(&cluster.hosts[0].netns, fdb);
        assert!(entries.contains(&evil) && entries.contains(&n2), "{entries}");
        for address in ["127.0.0.1", "dst 0.0.0.0", "255.255.255.255"] {
            assert!(!entries.contains(address), "{entries}");
        }
        assert_agents_work(&mut cluster);

        // An address that is valid but unusable for this node is accepted, and gets no entry.
        for (underlay, why) in [("fd99::9", "of another family"), ("10.99.0.1", "")] {
            hostile.push_self(n1, &cluster.hosts[0], |record| {
                record.vtep.underlay = underlay.parse().expect("an address");
            });
            for agent in 0..2 {
                let named = |status: &Value| {
                    let evil = status["members"].as_array().into_iter().flatten();
                    let mut evil = evil.filter(|member| member["name"] == "evil");
                    evil.next().is_some_and(|member| member["underlay"] == underlay)
                        && texts(&status["problems"]).contains(why)
                };
                status_where(&mut cluster.agents[agent], named);
            }
            assert_agents_work(&mut cluster);
        }
        hostile.push_self(n1, &cluster.hosts[0], |record| record.vtep.underlay = own);
        let said = "which is this host's own";
        wait_until(said, TIMEOUT, || has_problem(&mut cluster.agents[0], said));
        let entries = tool(&cluster.hosts[0].netns, fdb);
        assert!(!entries.contains(&format!("dst {own} ")), "{entries}");
        assert_agents_work(&mut cluster);

        // The same after a restart: nothing of it was stored.
        cluster.agents[0].end(nix::sys::signal::Signal::SIGTERM)?;
        cluster.agents[0] = cluster.start_agent(&cluster.hosts[0], &[])?;
        cluster.agents[0].wait_converged(2, TIMEOUT)?;
        assert_agents_work(&mut cluster);
        Ok(())
    });
}

#[test]
fn forged_high_counters_remove_no_subnet_and_no_member() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = lab.host(9, "evil")?;
        let hostile = HostileMember::new(&host, &cluster.token)?;
        let (from, answer) = hostile.greet(&cluster.hosts[0], hostile.record())?;
        let Response::Welcome(welcome) = answer else { panic!("{answer:?}") };
        let n2 = node_of(&mut cluster, 1);
        let is_theirs =
            |run: &&Run| run.record.owner == n2 && run.record.state == SlotState::Leased;
        let lease = *welcome.facts.slots.iter().find(is_theirs).expect("n2 has a subnet");
        let before = status(&mut cluster, 1)["subnet"].clone();
        let taken = SlotRecord {
            epoch: u64::MAX,
            owner: hostile.node,
            state: SlotState::Leased,
            granter: hostile.node,
        };
        let victim = welcome.facts.members.iter().find(|record| record.node == n2);
        let mut victim = victim.expect("its record").clone();
        victim.version = Version { starts: u32::MAX, change: u32::MAX };
        victim.vtep.underlay = "10.99.0.250".parse()?;
        let forged = Identity {
            node: n2,
            incarnation: Incarnation { starts: u32::MAX, renewals: u32::MAX },
        };
        let facts = Facts {
            members: vec![victim.clone()],
            slots: vec![Run { record: taken, ..lease }],
            active: vec![forged],
            forgets: Vec::new(),
        };
        hostile.push(from, &cluster.hosts[0], facts.clone());
        hostile.push(n2, &cluster.hosts[1], facts);
        for agent in 0..2 {
            wait_until("the jumps are not reported", TIMEOUT, || {
                has_problem(&mut cluster.agents[agent], "a jump to")
            });
        }
        assert_agents_work(&mut cluster);
        assert_eq!(status(&mut cluster, 1)["subnet"], before);
        let fdb = tool(&cluster.hosts[0].netns, "bridge fdb show dev gossamer.1");
        let their_end = format!("dst {} ", cluster.hosts[1].ip);
        assert!(fdb.contains(&their_end) && !fdb.contains("10.99.0.250"), "{fdb}");
        tool(&pods[0].netns, &format!("ping -c 1 -W 2 {}", pods[1].ip));

        // A node answers records that it could have written itself.
        victim.version = Version { starts: 1, change: 1000 };
        let facts = Facts { members: vec![victim], ..Facts::default() };
        hostile.push(from, &cluster.hosts[0], facts);
        let said = "records of this node were received that it never wrote";
        wait_until(said, TIMEOUT, || has_problem(&mut cluster.agents[1], said));
        eventually(&cluster.hosts[0].netns, "bridge fdb show dev gossamer.1", |fdb| {
            fdb.contains(&their_end) && !fdb.contains("10.99.0.250")
        });
        tool(&pods[0].netns, &format!("ping -c 1 -W 2 {}", pods[1].ip));
        assert_agents_work(&mut cluster);
        Ok(())
    });
}

#[test]
fn flood_of_facts_by_a_member_blocks_no_agent_and_fills_no_log() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = lab.host(9, "evil")?;
        let hostile = HostileMember::new(&host, &cluster.token)?;
        let (n1, answer) = hostile.greet(&cluster.hosts[0], hostile.record())?;
        assert!(matches!(answer, Response::Welcome(_)), "{answer:?}");

        // Answers that try to forge log lines, and contain terminal escape sequences.
        let text = format!(
            "x\n2026-01-01T00:00:00Z ERROR forged line\u{1b}[2J\u{7}{}",
            "y".repeat(20_000)
        );
        let mut refusal = vec![6, 9, 251];
        refusal.extend_from_slice(&(text.len() as u16).to_le_bytes());
        refusal.extend_from_slice(text.as_bytes());
        hostile.order(Order::AnswerWith(refusal));
        wait_until("nothing was compared", TIMEOUT, || {
            cluster.agents[0].log().contains("comparison refused")
        });
        let unknown_member = |n: u32| {
            let mut id = [0xee; 8];
            id[..4].copy_from_slice(&n.to_be_bytes());
            let incarnation = Incarnation { starts: 1, renewals: 0 };
            Identity { node: NodeId::from_bytes(id), incarnation }
        };
        let before = cluster.agents[0].log().len();
        // More members than any cluster has are rejected at once. A possible number of unknown members is
        // processed.
        for count in [200_000, 16_000, 16_000, 16_000] {
            let active = (0..count).map(unknown_member).collect();
            hostile.push(n1, &cluster.hosts[0], Facts { active, ..Facts::default() });
        }
        for round in 0..200 {
            hostile.push(
                n1,
                &cluster.hosts[0],
                Facts { active: (0..20_000).map(unknown_member).collect(), ..Facts::default() },
            );
            if round % 20 == 0 {
                status(&mut cluster, 0);
            }
        }
        let contradictions = (0..400_u32).map(|n| {
            let mut id = [0xdd; 8];
            id[..4].copy_from_slice(&n.to_be_bytes());
            let owner = NodeId::from_bytes(id);
            let record =
                SlotRecord { epoch: 0, owner, state: SlotState::Free, granter: hostile.node };
            Run { start: Slot(0), len: 256, record }
        });
        let slots: Vec<Run> = contradictions.collect();
        hostile.push(n1, &cluster.hosts[0], Facts { slots, ..Facts::default() });
        let malformed = |status: &Value| status["counters"]["malformed"].as_u64() >= Some(50);
        status_where(&mut cluster.agents[0], malformed);
        status_where(&mut cluster.agents[0], |status| {
            status["counters"]["ownership_conflicts"].as_u64() > Some(0)
        });
        status(&mut cluster, 0);
        let log = cluster.agents[0].log();
        let grown = log.len() - before;
        assert!(
            grown < 64 << 10,
            "the log has grown by {grown} bytes:\n{}",
            &log[before..][..4096]
        );
        for forged in ["\nx", "\n2026-01-01", "\u{1b}[2J", "\u{7}"] {
            assert!(!log.contains(forged), "{forged:?} is in the log");
        }
        let members = status(&mut cluster, 0)["members"].as_array().map(Vec::len);
        assert_eq!(members, Some(3), "two members and the hostile one");
        let pid = cluster.agents[0].pid();
        let gone = run(&cluster.hosts[0].netns, &format!("kill -0 {pid}"));
        assert!(gone.status.success(), "the agent is gone");
        Ok(())
    });
}

/// Regression: a label was compared with the ids of all members as text, so that 16,000 members of one name
/// stopped the event loop of each node for a minute, again and again. Later, the labels of all members were
/// made for each silent one with a subnet.
#[test]
fn thousands_of_invented_members_of_one_name_stop_no_agent_and_fill_no_log() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = lab.host(9, "evil")?;
        let hostile = HostileMember::new(&host, &cluster.token)?;
        let (_, answer) = hostile.greet(&cluster.hosts[0], hostile.record())?;
        let Response::Welcome(welcome) = answer else { panic!("{answer:?}") };
        let runs = welcome.facts.slots.iter().filter(|run| run.record.owner == hostile.node);
        let slots: Vec<Slot> = runs.flat_map(Run::slots).take(15).collect();
        assert_eq!(slots.len(), 15, "the seed has granted slots");
        hostile.invent(&cluster.hosts[0], 3_000, true, &slots)?;
        for agent in 0..2 {
            let named = |status: &Value| {
                let members = status["members"].as_array().into_iter().flatten();
                let labels = members.filter(|member| member["name"] == "same");
                let labels: std::collections::BTreeSet<_> =
                    labels.filter_map(|member| member["label"].as_str()).collect();
                labels.len() == 3_000
            };
            status_where(&mut cluster.agents[agent], named);
            status(&mut cluster, agent);
            let log = cluster.agents[agent].log();
            let lines = log.lines().filter(|line| line.contains("name=same")).count();
            assert!(lines < 1_000, "{lines} lines");
        }
        Ok(())
    });
}

/// Regression: each silent member was compared with each other one every second, and the tests of all peers'
/// pods were prepared with each probe of a silent member, up to 50 times a second. 16,000 such members kept
/// the event loop busy without end.
#[test]
fn thousands_of_silent_invented_members_with_subnets_slow_no_agent() {
    isolated(|lab| {
        let large = ["--network", "10.64.0.0/11", "--subnet-len", "27"];
        let mut cluster = Cluster::start_with(lab, 1, &large)?;
        let host = lab.host(9, "evil")?;
        let hostile = HostileMember::new(&host, &cluster.token)?;
        let (_, answer) = hostile.greet(&cluster.hosts[0], hostile.record())?;
        let Response::Welcome(welcome) = answer else { panic!("{answer:?}") };
        let runs = welcome.facts.slots.iter().filter(|run| run.record.owner == hostile.node);
        let count = usize::from(SILENT_MEMBERS);
        let slots: Vec<Slot> = runs.flat_map(Run::slots).take(count).collect();
        assert_eq!(slots.len(), count, "the seed has granted slots");
        hostile.invent(&cluster.hosts[0], SILENT_MEMBERS, false, &slots)?;
        status_where(&mut cluster.agents[0], |status| {
            status["paths"].as_array().is_some_and(|paths| paths.len() >= count)
        });
        let pid = cluster.agents[0].pid();
        let before = cpu_seconds(pid);
        thread::sleep(LOAD_TIME);
        let spent = cpu_seconds(pid) - before;
        assert!(spent < MAX_CPU_SECONDS, "{spent} s of CPU time within {LOAD_TIME:?}");
        Ok(())
    });
}

/// Regression: each reader of `/v1/status` had a status built, 64 in one turn of the loop, so that readers of
/// a large cluster kept the agent from gossip until it was called down.
#[test]
fn readers_of_a_large_status_keep_no_agent_from_gossip() {
    isolated(|lab| {
        let mut cluster = Cluster::start_with(lab, 2, &["--http", &format!("127.0.0.1:{HTTP}")])?;
        let host = lab.host(9, "evil")?;
        let hostile = HostileMember::new(&host, &cluster.token)?;
        let (_, answer) = hostile.greet(&cluster.hosts[0], hostile.record())?;
        assert!(matches!(answer, Response::Welcome(_)), "{answer:?}");
        // Gossip contacts this node less often if more members are alive.
        hostile.invent(&cluster.hosts[0], 12_000, false, &[])?;
        let knows_them = |status: &Value| {
            status["members"].as_array().is_some_and(|members| members.len() > 12_000)
        };
        for agent in &mut cluster.agents {
            status_where(agent, knows_them);
        }

        let Cluster { hosts, agents, .. } = &mut cluster;
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..READERS {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        // The listener may refuse a connection beyond its limit.
                        let _ = hosts[0].netns.run(|| {
                            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, HTTP))?;
                            stream
                                .write_all(b"GET /v1/status HTTP/1.0\r\nhost: 127.0.0.1\r\n\r\n")?;
                            io::copy(&mut stream, &mut io::sink())
                        });
                    }
                });
            }
            let (begun, mut slowest) = (Instant::now(), Duration::ZERO);
            while begun.elapsed() < LOAD_TIME {
                let asked = Instant::now();
                agents[0].ask("/v1/status", TIMEOUT).expect("an answer");
                slowest = slowest.max(asked.elapsed());
            }
            is_over.store(true, Ordering::Relaxed);
            assert!(slowest < ANSWER_TIMEOUT, "the loop did not turn for {slowest:?}");
        });
        let log = cluster.agents[1].log();
        let called_down = |line: &&str| line.contains("member down") && line.contains("name=n1");
        assert_eq!(log.lines().find(called_down), None);
        Ok(())
    });
}

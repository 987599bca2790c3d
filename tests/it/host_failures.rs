//! Failures of hosts: full disks, lost databases, foreign routes and others.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Host, NetNs};
use nix::{
    mount::{MsFlags, mount},
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use serde_json::{Value, json};

use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        Cluster, TIMEOUT, assert_logged, eventually, has_problem, isolated, program, resume, run,
        status_where, suspend, tool, wait_until,
    },
    netavark::{self, Podman},
};

/// A stopped agent ends within 5 s, whatever hangs; the rest is for a busy machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);

pub fn lose_database(host: &Host) -> anyhow::Result<()> {
    Ok(fs::remove_dir_all(host.dir.join("state/db"))?)
}

#[test]
fn host_with_a_lost_database_rejoins_its_cluster_with_its_subnet() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let id = cluster.agents[1].wait_converged(3, TIMEOUT)?["cluster"].clone();
        // The creator, whose unit still passes --init, and a joiner without any flags.
        for (n, arguments) in [(0, &["--init"][..]), (1, &[][..])] {
            let subnet = Agent::subnet(&cluster.agents[n].wait_converged(3, TIMEOUT)?)?;
            cluster.agents[n].end(Signal::SIGTERM)?;
            lose_database(&cluster.hosts[n])?;
            cluster.agents[n] = Agent::start(program(), &cluster.hosts[n], arguments)?;
            let status = cluster.agents[n].wait_converged(3, TIMEOUT)?;
            assert_eq!(status["cluster"], id, "no second cluster was created");
            assert_eq!(Agent::subnet(&status)?, subnet, "a peer remembered it");
        }
        cluster.converge()
    });
}

#[test]
fn single_node_with_a_lost_database_continues_with_the_second_copy() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let (host, _spaces) = (&cluster.hosts[0], namespaces(&["a", "b"])?);
        for container in ["a", "b"] {
            Runtime::new(&cluster.agents[0]).add(container);
        }
        let before = cluster.agents[0].wait_converged(1, TIMEOUT)?;
        let pods = |agent: &mut Agent| agent.ask("/v1/pods", TIMEOUT);
        let known = pods(&mut cluster.agents[0])?;
        for damage in ["lost", "emptied"] {
            cluster.agents[0].end(Signal::SIGTERM)?;
            match damage {
                "lost" => lose_database(host)?,
                _ => fs::write(host.dir.join("state/db/db"), "")?,
            }
            cluster.agents[0] = Agent::start(program(), host, &["--init"])?;
            let after = cluster.agents[0].wait_converged(1, TIMEOUT)?;
            assert_eq!(after["cluster"], before["cluster"], "{damage}");
            assert_eq!(Agent::subnet(&after)?, Agent::subnet(&before)?, "{damage}");
            assert_eq!(after["slots"], before["slots"], "{damage}");
            assert_eq!(pods(&mut cluster.agents[0])?, known, "{damage}");
        }
        assert!(host.dir.join("state/db.damaged-1").exists(), "what was left is kept");
        Ok(())
    });
}

/// The database engine accepts a truncated log as complete.
#[test]
fn database_without_its_last_changes_is_completed_from_the_second_copy() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _spaces = namespaces(&["a", "b", "c"])?;
        for pod in ["a", "b"] {
            Runtime::new(&cluster.agents[0]).add(pod);
        }
        cluster.agents[0].end(Signal::SIGTERM)?;
        let state = cluster.hosts[0].dir.join("state");
        let (db, earlier) = (state.join("db"), cluster.hosts[0].dir.join("earlier"));
        let copy = |from: &Path, to: &Path| Command::new("cp").arg("-a").arg(from).arg(to).status();
        assert!(copy(&db, &earlier)?.success());
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        cluster.converge()?;
        Runtime::new(&cluster.agents[0]).del("a");
        Runtime::new(&cluster.agents[0]).add("c");
        let known = cluster.agents[0].ask("/v1/pods", TIMEOUT)?;
        let before = cluster.agents[0].wait_converged(2, TIMEOUT)?;
        cluster.agents[0].end(Signal::SIGTERM)?;
        fs::remove_dir_all(&db)?;
        fs::rename(&earlier, &db)?;
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        let after = cluster.agents[0].wait_converged(2, TIMEOUT)?;
        assert_logged(&cluster.agents[0], "lost its last changes");
        assert_eq!(Agent::subnet(&after)?, Agent::subnet(&before)?);
        assert_eq!(cluster.agents[0].ask("/v1/pods", TIMEOUT)?, known);
        // After a restart the changes are in the database.
        cluster.restart(0, &[])?;
        assert_eq!(cluster.agents[0].ask("/v1/pods", TIMEOUT)?, known);
        assert_eq!(cluster.agents[0].log().matches("lost its last changes").count(), 1);
        Ok(())
    });
}

#[test]
fn swapped_databases_of_two_hosts_are_moved_aside_and_no_pod_is_lost() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let spaces = namespaces(&["a", "b"])?;
        let [a, b] = [(0, "a"), (1, "b")]
            .map(|(n, pod)| address(&Runtime::new(&cluster.agents[n]).add(pod)));
        let before = [0, 1].map(|n| cluster.agents[n].ask("/v1/pods", TIMEOUT).expect("pods"));
        cluster.agents[..2]
            .iter_mut()
            .try_for_each(|agent| agent.end(Signal::SIGTERM).map(drop))?;
        let [first, second] = [0, 1].map(|n| cluster.hosts[n].dir.join("state/db"));
        let aside = cluster.hosts[0].dir.join("swapped");
        for (from, to) in [(&first, &aside), (&second, &first), (&aside, &second)] {
            fs::rename(from, to)?;
        }
        for n in [0, 1] {
            cluster.agents[n] = Agent::start(program(), &cluster.hosts[n], &[])?;
        }
        cluster.converge()?;
        for (n, before) in before.iter().enumerate() {
            assert_logged(&cluster.agents[n], "written by node");
            let log = cluster.agents[n].log();
            assert!(!log.contains("interfaces of unknown pods"), "{log}");
            let after = cluster.agents[n].ask("/v1/pods", TIMEOUT)?;
            assert_eq!(after["pods"][0]["addresses"], before["pods"][0]["addresses"]);
            assert!(cluster.hosts[n].dir.join("state/db.damaged-1").exists());
        }
        eventually(&spaces[0], &format!("ping -c 1 -W 2 {b}"), |said| said.contains(" 1 received"));
        eventually(&spaces[1], &format!("ping -c 1 -W 2 {a}"), |said| said.contains(" 1 received"));
        Ok(())
    });
}

#[test]
fn key_of_another_node_is_refused_and_the_database_kept() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let before = cluster.agents[1].wait_converged(2, TIMEOUT)?;
        cluster.agents[1].end(Signal::SIGTERM)?;
        let [other, key] = [0, 1].map(|n| cluster.hosts[n].dir.join("state/node.key"));
        let own = fs::read(&key)?;
        fs::copy(other, &key)?;
        cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &[])?;
        assert_eq!(cluster.agents[1].wait()?.code(), Some(1));
        let log = cluster.agents[1].log();
        assert!(log.contains("restore the key and the database of one node"), "{log}");
        fs::write(&key, own)?;
        cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &[])?;
        let after = cluster.agents[1].wait_converged(2, TIMEOUT)?;
        assert_eq!([&after["node"], &after["subnet"]], [&before["node"], &before["subnet"]]);
        Ok(())
    });
}

#[test]
fn single_creator_with_both_copies_lost_reports_a_remedy() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        cluster.agents[0].end(Signal::SIGTERM)?;
        lose_database(&cluster.hosts[0])?;
        fs::remove_file(cluster.hosts[0].dir.join("state/essentials"))?;
        let mut again = Agent::start(program(), &cluster.hosts[0], &["--init"])?;
        assert_eq!(again.wait()?.code(), Some(1));
        assert!(again.log().contains("its database is lost"), "{}", again.log());
        assert!(cluster.hosts[0].dir.join("state/node.key").exists(), "nothing was removed");
        Ok(())
    });
}

#[test]
fn full_disk_delays_grants_and_loses_nothing() {
    isolated(|lab| {
        let first = lab.host(1, "n1")?;
        let state = first.dir.join("state");
        fs::create_dir_all(&state)?;
        mount(Some("tmpfs"), &state, Some("tmpfs"), MsFlags::empty(), Some("size=4m"))?;
        let mut creator = Agent::start(program(), &first, &["--init"])?;
        creator.wait_converged(1, TIMEOUT)?;
        let token = crate::common::token_of(&mut creator)?;
        fill(&state)?;

        let second = lab.host(2, "n2")?;
        let seed = first.ip.to_string();
        let mut joiner = Agent::start(program(), &second, &["--join", &seed, "--token", &token])?;
        let named = |creator: &mut Agent| has_problem(creator, "state directory");
        wait_until("the full disk is not reported", TIMEOUT, || named(&mut creator));
        fs::remove_file(state.join("filler"))?;
        joiner.wait_converged(2, TIMEOUT)?;
        creator.wait_converged(2, TIMEOUT)?;
        wait_until("the disk is still reported", TIMEOUT, || !named(&mut creator));
        creator.end(Signal::SIGKILL)?;
        let mut creator = Agent::start(program(), &first, &[])?;
        let status = creator.wait_converged(2, TIMEOUT)?;
        assert_eq!(status["slots"]["leased"], 2, "what was granted then is on the disk now");
        Ok(())
    });
}

#[test]
fn agent_on_a_full_disk_ends_on_sigterm_and_keeps_its_subnet() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let state = host.dir.join("state");
        fs::create_dir_all(&state)?;
        mount(Some("tmpfs"), &state, Some("tmpfs"), MsFlags::empty(), Some("size=4m"))?;
        let mut agent = Agent::start(program(), &host, &["--init"])?;
        let subnet = Agent::subnet(&agent.wait_converged(1, TIMEOUT)?)?;
        fill(&state)?;
        let _spaces = namespaces(&["a"])?;
        // The last page of the database may hold some more records.
        wait_until("not reported", TIMEOUT, || {
            let runtime = Runtime::new(&agent);
            let is_full = !runtime.call("ADD", "a", &json!({})).0;
            is_full || !runtime.call("DEL", "a", &json!({})).0
        });
        assert!(has_problem(&mut agent, "state directory"), "{}", agent.log());
        let signaled = Instant::now();
        agent.end(Signal::SIGTERM)?;
        assert!(signaled.elapsed() < STOP_TIMEOUT, "{:?}", signaled.elapsed());
        assert!(
            agent.log().contains("last changes not written to the state directory"),
            "{}",
            agent.log()
        );
        fs::remove_file(state.join("filler"))?;
        let mut agent = Agent::start(program(), &host, &[])?;
        assert_eq!(Agent::subnet(&agent.wait_converged(1, TIMEOUT)?)?, subnet);
        Ok(())
    });
}

/// A named pipe without a writer stands for a disk that hangs.
#[test]
fn agent_with_a_hanging_disk_at_start_ends_on_sigterm() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init"])?;
        agent.wait_converged(1, TIMEOUT)?;
        agent.end(Signal::SIGTERM)?;
        // The database engine opens this file, and blocks.
        let file = host.dir.join("state/db/conf");
        fs::remove_file(&file)?;
        mkfifo(&file, Mode::S_IRWXU)?;
        let start = || -> anyhow::Result<Agent> {
            let agent = Agent::start(program(), &host, &["--init"])?;
            let caught = format!("/proc/{}/status", agent.pid());
            // Before the agent has installed its handlers, a signal ends it at once.
            wait_until("it catches no signal", TIMEOUT, || {
                let status = fs::read_to_string(&caught).unwrap_or_default();
                let line = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
                let mask = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
                mask.is_some_and(|mask| mask >> (Signal::SIGTERM as u64 - 1) & 1 == 1)
            });
            Ok(agent)
        };
        let mut agent = start()?;
        let signaled = Instant::now();
        assert_eq!(agent.end(Signal::SIGTERM)?.code(), Some(0));
        assert!(signaled.elapsed() < STOP_TIMEOUT, "{:?}", signaled.elapsed());
        Ok(())
    });
}

fn fill(directory: &Path) -> anyhow::Result<()> {
    let mut file = fs::File::create(directory.join("filler"))?;
    while file.write_all(&[0; 512]).is_ok() {}
    Ok(())
}

#[test]
fn cleanup_removes_everything_of_gossamer_and_nothing_else() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let host = &cluster.hosts[1];
        tool(
            &host.netns,
            "ip link add flannel.1 type vxlan id 9 dstport 9999 dev eth0 local 10.99.0.11",
        );
        tool(&host.netns, "ip route add 10.43.0.0/16 via 10.99.0.1 proto static");
        let (state, env) = (host.dir.join("state"), host.dir.join("subnet.env"));
        let (state_dir, file) = (state.display().to_string(), env.display().to_string());
        let arguments = ["cleanup", "--state-dir", &state_dir, "--subnet-file", &file];
        let socket = cluster.agents[1].socket().display().to_string();
        let clean = |more: &str| {
            run(
                &host.netns,
                &format!(
                    "{} {} --socket {socket} {more}",
                    program().display(),
                    arguments.join(" ")
                ),
            )
        };
        let _pod = NetNs::new("pod")?;
        Runtime::new(&cluster.agents[1]).add("pod");
        tool(&host.netns, "ip link add br0 type bridge");
        let neighbors = "ip neigh show dev eth0 nud all";
        eventually(&host.netns, neighbors, |text| text.matches("extern_learn").count() == 2);
        let refused = clean("");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("gossamer leave"), "{refused:?}");
        cluster.agents[1].end(Signal::SIGKILL)?;
        tool(&host.netns, "ip route add unreachable 10.42.77.0/24 proto 73 metric 5");

        tool(&host.netns, "nft add table inet gossamer.77");
        tool(&host.netns, "nft add table inet mine");

        // The state of a disk that was cleared by hand.
        fs::remove_file(state.join("lock"))?;
        let content =
            || tool(&host.netns, &format!("find {} -printf %p%m%T@\\n", host.dir.display()));
        let before = content();
        let listed = clean("--dry-run");
        assert_eq!(content(), before, "a dry run has changed something");
        let listed = String::from_utf8(listed.stdout)?;
        for words in [
            "would remove device gossamer.1",
            "would remove bridge gsm0",
            "route to 10.42.77.0/24",
            "would remove nftables table inet gossamer.77",
            "would remove nftables table bridge gossamer.1",
            "protection of the neighbor entry of 10.99.0.10",
            &file,
            "gossamer forget",
        ] {
            assert!(listed.contains(words), "{words} is missing in\n{listed}");
        }
        assert!(!listed.contains("flannel") && !listed.contains("10.43"), "{listed}");
        assert_eq!(tool(&host.netns, "ip route show proto 73").lines().count(), 4, "only listed");
        assert!(clean("").status.success());
        assert_eq!(tool(&host.netns, "ip route show proto 73"), "");
        let links = tool(&host.netns, "ip -br link");
        assert!(!links.contains("gossamer") && !links.contains("gsm"), "{links}");
        assert!(links.contains("flannel.1") && links.contains("br0"), "{links}");
        assert!(tool(&host.netns, "ip route").contains("10.43.0.0/16"), "not ours");
        assert_eq!(tool(&host.netns, "nft list tables"), "table inet mine\n");
        assert!(!tool(&host.netns, neighbors).contains("extern_learn"));
        assert!(!state.exists() && !env.exists());
        let again = clean("");
        assert!(
            String::from_utf8_lossy(&again.stdout).contains("gossamer has left nothing"),
            "{again:?}"
        );
        Ok(())
    });
}

#[test]
fn cleanup_lets_a_running_agent_leave_first() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[1];
        let (state, env) = (host.dir.join("state"), host.dir.join("subnet.env"));
        let command = format!(
            "{} cleanup --state-dir {} --subnet-file {} --socket {}",
            program().display(),
            state.display(),
            env.display(),
            cluster.agents[1].socket().display()
        );
        let listed = run(&host.netns, &format!("{command} --leave --dry-run"));
        let said = String::from_utf8_lossy(&listed.stdout).into_owned();
        for words in ["This host (n2) gives up 10.42.", "would remove device gossamer.1"] {
            assert!(said.contains(words), "{words} is missing in\n{said}");
        }
        assert!(!said.contains("gossamer forget") && state.exists(), "{said}");
        let done = run(&host.netns, &format!("{command} --leave -o json"));
        let answer: Value = serde_json::from_slice(&done.stdout)?;
        assert_eq!(answer["left"][0]["successor"], "n1", "{answer}");
        assert!(!state.exists() && !env.exists());
        assert!(!tool(&host.netns, "ip -br link").contains("gossamer"));
        status_where(&mut cluster.agents[0], |status| {
            status["members"].as_array().is_some_and(|all| all.iter().any(|m| m["left"] == true))
        });
        Ok(())
    });
}

#[test]
fn foreign_route_is_reported_and_unchanged() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = &cluster.hosts[0].netns;
        // The subnet and the metric of the next joiner's route.
        tool(host, "ip route add 10.42.7.0/24 via 10.99.0.1 proto static metric 8");
        let second = lab.host(2, "n2")?;
        let mut joiner = cluster.start_agent(&second, &["--prefer-subnet", "10.42.7.0"])?;
        let subnet = Agent::subnet(&joiner.ask("/v1/status?wait=20&members=2", TIMEOUT)?)?;
        assert_eq!(subnet.to_string(), "10.42.7.0/24");
        let said = "another program has a route to 10.42.7.0/24";
        wait_until("it is not reported", TIMEOUT, || has_problem(&mut cluster.agents[0], said));
        let routes = tool(host, "ip route show 10.42.7.0/24");
        assert!(routes.contains("via 10.99.0.1 dev eth0 proto static"), "{routes}");
        // The agent detects by itself that the obstacle is gone.
        tool(host, "ip route del 10.42.7.0/24 via 10.99.0.1 metric 8");
        eventually(host, "ip route show 10.42.7.0/24", |routes| routes.contains("proto 73"));
        Ok(())
    });
}

#[test]
fn init_with_the_token_of_an_existing_cluster_is_rejected() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        let arguments = ["--init", "--token", cluster.token.as_str()];
        let mut agent = Agent::start(program(), &host, &arguments)?;
        assert_eq!(agent.wait()?.code(), Some(1));
        assert!(agent.log().contains("which exists"), "{}", agent.log());
        Ok(())
    });
}

#[test]
fn status_wait_succeeds_before_the_agent_has_started() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let socket = host.dir.join("gossamer.sock");
        let waiting = Command::new(program())
            .args(["status", "--wait=20", "--socket"])
            .arg(&socket)
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let _agent = Agent::start(program(), &host, &["--init"])?;
        let output = waiting.wait_with_output()?;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        Ok(())
    });
}

#[test]
fn netavark_setup_waits_longer_for_a_suspended_agent_than_teardown() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let _space = NetNs::new("a")?;
        let podman = Podman::new(&cluster.agents[0]);
        suspend(&cluster.agents[0])?;
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| podman.set_up("a", &json!({})));
            // Teardown gives up before this.
            std::thread::sleep(Duration::from_secs(6));
            resume(&cluster.agents[0])?;
            assert!(netavark::address(&asked.join().expect("an answer")).starts_with("10.42."));
            Ok(())
        })
    });
}

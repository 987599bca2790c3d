//! Agreement between real processes: partitions made with nft, joiners in both halves, kills, forgetting,
//! and a copied state directory.

use std::{fs, path::Path, process::Command, time::Duration};

use crate::{
    cni::Runtime,
    common::{
        Cluster, TIMEOUT, assert_logged, client, isolated, program, run, status_where, texts, tool,
        wait_until,
    },
};
use gossamer::lab::{Agent, Host, Lab, NetNs, Pod};
use nix::sys::signal::Signal;

/// Time until members that are gone are reported down, and until all members agree on that.
pub const DOWN_TIMEOUT: Duration = Duration::from_secs(40);

/// Drops all packets between two groups of hosts, in both directions. Returns false if `nft` is not
/// installed.
fn partition(hosts: &[&Host], others: &[&Host]) -> bool {
    let there = Command::new("nft").arg("--version").output().is_ok_and(|out| out.status.success());
    if !there {
        eprintln!("SKIPPED: a partition needs `nft` (Debian: nftables)");
        return false;
    }
    for (ours, theirs) in [(hosts, others), (others, hosts)] {
        for host in ours {
            tool(&host.netns, "nft add table inet cut");
            tool(
                &host.netns,
                "nft add chain inet cut input { type filter hook input priority 0 ; }",
            );
            for other in theirs {
                tool(
                    &host.netns,
                    &format!("nft add rule inet cut input ip saddr {} drop", other.ip),
                );
            }
        }
    }
    true
}

fn heal_partition(hosts: &[&Host]) {
    hosts.iter().for_each(|host| _ = run(&host.netns, "nft delete table inet cut"));
}

fn subnet_of(agent: &mut Agent, members: usize) -> anyhow::Result<String> {
    Ok(Agent::subnet(&agent.wait_converged(members, DOWN_TIMEOUT)?)?.to_string())
}

fn assert_all_reach_all(cluster: &mut Cluster) -> anyhow::Result<()> {
    let count = cluster.agents.len();
    let mut pods: Vec<Pod> = Vec::new();
    for (host, agent) in cluster.hosts.iter().zip(&mut cluster.agents) {
        let status = agent.wait_converged(count, DOWN_TIMEOUT)?;
        pods.push(host.pod(Agent::subnet(&status)?, 1450)?);
    }
    for from in &pods {
        for to in pods.iter().filter(|to| to.ip != from.ip) {
            let reply = tool(&from.netns, &format!("ping -c 1 -W 2 {}", to.ip));
            assert!(reply.contains(" 1 received"), "{reply}");
        }
    }
    Ok(())
}

fn start_joiner(
    cluster: &mut Cluster,
    lab: &mut Lab,
    number: u16,
    seed: usize,
) -> anyhow::Result<Host> {
    let host = lab.host(number, &format!("n{number}"))?;
    let seed = cluster.hosts[seed].ip.to_string();
    let arguments = ["--join", &seed, "--token", &cluster.token];
    cluster.agents.push(Agent::start(program(), &host, &arguments)?);
    Ok(host)
}

#[test]
fn partitioned_cluster_accepts_joiners_in_both_halves_and_merges() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 5)?;
        let hosts: Vec<&Host> = cluster.hosts.iter().collect();
        let (left, right) = hosts.split_at(2);
        if !partition(left, right) {
            return Ok(());
        }
        let left_host = start_joiner(&mut cluster, lab, 6, 0)?;
        let right_host = start_joiner(&mut cluster, lab, 7, 4)?;
        {
            let hosts: Vec<&Host> = cluster.hosts.iter().collect();
            partition(&[&left_host], &hosts[2..]);
            partition(&[&right_host], &[&hosts[..2], &[&left_host]].concat());
        }
        let one = subnet_of(&mut cluster.agents[5], 1)?;
        let other = subnet_of(&mut cluster.agents[6], 1)?;
        assert_ne!(one, other, "each half gave its own");

        // During the partition, a member of each half dies and restarts.
        for number in [1, 3] {
            cluster.agents[number].end(Signal::SIGKILL)?;
            cluster.agents[number] = Agent::start(program(), &cluster.hosts[number], &[])?;
        }
        cluster.hosts.extend([left_host, right_host]);
        heal_partition(&cluster.hosts.iter().collect::<Vec<_>>());
        assert_all_reach_all(&mut cluster)?;
        assert_eq!(subnet_of(&mut cluster.agents[5], 7)?, one, "no member was renumbered");
        assert_eq!(subnet_of(&mut cluster.agents[6], 7)?, other);
        wait_until("tables differ", TIMEOUT, || all_tables_are_equal(&cluster));
        Ok(())
    });
}

fn all_tables_are_equal(cluster: &Cluster) -> bool {
    let leases: Vec<String> = cluster
        .agents
        .iter()
        .map(|agent| {
            let output = client(agent, &["leases", "-o", "json"]);
            let mut table: serde_json::Value =
                serde_json::from_slice(&output.stdout).expect("JSON");
            for owner in table["owners"].as_array_mut().into_iter().flatten() {
                // Liveness is an opinion of each node and may differ for a while.
                owner["liveness"].take();
            }
            table["owners"].to_string()
        })
        .collect();
    leases.windows(2).all(|pair| pair[0] == pair[1])
}

#[test]
fn forgotten_member_that_restarts_joins_as_a_new_node() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let lost = subnet_of(&mut cluster.agents[2], 3)?;
        let alive = client(&cluster.agents[0], &["forget", "n3"]);
        assert!(!alive.status.success());
        let said = String::from_utf8_lossy(&alive.stderr).into_owned();
        assert!(
            said.contains("n3 appears to be alive") && said.contains("gossamer leave"),
            "{said}"
        );

        let netns = NetNs::new("c1")?;
        Runtime::new(&cluster.agents[2]).add("c1");
        // Without its agent, its kernel still forwards packets of its pods.
        cluster.agents[2].end(Signal::SIGKILL)?;
        let runs = "n3 is down for gossip, but its kernel answers (";
        wait_until("a member that forwards was not refused", DOWN_TIMEOUT, || {
            let refused = client(&cluster.agents[0], &["forget", "n3"]);
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(!refused.status.success(), "{said}");
            said.contains(runs) && said.contains("that host runs")
        });
        tool(&cluster.hosts[2].netns, "ip link set eth0 down");
        wait_until("n3 never went down", DOWN_TIMEOUT, || {
            client(&cluster.agents[0], &["forget", "n3"]).status.success()
        });
        for agent in &mut cluster.agents[..2] {
            status_where(agent, |status| status["slots"]["leased"] == 2);
        }
        wait_until("the route to it still exists", TIMEOUT, || {
            !tool(&cluster.hosts[0].netns, "ip route show proto 73").contains(&lost)
        });
        let history = client(&cluster.agents[0], &["leases", "--history"]);
        let history = String::from_utf8(history.stdout)?;
        assert!(history.contains("n3") && history.contains(&lost), "{history}");

        // The forgotten member returns: it learns that it was forgotten, and joins as a new node.
        tool(&cluster.hosts[2].netns, "ip link set eth0 up");
        cluster.agents[2] = Agent::start(program(), &cluster.hosts[2], &[])?;
        assert_all_reach_all(&mut cluster)?;
        assert_logged(&cluster.agents[2], "this node was forgotten by the cluster");
        // Its pod has no network until it is restarted, also after a restart of the agent.
        let lost = "1 pod lost its network when this host became a new node: c1";
        for _ in 0..2 {
            status_where(&mut cluster.agents[2], |status| texts(&status["notices"]).contains(lost));
            cluster.agents[2].end(Signal::SIGTERM)?;
            cluster.agents[2] = Agent::start(program(), &cluster.hosts[2], &[])?;
        }
        drop(netns);
        status_where(&mut cluster.agents[2], |status| !texts(&status["notices"]).contains(lost));
        assert_no_database_was_lost(&cluster, 2);
        Ok(())
    });
}

#[test]
fn copied_state_directory_is_reported_on_both_hosts_and_one_gets_a_new_identity() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let copy = lab.host(4, "n4")?;
        cluster.agents[2].end(Signal::SIGTERM)?;
        copy_directory(&cluster.hosts[2].dir.join("state"), &copy.dir.join("state"))?;
        cluster.agents[2] = Agent::start(program(), &cluster.hosts[2], &[])?;
        cluster.agents.push(Agent::start(program(), &copy, &[])?);
        cluster.hosts.push(copy);
        for number in [2, 3] {
            let both = [2, 3].map(|n: usize| cluster.hosts[n].ip.to_string());
            wait_until("the copy is not reported", DOWN_TIMEOUT, || {
                let status = cluster.agents[number].ask("/v1/status", TIMEOUT);
                let problems = texts(&status.expect("a status")["problems"]);
                problems.contains("reset-identity") && both.iter().all(|ip| problems.contains(ip))
            });
        }
        let reset = client(&cluster.agents[3], &["reset-identity"]);
        let said = String::from_utf8_lossy(&reset.stdout).into_owned();
        assert!(reset.status.success() && said.contains("forget --former-selves"), "{reset:?}");
        wait_until("still one identity", TIMEOUT, || {
            let status = [2, 3].map(|n: usize| cluster.agents[n].ask("/v1/status", TIMEOUT));
            matches!(&status, [Ok(one), Ok(other)] if one["node"] != other["node"])
        });
        assert_no_database_was_lost(&cluster, 3);
        Ok(())
    });
}

/// A new identity begins with an empty database, and nothing was damaged.
fn assert_no_database_was_lost(cluster: &Cluster, number: usize) {
    assert_logged(&cluster.agents[number], "new identity: the database begins empty");
    let log = cluster.agents[number].log();
    assert!(!log.contains("database lost") && !log.contains("database missing"), "{log}");
    assert!(!cluster.hosts[number].dir.join("state/db.damaged-1").exists());
}

fn copy_directory(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)?.flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_directory(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

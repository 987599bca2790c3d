//! The cluster's secret is rotated while pods communicate, and no member is lost.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, thread, time::Duration};

use gossamer::lab::{Agent, Pinger};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::{
    Cluster, TIMEOUT, assert_logged, client, isolated, program, status_where, texts, wait_until,
};

/// Runs a step on the first member. Returns the secrets, or the error message.
fn step(cluster: &Cluster, arguments: &[&str]) -> Result<Value, String> {
    let arguments = [&["secret"], arguments, &["-o", "json"]].concat();
    let output = client(&cluster.agents[0], &arguments);
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).expect("JSON")),
        false => Err(String::from_utf8(output.stderr).expect("UTF-8")),
    }
}

fn names(listed: &Value) -> Vec<String> {
    let secrets = listed["secrets"].as_array().expect("secrets").iter();
    secrets.map(|secret| secret["secret"].as_str().expect("a name").to_owned()).collect()
}

fn token_file(directory: &Path, token: &str) -> String {
    let path = directory.join("token-file");
    fs::write(&path, token).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("set");
    path.display().to_string()
}

#[test]
fn secret_rotation_under_traffic_loses_no_member_and_no_packet() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let pods = cluster.pods()?;
        let to = pods[1].ip;
        let old_token = cluster.token.clone();
        let listed = step(&cluster, &["list"]).expect("listed");
        let old = names(&listed).remove(0);
        assert_eq!(listed["secrets"][0]["used_by"].as_array().map(Vec::len), Some(3));
        let mut talk = Pinger::new(&pods[0].netns)?;
        let talking = thread::spawn(move || talk.stream(to, 1_000, Duration::from_millis(10)));

        let added = step(&cluster, &["add"]).expect("added");
        let new = names(&added).into_iter().find(|name| *name != old).expect("a new one");
        assert!(
            added["secrets"]
                .as_array()
                .expect("secrets")
                .iter()
                .all(|secret| { secret["accepted_by"].as_array().map(Vec::len) == Some(3) })
        );
        // A host that joins now uses the old secret, and does not know the new one yet.
        cluster.join(lab, 4)?;
        cluster.converge()?;
        let why = step(&cluster, &["use", &new]).expect_err("n4 is not ready");
        assert!(why.contains("n4 do not have secret"), "{why}");
        step(&cluster, &["add", "--again"]).expect("given to n4");
        let used = step(&cluster, &["use", &new]).expect("used");
        let of_new = used["secrets"].as_array().expect("secrets").iter();
        let of_new = of_new.clone().find(|secret| secret["secret"] == *new).expect("the new one");
        assert_eq!(of_new["used_by"].as_array().map(Vec::len), Some(4), "{used:#}");
        let dropped = step(&cluster, &["drop", &old]).expect("dropped");
        assert_eq!(names(&dropped), [&*new]);
        assert!(step(&cluster, &["drop", &new]).expect_err("in use").contains("is in use"));
        assert!(
            step(&cluster, &["use", "0badc0de"])
                .expect_err("unknown")
                .contains("is unknown on this node")
        );
        assert!(step(&cluster, &["use", "this"]).expect_err("no name").contains("eight"));

        let answered = talking.join().expect("the stream ends")?;
        assert_eq!(answered, 1_000, "packets were lost");
        for agent in &mut cluster.agents {
            let status = agent.wait_converged(4, TIMEOUT)?;
            assert_eq!(status["counters"]["downs"], 0, "a member was lost: {status:#}");
        }
        // The old token is rejected now, and the new one is accepted.
        let non_member = lab.host(5, "n5")?;
        let seed = cluster.hosts[0].ip.to_string();
        let refused =
            Agent::start(program(), &non_member, &["--join", &seed, "--token", &old_token])?;
        wait_until("the old token is not rejected", TIMEOUT, || {
            refused.log().contains("uses a different secret")
        });
        drop(refused);
        cluster.token = crate::common::token_of(&mut cluster.agents[2])?;
        let fifth = lab.host(6, "n6")?;
        let mut fifth = cluster.start_agent(&fifth, &[])?;
        fifth.wait_converged(5, TIMEOUT)?;
        // The same over a restart, with an outdated configuration file.
        cluster.agents[1].end(Signal::SIGTERM)?;
        let arguments = ["--token", &old_token, "--join", &seed];
        cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &arguments)?;
        cluster.agents[1].wait_converged(5, TIMEOUT)?;
        assert_logged(&cluster.agents[1], "has a secret that the cluster no longer uses");
        Ok(())
    });
}

#[test]
fn member_that_missed_a_secret_rotation_rejoins_with_a_new_token() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let old = names(&step(&cluster, &["list"]).expect("listed")).remove(0);
        let subnet = Agent::subnet(&cluster.agents[2].ask("/v1/status", TIMEOUT)?)?;
        cluster.agents[2].end(Signal::SIGTERM)?;
        status_where(&mut cluster.agents[0], |status| {
            status["members"].to_string().contains("\"down\"")
        });
        let new_token = crate::common::new_token()?;
        let file = token_file(&cluster.hosts[0].dir, &new_token);
        let added = step(&cluster, &["add", "--token-file", &file]).expect("added");
        let new = names(&added).into_iter().find(|name| *name != old).expect("a new one");
        let why = step(&cluster, &["use", &new]).expect_err("n3 does not answer");
        assert!(why.contains("n3 did not answer"), "{why}");
        step(&cluster, &["use", &new, "--force"]).expect("used");
        step(&cluster, &["drop", &old, "--force"]).expect("dropped");

        let seed = cluster.hosts[0].ip.to_string();
        let host = &cluster.hosts[2];
        cluster.agents[2] = Agent::start(program(), host, &["--join", &seed])?;
        wait_until("the old token is not rejected", TIMEOUT, || {
            let status = cluster.agents[2].ask("/v1/status", TIMEOUT).expect("a status");
            status["synced"] == false
        });
        status_where(&mut cluster.agents[2], |status| {
            let problems = texts(&status["problems"]);
            assert!(!problems.contains("no other member answers"), "{problems}");
            problems.contains("use a different secret than this host: it missed a rotation")
        });
        assert_logged(&cluster.agents[2], "gossamer token --out token");
        let other = "the agent of n3 runs with a different secret than this host";
        status_where(&mut cluster.agents[0], |status| texts(&status["problems"]).contains(other));
        cluster.agents[2].end(Signal::SIGTERM)?;
        let token = crate::common::token_of(&mut cluster.agents[0])?;
        let file = token_file(&host.dir, &token);
        cluster.agents[2] = Agent::start(program(), host, &["--token-file", &file])?;
        let status = cluster.agents[2].wait_converged(3, TIMEOUT)?;
        assert_eq!(Agent::subnet(&status)?, subnet, "with the subnet it had");
        Ok(())
    });
}

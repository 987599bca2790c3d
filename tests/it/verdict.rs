//! The verdict on a node: the same in the status, the doctor, the readiness check and the metrics.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Host};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    common::{Cluster, TIMEOUT, client, isolated, program, run, texts, tool, wait_until},
    forwarding::with_pods,
    metrics::{PORT, get, sample},
};

/// Answers to pings at least, so that their packets are counted.
const PINGS_BEFORE_DEATH: usize = 10;
/// Time limit until a corrected sysctl is known. The agent looks every ten seconds by itself.
const RECHECK_LIMIT: Duration = Duration::from_secs(5);

/// The words and the exit code of a verdict.
struct Expected<'a> {
    words: &'a str,
    state: &'a str,
    code: i32,
    http: &'a str,
}

/// Waits for a verdict, and checks that all views have it.
fn assert_verdict(host: &Host, agent: &mut Agent, expected: &Expected<'_>) {
    let Expected { words, state, code, http } = *expected;
    wait_until(words, TIMEOUT, || {
        let status: Value = agent.ask("/v1/status", TIMEOUT).expect("a status");
        status["verdict"]["text"].as_str().is_some_and(|text| text.starts_with(words))
    });
    let status = client(agent, &["status"]);
    let said = String::from_utf8_lossy(&status.stdout).replace('\n', " ");
    assert!(said.contains(&format!("state     {words}")), "{said}");
    assert_eq!(status.status.code(), Some(code), "{said}");
    // For probes a degraded node is ready.
    let is_ready = state != "not-ready";
    assert_eq!(client(agent, &["status", "--ready"]).status.success(), is_ready, "{said}");
    let (head, body) = get(&host.netns, "/readyz", "*/*");
    assert!(head.contains(http) && body.contains(words), "{head} {body}");
    let (_, metrics) = get(&host.netns, "/metrics", "*/*");
    for of in ["healthy", "degraded", "not-ready"] {
        let series = format!("gossamer_verdict{{state=\"{of}\"}}");
        assert_eq!(sample(&metrics, &series), f64::from(of == state), "{series}");
    }
    let state_dir = host.dir.join("state");
    let socket = agent.socket();
    let (program, socket, state_dir) = (program().display(), socket.display(), state_dir.display());
    let command = format!("{program} doctor --socket {socket} --state-dir {state_dir}");
    let doctor = run(&host.netns, &command);
    let said = String::from_utf8_lossy(&doctor.stdout);
    assert!(said.contains(&format!("\n\n{words}")), "{said}");
    assert_eq!(doctor.status.code(), Some(code), "{said}");
}

#[test]
fn verdict_is_the_same_in_all_views() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        cluster.restart(0, &["--http", &format!("127.0.0.1:{PORT}")])?;
        cluster.converge()?;
        let healthy = Expected { words: "healthy", state: "healthy", code: 0, http: "200" };
        let host = &cluster.hosts[0];
        assert_verdict(host, &mut cluster.agents[0], &healthy);

        // Pods reach nothing.
        tool(&host.netns, "sysctl -w net.ipv4.ip_forward=0");
        let words = "not ready: net.ipv4.ip_forward is 0";
        let not_ready = Expected { words, state: "not-ready", code: 3, http: "503" };
        assert_verdict(host, &mut cluster.agents[0], &not_ready);
        tool(&host.netns, "sysctl -w net.ipv4.ip_forward=1");
        // The agent learns it from the kernel, not from its next look.
        let corrected = Instant::now();
        wait_until("it is still not ready", TIMEOUT, || {
            let status = cluster.agents[0].ask("/v1/status", TIMEOUT).expect("a status");
            status["verdict"]["state"] != "not-ready"
        });
        assert!(corrected.elapsed() < RECHECK_LIMIT, "{:?}", corrected.elapsed());
        assert_verdict(host, &mut cluster.agents[0], &healthy);

        // A dead member is a problem, and does not make this node not ready.
        cluster.agents[2].end(Signal::SIGKILL)?;
        let words = "degraded: 1 problem";
        let degraded = Expected { words, state: "degraded", code: 1, http: "200" };
        assert_verdict(host, &mut cluster.agents[0], &degraded);
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        let problem = &status["problems"][0];
        assert_eq!((&problem["code"], &problem["subject"]), (&"member-down".into(), &"n3".into()));
        assert!(problem["since"].as_u64() > Some(1_700_000_000), "{problem}");
        let said = texts(&status["problems"]);
        assert!(said.starts_with("the agent of n3 is down; its kernel still forwards"), "{said}");
        // Packets of its host arrive, so it is not gone.
        assert!(said.contains("if it runs, open UDP 8473 between the two hosts"), "{said}");
        assert!(!said.contains("gossamer forget"), "{said}");
        let (_, metrics) = get(&host.netns, "/metrics", "*/*");
        let series = "gossamer_problems{code=\"member-down\",severity=\"problem\"}";
        assert_eq!(sample(&metrics, series), 1.0);
        wait_until("no event", TIMEOUT, || {
            let events = cluster.agents[0].ask("/v1/events?follow=false", TIMEOUT);
            events.expect("events").to_string().contains("the agent of n3 is down")
        });
        Ok(())
    });
}

/// A host that loses power: until gossip has decided, no cause is named; then all views count one problem.
#[test]
fn dead_host_has_no_cause_until_gossip_has_decided_and_then_one_problem() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let host = &cluster.hosts[0];
        // Packets of the host arrive until it dies.
        let pod = tool(&spaces[1], "ip -4 -br addr show dev eth0");
        let pod = pod.split_whitespace().nth(2).and_then(|ip| ip.split('/').next());
        let mut ping = Command::new("ping");
        ping.args(["-i", "0.2", pod.expect("an address")]).stdout(Stdio::piped());
        let mut ping = spaces[0].spawn(&mut ping)?;
        let output = ping.stdout.take().expect("its output");
        for line in BufReader::new(output).lines().take(PINGS_BEFORE_DEATH) {
            assert!(!line?.contains("unreachable"));
        }
        tool(&cluster.hosts[1].netns, "ip link set eth0 down");
        cluster.agents[1].end(Signal::SIGKILL)?;
        let mut told = BTreeSet::new();
        wait_until("it is not withdrawn", TIMEOUT, || {
            let status = cluster.agents[0].ask("/v1/status", TIMEOUT).expect("a status");
            let all = [texts(&status["problems"]), texts(&status["notices"])].join("\n");
            told.extend(all.lines().map(str::to_owned));
            let mut paths = status["paths"].as_array().expect("paths").iter();
            paths.any(|path| path["state"] == "withdrawn")
        });
        ping.kill()?;
        ping.wait()?;
        told.remove("");
        let right = ["n2 has not answered for ", "n2 is down: its pods are unreachable: start it"];
        let other: Vec<&String> =
            told.iter().filter(|text| !right.iter().any(|right| text.starts_with(right))).collect();
        assert!(other.is_empty(), "{other:#?}");
        assert!(told.iter().all(|text| !text.contains("open UDP")), "{told:#?}");
        let degraded = |views: [&str; 2]| {
            views.map(|view| {
                let state_dir = host.dir.join("state");
                let arguments = match view {
                    "doctor" => {
                        vec![view, "-o", "json", "--state-dir", state_dir.to_str().expect("text")]
                    }
                    _ => vec![view, "-o", "json"],
                };
                let output = client(&cluster.agents[0], &arguments);
                let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
                answer["verdict"]["text"].clone()
            })
        };
        assert_eq!(degraded(["status", "doctor"]), ["degraded: 1 problem"; 2]);
        Ok(())
    });
}

#[test]
fn status_wait_tells_what_it_waits_for_and_why_it_gave_up() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let agent = &cluster.agents[0];
        let errors = |arguments: &[&str]| {
            let output = client(agent, arguments);
            (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let (code, said) = errors(&["status", "--wait", "1", "--members", "3"]);
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains("waiting up to 1 s for the agent at "), "{said}");
        assert!(said.contains("to converge with 3 members alive"), "{said}");
        assert!(said.contains("gave up after 1 s: 1 of 3 members are alive"), "{said}");
        // `--members` implies `--wait`, and a wait that ends at once needs no words.
        assert_eq!(errors(&["status", "--members", "1"]), (Some(0), String::new()));
        assert_eq!(errors(&["status", "--wait=5"]), (Some(0), String::new()));
        let command = format!("{} status --wait 1 --socket /nowhere", program().display());
        let output = run(&cluster.hosts[0].netns, &command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("gave up after 1 s: no agent"), "{said}");
        assert!(said.contains("no agent at /nowhere"), "{said}");
        Ok(())
    });
}

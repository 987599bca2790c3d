//! Metrics and health endpoints, as collectors and probes read them.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Command, Stdio},
};

use gossamer::lab::{Agent, NetNs};

use crate::{
    cni::Runtime,
    common::{Cluster, TIMEOUT, isolated, program, skipped, wait_until},
};

pub const PORT: u16 = 9473;
/// Debian's `prometheus`.
const PROMTOOL: &str = "/usr/bin/promtool";

/// Returns the status line with headers, and the body.
pub fn get(netns: &NetNs, path: &str, accept: &str) -> (String, String) {
    get_from("127.0.0.1", netns, path, accept)
}

fn get_from(host: &str, netns: &NetNs, path: &str, accept: &str) -> (String, String) {
    let answer = netns.run(|| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: {host}\r\naccept: {accept}\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    let answer = answer.expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}

/// Returns the value of a sample by name and labels.
pub fn sample(text: &str, name: &str) -> f64 {
    let mut lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    let found = lines.find(|(series, _)| *series == name);
    found.and_then(|(_, number)| number.parse().ok()).unwrap_or_else(|| panic!("{name}: {text}"))
}

#[test]
fn metrics_and_health_endpoints_answer_collectors_and_probes() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let address = format!("127.0.0.1:{PORT}");
        cluster.restart(0, &["--http", &address])?;
        let _space = NetNs::new("a")?;
        Runtime::new(&cluster.agents[0]).add("a");
        let host = &cluster.hosts[0].netns;
        let (head, _) = get_from("evil.example", host, "/v1/status", "*/*");
        assert!(head.contains("421"), "a page from elsewhere: {head}");
        let (head, text) = get(host, "/metrics", "*/*");
        assert!(head.contains("200") && head.contains("text/plain; version=0.0.4"), "{head}");
        for (name, number) in [
            ("gossamer_converged", 1.0),
            ("gossamer_members{state=\"alive\"}", 2.0),
            ("gossamer_members{state=\"down\"}", 0.0),
            ("gossamer_subnets", 255.0),
            ("gossamer_subnets_known{state=\"leased\"}", 2.0),
            ("gossamer_pods", 1.0),
            ("gossamer_kernel_in_sync", 1.0),
        ] {
            assert_eq!(sample(&text, name), number, "{name}");
        }
        assert!(sample(&text, "process_resident_memory_bytes") > 1e6);
        assert!(text.contains("# TYPE gossamer_grants_total counter"), "{text}");
        let (head, open) = get(host, "/metrics", "application/openmetrics-text; version=1.0.0");
        assert!(head.contains("application/openmetrics-text"), "{head}");
        assert!(open.contains("# TYPE gossamer_grants counter") && open.ends_with("# EOF\n"));
        assert_names_documented(&text);
        lint(&text);

        assert!(get(host, "/healthz", "*/*").0.contains("200"));
        assert!(get(host, "/readyz", "*/*").0.contains("200"));
        // Endpoints that change the state or reveal the token are not available here.
        for path in ["/v1/token", "/v1/leave", "/v1/forget", "/v1/pods/detach"] {
            assert!(get(host, path, "*/*").0.contains("404"), "{path}");
        }
        // The dashboard lists the pods of its host.
        assert!(get(host, "/v1/pods", "*/*").1.starts_with("{\"pods\":"));
        // An agent that has found no member yet.
        let third = lab.host(3, "n3")?;
        let lost = ["--http", &address, "--join", "10.99.0.99", "--token", &cluster.token];
        let _joining = Agent::start(program(), &third, &lost)?;
        wait_until("it answers", TIMEOUT, || {
            third.netns.run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))).is_ok()
        });
        assert!(get(&third.netns, "/healthz", "*/*").0.contains("200"));
        assert!(get(&third.netns, "/readyz", "*/*").0.contains("503"));

        cluster.agents[1].end(nix::sys::signal::Signal::SIGKILL)?;
        let host = &cluster.hosts[0].netns;
        wait_until("the dead member is counted", TIMEOUT, || {
            sample(&get(host, "/metrics", "*/*").1, "gossamer_members{state=\"down\"}") == 1.0
        });
        Ok(())
    });
}

/// Checks that docs/METRICS.md lists exactly the existing metrics.
fn assert_names_documented(text: &str) {
    let shown: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let docs = include_str!("../../docs/METRICS.md");
    let rows =
        docs.lines().filter(|line| line.contains("| gauge |") || line.contains("| counter |"));
    let listed: BTreeSet<&str> = rows.filter_map(|line| line.split('`').nth(1)).collect();
    assert_eq!(shown, listed);
}

/// Checks the metrics with Prometheus' own tool, if it is installed.
fn lint(text: &str) {
    if !Path::new(PROMTOOL).exists() {
        return skipped("promtool", "prometheus is not installed");
    }
    let mut promtool = Command::new(PROMTOOL);
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = promtool.stdout(Stdio::piped()).spawn().expect("promtool starts");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(text.as_bytes()).expect("written");
    drop(input);
    let output = child.wait_with_output().expect("promtool ends");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let rules =
        Command::new(PROMTOOL).args(["check", "rules", "config/gossamer.rules.yml"]).output();
    let rules = rules.expect("promtool runs");
    assert!(rules.status.success(), "{rules:?}");
}

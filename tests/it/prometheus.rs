//! A real Prometheus that scrapes an agent, with the alert rules, and every query of the Grafana
//! dashboard.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Command, Stdio},
};

use gossamer::lab::NetNs;
use serde_json::Value;

use crate::common::{Cluster, TIMEOUT, isolated, skipped, wait_until};

const PROGRAM: &str = "/usr/bin/prometheus";
const PORT: u16 = 9090;

/// Queries Prometheus' API. Returns None while it does not listen.
fn ask(netns: &NetNs, path: &str) -> Option<Value> {
    let answer = netns.run(|| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
        let request = format!("GET {path} HTTP/1.0\r\nhost: 127.0.0.1\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    serde_json::from_str(answer.ok()?.split_once("\r\n\r\n")?.1).ok()
}

fn query(netns: &NetNs, expression: &str) -> Value {
    let escaped: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
    ask(netns, &format!("/api/v1/query?query={escaped}")).unwrap_or_default()
}

/// Returns the queries of all panels, for all hosts.
fn panel_queries() -> Vec<String> {
    let dashboard: Value =
        serde_json::from_str(include_str!("../../config/grafana.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let expressions = targets.map(|target| target["expr"].as_str().expect("a query"));
    expressions.map(|text| text.replace("$instance", ".*")).collect()
}

#[test]
fn prometheus_scrapes_the_agent_and_answers_all_dashboard_queries() {
    if !Path::new(PROGRAM).exists() {
        let test = "prometheus_scrapes_the_agent_and_answers_all_dashboard_queries";
        return skipped(test, "prometheus is not installed");
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.restart(0, &["--http", "127.0.0.1:9473"])?;
        let host = &cluster.hosts[0];
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/gossamer.rules.yml");
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
             rule_files: [\"{}\"]\n\
             scrape_configs: [{{job_name: gossamer, static_configs: [{{targets: [\"127.0.0.1:9473\"]}}]}}]\n",
            rules.display()
        );
        let (file, data) = (host.dir.join("prometheus.yml"), host.dir.join("prometheus"));
        fs::write(&file, config)?;
        let mut command = Command::new(PROGRAM);
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", data.display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{PORT}"));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut prometheus = host.netns.spawn(&mut command)?;
        wait_until("not scraped", TIMEOUT, || {
            let alive = query(&host.netns, "gossamer_members{state=\"alive\"}");
            alive["data"]["result"][0]["value"][1] == "2"
        });
        let targets = ask(&host.netns, "/api/v1/targets").expect("targets");
        assert_eq!(targets["data"]["activeTargets"][0]["health"], "up", "{targets:#}");
        let rules = ask(&host.netns, "/api/v1/rules").expect("rules");
        let rules = rules["data"]["groups"][0]["rules"].as_array().expect("rules").clone();
        assert!(
            rules.len() >= 6 && rules.iter().all(|rule| rule["state"] != "firing"),
            "{rules:#?}"
        );
        let queries = panel_queries();
        assert!(queries.len() >= 12, "{queries:?}");
        // Queries of a rate need two scrapes.
        for expression in queries {
            wait_until(&expression, TIMEOUT, || {
                let answer = query(&host.netns, &expression);
                assert_eq!(answer["status"], "success", "{expression}: {answer}");
                // Nothing was repaired, so this series does not exist yet.
                answer["data"]["result"][0].is_object() || expression.contains("repairs")
            });
        }
        prometheus.kill()?;
        prometheus.wait()?;
        Ok(())
    });
}

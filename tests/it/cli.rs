//! The command line as scripts and people use it.

use std::process::{Command, Output};

use crate::common::{Cluster, isolated, program};
use serde_json::Value;

fn client(cluster: &Cluster, n: usize, arguments: &[&str]) -> Output {
    Command::new(program())
        .args(arguments)
        .arg("--socket")
        .arg(cluster.agents[n].socket())
        .output()
        .expect("gossamer runs")
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn status_members_leases_and_token() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 3)?;
        let status = client(&cluster, 1, &["status", "--wait=10", "--members", "3"]);
        assert_eq!(status.status.code(), Some(0));
        for words in
            ["n2 (", "state     converged", "3 alive of 3", "gossamer.1, mtu 1450, in sync"]
        {
            assert!(text(&status).contains(words), "{words:?} in\n{}", text(&status));
        }
        let status = client(&cluster, 1, &["status", "-o", "json"]);
        assert_eq!(json(&status)["converged"], true);

        let late = client(&cluster, 1, &["status", "--wait=1", "--members", "4"]);
        assert_eq!(late.status.code(), Some(3), "there are only three: {}", text(&late));

        let members = client(&cluster, 0, &["members"]);
        let lines: Vec<String> = text(&members).lines().map(str::to_owned).collect();
        assert!(lines[0].starts_with("NAME") && lines.len() == 4, "{lines:?}");
        assert!(lines[1].starts_with("n1 ") && lines[1].contains("alive (me)"), "{lines:?}");
        assert!(lines[3].contains("10.99.0.12:8473"), "{lines:?}");
        let members = json(&client(&cluster, 0, &["members", "-o", "json"]));
        assert_eq!(members.as_array().map(Vec::len), Some(3));

        let leases = client(&cluster, 2, &["leases"]);
        assert!(
            text(&leases).contains("10.42.0.0/16: 3 leased, 252 spare of 255"),
            "{}",
            text(&leases)
        );
        let owners = &json(&client(&cluster, 2, &["leases", "-o", "json"]))["owners"];
        let spare: u64 =
            owners.as_array().expect("owners").iter().filter_map(|o| o["spare"].as_u64()).sum();
        assert_eq!(spare, 252);

        let token = client(&cluster, 2, &["token"]);
        assert!(text(&token).starts_with("gsm1."), "{}", text(&token));
        Ok(())
    });
}

#[test]
fn without_an_agent_it_says_so() {
    for command in ["status", "members", "leases", "token", "leave"] {
        let output = Command::new(program())
            .args([command, "--socket", "/nonexistent/gossamer.sock"])
            .output()
            .expect("gossamer runs");
        let said = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(1), "{command}");
        assert!(said.contains("no agent at /nonexistent/gossamer.sock: is it running?"), "{said}");
    }
}

#[test]
fn new_tokens_differ_and_need_no_agent() {
    let token = || {
        let output = Command::new(program()).args(["token", "--new"]).output().expect("runs");
        assert!(output.status.success());
        text(&output)
    };
    assert_ne!(token(), token());
}

#[test]
fn completions_and_manual_pages_are_of_all_commands() {
    let dir = tempfile::tempdir().expect("a directory");
    let run = |arguments: &[&str]| {
        let output = Command::new(program()).args(arguments).output();
        let output = output.expect("gossamer runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    for shell in ["bash", "zsh", "fish"] {
        assert!(run(&["completions", shell]).contains("docker-opts"), "{shell}");
    }
    run(&["man", dir.path().to_str().expect("UTF-8")]);
    for page in ["gossamer.1", "gossamer-agent.1", "gossamer-cni-install.1"] {
        let text = std::fs::read_to_string(dir.path().join(page)).expect(page);
        assert!(text.contains(".SH NAME"), "{page}");
    }
}

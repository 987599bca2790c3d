//! The command line as scripts and users call it.

use std::process::{Command, Output};

use std::{io::BufRead as _, process::Stdio};

use crate::{
    cni::{Runtime, namespaces},
    common::{Cluster, TIMEOUT, isolated, program, status_where, tool, wait_until},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
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
fn status_members_leases_and_token_commands_show_the_cluster() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 3)?;
        let status = client(&cluster, 1, &["status", "--wait=10", "--members", "3"]);
        assert_eq!(status.status.code(), Some(0));
        for words in ["n2 (", "state     healthy", "3 alive of 3", "gossamer.1, mtu 1450, in sync"]
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
            text(&leases).contains("10.42.0.0/16: 3 leased, 252 free of 255"),
            "{}",
            text(&leases)
        );
        let owners = &json(&client(&cluster, 2, &["leases", "-o", "json"]))["owners"];
        let free: u64 =
            owners.as_array().expect("owners").iter().filter_map(|o| o["free"].as_u64()).sum();
        assert_eq!(free, 252);

        let token = client(&cluster, 2, &["token"]);
        assert!(text(&token).starts_with("gsm1."), "{}", text(&token));
        Ok(())
    });
}

#[test]
fn members_and_routes_commands_show_one_member_and_the_kernel() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let _pods = cluster.pods()?;
        // Wait until the paths are known.
        for agent in &mut cluster.agents {
            status_where(agent, |status| {
                let paths = status["paths"].as_array().expect("paths");
                paths.len() == 2 && paths.iter().all(|path| path["state"] == "ok")
            });
        }
        let peer = text(&client(&cluster, 0, &["peers", "n2"]));
        for words in [
            "member     n2 (",
            "gossip     alive",
            "agent      10.99.0.11:8473 ",
            " ms, path ",
            "fdb ",
            "neighbor ",
            "route ",
            "in the kernel",
            "0 problems, 2 of 2 paths ok",
        ] {
            assert!(peer.contains(words), "{words:?} in\n{peer}");
        }
        let absent = client(&cluster, 0, &["peers", "n9"]);
        assert!(String::from_utf8_lossy(&absent.stderr).contains("no member is called n9"));

        let routes = client(&cluster, 0, &["routes"]);
        assert!(routes.status.success(), "{}", text(&routes));
        assert_eq!(text(&routes).matches(" same").count(), 7, "{}", text(&routes));
        // A stopped agent repairs nothing. Its kernel is compared when it continues.
        let entries = json(&client(&cluster, 0, &["routes", "-o", "json"]));
        assert!(entries["entries"].as_array().is_some_and(|all| all.len() == 7), "{entries}");

        // Every format works, and no colors are printed when the output is not a terminal.
        let yaml = text(&client(&cluster, 0, &["members", "-o", "yaml"]));
        assert!(yaml.contains("  name: n2\n"), "{yaml}");
        let wide = text(&client(&cluster, 0, &["members", "-o", "wide"]));
        assert!(wide.contains("VTEP MAC") && !wide.contains('\u{1b}'), "{wide}");
        for command in [&["status"][..], &["members"], &["leases"], &["routes"], &["peers", "n2"]] {
            let shown = text(&client(&cluster, 0, command));
            let too_wide = shown.lines().find(|line| line.chars().count() > 100);
            assert_eq!(too_wide, None, "{command:?}");
        }
        let version = text(&client(&cluster, 0, &["version"]));
        assert!(version.contains(", agent "), "{version}");
        Ok(())
    });
}

#[test]
fn events_command_follows_events_and_status_shows_problems_first() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        // Lost packets are a problem if there are pods on both hosts, otherwise a warning.
        let _spaces = namespaces(&["a", "b"])?;
        Runtime::new(&cluster.agents[0]).add("a");
        Runtime::new(&cluster.agents[1]).add("b");
        let socket = cluster.agents[0].socket();
        let mut follower = Command::new(program())
            .args(["events", "--follow", "-o", "json", "--socket"])
            .arg(socket)
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = std::io::BufReader::new(follower.stdout.take().expect("its output")).lines();
        let mut events = lines
            .map_while(Result::ok)
            .map(|line| serde_json::from_str::<Value>(&line).expect("JSON"));
        let mut wait_for = |kind: &str, words: &str| {
            let fits = |event: &Value| {
                event["kind"] == kind && event["text"].as_str().is_some_and(|t| t.contains(words))
            };
            events.find(|event| fits(event)).expect("the stream goes on")
        };
        wait_for("lease", "is the subnet of n2");
        wait_for("member", "n2 is alive");
        tool(&cluster.hosts[0].netns, "ip route flush root 10.42.0.0/16 proto 73");
        let repair = wait_for("repair", "route");
        assert_eq!(repair["level"], "warn");
        for chain in [
            "nft add table inet closed",
            "nft add chain inet closed in { type filter hook input priority 0 ; }",
            "nft add rule inet closed in udp dport 8472 drop",
        ] {
            tool(&cluster.hosts[1].netns, chain);
        }
        let wait_for_notice = wait_for("path", "packets to n2");
        assert_eq!(wait_for_notice["level"], "warn");
        wait_for("problem", "n2");
        follower.kill()?;
        follower.wait()?;
        wait_until("no problem", TIMEOUT, || {
            let shown = text(&client(&cluster, 0, &["status"]));
            let words: Vec<_> = shown.split_whitespace().collect();
            shown.starts_with("problem   ") && words.join(" ").contains("UDP 8472")
        });
        let past = text(&client(&cluster, 0, &["events"]));
        assert!(past.contains("repair   repaired"), "{past}");
        cluster.agents.clear();
        Ok(())
    });
}

#[test]
fn client_without_an_agent_reports_that_none_runs() {
    for command in ["status", "members", "leases", "routes", "events", "token", "leave"] {
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
fn new_tokens_differ_without_an_agent() {
    let token = || {
        let output = Command::new(program()).args(["token", "--new"]).output().expect("runs");
        assert!(output.status.success());
        text(&output)
    };
    assert_ne!(token(), token());
}

#[test]
fn completions_and_manual_pages_cover_all_commands() {
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

#[test]
fn bash_completes_names_of_members() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 3)?;
        let path = program().parent().expect("a directory").display().to_string();
        let completed = |line: &str| -> anyhow::Result<String> {
            let script = format!(
                "PATH={path}:$PATH; source <(gossamer completions bash); COMP_WORDS=({line})
                 COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
                 _gossamer_with_members gossamer \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"
                 echo \"${{COMPREPLY[@]}}\""
            );
            let mut bash = Command::new("bash");
            bash.args(["-c", &script]).env("GOSSAMER_SOCKET", cluster.agents[0].socket());
            Ok(text(&bash.output()?).trim().to_owned())
        };
        assert_eq!(completed("gossamer ping ''")?, "n2 n3");
        assert_eq!(completed("gossamer forget --force n3")?, "n3");
        assert_eq!(completed("gossamer forget --for")?, "--former-selves --force");
        assert_eq!(completed("gossamer ping --output y")?, "yaml");
        assert_eq!(completed("gossamer lease")?, "leases");
        assert!(completed("gossamer members --")?.contains("--all"));
        Ok(())
    });
}

#[test]
fn command_with_closed_output_pipe_ends_silently() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 2)?;
        let socket = cluster.agents[0].socket().display().to_string();
        let commands = [
            &["ping", "n2", "--socket", &socket][..],
            &["status", "--socket", &socket],
            &["docker-opts"],
        ];
        for arguments in commands {
            let (reader, writer) = std::io::pipe()?;
            drop(reader);
            let mut command = Command::new(program());
            command.args(arguments).stdout(writer).stderr(Stdio::piped());
            let output = command.spawn()?.wait_with_output()?;
            let said = String::from_utf8(output.stderr)?;
            assert!(!said.contains("panicked"), "{arguments:?}: {said}");
        }
        Ok(())
    });
}

#[test]
fn demo_that_is_kept_leaves_every_host_healthy() {
    isolated(|_| {
        let mut demo = Command::new(program());
        let mut demo = demo.args(["demo", "--keep"]).stdout(Stdio::piped()).spawn()?;
        let mut lines = std::io::BufReader::new(demo.stdout.take().expect("its output")).lines();
        let is_kept = |line: &std::io::Result<String>| {
            line.as_ref().is_ok_and(|line| line.contains("keeps running"))
        };
        assert!(lines.any(|line| is_kept(&line)), "the demo failed");
        for host in ["n1", "n2", "n3"] {
            let mut said = String::new();
            let status = ["demo", "exec", host, "--", "gossamer", "status"];
            wait_until("it is not healthy", TIMEOUT, || {
                let output = Command::new(program()).args(status).output().expect("it runs");
                said = text(&output);
                let is_tested = !said.contains("not known yet");
                is_tested && output.status.success()
            });
            assert!(said.contains("3 alive of 3"), "{said}");
        }
        // The pod of the host that has joined again has an address of its new subnet.
        let command = ["demo", "exec", "n3-pod", "--", "ip", "-4", "-br", "addr", "show", "eth0"];
        let pod = text(&Command::new(program()).args(command).output()?);
        let command = ["demo", "exec", "n3", "--", "ip", "-4", "-br", "addr", "show", "pods"];
        let bridge = text(&Command::new(program()).args(command).output()?);
        let subnet = |shown: &str| {
            let address = shown.split_whitespace().nth(2).expect("an address").to_owned();
            address.rsplit_once('.').expect("IPv4").0.to_owned()
        };
        let status = ["demo", "exec", "n3", "--", "gossamer", "status"];
        let status = text(&Command::new(program()).args(status).output()?);
        assert_eq!(subnet(&pod), subnet(&bridge));
        assert!(status.contains(&format!("subnet    {}.0/24", subnet(&pod))), "{status} {pod}");
        kill(Pid::from_raw(demo.id().cast_signed()), Signal::SIGINT)?;
        assert_eq!(demo.wait()?.code(), Some(130));
        let last = lines.last().expect("a line")?;
        assert!(last.contains("The demo has ended"), "{last}");
        Ok(())
    });
}

/// The hosts of a demo share the files of the machine on which it runs.
#[test]
fn commands_that_change_files_are_refused_on_hosts_of_the_demo() {
    for command in
        [&["init", "--dry-run"][..], &["uninstall", "--dry-run"], &["cleanup", "--dry-run"]]
    {
        let output = Command::new(program())
            .args(command)
            .env("IN_GOSSAMER_DEMO", "n1")
            .output()
            .expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("n1 is a host of the demo"), "{said}");
    }
}

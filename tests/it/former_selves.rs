//! Members with the same name: former selves of a host, and what commands accept as a member.

use std::collections::BTreeSet;

use gossamer::lab::Host;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::{Cluster, TIMEOUT, client, isolated, status_where, texts};

fn text(output: &std::process::Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

fn members_named<'a>(status: &'a Value, name: &str) -> Vec<&'a Value> {
    let members = status["members"].as_array().expect("members").iter();
    members.filter(|member| member["name"] == name).collect()
}

#[test]
fn former_self_is_hidden_named_with_its_id_and_forgotten_by_one_command() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        // The third host is installed again: the same name and address, another key.
        cluster.agents[2].end(Signal::SIGKILL)?;
        std::fs::remove_dir_all(cluster.hosts[2].dir.join("state"))?;
        cluster.agents[2] = cluster.start_agent(&cluster.hosts[2], &[])?;
        let mut told = BTreeSet::new();
        let is_silent = |path: &Value| path["state"] != "ok" && path["state"] != "unknown";
        let status = status_where(&mut cluster.agents[0], |status| {
            let all = [texts(&status["problems"]), texts(&status["notices"])].join("\n");
            told.extend(all.lines().map(str::to_owned));
            let is_former = |member: &&Value| member["former_self"] == true;
            let paths = status["paths"].as_array().expect("paths");
            members_named(status, "n3").iter().any(is_former) && paths.iter().any(is_silent)
        });
        // The living host is not the subject.
        let of_living = |text: &&String| text.contains("n3") && !text.contains("n3~");
        let wrong: Vec<&String> = told.iter().filter(of_living).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
        // The host itself is healthy.
        status_where(&mut cluster.agents[2], |status| {
            let is_told = texts(&status["notices"]).contains("earlier identities of living hosts");
            is_told && status["problems"].as_array().is_some_and(Vec::is_empty)
        });
        let both = members_named(&status, "n3");
        assert_eq!(both.len(), 2, "{status:#}");
        let label = |former: bool| {
            let member = both.iter().find(|member| member["former_self"] == former);
            member.and_then(|member| member["label"].as_str()).expect("a label").to_owned()
        };
        assert_eq!(label(false), "n3");
        let former = label(true);
        assert!(former.starts_with("n3~") && former.len() == 7, "{former}");

        let agent = &cluster.agents[0];
        let shown = text(&client(agent, &["members"]));
        assert_eq!(shown.matches("10.99.0.12:8473").count(), 1, "{shown}");
        assert!(shown.contains("1 former self of a host (gossamer members --all)"), "{shown}");
        let all = text(&client(agent, &["members", "--all"]));
        assert!(all.contains(&former) && all.contains("former self"), "{all}");
        // The name stands for the living host.
        for whom in ["n3", "10.99.0.12"] {
            let pinged = client(agent, &["ping", "-c", "1", whom]);
            assert!(pinged.status.success(), "{whom}: {}", text(&pinged));
        }
        let doctor = std::process::Command::new(crate::common::program());
        let advice = doctor_text(doctor, &cluster)?;
        assert!(advice.contains(&former), "{advice}");
        assert!(advice.contains("gossamer forget --former-selves"), "{advice}");

        // The name still stands for the host after its agent has ended, and its kernel answers: nothing is
        // wrong with packets to its address.
        cluster.agents[2].end(Signal::SIGKILL)?;
        let status = status_where(&mut cluster.agents[0], |status| {
            let problems = texts(&status["problems"]);
            for line in problems.lines().filter(|line| line.contains("n3")) {
                assert!(line.contains("the agent of n3 is down"), "{line}");
            }
            problems.contains("the agent of n3 is down")
        });
        let both = members_named(&status, "n3");
        assert!(both.iter().any(|member| member["label"] == former.as_str()), "{both:?}");
        let agent = &cluster.agents[0];
        let pinged = text(&client(agent, &["ping", "-c", "1", "n3"]));
        assert!(!pinged.contains("2 members match"), "{pinged}");
        cluster.agents[2] = cluster.start_agent(&cluster.hosts[2], &[])?;

        let agent = &cluster.agents[0];
        let forgotten = client(agent, &["forget", "--former-selves"]);
        assert!(forgotten.status.success(), "{}", text(&forgotten));
        assert!(text(&forgotten).contains(&former), "{}", text(&forgotten));
        let again = text(&client(agent, &["forget", "--former-selves"]));
        assert!(again.contains("no member is a former self"), "{again}");
        status_where(&mut cluster.agents[1], |status| status["slots"]["leased"] == 3);
        Ok(())
    });
}

fn doctor_text(mut doctor: std::process::Command, cluster: &Cluster) -> anyhow::Result<String> {
    let host = &cluster.hosts[0];
    doctor.arg("doctor").arg("--state-dir").arg(host.dir.join("state"));
    doctor.arg("--socket").arg(cluster.agents[0].socket());
    doctor.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    Ok(text(&host.netns.spawn(&mut doctor)?.wait_with_output()?))
}

#[test]
fn commands_accept_name_id_beginning_of_id_and_address_and_name_the_choices() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        // Another living host with the same name.
        let host = Host { name: "n2".to_owned(), ..lab.host(3, "n3")? };
        let mut third = cluster.start_agent(&host, &[])?;
        cluster.converge_with(&mut third, 3)?;
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        let agent = &cluster.agents[0];
        for member in members_named(&status, "n2") {
            let (id, label) = (member["node"].as_str(), member["label"].as_str());
            let (id, label) = (id.expect("an id"), label.expect("a label"));
            assert!(label.starts_with("n2~"), "{member}");
            let address = member["underlay"].as_str().expect("an address");
            for whom in [label, id, &id[..12], address] {
                let pinged = client(agent, &["ping", "-c", "1", whom]);
                assert!(pinged.status.success(), "{whom}: {}", text(&pinged));
                assert!(text(&pinged).contains(id), "{whom}: {}", text(&pinged));
            }
        }
        for command in [&["ping", "n2"][..], &["peers", "n2"], &["forget", "n2"]] {
            let refused = client(agent, command);
            assert_eq!(refused.status.code(), Some(1));
            let said = text(&refused);
            assert!(said.contains("2 members match n2: use one of n2~"), "{said}");
            assert!(said.contains("(alive), n2~"), "{said}");
        }
        let peers = text(&client(agent, &["peers"]));
        assert!(peers.matches("n2~").count() == 2 && !peers.contains("alive (me)"), "{peers}");
        Ok(())
    });
}

#[test]
fn unanswered_join_is_logged_at_once_with_address_and_remedy_and_leaves_no_false_words() {
    isolated(|lab| {
        let host = lab.host(2, "n2")?;
        let token = crate::common::new_token()?;
        let arguments = ["--join", "10.99.0.99", "--token", &token];
        let mut agent = gossamer::lab::Agent::start(crate::common::program(), &host, &arguments)?;
        agent.ask("/v1/status", TIMEOUT)?;
        let warned = || {
            let log = agent.log();
            log.lines().find(|line| line.contains("WARN")).map(str::to_owned)
        };
        crate::common::wait_until("nothing is logged", TIMEOUT, || warned().is_some());
        let (log, line) = (agent.log(), warned().expect("a warning"));
        assert!(log.contains("joining through 10.99.0.99:8473"), "{log}");
        for words in ["not joined yet: 10.99.0.99:8473", "firewalls", "UDP"] {
            assert!(line.contains(words), "{words:?} is not in {line}");
        }
        let status = text(&client(&agent, &["status"]));
        assert!(status.contains("10.99.0.99:8473") && status.contains("firewalls"), "{status}");
        for command in ["members", "leases"] {
            let shown = text(&client(&agent, &[command]));
            assert!(shown.contains("has not joined a cluster yet"), "{command}: {shown}");
        }
        let pods = text(&client(&agent, &["pods"]));
        assert!(pods.contains("no pods made by"), "{pods}");
        let reset = client(&agent, &["reset-identity"]);
        assert!(text(&reset).contains("in no cluster yet"), "{}", text(&reset));
        let left = text(&client(&agent, &["leave"]));
        assert!(left.contains("this host had not joined a cluster yet"), "{left}");
        Ok(())
    });
}

#[test]
fn unknown_secret_is_not_dropped_and_next_steps_are_named() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let agent = &cluster.agents[0];
        let dropped = client(agent, &["secret", "drop", "00000000"]);
        assert_eq!(dropped.status.code(), Some(1));
        assert!(text(&dropped).contains("no member knows secret 00000000"), "{}", text(&dropped));
        let added = text(&client(agent, &["secret", "add"]));
        let next = added.lines().find_map(|line| line.strip_prefix("next: gossamer "));
        let words: Vec<&str> = next.expect("a next step").split(' ').collect();
        let used = text(&client(agent, &words));
        let next = used.lines().find_map(|line| line.strip_prefix("next: gossamer "));
        let words: Vec<&str> = next.expect("a next step").split(' ').collect();
        assert_eq!(words[..2], ["secret", "drop"]);
        assert!(client(agent, &words).status.success());
        // Without other members, the last one to leave says so in its log.
        assert!(client(agent, &["leave"]).status.success());
        cluster.agents[0].wait()?;
        assert!(cluster.agents[0].log().contains("left"), "{}", cluster.agents[0].log());
        Ok(())
    });
}

//! Configurations that cannot work are rejected with one clear sentence and exit code 1, and leave
//! nothing behind.

use std::{
    fs,
    process::{Command, Stdio},
};

use gossamer::lab::{Agent, Host, Lab};
use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::common::{
    Cluster, TIMEOUT, has_problem, isolated, program, run, texts, tool, wait_until,
};

/// Runs an agent that must end by itself with code 1. Checks its message, and that nothing is left.
fn refused(host: &Host, arguments: &[&str], words: &[&str]) -> anyhow::Result<()> {
    let mut agent = Agent::start(program(), host, arguments)?;
    let status = agent.wait()?;
    let log = agent.log();
    assert_eq!(status.code(), Some(1), "{log}");
    let last = log.lines().filter(|line| line.starts_with("gossamer: ")).collect::<Vec<_>>();
    assert_eq!(last.len(), 1, "one sentence:\n{log}");
    for word in words {
        assert!(last[0].contains(word), "{word:?} is missing in {:?}", last[0]);
    }
    assert_clean(host);
    fs::remove_file(host.dir.join("log"))?;
    Ok(())
}

fn assert_clean(host: &Host) {
    let state = host.dir.join("state");
    let left = fs::read_dir(&state).map(|files| files.count()).unwrap_or(0);
    assert_eq!(left, 0, "state is left in {}", state.display());
    assert!(!run(&host.netns, "ip link show gossamer.1").status.success(), "a device is left");
    assert!(!host.dir.join("subnet.env").exists());
    assert!(!host.dir.join("gossamer.sock").exists());
}

fn new_token() -> String {
    let output = Command::new(program()).args(["token", "--new"]).output().expect("runs");
    String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
}

#[test]
fn open_file_limit_too_low_for_an_agent_is_rejected() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let command = "ulimit -n 64; exec timeout 30 \"$0\" agent --init --state-dir \"$1/state\" \
                       --socket \"$1/gossamer.sock\" --subnet-file \"$1/subnet.env\"";
        let mut agent = Command::new("sh");
        agent.args(["-c", command]).arg(program()).arg(&host.dir).stderr(Stdio::piped());
        let output = host.netns.spawn(&mut agent)?.wait_with_output()?;
        let said = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "{said}");
        for word in ["64 files", "256", "LimitNOFILE", "ulimit -Hn"] {
            assert!(said.contains(word), "{word:?} is missing in {said:?}");
        }
        assert_clean(&host);
        Ok(())
    });
}

#[test]
fn joiners_with_wrong_token_or_settings_are_rejected() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let non_member = lab.host(9, "non-member")?;
        let (seed, token) = (cluster.hosts[0].ip.to_string(), cluster.token.clone());
        refused(
            &non_member,
            &["--join", &seed, "--token", &new_token()],
            &["uses a different secret", "token"],
        )?;
        refused(&non_member, &["--join", &seed], &["a token is needed", "gossamer token"])?;
        refused(&non_member, &[], &["--init", "--join"])?;
        for (flag, value, words) in [
            ("--vni", "7", "vni is 7 here and 1 in the cluster"),
            ("--vxlan-port", "4789", "vxlan_port is 4789 here and 8472"),
            ("--network", "10.99.0.0/16", "network is 10.99.0.0/16 here and 10.42.0.0/16"),
            ("--subnet-len", "25", "subnet_len is 25 here and 24"),
        ] {
            refused(&non_member, &["--join", &seed, "--token", &token, flag, value], &[words])?;
        }
        // Another cluster with the same secret: distinguished by its id.
        let other = lab.host(10, "other")?;
        let secret = new_token();
        let mut creator = Agent::start(program(), &other, &["--init", "--token", &secret])?;
        creator.wait_converged(1, TIMEOUT)?;
        let token_of_other = crate::common::token_of(&mut creator)?;
        let third = lab.host(11, "third")?;
        let mut creator = Agent::start(program(), &third, &["--init", "--token", &secret])?;
        creator.wait_converged(1, TIMEOUT)?;
        let seed = third.ip.to_string();
        refused(
            &non_member,
            &["--join", &seed, "--token", &token_of_other],
            &["clusters never merge"],
        )?;

        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["members"].as_array().map(Vec::len), Some(2), "no trace in the cluster");
        assert_eq!(status["slots"]["leased"], 2);
        Ok(())
    });
}

#[test]
fn joined_host_with_conflicting_settings_is_rejected() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.agents[1].end(nix::sys::signal::Signal::SIGTERM)?;
        let host = &cluster.hosts[1];
        let before = tool(&host.netns, "ip route show proto 73");
        for (arguments, words) in [
            (["--vni", "7"], "vni is 7 here and 1 in the cluster"),
            (["--mtu", "1480"], "at most 1450"),
        ] {
            let mut agent = Agent::start(program(), host, &arguments)?;
            assert_eq!(agent.wait()?.code(), Some(1));
            assert!(agent.log().contains(words), "{}", agent.log());
        }
        assert_eq!(tool(&host.netns, "ip route show proto 73"), before, "nothing was touched");
        cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &[])?;
        cluster.converge()
    });
}

#[test]
fn agent_with_conflicting_devices_ports_or_sockets_is_rejected() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        let (seed, token) = (cluster.hosts[0].ip.to_string(), cluster.token.clone());
        let join = ["--join", seed.as_str(), "--token", token.as_str()];
        let with = |more: &[&'static str]| [&join[..], more].concat();

        tool(&host.netns, "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0 nolearning");
        refused(&host, &join, &["VNI 1", "8472", "flannel.1", "is flannel running"])?;
        tool(&host.netns, "ip link del flannel.1");

        tool(&host.netns, "ip link add gossamer.1 type bridge");
        let mut agent = Agent::start(program(), &host, &join)?;
        assert_eq!(agent.wait()?.code(), Some(1));
        assert!(agent.log().contains("gossamer.1 is taken by a bridge"), "{}", agent.log());
        assert!(tool(&host.netns, "ip -d link show gossamer.1").contains("bridge"), "untouched");
        tool(&host.netns, "ip link del gossamer.1");
        fs::remove_file(host.dir.join("log"))?;

        let taken = host.netns.run(|| std::net::UdpSocket::bind("0.0.0.0:8472"))?;
        refused(&host, &join, &["UDP port 8472", "taken"])?;
        drop(taken);
        let taken = host.netns.run(|| std::net::UdpSocket::bind("0.0.0.0:8473"))?;
        refused(&host, &join, &["0.0.0.0:8473", "in use", "--listen"])?;
        drop(taken);

        refused(&host, &with(&["--mtu", "9000"]), &["9000", "at most 1450"])?;
        refused(&host, &with(&["--network", "10.42.0.0/30"]), &["too small"])?;

        let mut agent = cluster.start_agent(&host, &[])?;
        agent.wait_converged(2, TIMEOUT)?;
        let second = Agent::start(program(), &host, &join).and_then(|mut second| second.wait())?;
        assert_eq!(second.code(), Some(1));
        assert!(agent.log().contains("an agent is already listening"), "{}", agent.log());
        agent.wait_converged(2, TIMEOUT)?;
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["slots"]["leased"], 2, "refused hosts hold no subnet");
        Ok(())
    });
}

#[test]
fn pipe_or_device_in_place_of_a_file_is_rejected_at_once() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let pipe = host.dir.join("pipe");
        mkfifo(&pipe, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let pipe = pipe.to_str().expect("UTF-8");
        for flag in ["--config", "--net-config", "--token-file"] {
            refused(&host, &[flag, pipe], &[pipe, "not a regular file"])?;
        }
        refused(&host, &["--config", "/dev/zero"], &["/dev/zero", "not a regular file"])?;
        let long = host.dir.join("long");
        fs::write(&long, " ".repeat((1 << 20) + 1))?;
        refused(&host, &["--config", long.to_str().expect("UTF-8")], &["longer than 1048576"])?;
        // A file written by Kubernetes may become valid while the agent waits for it.
        let waiting = ["--lease-source", "podcidr", "--token", &new_token(), "--pod-cidr-file"];
        let given = host.dir.join("pod-cidr");
        mkfifo(&given, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let named = given.to_str().expect("UTF-8");
        let mut agent = Agent::start(program(), &host, &[&waiting[..], &[named]].concat())?;
        let problem = "not a regular file";
        wait_until(problem, TIMEOUT, || has_problem(&mut agent, problem));
        fs::remove_file(&given)?;
        fs::write(&given, "10.42.7.0/24\n")?;
        agent.wait_converged(1, TIMEOUT)?;
        Ok(())
    });
}

#[test]
fn joiner_with_the_clusters_vni_in_use_is_rejected_and_returns_its_subnet() {
    isolated(|lab| {
        let first = lab.host(1, "n1")?;
        let mut creator = Agent::start(program(), &first, &["--init", "--vni", "42"])?;
        creator.wait_converged(1, TIMEOUT)?;
        let token = crate::common::token_of(&mut creator)?;
        let host = lab.host(2, "n2")?;
        tool(&host.netns, "ip link add other type vxlan id 42 dstport 8472 dev eth0");
        let seed = first.ip.to_string();
        refused(&host, &["--join", &seed, "--token", &token], &["VNI 42", "device other"])?;
        let status = creator.wait_converged(1, TIMEOUT)?;
        assert_eq!(status["slots"]["leased"], 1, "the subnet was given back");
        Ok(())
    });
}

#[test]
fn agent_without_net_admin_reports_the_missing_capability() {
    isolated(|lab: &mut Lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Command::new("setpriv");
        agent
            .args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"])
            .arg(program())
            .args(["agent", "--init", "--state-dir"])
            .arg(host.dir.join("state"))
            .arg("--socket")
            .arg(host.dir.join("gossamer.sock"))
            .stderr(Stdio::piped());
        let output = host.netns.spawn(&mut agent)?.wait_with_output()?;
        let said = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("CAP_NET_ADMIN"), "{said}");
        assert_clean(&host);
        Ok(())
    });
}

#[test]
fn wrong_usage_exits_with_2_and_an_unknown_key_is_reported_with_its_line() {
    let run = |arguments: &[&str]| Command::new(program()).args(arguments).output().expect("runs");
    assert_eq!(run(&["agent", "--nonsense"]).status.code(), Some(2));
    assert_eq!(run(&["agent", "--vni", "many"]).status.code(), Some(2));
    assert_eq!(run(&[]).status.code(), Some(2));
    let dir = tempfile::tempdir().expect("tempdir");
    let file = dir.path().join("gossamer.toml");
    fs::write(&file, "vni = 1\nsubnetlen = 24\n").expect("written");
    let output = run(&["agent", "--config", file.to_str().expect("UTF-8")]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("line 2") && said.contains("subnetlen"), "{said}");
}

#[test]
fn seed_without_a_route_is_named_as_such_and_no_firewall_is_blamed() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        let join = ["--join", "[2001:db8::1]:8473", "--token", &cluster.token];
        let mut agent = Agent::start(program(), &host, &join)?;
        let words = "[2001:db8::1]:8473 (it is IPv6, and this host's underlay is IPv4)";
        wait_until("the route is not named", TIMEOUT, || has_problem(&mut agent, words));
        let status = agent.ask("/v1/status", TIMEOUT)?;
        assert!(!texts(&status["problems"]).contains("firewalls"), "{status:#}");
        Ok(())
    });
}

//! The doctor reports nothing on a healthy host, and reports each injected fault.

use std::{
    fs,
    net::{Ipv4Addr, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    time::Instant,
};

use gossamer::lab::{Agent, Host, NetNs};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    common::{
        Cluster, TIMEOUT, isolated, new_token, program, resume, run, sh, status_where, suspend,
        tool,
    },
    forwarding::with_pods,
};

/// Runs the doctor on a host, with the host's own files, and returns its findings.
pub fn examine(host: &Host, more: &str) -> Vec<Value> {
    let (socket, state) = (host.dir.join("gossamer.sock"), host.dir.join("state"));
    let state = if more.contains("--state-dir") {
        String::new()
    } else {
        format!("--state-dir {}", state.display())
    };
    let program = program().display();
    let command = format!("{program} doctor -o json --socket {} {state} {more}", socket.display());
    let output = run(&host.netns, &command);
    let answer: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let findings = answer["findings"].as_array().expect("findings").clone();
    let bad = findings.iter().any(|finding| finding["verdict"] == "problem");
    let code = match answer["verdict"]["state"].as_str() {
        Some("not-ready") => 3,
        state => {
            assert_eq!(state, Some(if bad { "degraded" } else { "healthy" }), "{answer:#}");
            i32::from(bad)
        }
    };
    assert_eq!(output.status.code(), Some(code), "{answer:#}");
    findings
}

/// Returns the findings that are neither "ok" nor "skipped". Without pods there is nothing to forward.
pub fn complaints(host: &Host, more: &str) -> Vec<Value> {
    let mut findings = examine(host, more);
    findings.retain(|finding| finding["verdict"] != "ok" && finding["verdict"] != "skipped");
    findings
}

/// Waits until a check reports a fault: the agent checks some of them every ten seconds.
#[track_caller]
fn assert_reported(host: &Host, more: &str, check: &str, words: &str) {
    let matches_fault = |finding: &Value| {
        finding["check"] == check
            && matches!(finding["verdict"].as_str(), Some("problem" | "notice"))
            && finding.to_string().contains(words)
    };
    let begun = Instant::now();
    loop {
        let complaints = complaints(host, more);
        if complaints.iter().any(matches_fault) {
            return;
        }
        assert!(begun.elapsed() < TIMEOUT, "{check} {words}: {complaints:#?}");
    }
}

/// The check, a text of its finding, the commands that cause the fault, and the commands that remove it.
const FAULTS: [(&str, &str, &str, &str); 12] = [
    (
        "sysctls",
        "sysctl -w net.ipv4.ip_forward=1",
        "sysctl -w net.ipv4.ip_forward=0",
        "sysctl -w net.ipv4.ip_forward=1",
    ),
    (
        "firewall",
        "chain inet wall in drops UDP 8472",
        "nft add table inet wall && nft add chain inet wall in { type filter hook input priority 0 ; } && \
         nft add rule inet wall in udp dport 8472 drop",
        "nft delete table inet wall",
    ),
    (
        "firewall",
        "iptables -I INPUT -p udp --dport 8473 -j ACCEPT",
        "nft add table ip filter && \
         nft add chain ip filter INPUT { type filter hook input priority 0 ; policy drop ; } && \
         nft add rule ip filter INPUT ct state established accept && \
         nft add rule ip filter INPUT udp dport 8472 accept && \
         nft add rule ip filter INPUT tcp dport 22 accept",
        "nft delete table ip filter",
    ),
    // As images of some clouds have it, by nftables and by iptables.
    (
        "firewall",
        "chain ip filter INPUT drops UDP 8472",
        "nft add table ip filter && \
         nft add chain ip filter INPUT { type filter hook input priority 0 ; } && \
         nft add rule ip filter INPUT ct state established,related accept && \
         nft add rule ip filter INPUT ip protocol icmp accept && \
         nft add rule ip filter INPUT iifname lo accept && \
         nft add rule ip filter INPUT reject with icmp type host-prohibited",
        "nft delete table ip filter",
    ),
    (
        "firewall",
        "chain ip filter INPUT drops UDP 8472",
        "iptables -A INPUT -m state --state ESTABLISHED,RELATED -j ACCEPT && \
         iptables -A INPUT -p icmp -j ACCEPT && \
         iptables -A INPUT -j REJECT --reject-with icmp-host-prohibited",
        "iptables -F INPUT",
    ),
    (
        "firewall",
        "chain ip filter INPUT drops UDP 8472",
        "iptables -A INPUT -p udp -m multiport --dports 53,8400:8472 -j DROP",
        "iptables -F INPUT",
    ),
    (
        "forwarding",
        "iptables -I FORWARD -s 10.42.0.0/16 -j ACCEPT",
        "nft add table ip filter && \
         nft add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }",
        "nft delete table ip filter",
    ),
    (
        "docker",
        "--allow-direct-routing",
        "nft add table ip raw && \
         nft add chain ip raw PREROUTING { type filter hook prerouting priority -300 ; } && \
         nft add rule ip raw PREROUTING ip daddr 10.42.7.9 iifname != docker0 drop",
        "nft delete table ip raw",
    ),
    (
        "overlays",
        "interface flannel.1 belongs to flannel",
        "ip link add flannel.1 type vxlan id 9 dstport 8479",
        "ip link del flannel.1",
    ),
    (
        "overlays",
        "10.42.250.5 on br0 is in the overlay's network",
        "ip link add br0 type bridge && ip addr add 10.42.250.5/24 dev br0",
        "ip link del br0",
    ),
    (
        "mtu",
        "gsm0 has MTU 9000, the overlay 1450",
        "ip link add name gsm0 mtu 9000 type bridge",
        "ip link del gsm0",
    ),
    (
        "firewall",
        "drops UDP 8472",
        "iptables -A INPUT -p udp --dport 8472 -j DROP",
        "iptables -D INPUT -p udp --dport 8472 -j DROP",
    ),
];

#[test]
fn doctor_reports_injected_faults_and_nothing_on_a_healthy_host() {
    isolated(|lab| {
        // The bridges that are injected have no address in this host's subnet.
        let mut cluster = Cluster::start_with(lab, 3, &["--prefer-subnet", "10.42.1.0"])?;
        for agent in &mut cluster.agents {
            status_where(agent, |status| {
                let mut paths = status["paths"].as_array().expect("paths").iter();
                let is_asked = status["kernel"]["routing"]["state"] == "ok";
                let are_all = paths.len() == 2;
                status["converged"] == true
                    && is_asked
                    && are_all
                    && paths.all(|path| path["state"] == "ok")
            });
        }
        for host in &cluster.hosts {
            let findings = examine(host, "");
            // No Docker runs here, and only one host has the subnet that all prefer.
            let is_expected = |finding: &Value| {
                finding["check"] == "docker" || finding["code"] == "preferred-subnet"
            };
            let complaints = findings.iter().filter(|f| f["verdict"] != "ok" && !is_expected(f));
            let complaints: Vec<_> = complaints.collect();
            let [skipped] = complaints[..] else { panic!("{}: {complaints:#?}", host.name) };
            assert_eq!(
                (&skipped["check"], &skipped["verdict"]),
                (&"forwarding".into(), &"skipped".into())
            );
            assert!(findings.len() >= 23, "{findings:#?}");
        }
        let host = &cluster.hosts[0];
        for (check, words, plant, remove) in FAULTS {
            if plant.starts_with("iptables") && run_is_missing(&host.netns, "iptables --version") {
                continue;
            }
            sh(&host.netns, plant);
            assert_reported(host, "", check, words);
            sh(&host.netns, remove);
        }
        let state = host.dir.join("state");
        for (file, mode, right, words) in [
            (state.clone(), 0o755, 0o700, "chmod 700"),
            (state.join("token"), 0o644, 0o600, "chmod 600"),
        ] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
            assert_reported(host, "", "state", words);
            fs::set_permissions(&file, fs::Permissions::from_mode(right))?;
        }
        let history = fs::read_to_string(state.join("history"))?;
        let last = history.lines().last().expect("a change of owner");
        let mut later: Value = serde_json::from_str(last)?;
        later["at"] = 4_000_000_000_u64.into();
        fs::write(state.join("history"), format!("{history}{later}\n"))?;
        assert_reported(host, "", "clock", "2096-10-02");
        fs::write(state.join("history"), history)?;
        if !run_is_missing(&host.netns, "setpriv --version") {
            let doctor = format!("setpriv --bounding-set=-net_raw {} doctor", program().display());
            let said = String::from_utf8(run(&host.netns, &doctor).stdout)?;
            assert!(said.contains("CAP_NET_RAW is not held"), "{said}");
        }
        // The fault is removed, so the host is healthy again.
        status_where(&mut cluster.agents[0], |status| status["problems"] == serde_json::json!([]));
        assert_eq!(complaints(&cluster.hosts[0], ""), [Value::Null; 0]);

        // A hanging agent.
        suspend(&cluster.agents[0])?;
        assert_reported(&cluster.hosts[0], "", "agent", "does not answer within 5s");
        resume(&cluster.agents[0])?;

        // A firewall on a neighboring host, and a dead member.
        let wall = "nft add table inet wall && \
                    nft add chain inet wall in { type filter hook input priority 0 ; } && \
                    nft add rule inet wall in udp dport 8472 drop";
        sh(&cluster.hosts[1].netns, wall);
        status_where(&mut cluster.agents[0], |status| {
            status["paths"].to_string().contains("one-way")
        });
        // A warning only, because without pods no lost packet of a pod is known.
        assert_reported(
            &cluster.hosts[0],
            "",
            "paths",
            "UDP 8472 is closed on the way from 10.99.0.10 to 10.99.0.11",
        );
        cluster.agents[2].end(Signal::SIGKILL)?;
        status_where(&mut cluster.agents[0], |status| {
            status["members"].to_string().contains("down")
        });
        // Its kernel still answers, so the host is not gone.
        let running = "if it runs, open UDP 8473 between the two hosts";
        assert_reported(&cluster.hosts[0], "", "members", running);
        let advised = serde_json::to_string(&examine(&cluster.hosts[0], ""))?;
        assert!(!advised.contains("gossamer forget"), "{advised}");
        Ok(())
    });
}

fn run_is_missing(netns: &NetNs, command: &str) -> bool {
    let words: Vec<&str> = command.split(' ').collect();
    let mut probe = std::process::Command::new(words[0]);
    probe.args(&words[1..]).stdout(std::process::Stdio::null());
    netns.spawn(&mut probe).is_err()
}

#[test]
fn doctor_without_an_agent_reports_what_would_prevent_its_start() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let (seed, token) = (cluster.hosts[0].ip, cluster.token.clone());
        let third = lab.host(3, "n3")?;
        let fresh = |more: &str| format!("--join {seed} --token {token} {more}");
        let found = complaints(&third, &fresh(""));
        assert_eq!(found.len(), 1, "only the missing agent is reported: {found:#?}");
        assert_reported(&third, &fresh(""), "agent", "systemctl start gossamer");

        let taken = third.netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 8473)))?;
        assert_reported(&third, &fresh(""), "ports", "ss -lunp");
        drop(taken);
        let taken = third.netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 8472)))?;
        assert_reported(&third, &fresh(""), "ports", "UDP port 8472 is taken");
        drop(taken);
        assert_reported(&third, &fresh("--iface nosuch0"), "underlay", "nosuch0");
        // With a network in the settings, but without a token.
        third.netns.sysctl("net/ipv4/ip_forward", "0")?;
        let joins = format!("--join {seed}");
        assert_reported(&third, &joins, "token", "gossamer join TOKEN");
        assert_reported(&third, &joins, "sysctls", "net.ipv4.ip_forward=1");
        third.netns.sysctl("net/ipv4/ip_forward", "1")?;
        assert_reported(
            &third,
            &fresh("--network 10.42.0.0/16 --subnet-len 12"),
            "configuration",
            "subnet_len",
        );
        let other_token = new_token()?;
        let wrong = format!("--join {seed} --token {other_token}");
        assert_reported(&third, &wrong, "seeds", "copy the token again");
        let unreachable_seed = format!("--join 10.99.0.99 --token {token}");
        assert_reported(&third, &unreachable_seed, "seeds", "10.99.0.99");
        let half = format!("--join 10.99.0.99 --join {seed} --token {token}");
        let found = complaints(&third, &half);
        assert!(found.iter().any(|f| f["check"] == "seeds" && f["verdict"] == "notice"));

        // A database that was damaged while no agent ran. The doctor must not change it.
        cluster.agents[1].end(Signal::SIGTERM)?;
        let host = &cluster.hosts[1];
        let database = host.dir.join("state/db/db");
        let mut bytes = fs::read(&database)?;
        let whole = bytes.clone();
        bytes.iter_mut().for_each(|byte| *byte ^= 0x5a);
        fs::write(&database, &bytes)?;
        assert_reported(host, "", "state", "contains no cluster");
        assert_eq!(fs::read(&database)?, bytes, "nothing was changed");
        fs::write(&database, whole)?;
        assert!(complaints(host, "").iter().all(|finding| finding["check"] != "state"));
        Ok(())
    });
}

#[test]
fn doctor_asks_the_agent_named_by_an_option_although_the_settings_cannot_be_read() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let host = &cluster.hosts[0];
        let file = host.dir.join("broken.toml");
        fs::write(&file, "network = 10.42.0.0/16\n")?;
        let findings = examine(host, &format!("--config {}", file.display()));
        let of = |check: &str| {
            let found = findings.iter().find(|finding| finding["check"] == check);
            found.unwrap_or_else(|| panic!("{check}: {findings:#?}"))
        };
        assert!(of("configuration").to_string().contains("write texts in quotes"), "{findings:#?}");
        assert!(of("agent")["seen"].to_string().contains("converged, with"), "{findings:#?}");
        assert_eq!(
            (&of("ports")["verdict"], &of("paths")["verdict"]),
            (&"ok".into(), &"skipped".into())
        );
        // Without an answer it is not known whether the port is the agent's.
        let other = run(
            &host.netns,
            &format!(
                "{} doctor --config {} --socket /nowhere",
                program().display(),
                file.display()
            ),
        );
        let said = String::from_utf8(other.stdout)?;
        assert!(said.contains("not known whether an agent runs"), "{said}");
        assert!(!said.contains("in use"), "{said}");
        Ok(())
    });
}

#[test]
fn doctor_on_a_fresh_host_says_that_nothing_is_set_up_and_what_to_run() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        host.netns.sysctl("net/ipv4/ip_forward", "0")?;
        let (socket, state) = (host.dir.join("gossamer.sock"), host.dir.join("state"));
        let program = program().display();
        let (socket, state) = (socket.display(), state.display());
        let command = format!("{program} doctor --socket {socket} --state-dir {state}");
        let output = run(&host.netns, &command);
        let said = String::from_utf8(output.stdout)?;
        assert!(said.contains("\n\nnot set up: run `gossamer init`"), "{said}");
        assert!(said.contains("`gossamer join TOKEN`") && !said.contains("PROBLEM"), "{said}");
        assert!(said.contains("gossamer init and gossamer join set it"), "{said}");
        assert_eq!(output.status.code(), Some(3), "{said}");
        Ok(())
    });
}

/// Commands that a test starts must not read the settings of this machine.
#[test]
fn commands_of_tests_read_no_settings_file() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        for command in ["mount -t tmpfs tmpfs /etc", "mkdir /etc/gossamer"] {
            tool(&host.netns, command);
        }
        fs::write("/etc/gossamer/gossamer.toml", "nosuch = 1\n")?;
        let found = examine(&host, "");
        let configuration = found.iter().find(|finding| finding["check"] == "configuration");
        assert_eq!(configuration.expect("a finding")["verdict"], "ok", "{configuration:?}");
        Ok(())
    });
}

#[test]
fn doctor_on_a_host_with_pods_and_stopped_agent_reports_only_the_agent() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        cluster.agents[1].end(Signal::SIGTERM)?;
        let findings = examine(&cluster.hosts[1], "");
        let routing = findings.iter().find(|finding| finding["check"] == "routing");
        let routing = routing.expect("a finding");
        assert_eq!(routing["verdict"], "ok", "{routing:#}");
        let faults: Vec<_> = findings.iter().filter(|f| f["verdict"] == "problem").collect();
        let [fault] = faults[..] else { panic!("{faults:#?}") };
        assert_eq!(fault["check"], "agent");
        Ok(())
    });
}

#[test]
fn doctor_bundle_contains_no_secret() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let host = &cluster.hosts[0];
        let (config, bundle) = (host.dir.join("gossamer.toml"), host.dir.join("bundle.tar.gz"));
        fs::write(&config, format!("token = \"{}\"\nmtu = 1400\n", cluster.token))?;
        fs::set_permissions(&config, fs::Permissions::from_mode(0o600))?;
        let more = format!("--config {} --bundle {}", config.display(), bundle.display());
        // Terminals interpret this escape sequence.
        tool(&host.netns, "ip link set dev eth0 alias \u{1b}]0;alias\u{7}");
        examine(host, &more);
        assert_eq!(fs::metadata(&bundle)?.permissions().mode() & 0o777, 0o600);
        let listed = tool(&host.netns, &format!("tar -tzf {}", bundle.display()));
        for name in ["doctor.json", "status.json", "config.toml", "links.txt", "nftables.txt"] {
            assert!(listed.contains(&format!("gossamer/{name}")), "{name}: {listed}");
        }
        let all = tool(&host.netns, &format!("tar -xzOf {}", bundle.display()));
        assert!(all.contains("token = \"gsm1.REDACTED\"") && all.contains("mtu = 1400"));
        assert!(!all.contains(&cluster.token[5..]), "the token is in it");
        assert!(all.contains("]0;alias") && !all.contains(['\u{1b}', '\u{7}']), "for a terminal");
        let again = run(&host.netns, &format!("{} doctor {more}", program().display()));
        let said = String::from_utf8(again.stderr)?;
        assert!(said.contains("bundle: ") && said.contains("exists"), "{said}");
        let _ = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        Ok(())
    });
}

/// The capabilities of the agent count, not those of the shell in which the doctor runs.
#[test]
fn missing_capability_of_the_agent_is_reported_with_its_process() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let wrapper = host.dir.join("without-sys-admin");
        let script = format!(
            "#!/bin/sh\nexec setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin {} \"$@\"\n",
            program().display()
        );
        fs::write(&wrapper, script)?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
        let mut agent = Agent::start(&wrapper, &host, &["--init"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let words = format!("CAP_SYS_ADMIN is not held by the agent (process {})", agent.pid());
        assert_reported(&host, "", "privileges", &words);
        Ok(())
    });
}

/// With 1280 bytes on the underlay, the tunnel is too small for IPv6. Only some overlays have IPv6.
#[test]
fn underlay_too_small_for_ipv6_is_reported_alike_by_status_and_doctor() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        sh(&host.netns, "ip link set eth0 mtu 1280 && sysctl -qw net.ipv6.conf.all.forwarding=1");
        let mut agent = Agent::start(program(), &host, &["--init"])?;
        let status = agent.wait_converged(1, TIMEOUT)?;
        assert_eq!(status["problems"], serde_json::json!([]), "{status:#}");
        assert_eq!(complaints(&host, ""), Vec::<Value>::new());
        let host = lab.host(2, "n2")?;
        sh(&host.netns, "ip link set eth0 mtu 1280 && sysctl -qw net.ipv6.conf.all.forwarding=1");
        let mut agent = Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        let status = agent.wait_converged(1, TIMEOUT)?;
        let problems = status["problems"].as_array().expect("problems");
        assert_eq!(problems.len(), 1, "{status:#}");
        let findings = complaints(&host, "");
        let findings: Vec<_> =
            findings.iter().map(|finding| (&finding["check"], &finding["seen"])).collect();
        assert_eq!(findings, [(&Value::from("mtu"), &problems[0]["what"])]);
        Ok(())
    });
}

//! Pods and their bridge after changes by other programs, and after lost state.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use gossamer::lab::Agent;
use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use serde_json::json;

use crate::{
    cni::{Runtime, address, namespaces, pods, veths},
    common::{
        Cluster, TIMEOUT, assert_logged, client, eventually, isolated, new_token, program, run,
        status_where, texts, tool, wait_until,
    },
    host_failures::lose_database,
};

#[test]
fn changed_bridge_is_repaired() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        cluster.agents[0].end(Signal::SIGTERM)?;
        let bridge = ["--bridge", "pods0"];
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &bridge)?;
        cluster.converge()?;
        let host = &cluster.hosts[0].netns;
        let spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let (a, _) = (runtime.add("a"), runtime.add("b"));
        let link = a["interfaces"][1]["name"].as_str().expect("a name");
        let is_whole = |what: &str| {
            wait_until(what, TIMEOUT, || {
                let ports = tool(host, "ip -o link show type veth master pods0 up");
                let addresses = String::from_utf8(run(host, "ip addr show pods0").stdout);
                // Ignore the port of the agent's own pod for forwarding trials.
                ports.lines().filter(|line| line.contains(": gsm")).count() == 2
                    && addresses.is_ok_and(|text| text.contains("/24") && text.contains("state UP"))
            });
        };
        for command in [
            "ip addr flush dev pods0",
            "ip link set pods0 down",
            &format!("ip link set {link} nomaster"),
            &format!("ip link set {link} down"),
            "ip link del pods0",
        ] {
            tool(host, command);
            // Commands that find nothing print nothing.
            is_whole(command);
            let gateway = a["ips"][0]["gateway"].as_str().expect("a gateway");
            tool(&spaces[0], &format!("ping -c 1 -W 2 {gateway}"));
        }
        status_where(&mut cluster.agents[0], |status| {
            status["kernel"]["repairs"]["bridge"].as_u64() >= Some(5)
        });
        // The same over a restart: the new process has connected no pod itself.
        cluster.agents[0].end(Signal::SIGTERM)?;
        tool(&cluster.hosts[0].netns, "ip link del pods0");
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &bridge)?;
        let host = &cluster.hosts[0].netns;
        eventually(host, "ip -o link show type veth up", |text| {
            let of_pod = |line: &&str| line.contains(": gsm") && line.contains("master pods0");
            text.lines().filter(of_pod).count() == 2
        });
        Ok(())
    });
}

#[test]
fn renamed_veth_end_gets_its_name_back() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _space = namespaces(&["a"])?;
        let given = address(&Runtime::new(&cluster.agents[0]).add("a"));
        let answer = cluster.agents[0].ask("/v1/pods", TIMEOUT)?;
        let link = answer["pods"][0]["link"].as_str().expect("a name").to_owned();
        let rename =
            [format!("{link} down"), format!("{link} name other0"), "other0 up".to_owned()];
        let host = &cluster.hosts[0].netns;
        // The name may be restored before the last command runs.
        rename.iter().for_each(|change| _ = run(host, &format!("ip link set {change}")));
        eventually(host, "ip -o link show master gsm0 up", |shown| shown.contains(&link));
        eventually(host, &format!("ping -c 1 -W 2 {given}"), |said| said.contains(" 1 received"));
        // Renamed while no agent runs, and to be removed by the next one.
        cluster.agents[0].end(Signal::SIGKILL)?;
        rename.iter().for_each(|change| _ = tool(host, &format!("ip link set {change}")));
        Runtime::new(&cluster.agents[0]).del("a");
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        eventually(&cluster.hosts[0].netns, "ip -o link show master gsm0", str::is_empty);
        Ok(())
    });
}

#[test]
fn pods_survive_a_lost_database_but_not_a_host_reboot() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let a = Runtime::new(&cluster.agents[1]).add("a");
        cluster.agents[1].end(Signal::SIGKILL)?;
        lose_database(&cluster.hosts[1])?;
        let start = |cluster: &mut Cluster| {
            cluster.agents[1] = Agent::start(program(), &cluster.hosts[1], &[])?;
            cluster.converge()
        };
        start(&mut cluster)?;
        assert_logged(&cluster.agents[1], "restored from their interfaces");
        let b = Runtime::new(&cluster.agents[1]).add("b");
        assert_ne!(address(&a), address(&b));
        let gateway = a["ips"][0]["gateway"].as_str().expect("a gateway");
        // Once more: the records are on disk again, and nothing is removed.
        cluster.agents[1].end(Signal::SIGKILL)?;
        start(&mut cluster)?;
        assert_eq!((pods(&mut cluster.agents[1]), veths(&cluster.hosts[1])), (2, 2));
        tool(&spaces[0], &format!("ping -c 1 -W 2 {gateway}"));

        cluster.agents[1].end(Signal::SIGKILL)?;
        // A boot leaves no interfaces, and has another id.
        let host = &cluster.hosts[1].netns;
        for line in tool(host, "ip -br link show type veth").lines() {
            let name = line.split('@').next().expect("a name");
            if name.starts_with("gsm") {
                tool(host, &format!("ip link del {name}"));
            }
        }
        let boot = cluster.hosts[1].dir.join("state/boot");
        let another = "0a7d2f1e-9c1b-4c37-9f0d-b0b86d1f0000\n";
        fs::write(&boot, another)?;
        start(&mut cluster)?;
        assert_eq!(pods(&mut cluster.agents[1]), 0);
        wait_until("this boot is not recorded", TIMEOUT, || {
            fs::read_to_string(&boot).is_ok_and(|noted| noted != another)
        });
        Ok(())
    });
}

#[test]
fn pods_survive_a_recorded_boot_id_of_another_boot() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let a = Runtime::new(&cluster.agents[0]).add("a");
        let gateway = a["ips"][0]["gateway"].as_str().expect("a gateway").to_owned();
        let state = cluster.hosts[0].dir.join("state");
        let noted = fs::read(state.join("boot"))?;
        let mut another = noted.clone();
        another[1] = if noted[1] == b'0' { b'1' } else { b'0' };
        let mut given = vec![address(&a)];
        for (turn, name) in ["b", "c"].iter().enumerate() {
            cluster.agents[0].end(Signal::SIGTERM)?;
            fs::write(state.join("boot"), &another)?;
            cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &["--init"])?;
            cluster.converge()?;
            assert_logged(&cluster.agents[0], "state directory is of another boot");
            // All records are on disk: CHECK opens the namespace by the recorded path.
            let (done, said) =
                Runtime::new(&cluster.agents[0]).call("CHECK", "a", &json!({ "prevResult": a }));
            assert!(done, "{said}");
            let new = address(&Runtime::new(&cluster.agents[0]).add(name));
            assert!(!given.contains(&new), "{new} is {given:?}");
            given.push(new);
            assert_eq!(
                (pods(&mut cluster.agents[0]), veths(&cluster.hosts[0])),
                (turn + 2, turn + 2)
            );
            tool(&spaces[0], &format!("ping -c 1 -W 5 {gateway}"));
            wait_until("this boot is not recorded", TIMEOUT, || {
                fs::read(state.join("boot")).is_ok_and(|now| now == noted)
            });
        }
        Ok(())
    });
}

#[test]
fn pods_survive_a_state_directory_of_an_earlier_boot() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _spaces = namespaces(&["old", "a", "b"])?;
        let state = cluster.hosts[0].dir.join("state");
        let copy = cluster.hosts[0].dir.join("copy");
        let start = |cluster: &mut Cluster| {
            cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &["--init"])?;
            cluster.converge()
        };
        let old = Runtime::new(&cluster.agents[0]).add("old");
        cluster.agents[0].end(Signal::SIGTERM)?;
        let copied = format!("cp -a {} {}", state.display(), copy.display());
        tool(&cluster.hosts[0].netns, &copied);
        fs::write(copy.join("boot"), "0a7d2f1e-9c1b-4c37-9f0d-b0b86d1f0000\n")?;
        start(&mut cluster)?;
        Runtime::new(&cluster.agents[0]).call("DEL", "old", &json!({}));
        wait_until("the veth pair of the old pod is left", TIMEOUT, || {
            veths(&cluster.hosts[0]) == 0
        });
        let a = Runtime::new(&cluster.agents[0]).add("a");
        cluster.agents[0].end(Signal::SIGTERM)?;
        fs::remove_dir_all(&state)?;
        fs::rename(&copy, &state)?;
        start(&mut cluster)?;
        // The pod of the earlier boot is gone, and that of this boot is known.
        assert_eq!((pods(&mut cluster.agents[0]), veths(&cluster.hosts[0])), (1, 1));
        let listed = cluster.agents[0].ask("/v1/pods", TIMEOUT)?.to_string();
        assert!(listed.contains(&address(&a)), "{listed}");
        let b = Runtime::new(&cluster.agents[0]).add("b");
        assert!(address(&b) != address(&a) && address(&old) != address(&a), "{listed}");
        Ok(())
    });
}

#[test]
fn fifo_in_place_of_a_namespace_is_rejected_and_delays_no_other_pod() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let agent = &cluster.agents[0];
        let fifo = cluster.hosts[0].dir.join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU)?;
        let body = json!({ "container": "x", "interface": "eth0", "owner": "test", "netns": fifo });
        let body = body.to_string();
        let mut stream = UnixStream::connect(agent.socket())?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        write!(
            stream,
            "POST /v1/pods/attach HTTP/1.1\r\nHost: gossamer\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        assert!(answer.contains("fifo"), "{answer}");
        let _spaces = namespaces(&["a"])?;
        Runtime::new(agent).add("a");
        Ok(())
    });
}

/// A veth pair is removed after its DEL was answered.
#[test]
fn pods_disconnected_before_a_crash_are_not_restored() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
        let _spaces = namespaces(&names)?;
        for name in names {
            Runtime::new(&cluster.agents[0]).add(name);
        }
        for name in &names[1..] {
            let (is_done, answer) = Runtime::new(&cluster.agents[0]).call("DEL", name, &json!({}));
            assert!(is_done, "{answer}");
        }
        cluster.agents[0].end(Signal::SIGKILL)?;
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &["--init"])?;
        cluster.converge()?;
        assert_eq!(pods(&mut cluster.agents[0]), 1);
        wait_until("the veth pairs are left", TIMEOUT, || veths(&cluster.hosts[0]) == 1);
        Ok(())
    });
}

#[test]
fn pods_survive_a_lost_state_directory_over_several_restarts() {
    isolated(|lab| {
        let (host, token) = (lab.host(1, "n1")?, new_token()?);
        let arguments =
            ["--lease-source", "podcidr", "--token", &token, "--pod-cidr", "10.42.0.0/24"];
        let mut agent = Agent::start(program(), &host, &arguments)?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let mut given = vec![Runtime::new(&agent).add("a")];
        let gateway = given[0]["ips"][0]["gateway"].as_str().expect("a gateway").to_owned();
        for (turn, name) in ["b", "c"].iter().enumerate() {
            agent.end(Signal::SIGKILL)?;
            fs::remove_dir_all(host.dir.join("state"))?;
            agent = Agent::start(program(), &host, &arguments)?;
            agent.wait_converged(1, TIMEOUT)?;
            assert_eq!(pods(&mut agent), turn + 1);
            // Addresses of existing pods are not assigned again.
            let new = Runtime::new(&agent).add(name);
            assert!(given.iter().all(|old| address(old) != address(&new)), "{new}");
            given.push(new);
            for _ in 0..2 {
                agent.end(Signal::SIGTERM)?;
                agent = Agent::start(program(), &host, &arguments)?;
                agent.wait_converged(1, TIMEOUT)?;
                // The second check of the bridge is over when another pod has been checked.
                let (done, said) =
                    Runtime::new(&agent).call("CHECK", "a", &json!({ "prevResult": given[0] }));
                assert!(done, "{said}");
                assert_eq!((pods(&mut agent), veths(&host)), (turn + 2, turn + 2));
                tool(&spaces[0], &format!("ping -c 1 -W 5 {gateway}"));
            }
        }
        assert!(!agent.log().contains("removed interfaces of unknown pods"), "{}", agent.log());
        Ok(())
    });
}

#[test]
fn foreign_bridge_is_unchanged_and_own_bridge_can_be_renamed() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b"])?;
        let a = Runtime::new(&cluster.agents[0]).add("a");
        let gateway = a["ips"][0]["gateway"].as_str().expect("a gateway").to_owned();
        let host = &cluster.hosts[0].netns;
        // An address of a subnet that this node had before.
        tool(host, "ip addr add 10.42.250.1/24 dev gsm0");
        tool(host, "ip link set gsm0 down");
        eventually(host, "ip addr show gsm0", |text| {
            !text.contains("10.42.250.1") && text.contains("state UP")
        });
        tool(host, "ip link add br0 type bridge");
        cluster.agents[0].end(Signal::SIGTERM)?;
        let start =
            |bridge: &str| Agent::start(program(), &cluster.hosts[0], &["--bridge", bridge]);
        cluster.agents[0] = start("br0")?;
        status_where(&mut cluster.agents[0], |status| {
            status["pods_refused"].to_string().contains("belongs to another program")
        });
        let (code, why) = Runtime::new(&cluster.agents[0]).refused("ADD", "b", &json!({}));
        assert!(code == 5 && why.contains("belongs to another program"), "{code} {why}");
        assert_eq!(pods(&mut cluster.agents[0]), 1);
        let host = &cluster.hosts[0].netns;
        assert!(!tool(host, "ip addr show br0").contains("10.42."));

        cluster.agents[0].end(Signal::SIGTERM)?;
        cluster.agents[0] = start("pods0")?;
        cluster.converge()?;
        let host = &cluster.hosts[0].netns;
        eventually(host, "ip -o link show type veth master pods0", |text| {
            text.lines().filter(|line| line.contains(": gsm")).count() == 1
        });
        assert!(!run(host, "ip link show gsm0").status.success());
        tool(&spaces[0], &format!("ping -c 1 -W 2 {gateway}"));
        Ok(())
    });
}

#[test]
fn foreign_interface_with_the_bridges_name_is_reported_everywhere_until_removed() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = &cluster.hosts[0].netns;
        tool(host, "ip link add mine type bridge");
        tool(host, "ip link add other type veth peer name otherp");
        let _spaces = namespaces(&["a"])?;
        for name in ["mine", "other", "eth0"] {
            cluster.agents[0].end(Signal::SIGTERM)?;
            cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &["--bridge", name])?;
            let why = format!("the interface {name} belongs to another program");
            // Before any pod is requested.
            let status = status_where(&mut cluster.agents[0], |status| {
                assert!(status["converged"] == false, "{status:#}");
                status["pods_refused"].to_string().contains(&why)
            });
            assert!(texts(&status["problems"]).contains(&why), "{status:#}");
            let agent = &cluster.agents[0];
            let (code, said) = Runtime::new(agent).refused("STATUS", "", &json!({}));
            assert!(code == 50 && said.contains(&why), "{code} {said}");
            let (_, said) = Runtime::new(agent).refused("ADD", "a", &json!({}));
            assert!(said.contains(&why), "{said}");
            let said = client(agent, &["status"]);
            assert_eq!(said.status.code(), Some(3), "{said:?}");
            let said = client(agent, &["doctor"]).stdout;
            let said =
                String::from_utf8_lossy(&said).split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(said.contains(&why), "{said}");
            let socket = agent.socket().display().to_string();
            let ready =
                format!("curl -s --unix-socket {socket} http://gossamer/readyz -w %{{http_code}}");
            let said = tool(&cluster.hosts[0].netns, &ready);
            assert!(said.ends_with("503") && said.contains(&why), "{said}");
        }
        // The operator removes the interface.
        cluster.agents[0].end(Signal::SIGTERM)?;
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &["--bridge", "mine"])?;
        status_where(&mut cluster.agents[0], |status| status["pods_refused"].is_string());
        tool(&cluster.hosts[0].netns, "ip link del mine");
        cluster.converge()?;
        let runtime = Runtime::new(&cluster.agents[0]);
        assert!(runtime.call("STATUS", "", &json!({})).0);
        runtime.add("a");
        let log = cluster.agents[0].log();
        assert!(!log.contains("repaired changes by another program"), "{log}");
        Ok(())
    });
}

#[test]
fn doctor_without_an_agent_reports_an_interface_in_place_of_the_bridge() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        tool(&host.netns, "ip link add gsm0 type veth peer name gsm0p");
        let state = host.dir.join("state").display().to_string();
        let socket = host.dir.join("none.sock").display().to_string();
        let doctor =
            format!("{} doctor --state-dir {state} --socket {socket}", program().display());
        let said = String::from_utf8(run(&host.netns, &doctor).stdout)?;
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains("the interface gsm0 belongs to another program"), "{said}");
        Ok(())
    });
}

#[test]
fn bridge_changes_by_settings_are_not_counted_as_repairs() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let a = runtime.add("a");
        runtime.add("b");
        for (name, mtu) in [("pods0", "1450"), ("pods1", "1450"), ("pods1", "1400")] {
            cluster.agents[0].end(Signal::SIGTERM)?;
            let settings = ["--bridge", name, "--mtu", mtu];
            cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &settings)?;
            eventually(&cluster.hosts[0].netns, "ip -o link show type veth up", |text| {
                text.lines().filter(|line| line.contains(&format!("master {name} "))).count() >= 2
            });
            eventually(&cluster.hosts[0].netns, &format!("ip -o link show {name}"), |text| {
                text.contains(&format!("mtu {mtu}"))
            });
            let gateway = a["ips"][0]["gateway"].as_str().expect("a gateway");
            eventually(&spaces[0], &format!("ping -c 1 -W 2 {gateway}"), |text| {
                text.contains("1 received")
            });
            cluster.converge()?;
        }
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        let log = cluster.agents[0].log();
        assert!(!log.contains("repaired changes by another program"), "{log}");
        assert_eq!(status["kernel"]["repairs"]["bridge"], serde_json::Value::Null, "{status}");
        // Later changes by other programs are reported.
        tool(&cluster.hosts[0].netns, "ip link set pods1 down");
        status_where(&mut cluster.agents[0], |status| status["kernel"]["repairs"]["bridge"] == 1);
        Ok(())
    });
}

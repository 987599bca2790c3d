//! Containers connected by the CNI plugin, called as a runtime calls it. Results are checked with `ip`
//! and `ping`.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use gossamer::lab::{Agent, Host, NetNs};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::{
    Cluster, TIMEOUT, client, eventually, isolated, program, run, tool, wait_until,
};

/// A container runtime on one host.
pub struct Runtime<'a> {
    socket: &'a Path,
    version: &'static str,
}

impl<'a> Runtime<'a> {
    pub fn new(agent: &'a Agent) -> Self {
        Self::at(agent.socket())
    }

    /// Creates a runtime that calls the agent behind the given socket.
    pub const fn at(socket: &'a Path) -> Self {
        Self { socket, version: "1.1.0" }
    }

    /// Calls the plugin once. Returns whether it succeeded, and its output.
    pub fn call(&self, verb: &str, container: &str, more: &Value) -> (bool, Value) {
        self.call_with(verb, container, &[], more)
    }

    /// As `call`, with the given environment variables in place of the default ones.
    pub fn call_with(
        &self,
        verb: &str,
        container: &str,
        variables: &[(&str, &str)],
        more: &Value,
    ) -> (bool, Value) {
        let netns = format!("/run/netns/{container}");
        let usual = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", container),
            ("CNI_NETNS", &netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ];
        let all: Vec<_> = usual.into_iter().chain(variables.iter().copied()).collect();
        invoke(program(), &all, &self.config(more).to_string())
    }

    pub fn config(&self, more: &Value) -> Value {
        let mut config = json!({
            "cniVersion": self.version,
            "name": "pods",
            "type": "gossamer",
            "socket": self.socket,
        });
        for (key, value) in more.as_object().expect("an object") {
            config[key] = value.clone();
        }
        config
    }

    /// Calls ADD, which must succeed, and returns the result.
    pub fn add(&self, container: &str) -> Value {
        let (done, result) = self.call("ADD", container, &json!({}));
        assert!(done, "{result}");
        result
    }

    pub fn del(&self, container: &str) {
        let (done, said) = self.call("DEL", container, &json!({}));
        assert!(done && said.is_null(), "{said}");
    }

    /// Makes a call that must fail. Returns the error's code and message.
    pub fn refused(&self, verb: &str, container: &str, more: &Value) -> (u64, String) {
        let (done, error) = self.call(verb, container, more);
        assert!(!done, "{verb} {container} should have failed: {error}");
        let code = error["code"].as_u64().expect("a number");
        (code, error["msg"].as_str().expect("a text").to_owned())
    }
}

/// Runs a plugin. Returns whether it succeeded, and its output.
pub fn invoke(plugin: &Path, variables: &[(&str, &str)], input: &str) -> (bool, Value) {
    let mut command = Command::new(plugin);
    command.envs(variables.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("the plugin starts");
    // A plugin that rejects the environment may not read its input.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    let output = child.wait_with_output().expect("the plugin ends");
    let said = match output.stdout.as_slice() {
        [] => Value::Null,
        text => serde_json::from_slice(text).expect("JSON"),
    };
    (output.status.success(), said)
}

/// Returns the first address of a result, without the prefix length.
pub fn address(result: &Value) -> String {
    let text = result["ips"][0]["address"].as_str().expect("an address");
    text.split('/').next().expect("an address").to_owned()
}

/// Returns the number of veth interfaces of pods on a host.
pub fn veths(host: &Host) -> usize {
    let links = tool(&host.netns, "ip -o link show type veth");
    links.lines().filter(|line| line.contains(": gsm")).count()
}

/// Returns the number of pods that the agent lists.
pub fn pods(agent: &mut Agent) -> usize {
    let answer = agent.ask("/v1/pods", TIMEOUT).expect("pods");
    answer["pods"].as_array().expect("a list").len()
}

/// Kills the first agent and starts it again.
fn kill_and_start(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.agents[0].end(Signal::SIGKILL)?;
    cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
    cluster.converge()
}

pub fn namespaces(names: &[&str]) -> std::io::Result<Vec<NetNs>> {
    names.iter().map(|name| NetNs::new(name)).collect()
}

#[test]
fn cni_pods_on_two_hosts_exchange_full_size_packets() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 2)?;
        let (one, two) = (NetNs::new("one")?, NetNs::new("two")?);
        let first = Runtime::new(&cluster.agents[0]).add("one");
        let second = Runtime { version: "0.3.1", ..Runtime::new(&cluster.agents[1]) }.add("two");
        assert_eq!(
            (&first["interfaces"][2]["mtu"], &first["ips"][0]["version"]),
            (&json!(1450), &Value::Null)
        );
        assert_eq!(
            (&second["interfaces"][2]["mtu"], &second["ips"][0]["version"]),
            (&Value::Null, &json!("4"))
        );
        let (here, there) = (address(&first), address(&second));
        let shown = tool(&one, "ip addr show dev eth0");
        assert!(shown.contains(&here) && shown.contains("mtu 1450"), "{shown}");
        assert!(shown.contains(first["interfaces"][2]["mac"].as_str().expect("a MAC")), "{shown}");
        // The largest packets that fit, unfragmented, in both directions; and this host itself.
        tool(&one, &format!("ping -c 2 -i 0.2 -W 2 -M do -s 1422 {there}"));
        tool(&two, &format!("ping -c 2 -i 0.2 -W 2 -M do -s 1422 {here}"));
        let gateway = first["ips"][0]["gateway"].as_str().expect("a gateway");
        tool(&one, &format!("ping -c 1 -W 2 {gateway}"));
        tool(&cluster.hosts[0].netns, &format!("ping -c 1 -W 2 {there}"));
        Ok(())
    });
}

#[test]
fn pods_keep_addresses_over_agent_restarts_and_release_them_on_del() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces: Vec<NetNs> = namespaces(&["a", "b", "c"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let a = runtime.add("a");
        let (code, why) = runtime.refused("ADD", "a", &json!({}));
        assert!(code == 4 && why.contains("has an address already"), "{code} {why}");
        assert!(runtime.call("CHECK", "a", &json!({ "prevResult": a })).0);

        cluster.agents[0].end(Signal::SIGKILL)?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let (code, why) = runtime.refused("ADD", "b", &json!({}));
        assert!(code == 11 && why.contains("does not run"), "{code} {why}");
        assert_eq!(runtime.refused("STATUS", "b", &json!({})).0, 50);
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        cluster.converge()?;
        let runtime = Runtime::new(&cluster.agents[0]);
        assert!(runtime.call("STATUS", "b", &json!({})).0);
        assert!(runtime.call("CHECK", "a", &json!({ "prevResult": a })).0);
        let b = runtime.add("b");
        assert_ne!(address(&a), address(&b));

        tool(&spaces[0], "ip addr flush dev eth0");
        let (code, why) = runtime.refused("CHECK", "a", &json!({ "prevResult": a }));
        assert!(code == 5 && why.contains("has lost"), "{code} {why}");
        runtime.del("a");
        runtime.del("a");
        eventually(&spaces[0], "ip -o link", |links| !links.contains("eth0"));
        // A released address is not assigned again at once.
        assert_ne!(address(&runtime.add("c")), address(&a));
        // Without its namespace, a pod has only its address left to release.
        run(&cluster.hosts[0].netns, "umount /run/netns/b");
        drop(spaces);
        runtime.del("b");
        assert_eq!(pods(&mut cluster.agents[0]), 1);
        eventually(&cluster.hosts[0].netns, "ip -o link show type veth master gsm0", |text| {
            // Ignore the port of the agent's own pod for forwarding trials.
            text.lines().filter(|line| !line.contains("forwarding trial")).count() == 1
        });
        // A bridge without ports keeps its settings, including the MTU.
        Runtime::new(&cluster.agents[0]).del("c");
        let host = &cluster.hosts[0].netns;
        eventually(host, "ip -o link show type veth master gsm0", str::is_empty);
        let shown = tool(host, "ip link show gsm0");
        assert!(shown.contains("mtu 1450"), "{shown}");
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert_eq!(status["kernel"]["repairs"]["bridge"], Value::Null, "{status}");
        Ok(())
    });
}

#[test]
fn add_that_cannot_succeed_is_rejected_and_leaves_no_state() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let space = NetNs::new("a")?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let (code, why) = runtime.refused("ADD", "nowhere", &json!({}));
        assert!(code == 4 && why.contains("/run/netns/nowhere"), "{code} {why}");
        std::fs::write("/run/netns/file", "")?;
        let (code, why) = runtime.refused("ADD", "file", &json!({}));
        assert!(code == 4 && why.contains("not a network namespace"), "{code} {why}");
        tool(&space, "ip link add eth0 type bridge");
        let (code, why) = runtime.refused("ADD", "a", &json!({}));
        assert!(code == 4 && why.contains("already"), "{code} {why}");
        tool(&space, "ip link del eth0");
        for (wish, wanted) in [("192.0.2.1", 101), ("10.42.0", 7)] {
            let more = json!({ "runtimeConfig": { "ips": [wish] } });
            assert_eq!(runtime.refused("ADD", "a", &more).0, wanted, "{wish}");
        }
        assert_eq!(runtime.refused("CHECK", "a", &json!({})).0, 3);
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        // The agent removes its own trial pod when it learns that there are no pods.
        let host = &cluster.hosts[0].netns;
        eventually(host, "ip -o link show type veth", |left| !left.contains("gsm"));

        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.add("a");
        assert_eq!(veths(&cluster.hosts[0]), 1);
        Ok(())
    });
}

#[test]
fn gc_removes_unlisted_pods_of_its_network_only() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _spaces: Vec<NetNs> = namespaces(&["a", "b", "c"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        ["a", "b"].iter().for_each(|pod| _ = runtime.add(pod));
        assert!(runtime.call("ADD", "c", &json!({ "name": "another" })).0);
        let (code, _) = runtime.refused("GC", "", &json!({}));
        assert_eq!((code, veths(&cluster.hosts[0])), (7, 3));
        let valid =
            json!({ "cni.dev/valid-attachments": [{ "containerID": "b", "ifname": "eth0" }] });
        assert!(runtime.call("GC", "", &valid).0);
        wait_until("two are left", TIMEOUT, || veths(&cluster.hosts[0]) == 2);
        let left = cluster.agents[0].ask("/v1/pods", TIMEOUT)?;
        let names: Vec<_> =
            left["pods"].as_array().expect("a list").iter().map(|pod| &pod["container"]).collect();
        assert_eq!(names, ["b", "c"]);
        Ok(())
    });
}

#[test]
fn two_hundred_concurrent_adds_succeed() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let names: Vec<String> = (0..200).map(|number| format!("p{number}")).collect();
        let _spaces: Vec<NetNs> =
            names.iter().map(|name| NetNs::new(name)).collect::<Result<_, _>>()?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let mut addresses: Vec<String> = std::thread::scope(|scope| {
            let added: Vec<_> =
                names.iter().map(|name| scope.spawn(|| address(&runtime.add(name)))).collect();
            added.into_iter().map(|one| one.join().expect("added")).collect()
        });
        addresses.sort();
        addresses.dedup();
        assert_eq!((addresses.len(), veths(&cluster.hosts[0])), (200, 200));
        std::thread::scope(|scope| {
            names.iter().for_each(|name| _ = scope.spawn(|| runtime.del(name)))
        });
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        wait_until("no interface is left", TIMEOUT, || veths(&cluster.hosts[0]) == 0);
        Ok(())
    });
}

#[test]
fn agent_killed_during_add_leaks_no_address_and_no_interface() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _space = NetNs::new("a")?;
        let mut cut_short = 0;
        for round in 0..16_u64 {
            let done = std::thread::scope(|scope| {
                let runtime = Runtime::new(&cluster.agents[0]);
                let adding = scope.spawn(move || runtime.call("ADD", "a", &json!({})).0);
                // The delays cover the time from before the agent reads the request to after it has
                // answered.
                std::thread::sleep(Duration::from_micros(2_000 + 700 * round));
                let killed = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(cluster.agents[0].pid() as i32),
                    Signal::SIGKILL,
                );
                killed.expect("killed");
                adding.join().expect("the plugin ends")
            });
            cut_short += usize::from(!done);
            kill_and_start(&mut cluster)?;
            // A runtime calls DEL after a failed ADD.
            Runtime::new(&cluster.agents[0]).del("a");
            if round % 2 == 0 {
                // In this case the interface may still exist.
                kill_and_start(&mut cluster)?;
            }
            assert_eq!(pods(&mut cluster.agents[0]), 0, "{round}");
            wait_until("no interface is left", TIMEOUT, || veths(&cluster.hosts[0]) == 0);
        }
        assert!(cut_short > 0, "no ADD was cut short");
        assert!(Runtime::new(&cluster.agents[0]).add("a")["ips"].is_array());
        Ok(())
    });
}

#[test]
fn orphaned_pod_is_listed_and_leaving_node_removes_its_bridge() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let _space = NetNs::new("a")?;
        Runtime::new(&cluster.agents[1]).add("a");
        let shown = client(&cluster.agents[1], &["pods"]);
        let shown = String::from_utf8(shown.stdout)?;
        assert!(shown.contains("cni/pods") && shown.contains("connected"), "{shown}");
        let link = tool(&cluster.hosts[1].netns, "ip -o link show type veth master gsm0");
        let link = link.split([':', '@']).nth(1).expect("a name").trim();
        tool(&cluster.hosts[1].netns, &format!("ip link del {link}"));
        let shown = String::from_utf8(client(&cluster.agents[1], &["pods"]).stdout)?;
        assert!(shown.contains("orphan:"), "{shown}");
        cluster.agents[1].leave()?;
        cluster.agents[1].wait()?;
        let links = tool(&cluster.hosts[1].netns, "ip -br link");
        assert!(!links.contains("gsm"), "{links}");
        Ok(())
    });
}

#[test]
fn cni_install_writes_plugin_and_list_and_preserves_foreign_changes() {
    let dir = tempfile::tempdir().expect("a directory");
    let [bin, conf] = ["bin", "net.d"].map(|name| dir.path().join(name));
    let install = |more: &[&str]| {
        let mut command = Command::new(program());
        command.args(["cni", "install", "--bin-dir"]).arg(&bin).arg("--conf-dir").arg(&conf);
        command.args(more).output().expect("gossamer runs")
    };
    for _ in 0..2 {
        assert!(install(&[]).status.success());
    }
    for plugin in ["gossamer", "loopback"] {
        let (done, version) =
            invoke(&bin.join(plugin), &[("CNI_COMMAND", "VERSION")], r#"{"cniVersion": "1.0.0"}"#);
        let spoken = json!(["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
        assert!(done && version["supportedVersions"] == spoken, "{version}");
    }
    let file = conf.join("10-gossamer.conflist");
    let list: Value = serde_json::from_slice(&std::fs::read(&file).expect("read")).expect("JSON");
    assert_eq!(list["plugins"][0]["type"], "gossamer");
    // A list that names a missing plugin would keep all pods from starting.
    assert_eq!(list["plugins"].as_array().map(Vec::len), Some(1));
    std::fs::write(bin.join("portmap"), "").expect("written");
    // An existing plugin belongs to another package.
    std::fs::remove_file(bin.join("loopback")).expect("removed");
    std::fs::write(bin.join("loopback"), "theirs").expect("written");
    assert!(install(&["--copy"]).status.success());
    let list: Value = serde_json::from_slice(&std::fs::read(&file).expect("read")).expect("JSON");
    assert_eq!(list["plugins"][1]["type"], "portmap");
    let copied = std::fs::symlink_metadata(bin.join("gossamer")).expect("there");
    assert!(copied.file_type().is_file(), "{copied:?}");
    let loopback = std::fs::read_to_string(bin.join("loopback")).expect("read");
    assert_eq!(loopback, "theirs");
    // A list written by an earlier version is not a change by an operator.
    let text = std::fs::read_to_string(&file).expect("read");
    let earlier =
        text.replace(r#"{ "ips": true, "mac": true, "dns": true }"#, r#"{ "ips": true }"#);
    assert_ne!(earlier, text);
    std::fs::write(&file, earlier).expect("written");
    assert!(install(&[]).status.success());
    assert_eq!(std::fs::read_to_string(&file).expect("read"), text);
    std::fs::write(&file, "{}").expect("written");
    let kept = install(&[]);
    assert!(kept.status.success() && String::from_utf8_lossy(&kept.stdout).contains("--force"));
    assert_eq!(std::fs::read_to_string(&file).expect("read"), "{}");
    assert!(install(&["--force"]).status.success());
    assert_ne!(std::fs::read_to_string(&file).expect("read"), "{}");
}

#[test]
fn exhausted_subnet_is_reported_and_released_addresses_are_reused() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let small = ["--init", "--network", "10.42.0.0/24", "--subnet-len", "29"];
        let mut agent = Agent::start(program(), &host, &small)?;
        agent.wait_converged(1, TIMEOUT)?;
        let names = ["a", "b", "c", "d", "e"];
        let _spaces = namespaces(&names)?;
        let runtime = Runtime::new(&agent);
        let given: Vec<String> =
            names[..4].iter().map(|name| address(&runtime.add(name))).collect();
        let (code, why) = runtime.refused("ADD", "e", &json!({}));
        assert!(code == 100 && why.contains("all 4 addresses"), "{code} {why}");
        assert_eq!((veths(&host), pods(&mut agent)), (4, 4));
        let runtime = Runtime::new(&agent);
        let last: std::net::Ipv4Addr = given[3].parse()?;
        let last = std::net::Ipv4Addr::from(u32::from(last) + 1).to_string();
        let fixed = json!({ "runtimeConfig": { "ips": [last] } });
        let (code, why) = runtime.refused("ADD", "e", &fixed);
        assert!(code == 101 && why.contains("reserved for the agent's own pod"), "{code} {why}");
        runtime.del("c");
        assert_eq!(address(&runtime.add("e")), given[2]);
        Ok(())
    });
}

#[test]
fn overlay_with_mtu_below_ipv6_minimum_connects_ipv4_pods() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init", "--mtu", "1200"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let space = NetNs::new("a")?;
        let added = Runtime::new(&agent).add("a");
        let gateway = added["ips"][0]["gateway"].as_str().expect("a gateway");
        tool(&space, &format!("ping -c 1 -W 2 -M do -s 1172 {gateway}"));
        Ok(())
    });
}

//! Containers connected by the netavark plugin, called as Podman and netavark call it. Results are
//! checked with `ip` and `ping`.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use gossamer::lab::{Agent, NetNs};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    cni::{namespaces, pods, veths},
    common::{Cluster, TIMEOUT, eventually, isolated, program, run, skipped, tool, wait_until},
};

/// Installs the plugin into a directory. Returns its path, and the output of the command.
fn install(dir: &Path, more: &[&str]) -> (PathBuf, String) {
    let mut command = Command::new(program());
    let output = command.args(["podman", "install", "--dir"]).arg(dir).args(more).output();
    let output = output.expect("gossamer runs");
    assert!(output.status.success(), "{output:?}");
    (dir.join("gossamer"), String::from_utf8(output.stdout).expect("UTF-8"))
}

/// Calls a plugin once.
fn call(mut plugin: Command, arguments: &[&str], input: &[u8]) -> Output {
    plugin.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = plugin.spawn().expect("the plugin starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    // The plugin may end without reading all of its input.
    let _ = stdin.write_all(input);
    drop(stdin);
    child.wait_with_output().expect("the plugin ends")
}

fn answer(output: &Output) -> Value {
    match output.stdout.as_slice() {
        [] => Value::Null,
        text => serde_json::from_slice(text).expect("JSON"),
    }
}

/// Podman with netavark on one host, with one network.
pub struct Podman {
    plugin: PathBuf,
    network: Value,
}

impl Podman {
    /// Creates the network.
    pub fn new(agent: &Agent) -> Self {
        let plugin = PathBuf::from("/run/netavark/gossamer");
        if !plugin.exists() {
            install(Path::new("/run/netavark"), &[]);
        }
        let asked = json!({
            "name": "web", "id": "d5d6", "driver": "gossamer", "created": "0001-01-01T00:00:00Z",
            "ipv6_enabled": false, "internal": false, "dns_enabled": true,
            "options": { "socket": agent.socket() },
        });
        let output = call(Command::new(&plugin), &["create"], asked.to_string().as_bytes());
        let network = answer(&output);
        assert!(output.status.success(), "{network}");
        Self { plugin, network }
    }

    fn request(&self, container: &str, options: &Value) -> Value {
        let mut request = json!({
            "container_id": container, "container_name": container, "port_mappings": null,
            "network": self.network,
            "network_options": {
                "aliases": [container], "interface_name": "eth0", "static_ips": null,
                "static_mac": null, "options": null,
            },
        });
        for (key, value) in options.as_object().expect("an object") {
            request["network_options"][key] = value.clone();
        }
        request
    }

    fn call(&self, verb: &str, container: &str, options: &Value) -> Output {
        let netns = format!("/run/netns/{container}");
        let request = self.request(container, options).to_string();
        call(Command::new(&self.plugin), &[verb, &netns], request.as_bytes())
    }

    pub fn set_up(&self, container: &str, options: &Value) -> Value {
        let output = self.call("setup", container, options);
        assert!(output.status.success(), "{}", answer(&output));
        answer(&output)
    }

    fn refused(&self, container: &str, options: &Value) -> String {
        let output = self.call("setup", container, options);
        let said = answer(&output);
        assert!(!output.status.success(), "it should have failed: {said}");
        // Podman reads no other fields.
        assert_eq!(said.as_object().map(serde_json::Map::len), Some(1), "{said}");
        said["error"].as_str().expect("a text").to_owned()
    }

    fn tear_down(&self, container: &str) {
        let output = self.call("teardown", container, &json!({}));
        assert!(output.status.success() && output.stdout.is_empty(), "{}", answer(&output));
    }
}

#[test]
fn invalid_calls_return_errors_in_netavarks_format() {
    isolated(|_| {
        let (plugin, _) = install(Path::new("/run/netavark"), &[]);
        let refused = |output: Output, call: &str| {
            let said = answer(&output);
            assert_eq!(output.status.code(), Some(1), "{call}: {said}");
            assert_eq!(said.as_object().map(serde_json::Map::len), Some(1), "{call}: {said}");
            said["error"].as_str().expect("a text").to_owned()
        };
        for (call_of, words) in [
            ("setup", "setup takes one argument"),
            ("setup /run/netns/a /run/netns/b", "was given 2"),
            ("teardown", "teardown takes one argument"),
            ("teardown a b c", "was given 3"),
            ("create web", "create takes no argument"),
            ("info --json", "info takes no argument"),
            ("update /run/netns/a", "\"update\""),
            ("update", "info, create, setup or teardown"),
            ("", "info, create, setup or teardown"),
            // Nothing on standard input.
            ("create", "stdin"),
            ("setup /run/netns/a", "stdin"),
            ("teardown /run/netns/a", "stdin"),
        ] {
            let arguments: Vec<&str> = call_of.split_whitespace().collect();
            let said = refused(call(Command::new(&plugin), &arguments, b""), call_of);
            assert!(said.contains(words), "{call_of}: {said}");
        }
        // A directory, and a file that was opened for writing only.
        for input in [File::open("/")?, File::create("/run/written")?] {
            for arguments in [&["create"][..], &["setup", "/run/netns/a"], &["teardown", "a"]] {
                let mut command = Command::new(&plugin);
                let output = command.args(arguments).stdin(input.try_clone()?).output()?;
                let said = refused(output, arguments[0]);
                assert!(said.contains("stdin"), "{said}");
            }
        }
        Ok(())
    });
}

/// Returns the address of `eth0`, without the prefix length.
pub fn address(status: &Value) -> String {
    let ipnet = status["interfaces"]["eth0"]["subnets"][0]["ipnet"].as_str().expect("an address");
    ipnet.split('/').next().expect("an address").to_owned()
}

#[test]
fn netavark_containers_on_two_hosts_exchange_full_size_packets() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let spaces = namespaces(&["one", "two"])?;
        let podmans: Vec<Podman> = cluster.agents.iter().map(Podman::new).collect();
        assert_eq!(podmans[0].network["subnets"], json!([{ "subnet": "10.42.0.0/16" }]));
        let none = json!({});
        let [first, second] = [podmans[0].set_up("one", &none), podmans[1].set_up("two", &none)];
        let shown = tool(&spaces[0], "ip addr show dev eth0");
        let mac = first["interfaces"]["eth0"]["mac_address"].as_str().expect("a MAC");
        assert!(shown.contains(mac) && shown.contains(&address(&first)), "{shown}");
        assert!(shown.contains("mtu 1450"), "{shown}");
        let gateway = first["interfaces"]["eth0"]["subnets"][0]["gateway"].as_str();
        let routes = tool(&spaces[0], "ip route show default");
        assert!(routes.contains(gateway.expect("a gateway")), "{routes}");
        assert_eq!(first["dns_server_ips"], json!([]));
        for (from, to) in [(&spaces[0], &second), (&spaces[1], &first)] {
            tool(from, &format!("ping -c 2 -i 0.2 -W 2 -M do -s 1422 {}", address(to)));
        }
        let listed = cluster.agents[0].ask("/v1/pods", TIMEOUT)?;
        assert_eq!(listed["pods"][0]["owner"], "podman/web");
        // Teardown is idempotent.
        podmans[0].tear_down("one");
        podmans[0].tear_down("one");
        eventually(&spaces[0], "ip -o link", |links| !links.contains("eth0"));
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        Ok(())
    });
}

#[test]
fn requested_addresses_macs_and_names_are_assigned_or_rejected() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b"])?;
        let podman = Podman::new(&cluster.agents[0]);
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        let place = |n: usize| subnet.hosts().nth(n).expect("an address").to_string();
        let asked = json!({
            "static_ips": [place(50)], "static_mac": "02:00:00:00:00:33", "interface_name": "net5",
        });
        let given = podman.set_up("a", &asked);
        let wanted = json!({ "net5": {
            "mac_address": "02:00:00:00:00:33",
            "subnets": [{
                "ipnet": format!("{}/{}", place(50), subnet.prefix_len()), "gateway": place(0),
            }],
        }});
        assert_eq!(given["interfaces"], wanted);
        let shown = tool(&spaces[0], "ip addr show dev net5");
        assert!(shown.contains("02:00:00:00:00:33") && shown.contains(&place(50)), "{shown}");
        for (asked, word) in [
            (json!({ "static_ips": [place(50)] }), "has it"),
            (json!({ "static_ips": ["10.99.0.1"] }), "this node's subnet"),
            (json!({ "static_mac": "02:00:00:00:00:33" }), "02:00:00:00:00:33"),
            (json!({ "static_mac": "01:00:5e:00:00:01" }), "01:00:5e:00:00:01"),
            (json!({ "static_mac": "00:00:00:00:00:00" }), "00:00:00:00:00:00"),
            // The gateway's MAC.
            (json!({ "static_mac": "0a:58:0a:2a:01:01" }), "0a:58"),
            (json!({ "static_mac": "02:00" }), "02:00"),
            (json!({ "interface_name": "a/b" }), "interface name"),
            (json!({ "interface_name": "lo" }), "already"),
        ] {
            let error = podman.refused("b", &asked);
            assert!(error.contains(word), "{asked}: {error}");
        }
        // Setup rejects this name, so there is nothing to tear down.
        let never = podman.call("teardown", "b", &json!({ "interface_name": "all" }));
        assert!(never.status.success(), "{}", answer(&never));
        assert_eq!((pods(&mut cluster.agents[0]), veths(&cluster.hosts[0])), (1, 1));

        // As `podman network reload` does: the same address and MAC again.
        let output = podman.call("teardown", "a", &asked);
        assert!(output.status.success(), "{}", answer(&output));
        assert_eq!(podman.set_up("a", &asked)["interfaces"], wanted);
        let b = podman.set_up("b", &json!({}));
        podman.tear_down("b");
        let again = json!({
            "static_ips": [address(&b)], "static_mac": b["interfaces"]["eth0"]["mac_address"],
        });
        assert_eq!(podman.set_up("b", &again), b);

        // A restarted agent accepts the MAC that was assigned before its restart.
        cluster.agents[0].end(Signal::SIGKILL)?;
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        cluster.converge()?;
        for _ in 0..2 {
            tool(&spaces[0], &format!("ping -c 1 -W 2 {}", address(&b)));
            // A deleted table is re-created from the restarted agent's own knowledge.
            run(&cluster.hosts[0].netns, "nft delete table bridge gossamer.1");
            eventually(&cluster.hosts[0].netns, "nft list table bridge gossamer.1", |table| {
                table.contains("02:00:00:00:00:33")
            });
        }
        Ok(())
    });
}

#[test]
fn container_in_several_networks_keeps_the_default_route_of_the_others() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 2)?;
        let spaces = namespaces(&["before", "after", "peer"])?;
        let podmans: Vec<Podman> = cluster.agents.iter().map(Podman::new).collect();
        let none = json!({});
        let other = |space: &NetNs| {
            for command in [
                "ip link add other type bridge",
                "ip addr add 10.88.0.2/16 dev other",
                "ip link set other up",
                // As netavark does it.
                "ip route add default via 10.88.0.1 dev other metric 100",
            ] {
                tool(space, command);
            }
        };
        other(&spaces[0]);
        let peer = podmans[1].set_up("peer", &none);
        for (space, name) in spaces.iter().zip(["before", "after"]) {
            let given = podmans[0].set_up(name, &none);
            if name == "after" {
                other(space);
            }
            let route = tool(space, "ip route get 192.0.2.1");
            assert!(route.contains("dev other"), "{name}: {route}");
            for (from, to) in [(space, &peer), (&spaces[2], &given)] {
                tool(from, &format!("ping -c 1 -W 2 {}", address(to)));
            }
            // A second network of the overlay does no harm.
            let before = tool(space, "ip route show default");
            let second = podmans[0].set_up(name, &json!({ "interface_name": "eth1" }));
            assert!(second["interfaces"]["eth1"].is_object(), "{second}");
            assert_eq!(tool(space, "ip route show default"), before);
            tool(space, &format!("ping -c 1 -W 2 {}", address(&peer)));
            // After the first network is disconnected, the routes of the second one suffice.
            podmans[0].tear_down(name);
            let overlay = || tool(space, "ip route show 10.42.0.0/16");
            wait_until("eth1 has its routes", TIMEOUT, || overlay().contains("dev eth1"));
            let default = tool(space, "ip route show default metric 200");
            assert!(default.contains("dev eth1"), "{name}: {default}");
            tool(space, &format!("ping -c 1 -W 2 {}", address(&peer)));
        }
        Ok(())
    });
}

#[test]
fn dual_stack_netavark_container_has_both_addresses() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        if !run(&host.netns, "ip -6 route").status.success()
            || !Path::new("/proc/sys/net/ipv6").exists()
        {
            skipped("dual_stack_netavark_container_has_both_addresses", "the kernel has no IPv6");
            return Ok(());
        }
        let mut agent = Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let podman = Podman::new(&agent);
        let both = json!([{ "subnet": "10.42.0.0/16" }, { "subnet": "fd42::/48" }]);
        assert_eq!(
            (&podman.network["subnets"], &podman.network["ipv6_enabled"]),
            (&both, &true.into())
        );
        let space = NetNs::new("a")?;
        let given = podman.set_up("a", &json!({}));
        let subnets = given["interfaces"]["eth0"]["subnets"].as_array().expect("a list");
        assert_eq!(subnets.len(), 2, "{given}");
        for subnet in subnets {
            let gateway = subnet["gateway"].as_str().expect("a gateway");
            eventually(&space, &format!("ping -c 1 -W 2 {gateway}"), |said| {
                said.contains(" 1 received")
            });
        }
        let route = tool(&space, "ip -6 route show default");
        assert!(route.contains("metric 200"), "{route}");
        Ok(())
    });
}

#[test]
fn container_ended_without_teardown_starts_again() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let space = NetNs::new("a")?;
        let podman = Podman::new(&cluster.agents[0]);
        podman.set_up("a", &json!({}));
        // The namespace is gone with its veth pair, and there is a new one of the same name.
        tool(&cluster.hosts[0].netns, "ip netns del a");
        drop(space);
        let space = NetNs::new("a")?;
        let given = podman.set_up("a", &json!({}));
        let shown = tool(&space, "ip addr show dev eth0");
        assert!(shown.contains(&address(&given)), "{shown}");
        assert_eq!(pods(&mut cluster.agents[0]), 1);
        wait_until("one veth pair is left", TIMEOUT, || veths(&cluster.hosts[0]) == 1);
        Ok(())
    });
}

#[test]
fn container_ended_without_an_agent_releases_its_address_later() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _spaces = namespaces(&["a", "b"])?;
        let podman = Podman::new(&cluster.agents[0]);
        ["a", "b"].iter().for_each(|name| _ = podman.set_up(name, &json!({})));
        cluster.agents[0].end(Signal::SIGKILL)?;
        podman.tear_down("a");
        podman.tear_down("a");
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        cluster.converge()?;
        wait_until("one pod is left", TIMEOUT, || pods(&mut cluster.agents[0]) == 1);
        wait_until("one veth pair is left", TIMEOUT, || veths(&cluster.hosts[0]) == 1);
        let left = cluster.agents[0].ask("/v1/pods", TIMEOUT)?;
        assert_eq!(left["pods"][0]["container"], "b");
        Ok(())
    });
}

#[test]
fn published_ports_cause_a_notice_but_no_error() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let _space = NetNs::new("a")?;
        let podman = Podman::new(&cluster.agents[0]);
        let mut request = podman.request("a", &json!({}));
        request["port_mappings"] = json!([{
            "container_port": 80, "host_ip": "", "host_port": 8080, "protocol": "tcp", "range": 1,
        }]);
        let plugin = Command::new(&podman.plugin);
        let output = call(plugin, &["setup", "/run/netns/a"], request.to_string().as_bytes());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && said.contains("publishes no ports"), "{output:?}");
        Ok(())
    });
}

#[test]
fn unsupported_networks_are_rejected_in_podmans_format() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let podman = Podman::new(&cluster.agents[0]);
        let error = podman.refused("nowhere", &json!({}));
        assert!(error.contains("/run/netns/nowhere"), "{error}");
        let create = |asked: Value| {
            let plugin = Command::new(&podman.plugin);
            let output = call(plugin, &["create"], asked.to_string().as_bytes());
            assert!(!output.status.success(), "{output:?}");
            answer(&output)["error"].as_str().expect("a text").to_owned()
        };
        let mut asked = podman.network.clone();
        asked["internal"] = true.into();
        assert!(create(asked).contains("--internal"));
        for input in ["", "{", "[]", "{}", "null", &"[".repeat(100_000)] {
            for verb in [&["create"][..], &["setup", "/run/netns/a"], &["teardown", "/run/netns/a"]]
            {
                let output = call(Command::new(&podman.plugin), verb, input.as_bytes());
                assert!(
                    !output.status.success() && answer(&output)["error"].is_string(),
                    "{output:?}"
                );
            }
        }
        // An endless request is not read to its end.
        let endless =
            Command::new(&podman.plugin).arg("create").stdin(File::open("/dev/zero")?).output()?;
        assert!(answer(&endless)["error"].is_string(), "{endless:?}");

        cluster.agents[0].end(Signal::SIGKILL)?;
        let _space = NetNs::new("a")?;
        for error in [podman.refused("a", &json!({})), create(podman.network.clone())] {
            assert!(error.contains("agent"), "{error}");
        }
        Ok(())
    });
}

#[test]
fn rootless_podman_gets_the_reason_and_a_remedy() {
    let plugin = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user"]).arg(program());
        command
    };
    if !plugin().arg("version").output().is_ok_and(|output| output.status.success()) {
        return skipped(
            "rootless_podman_gets_the_reason_and_a_remedy",
            "unshare --user is not allowed here",
        );
    }
    let asked = json!({ "name": "web", "options": { "socket": "/nowhere/gossamer.sock" } });
    let output = call(plugin(), &["create"], asked.to_string().as_bytes());
    let said = answer(&output);
    let error = said["error"].as_str().expect("a text");
    assert!(error.contains("rootless") && error.contains("as root"), "{error}");
}

#[test]
fn netavark_plugin_is_installed_and_still_runs_gossamers_commands() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path().join("netavark");
    for _ in 0..2 {
        let (plugin, said) = install(&dir, &[]);
        // Podman before 5 knows no drivers.
        let next = ["podman network create --driver gossamer", "next: update Podman"];
        assert!(next.iter().any(|next| said.contains(next)), "{said}");
        // Podman does not know this directory.
        assert!(said.contains("netavark_plugin_dirs"), "{said}");
        assert_eq!(std::fs::canonicalize(plugin).expect("a link"), program());
    }
    let (plugin, _) = install(&dir, &["--copy"]);
    let copied = std::fs::symlink_metadata(&plugin).expect("there");
    assert!(copied.file_type().is_file(), "{copied:?}");
    let run = |arguments: &[&str]| {
        Command::new(&plugin).args(arguments).stdin(Stdio::null()).output().expect("it runs")
    };
    let info = answer(&run(&["info"]));
    assert_eq!(info["api_version"], "1.0.0");
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    for command in [&["version"][..], &["podman", "--help"], &["--version"]] {
        let output = run(command);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains("gossamer"), "{output:?}");
    }
}

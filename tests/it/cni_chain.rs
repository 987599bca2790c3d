//! Other plugins chained behind gossamer, and gossamer as `loopback`. Results are checked with packets
//! and kernel tools.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use gossamer::lab::{NetNs, PLUGINS, PluginResult, call_plugin};
use serde_json::{Value, json};

use crate::{
    cni::{Runtime, address, invoke, namespaces, pods},
    common::{Cluster, isolated, program, run, skipped, tool},
};

const VERSION: &str = "1.0.0";

/// A list of plugins on a host, called as a runtime calls it.
struct List<'a> {
    runtime: Runtime<'a>,
    host: &'a NetNs,
    behind: Value,
}

impl<'a> List<'a> {
    fn new(cluster: &'a Cluster, behind: Value) -> Self {
        let runtime = Runtime::new(&cluster.agents[0]);
        Self { runtime, host: &cluster.hosts[0].netns, behind }
    }

    fn call_behind(&self, verb: &str, container: &str, previous: &Value) -> (bool, Value) {
        let mut config = json!({ "cniVersion": VERSION, "name": "pods", "prevResult": previous });
        for (key, value) in self.behind.as_object().expect("an object") {
            config[key] = value.clone();
        }
        let plugin = Path::new(PLUGINS).join(self.behind["type"].as_str().expect("a type"));
        let called = call_plugin(&plugin, self.host, &config, verb, container);
        let PluginResult { succeeded, output, .. } = called.expect("the plugin runs");
        (succeeded, output)
    }

    /// Calls ADD in order; returns both results.
    fn add(&self, container: &str, more: &Value) -> (Value, Result<Value, Value>) {
        let mut config = more.clone();
        config["cniVersion"] = VERSION.into();
        let (done, first) = self.runtime.call("ADD", container, &config);
        assert!(done, "{first}");
        let (done, last) = self.call_behind("ADD", container, &first);
        (first, if done { Ok(last) } else { Err(last) })
    }

    /// Calls DEL in reverse order.
    fn del(&self, container: &str, result: &Value) {
        let (done, said) = self.call_behind("DEL", container, result);
        assert!(done, "{said}");
        let more = json!({ "cniVersion": VERSION, "prevResult": result });
        let (done, said) = self.runtime.call("DEL", container, &more);
        assert!(done, "{said}");
    }

    fn check(&self, container: &str, result: &Value) -> (bool, Value) {
        let more = json!({ "cniVersion": VERSION, "prevResult": result });
        self.runtime.call("CHECK", container, &more)
    }
}

/// Returns why a test cannot run, if a plugin is missing.
fn missing(plugin: &str) -> Option<String> {
    let path = Path::new(PLUGINS).join(plugin);
    (!path.exists()).then(|| format!("{} is not installed", path.display()))
}

/// Connects from a namespace to an address behind which a pod listens, and sends a greeting.
fn send_greeting(from: &NetNs, to: SocketAddr, pod: &NetNs, port: u16) -> anyhow::Result<()> {
    let listener = pod.run(|| TcpListener::bind(("0.0.0.0", port)))?;
    let received = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    });
    from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))?.write_all(b"hello"))?;
    assert_eq!(received.join().expect("a thread")?, "hello");
    Ok(())
}

#[test]
fn portmap_plugin_publishes_a_pods_port_to_other_hosts() {
    if let Some(why) = missing("portmap") {
        return skipped("cni_chain::portmap_plugin_publishes_a_pods_port_to_other_hosts", &why);
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let spaces = namespaces(&["a"])?;
        let mappings = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }]);
        let behind = json!({ "type": "portmap", "runtimeConfig": { "portMappings": mappings } });
        let list = List::new(&cluster, behind);
        // A runtime passes the mappings to each plugin that declares the capability.
        let more = json!({ "runtimeConfig": { "portMappings": mappings } });
        let (_, result) = list.add("a", &more);
        let result = result.expect("a published port");
        let published = SocketAddr::new(cluster.hosts[0].ip.into(), 8080);
        send_greeting(&cluster.hosts[1].netns, published, &spaces[0], 80)?;
        assert!(list.check("a", &result).0);
        list.del("a", &result);
        let rules = tool(list.host, "iptables -t nat -S");
        assert!(!rules.contains("8080"), "{rules}");
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        Ok(())
    });
}

#[test]
fn firewall_plugin_admits_pod_packets_through_a_dropping_chain() {
    if let Some(why) = missing("firewall") {
        return skipped(
            "cni_chain::firewall_plugin_admits_pod_packets_through_a_dropping_chain",
            &why,
        );
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let spaces = namespaces(&["a", "b"])?;
        let there = Runtime::new(&cluster.agents[1]).add("b");
        let list = List::new(&cluster, json!({ "type": "firewall", "backend": "iptables" }));
        let (first, result) = list.add("a", &json!({}));
        let result = result.expect("a firewall");
        tool(list.host, "iptables -P FORWARD DROP");
        let rules = tool(list.host, "iptables -S CNI-FORWARD");
        assert!(rules.contains(&address(&first)), "{rules}");
        tool(&spaces[0], &format!("ping -c 1 -W 2 {}", address(&there)));
        assert!(list.check("a", &result).0);
        list.del("a", &result);
        let rules = tool(list.host, "iptables -S CNI-FORWARD");
        assert!(!rules.contains(&address(&first)), "{rules}");
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        Ok(())
    });
}

#[test]
fn bandwidth_plugin_finds_the_pods_veth_and_limits_its_rate() {
    if let Some(why) = missing("bandwidth") {
        return skipped(
            "cni_chain::bandwidth_plugin_finds_the_pods_veth_and_limits_its_rate",
            &why,
        );
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a"])?;
        let rate = json!({ "ingressRate": 8_000_000, "ingressBurst": 8_000_000 });
        let behind = json!({ "type": "bandwidth", "runtimeConfig": { "bandwidth": rate } });
        let list = List::new(&cluster, behind);
        let (first, result) = list.add("a", &json!({}));
        let result = match result {
            Ok(result) => result,
            // The plugin needs sch_tbf in the kernel.
            Err(why)
                if run(
                    list.host,
                    "tc qdisc add dev lo root tbf rate 8mbit burst 8k latency 1s",
                )
                .status
                .success() =>
            {
                panic!("{why}")
            }
            Err(why) => {
                skipped(
                    "cni_chain::bandwidth_plugin_finds_the_pods_veth_and_limits_its_rate",
                    &why.to_string(),
                );
                return Ok(());
            }
        };
        let veth = first["interfaces"][1]["name"].as_str().expect("a name");
        let shown = tool(list.host, &format!("tc qdisc show dev {veth}"));
        assert!(shown.contains("tbf") && shown.contains("8Mbit"), "{shown}");
        let gateway = first["ips"][0]["gateway"].as_str().expect("a gateway");
        tool(&spaces[0], &format!("ping -c 1 -W 2 {gateway}"));
        assert!(list.check("a", &result).0);
        list.del("a", &result);
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        Ok(())
    });
}

#[test]
fn tuning_plugin_sets_sysctls_but_its_mac_fails_check() {
    if let Some(why) = missing("tuning") {
        return skipped("cni_chain::tuning_plugin_sets_sysctls_but_its_mac_fails_check", &why);
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b"])?;
        let data = cluster.hosts[0].dir.join("tuning");
        let tuning = |more: Value| {
            let mut config = json!({ "type": "tuning", "dataDir": data });
            for (key, value) in more.as_object().expect("an object") {
                config[key] = value.clone();
            }
            config
        };
        let sysctl = json!({ "net.ipv4.conf.eth0.arp_filter": "1" });
        let list = List::new(&cluster, tuning(json!({ "sysctl": sysctl, "mtu": 1400 })));
        let mac = "02:00:00:00:00:07";
        let (first, result) = list.add("a", &json!({ "runtimeConfig": { "mac": mac } }));
        let result = result.expect("tuned");
        let shown = tool(&spaces[0], "ip link show dev eth0");
        assert!(shown.contains("mtu 1400") && shown.contains(mac), "{shown}");
        let shown = tool(&spaces[0], "cat /proc/sys/net/ipv4/conf/eth0/arp_filter");
        assert_eq!(shown.trim(), "1");
        let gateway = first["ips"][0]["gateway"].as_str().expect("a gateway").to_owned();
        tool(&spaces[0], &format!("ping -c 1 -W 2 {gateway}"));
        assert!(list.check("a", &result).0);
        list.del("a", &result);

        // gossamer's anti-spoofing does not know a MAC that another plugin sets; CHECK reports it.
        let other = List::new(&cluster, tuning(json!({ "mac": "02:00:00:00:00:08" })));
        let (_, result) = other.add("b", &json!({}));
        let result = result.expect("tuned");
        assert!(!run(&spaces[1], &format!("ping -c 1 -W 1 {gateway}")).status.success());
        let (whole, why) = other.check("b", &result);
        assert!(
            !whole && why["msg"].as_str().is_some_and(|why| why.contains("capability mac")),
            "{why}"
        );
        other.del("b", &result);
        cluster.restart(0, &["--anti-spoofing", "false"])?;
        let other = List::new(&cluster, tuning(json!({ "mac": "02:00:00:00:00:08" })));
        let (_, result) = other.add("b", &json!({}));
        let result = result.expect("tuned");
        tool(&spaces[1], &format!("ping -c 1 -W 2 {gateway}"));
        assert!(other.check("b", &result).0);
        other.del("b", &result);
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        Ok(())
    });
}

/// Creates a link to the program under the name `loopback`.
fn loopback(dir: &Path) -> PathBuf {
    let path = dir.join("loopback");
    symlink(program(), &path).expect("a link");
    path
}

#[test]
fn program_called_loopback_sets_up_lo_without_an_agent() {
    isolated(|_| {
        let dir = tempfile::tempdir()?;
        let plugin = loopback(dir.path());
        let space = NetNs::new("a")?;
        let call = |verb: &str, netns: &str, config: &Value| {
            let variables = [
                ("CNI_COMMAND", verb),
                ("CNI_CONTAINERID", "a"),
                ("CNI_NETNS", netns),
                ("CNI_IFNAME", "lo"),
                ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=a"),
            ];
            invoke(&plugin, &variables, &config.to_string())
        };
        for version in ["0.1.0", "0.3.1", "1.0.0", "1.1.0"] {
            let config =
                json!({ "cniVersion": version, "name": "cni-loopback", "type": "loopback" });
            tool(&space, "ip link set lo down");
            if version.starts_with('1') {
                let (whole, why) = call("CHECK", "/run/netns/a", &config);
                assert!(!whole && why["code"] == 5, "{why}");
            }
            let (done, result) = call("ADD", "/run/netns/a", &config);
            assert!(done && result["cniVersion"] == version, "{result}");
            let text = result.to_string();
            assert!(text.contains("127.0.0.1/8"), "{text}");
            assert_eq!(result["interfaces"].is_array(), version != "0.1.0");
            tool(&space, "ping -c 1 -W 2 127.0.0.1");
            if version.starts_with('1') {
                let (whole, why) = call("CHECK", "/run/netns/a", &config);
                assert!(whole, "{why}");
            }
            let mut chained = config.clone();
            chained["prevResult"] = json!({ "cniVersion": version, "ips": [], "dns": {} });
            let (done, result) = call("ADD", "/run/netns/a", &chained);
            assert!(done && result == chained["prevResult"], "{result}");
            for netns in ["/run/netns/a", "/run/netns/nowhere", ""] {
                let (done, said) = call("DEL", netns, &config);
                assert!(done && said.is_null(), "{said}");
            }
        }
        let config = json!({ "cniVersion": "1.1.0", "name": "cni-loopback", "type": "loopback" });
        assert!(call("STATUS", "", &config).0);
        for netns in ["/proc/self/ns/net", "/run/netns/nowhere", "/etc/passwd"] {
            let (done, error) = call("ADD", netns, &config);
            assert!(!done && error["code"] == 4, "{netns}: {error}");
        }
        Ok(())
    });
}

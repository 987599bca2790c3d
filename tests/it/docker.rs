//! Docker's network plugin: with the requests that Docker sends, and with real dockerds.

use std::path::Path;

use gossamer::{
    api::{self, ClientError},
    lab::{Agent, NetNs},
    runtime,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    cni::Runtime,
    common::{
        Cluster, TIMEOUT, client, eventually, isolated, program, resume, skipped, suspend, tool,
    },
    docker_plugin::{Plugin, endpoint},
    dockerd::{BUSYBOX, DOCKERD, Dockerd},
};

/// Ends the agent of a host, and starts it again with the plugin.
pub fn serve(cluster: &mut Cluster, number: usize, end: Signal) -> anyhow::Result<()> {
    cluster.agents[number].end(end)?;
    let plugins = cluster.hosts[number].dir.join("plugins");
    let plugins = plugins.to_str().expect("a path").to_owned();
    let host = &cluster.hosts[number];
    cluster.agents[number] = Agent::start(program(), host, &["--docker-plugin", &plugins])?;
    cluster.converge()
}

fn pods(agent: &mut Agent) -> Vec<Value> {
    let answer = agent.ask("/v1/pods", TIMEOUT).expect("pods");
    answer["pods"].as_array().expect("a list").clone()
}

#[test]
fn docker_requests_are_answered_and_survive_a_killed_agent() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        serve(&mut cluster, 0, Signal::SIGTERM)?;
        let plugin = Plugin::on(&cluster.hosts[0]);
        let drivers = plugin.done("Plugin.Activate", &Value::Null);
        assert_eq!(drivers["Implements"], json!(["NetworkDriver", "IpamDriver"]));
        let pool = plugin.done("IpamDriver.RequestPool", &json!({ "Pool": "" }))["PoolID"].clone();
        let network = |pool: &Value| json!({ "NetworkID": "n", "IPv4Data": [{ "Pool": pool }] });
        plugin.done("NetworkDriver.CreateNetwork", &network(&pool));
        let gateway = json!({ "RequestAddressType": "com.docker.network.gateway" });
        let gateway = json!({ "PoolID": pool, "Options": gateway });
        let gateway = plugin.done("IpamDriver.RequestAddress", &gateway)["Address"].clone();
        assert!(gateway.as_str().is_some_and(|text| text.ends_with(".1/24")), "{gateway}");

        let first = plugin.address(&pool, "02:42:00:00:00:01");
        // Requested again, because the answer may have been lost.
        assert_eq!(plugin.address(&pool, "02:42:00:00:00:01"), first);
        let second = plugin.address(&pool, "02:42:00:00:00:02");
        assert_ne!(first, second);
        for _ in 0..2 {
            let made = plugin.done("NetworkDriver.CreateEndpoint", &endpoint("e1", &first));
            assert_eq!(made["Interface"], json!({}), "Docker has given all of it itself");
        }
        // Between two steps, and as after a power cut.
        serve(&mut cluster, 0, Signal::SIGKILL)?;
        let join = json!({ "NetworkID": "n", "EndpointID": "e1", "SandboxKey": "/sandbox" });
        let joined = plugin.done("NetworkDriver.Join", &join);
        // Docker sends the MAC before the agent ends; the agent cannot read it from the namespace.
        let entry_of_first = format!(". 02:42:00:00:00:01 . {}", first.trim_end_matches("/24"));
        let allowed = tool(&cluster.hosts[0].netns, "nft list table bridge gossamer.1");
        assert!(allowed.contains(&entry_of_first), "{allowed}");
        let via = gateway.as_str().and_then(|text| text.split('/').next());
        assert_eq!(
            joined["StaticRoutes"],
            json!([{ "Destination": "10.42.0.0/16", "RouteType": 0, "NextHop": via }])
        );
        let name = joined["InterfaceName"]["SrcName"].as_str().expect("a name");
        let host = &cluster.hosts[0].netns;
        let shown = tool(host, &format!("ip link show {name}"));
        assert!(shown.contains("mtu 1450"), "{shown}");
        assert_eq!(pods(&mut cluster.agents[0]).len(), 2);
        // A container with the MAC that Docker has sent may use its own address only.
        plugin.done("NetworkDriver.CreateEndpoint", &endpoint("e2", &second));
        let other = json!({ "NetworkID": "n", "EndpointID": "e2", "SandboxKey": "/sandbox2" });
        plugin.done("NetworkDriver.Join", &other);
        let entry_of_second = format!(". 02:42:00:00:00:02 . {}", second.trim_end_matches("/24"));
        let allowed = || tool(&cluster.hosts[0].netns, "nft list table bridge gossamer.1");
        assert!(allowed().contains(&entry_of_second), "{}", allowed());
        serve(&mut cluster, 0, Signal::SIGKILL)?;
        let host = &cluster.hosts[0].netns;
        let allowed = tool(host, "nft list table bridge gossamer.1");
        assert!(allowed.contains(&entry_of_second), "without its memory: {allowed}");
        plugin.done("NetworkDriver.Leave", &other);

        plugin.done("NetworkDriver.Leave", &join);
        for _ in 0..2 {
            plugin.done("NetworkDriver.DeleteEndpoint", &join);
            plugin.done("NetworkDriver.DeleteEndpoint", &other);
            for address in [&first, &second] {
                let ip = address.split('/').next();
                let request = json!({ "PoolID": pool, "Address": ip });
                plugin.done("IpamDriver.ReleaseAddress", &request);
            }
        }
        eventually(host, "ip -o link show type veth master gsm0", str::is_empty);
        assert!(pods(&mut cluster.agents[0]).is_empty());
        Ok(())
    });
}

#[test]
fn unsupported_docker_requests_are_rejected_without_changes() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        serve(&mut cluster, 0, Signal::SIGTERM)?;
        let plugin = Plugin::on(&cluster.hosts[0]);
        let pool = plugin.done("IpamDriver.RequestPool", &json!({ "Pool": "" }))["PoolID"].clone();
        let first = plugin.address(&pool, "02:42:00:00:00:01");
        let ip = first.split('/').next().expect("an address");
        plugin.done("NetworkDriver.CreateEndpoint", &endpoint("e1", &first));
        let foreign = json!({ "NetworkID": "n", "IPv4Data": [{ "Pool": "172.18.0.0/16" }] });
        let option = json!({ "com.docker.network.generic": { "speed": "fast" } });
        let option = json!({ "NetworkID": "n", "IPv4Data": [{ "Pool": pool }], "Options": option });
        let any = "10.42.99.0/24";
        let group = "01:00:5e:00:00:01";
        let of_group = json!({ "com.docker.network.endpoint.macaddress": group });
        // Docker sends null for absent values.
        let nulls = json!({
            "NetworkID": "n", "Options": null, "IPv4Data": [{ "Pool": pool }], "IPv6Data": null,
        });
        plugin.done("NetworkDriver.CreateNetwork", &nulls);
        plugin.done("NetworkDriver.CreateNetwork", &json!({ "IPv4Data": null }));
        plugin
            .done("IpamDriver.RequestPool", &json!({ "Pool": null, "Options": null, "V6": null }));
        plugin.done("NetworkDriver.Leave", &Value::Null);
        let cases = [
            ("NetworkDriver.CreateNetwork", foreign, "--ipam-driver gossamer"),
            ("NetworkDriver.CreateNetwork", option, "option speed=fast"),
            ("NetworkDriver.CreateEndpoint", endpoint("e2", "172.18.0.2/16"), "172.18.0.2"),
            ("NetworkDriver.CreateEndpoint", endpoint("e2", &first), "in use by endpoint e1"),
            ("NetworkDriver.CreateEndpoint", endpoint("e2", ""), "no address"),
            ("NetworkDriver.CreateEndpoint", endpoint("../e2", &first), "no address"),
            ("NetworkDriver.Join", json!({ "EndpointID": "e9" }), "endpoint e9"),
            ("NetworkDriver.Join", json!({ "EndpointID": "../e1" }), "../e1"),
            ("NetworkDriver.EndpointOperInfo", json!({ "EndpointID": "e9" }), "endpoint e9"),
            ("NetworkDriver.Join", json!({ "EndpointID": 9 }), "the request"),
            (
                "NetworkDriver.CreateEndpoint",
                json!({ "EndpointID": "e2", "Interface": { "Address": first, "MacAddress": group } }),
                "must be unicast",
            ),
            (
                "NetworkDriver.CreateEndpoint",
                json!({ "EndpointID": "e2", "Interface": { "Address": first, "MacAddress": "x" } }),
                "MacAddress",
            ),
            ("IpamDriver.RequestAddress", json!({ "PoolID": pool, "Options": of_group }), group),
            (
                "NetworkDriver.CreateNetwork",
                json!({ "IPv4Data": [{ "Pool": 7 }] }),
                "IPv4Data[0].Pool",
            ),
            ("IpamDriver.RequestPool", json!({ "Pool": any }), any),
            ("IpamDriver.RequestPool", json!({ "Pool": "ten" }), "ten"),
            (
                "IpamDriver.RequestPool",
                json!({ "Pool": pool, "SubPool": "10.42.1.0/28" }),
                "ip-range",
            ),
            ("IpamDriver.RequestPool", json!({ "Pool": pool, "V6": true }), "no IPv6"),
            (
                "IpamDriver.RequestPool",
                json!({ "Pool": pool, "Options": { "a": "b" } }),
                "ipam-opt a=b",
            ),
            ("IpamDriver.RequestAddress", json!({ "PoolID": any, "Address": ip }), any),
            ("IpamDriver.RequestAddress", json!({ "PoolID": pool, "Address": ip }), "has it"),
            (
                "IpamDriver.RequestAddress",
                json!({ "PoolID": pool, "Address": "10.42.1.999" }),
                "999",
            ),
        ];
        for (method, request, word) in cases {
            let why = plugin.refused(method, &request);
            // An invalid name is reported first.
            assert!(why.contains(word) || why.contains("endpoint id"), "{method}: {why}");
        }
        let unknown =
            runtime::block_on(api::post_json(&plugin.0, "/NetworkDriver.Fly", &Value::Null))?;
        assert!(matches!(unknown, Err(ClientError::Refused { .. })), "{unknown:?}");
        let pods = pods(&mut cluster.agents[0]);
        assert_eq!(pods.len(), 1, "{pods:?}");
        assert_eq!((&pods[0]["container"], &pods[0]["orphan"]), (&json!("e1"), &json!(false)));

        // A second network while containers exist: here Docker does not compare the pool with the host's
        // routes.
        plugin.done("NetworkDriver.Join", &json!({ "EndpointID": "e1", "SandboxKey": "/s" }));
        let again = plugin.done("IpamDriver.RequestPool", &json!({ "Pool": "" }));
        assert_eq!((&again["Pool"], &again["PoolID"]), (&json!("0.0.0.0/0"), &pool));
        // Docker would fail after the answer, and leave the container without routes.
        let second = plugin.address(&pool, "02:42:00:00:00:02");
        plugin.done("NetworkDriver.CreateEndpoint", &endpoint("e2", &second));
        let both = json!({ "EndpointID": "e2", "SandboxKey": "/s" });
        let why = plugin.refused("NetworkDriver.Join", &both);
        assert!(why.contains(ip) && why.contains("omit this network"), "{why}");
        plugin.done("NetworkDriver.Join", &json!({ "EndpointID": "e2", "SandboxKey": "/s2" }));
        Ok(())
    });
}

#[test]
fn mac_generated_by_docker_is_announced_to_neighbors_at_once() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        serve(&mut cluster, 0, Signal::SIGTERM)?;
        let neighbor = NetNs::new("neighbor")?;
        Runtime::new(&cluster.agents[0]).add("neighbor");
        let plugin = Plugin::on(&cluster.hosts[0]);
        let pool = plugin.done("IpamDriver.RequestPool", &json!({ "Pool": "" }))["PoolID"].clone();
        let mac = "02:42:00:00:00:01";
        let address = plugin.address(&pool, mac);
        let ip = address.trim_end_matches("/24");
        // A stale entry, as after a restart of the container.
        tool(&neighbor, &format!("ip neigh add {ip} dev eth0 lladdr 02:42:00:00:00:02 nud stale"));
        plugin.done("NetworkDriver.CreateEndpoint", &endpoint("e1", &address));
        let join = json!({ "NetworkID": "n", "EndpointID": "e1", "SandboxKey": "/sandbox" });
        plugin.done("NetworkDriver.Join", &join);
        let known = tool(&neighbor, &format!("ip neigh show {ip}"));
        assert!(known.contains(mac), "{known}");
        Ok(())
    });
}

#[test]
fn mac_of_another_pod_is_rejected_for_a_docker_container() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        serve(&mut cluster, 0, Signal::SIGTERM)?;
        let _space = NetNs::new("pod")?;
        let plugin = Plugin::on(&cluster.hosts[0]);
        let pool = plugin.done("IpamDriver.RequestPool", &json!({ "Pool": "" }))["PoolID"].clone();
        let of_pod = "02:00:00:00:00:05";
        let wish = json!({ "runtimeConfig": { "mac": of_pod } });
        let runtime = Runtime::new(&cluster.agents[0]);
        assert!(runtime.call("ADD", "pod", &wish).0);
        let of_docker = "02:42:00:00:00:01";
        let first = plugin.address(&pool, of_docker);
        plugin.done("NetworkDriver.CreateEndpoint", &endpoint("e1", &first));
        let ip: std::net::Ipv4Addr = first.trim_end_matches("/24").parse()?;
        let [a, b, c, _] = ip.octets();
        let of_gateway = format!("0a:58:{a:02x}:{b:02x}:{c:02x}:01");
        let ask = |mac: &str| {
            let options = json!({ "com.docker.network.endpoint.macaddress": mac });
            json!({ "PoolID": pool, "Address": "", "Options": options })
        };
        for (mac, word) in [
            (of_pod, "pod eth0 has it"),
            (of_docker, "e1 docker has it"),
            (of_gateway.as_str(), "follow from addresses"),
        ] {
            let why = plugin.refused("IpamDriver.RequestAddress", &ask(mac));
            assert!(why.contains(mac) && why.contains(word), "{mac}: {why}");
        }
        // Docker generates MACs with this prefix.
        plugin.address(&pool, "0a:58:de:ad:be:ef");
        plugin.done("NetworkDriver.DeleteEndpoint", &json!({ "EndpointID": "e1" }));
        plugin.address(&pool, of_docker);
        Ok(())
    });
}

#[test]
fn docker_request_waits_until_the_node_has_a_subnet() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        suspend(&cluster.agents[0])?;
        let plugins = host.dir.join("plugins").display().to_string();
        let mut late = cluster.start_agent(&host, &["--docker-plugin", &plugins])?;
        // It answers, but cannot join.
        late.ask("/v1/status", TIMEOUT)?;
        let plugin = Plugin::on(&host);
        let asked = std::thread::spawn(move || {
            let pool = plugin.done("IpamDriver.RequestPool", &json!({}))["PoolID"].clone();
            plugin.address(&pool, "02:42:00:00:00:01")
        });
        late.ask("/v1/status", TIMEOUT)?;
        assert!(!asked.is_finished());
        resume(&cluster.agents[0])?;
        let address = asked.join().expect("an address");
        assert!(address.starts_with("10.42."), "{address}");
        cluster.converge_with(&mut late, 2)
    });
}

#[test]
fn docker_containers_on_two_hosts_reach_each_other() {
    let missing = [DOCKERD, BUSYBOX].iter().find(|path| !Path::new(path).exists());
    if let Some(missing) = missing {
        return skipped("docker_containers_on_two_hosts_reach_each_other", missing);
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        (0..2).try_for_each(|number| serve(&mut cluster, number, Signal::SIGTERM))?;
        let mut docker: Vec<Dockerd> =
            cluster.hosts.iter().map(|host| Dockerd::start(host, "")).collect();
        for (docker, host) in docker.iter().zip(&cluster.hosts) {
            docker.import(host);
            docker.done("network create -d gossamer --ipam-driver gossamer web");
        }
        let start = |docker: &Dockerd, name: &str, command: &str| {
            let run = "run -d --stop-signal KILL --network web -p 80 --name";
            docker.done(&format!("{run} {name} box {command}"));
            docker.address(name)
        };
        let (one, two) =
            (start(&docker[0], "one", "sleep 600"), start(&docker[1], "two", "sleep 600"));
        assert_ne!(one, two);
        let ping = |docker: &Dockerd, from: &str, to: &str, size: &str| {
            docker.done(&format!("exec {from} ping -c 2 -W 2 -s {size} {to}"));
        };
        // The largest packets that fit (1450 bytes less IP and ICMP), between hosts; by name on one host;
        // the outside.
        ping(&docker[0], "one", &two, "1422");
        ping(&docker[1], "two", &one, "1422");
        let more = start(&docker[0], "more", "httpd -f -h /");
        ping(&docker[0], "one", "more", "56");
        ping(&docker[0], "one", "10.99.0.1", "56");
        // A published port.
        let published = docker[0].done("port more 80/tcp");
        let port = published.lines().next().and_then(|line| line.rsplit(':').next());
        let url = format!("http://{}:{}/etc/hosts", cluster.hosts[0].ip, port.expect("a port"));
        let fetch = format!("{BUSYBOX} wget -qO- {url}");
        eventually(&cluster.hosts[1].netns, &fetch, |text| text.contains("localhost"));

        // The agent is killed and restarted without loss. Then Docker restarts and finds its state again.
        kill(Pid::from_raw(cluster.agents[0].pid().cast_signed()), Signal::SIGKILL)?;
        ping(&docker[0], "one", &two, "1422");
        serve(&mut cluster, 0, Signal::SIGKILL)?;
        ping(&docker[1], "two", &one, "1422");
        drop(docker.remove(0));
        let docker_again = Dockerd::start(&cluster.hosts[0], "");
        docker_again.done("start one");
        let again = docker_again.address("one");
        ping(&docker_again, "one", &two, "1422");
        assert!(again != two && again != more, "{again}");
        docker_again.done("rm -f one more");
        docker_again.done("network rm web");
        let listed = client(&cluster.agents[0], &["pods"]);
        let listed = String::from_utf8(listed.stdout)?;
        assert!(!listed.contains("docker"), "{listed}");
        docker_again.done("network create -d gossamer --ipam-driver gossamer web");
        drop((docker_again, docker));
        Ok(())
    });
}

#[test]
fn docker_bridge_driver_uses_the_nodes_subnet() {
    if let Some(missing) = [DOCKERD, BUSYBOX].iter().find(|path| !Path::new(path).exists()) {
        return skipped("docker_bridge_driver_uses_the_nodes_subnet", missing);
    }
    isolated(|lab| {
        let cluster = Cluster::start(lab, 2)?;
        let mut dockerds = Vec::new();
        for host in &cluster.hosts {
            std::fs::create_dir_all(host.dir.join("plugins"))?;
            let mut gossamer = std::process::Command::new(program());
            gossamer.arg("docker-opts").arg("--subnet-file").arg(host.dir.join("subnet.env"));
            let options = String::from_utf8(gossamer.output()?.stdout)?;
            assert!(options.contains("--ip-masq=true --mtu=1450"), "{options}");
            let docker = Dockerd::start(host, &options);
            docker.import(host);
            docker.done("run -d --stop-signal KILL --name box box sleep 600");
            dockerds.push(docker);
        }
        let there = dockerds[1].address("box");
        dockerds[0].done(&format!("exec box ping -c 2 -W 2 -s 1422 {there}"));
        Ok(())
    });
}

#[test]
fn dual_stack_docker_container_has_the_same_place_in_both_pools() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let plugins = host.dir.join("plugins").display().to_string();
        let dual = ["--init", "--network6", "fd42::/48", "--docker-plugin", &plugins];
        let mut agent = Agent::start(program(), &host, &dual)?;
        agent.wait_converged(1, TIMEOUT)?;
        let plugin = Plugin::on(&host);
        let pool = |v6: bool| {
            let request = json!({ "Pool": "", "V6": v6 });
            plugin.done("IpamDriver.RequestPool", &request)["PoolID"].clone()
        };
        let pools = [pool(false), pool(true)];
        let mac = "02:42:00:00:00:07";
        let [first, second] = [0, 1].map(|family: usize| plugin.address(&pools[family], mac));
        assert!(first.ends_with(".2/24") && second.ends_with("::2/64"), "{first} {second}");
        let interface = json!({ "Address": first, "AddressIPv6": second });
        let endpoint = json!({ "EndpointID": "e1", "Interface": interface });
        plugin.done("NetworkDriver.CreateEndpoint", &endpoint);
        let sandbox = json!({ "EndpointID": "e1", "SandboxKey": "/s1" });
        let joined = plugin.done("NetworkDriver.Join", &sandbox);
        assert_eq!(joined["StaticRoutes"].as_array().map(Vec::len), Some(2), "{joined}");
        // A container with IPv4 alone must not get routes by a gateway that it cannot reach.
        let alone = plugin.address(&pools[0], "02:42:00:00:00:08");
        let interface = json!({ "Address": alone });
        let endpoint = json!({ "EndpointID": "e2", "Interface": interface });
        plugin.done("NetworkDriver.CreateEndpoint", &endpoint);
        let sandbox = json!({ "EndpointID": "e2", "SandboxKey": "/s2" });
        let joined = plugin.done("NetworkDriver.Join", &sandbox);
        assert_eq!(joined["StaticRoutes"].as_array().map(Vec::len), Some(1), "{joined}");
        // A container cannot have two places in the pools, and nothing of the refused request remains.
        let mac = json!({ "com.docker.network.endpoint.macaddress": "02:42:00:00:00:09" });
        let request =
            |pool: &Value, ip: &str| json!({ "PoolID": pool, "Address": ip, "Options": mac });
        plugin.done("IpamDriver.RequestAddress", &request(&pools[0], ""));
        let sixth = format!("{}9", second.trim_end_matches("2/64"));
        let why = plugin.refused("IpamDriver.RequestAddress", &request(&pools[1], &sixth));
        assert!(why.contains("--ip and --ip6"), "{why}");
        assert_eq!(pods(&mut agent).len(), 2);

        let release = |address: &str| {
            let ip = address.split('/').next();
            plugin.done("IpamDriver.ReleaseAddress", &json!({ "PoolID": "", "Address": ip }));
        };
        // A repeated release, when the address may already belong to another container.
        release(&alone);
        assert_eq!(pods(&mut agent).len(), 2);
        for endpoint in ["e1", "e2"] {
            plugin.done("NetworkDriver.DeleteEndpoint", &json!({ "EndpointID": endpoint }));
        }
        [&first, &second, &alone].into_iter().for_each(|address| release(address));
        assert!(pods(&mut agent).is_empty());
        Ok(())
    });
}

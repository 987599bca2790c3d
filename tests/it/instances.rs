//! Several overlays on the same hosts.

use gossamer::lab::{Host, Lab, NetNs};

use crate::{
    cni::{Runtime, namespaces},
    common::{Cluster, TIMEOUT, eventually, isolated, program, run, tool, wait_until},
};

/// An agent with the default files of its instance. The lab's directory stands for `/`.
struct Agent(std::process::Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(host: &Host, arguments: &str) -> Agent {
    let mut command = std::process::Command::new(program());
    let files = |name: &str| host.dir.join(name).display().to_string();
    command.arg("agent").args(arguments.split(' ')).stderr(std::process::Stdio::null());
    // Hosts share the file system here, so the files of the default instance are specified.
    if !arguments.contains("--instance") {
        command.args(["--state-dir", &files("state"), "--socket", &files("socket")]);
        command.args(["--subnet-file", &files("subnet.env")]);
    }
    Agent(host.netns.spawn(&mut command).expect("it starts"))
}

/// Runs a client on the agent's host and returns its output.
fn ask(host: &Host, arguments: &str) -> String {
    let said = run(&host.netns, &format!("{} {arguments}", program().display()));
    String::from_utf8(said.stdout).expect("UTF-8")
}

fn converged(host: &Host, socket: &str, members: usize) -> serde_json::Value {
    let asked = format!("status --wait=20 --members {members} -o json {socket}");
    let status = ask(host, &asked);
    serde_json::from_str(&status).unwrap_or_else(|error| panic!("{asked}: {error}: {status}"))
}

fn devices(netns: &NetNs) -> usize {
    tool(netns, "ip -br link show type vxlan").lines().count()
}

#[test]
fn two_overlays_on_a_host_are_independent() {
    isolated(|lab: &mut Lab| {
        let host = lab.host(1, "n1")?;
        // The instance's own directory is created below this one.
        let none: Option<&str> = None;
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), "/var/lib", Some("tmpfs"), flags, none)?;
        let plain = format!("--socket {}", host.dir.join("socket").display());
        let _first = start(&host, "--init");
        let one = converged(&host, &plain, 1);
        let _blue = start(&host, "--init --instance blue --network 10.43.0.0/16");
        let two = converged(&host, "--instance blue", 1);
        assert_eq!(one["kernel"]["device"], "gossamer.1");
        assert_eq!(two["kernel"]["device"], "gossamer.739354");
        assert_eq!(devices(&host.netns), 2);
        let tables = tool(&host.netns, "nft list tables");
        assert_eq!(tables, "table inet gossamer.1\ntable inet gossamer.739354\n");

        // A host that is in both overlays.
        let both = lab.host(2, "n2")?;
        let token = ask(&host, &format!("token {plain}"));
        let blue_token = ask(&host, "token --instance blue");
        let join = |token: &str| format!("--join {} --token {}", host.ip, token.trim());
        let _second = start(&both, &join(&token));
        let plain2 = format!("--socket {}", both.dir.join("socket").display());
        converged(&both, &plain2, 2);
        let files = |name: &str| both.dir.join(name).display().to_string();
        let _blue2 = start(
            &both,
            &format!(
                "--instance blue {} --state-dir {} --socket {} --subnet-file {}",
                join(&blue_token),
                files("blue"),
                files("blue.sock"),
                files("blue.env")
            ),
        );
        let blue2 = converged(&both, &format!("--socket {}", files("blue.sock")), 2);
        // The port follows from the instance's name.
        assert_eq!(blue2["settings"]["vni"], 739_354);
        let vtep = |status: &serde_json::Value| {
            let subnet: ipnet::IpNet =
                status["subnet"].as_str().expect("one").parse().expect("one");
            subnet.network()
        };
        for status in [converged(&host, &plain, 2), converged(&host, "--instance blue", 2)] {
            let to = vtep(&status);
            wait_until("no answer", TIMEOUT, || {
                run(&both.netns, &format!("ping -c 1 -W 1 {to}")).status.success()
            });
        }

        // One overlay is left; the other is not affected.
        let left = ask(&host, "leave --instance blue");
        assert!(left.contains("left"), "{left}");
        eventually(&host.netns, "nft list tables", |tables| tables == "table inet gossamer.1\n");
        assert_eq!(devices(&host.netns), 1);
        let to = vtep(&converged(&host, &plain, 2));
        tool(&both.netns, &format!("ping -c 1 -W 1 {to}"));
        Ok(())
    });
}

#[test]
fn rejected_second_overlay_does_not_affect_the_first() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pods = cluster.pods()?;
        let host = &cluster.hosts[0];
        let before =
            tool(&host.netns, "ip route show proto 73") + &tool(&host.netns, "nft list tables");
        let files = |name: &str| host.dir.join(name).display().to_string();
        // The same network and files, except for what must differ; the whole network, or a part of it.
        for network in ["10.42.0.0/16", "10.42.128.0/17", "10.42.0.0/17", "10.40.0.0/14"] {
            let mut command = std::process::Command::new(program());
            command.args(["agent", "--init", "--vni", "2"]);
            command.args(["--listen", "0.0.0.0:8474", "--network", network]);
            command.args(["--state-dir", &files("other"), "--socket", &files("other.sock")]);
            command.args(["--subnet-file", &files("other.env")]);
            let refused = host.netns.spawn(command.stderr(std::process::Stdio::piped()))?;
            let said = String::from_utf8(refused.wait_with_output()?.stderr)?;
            assert!(said.contains("overlap"), "{network}: {said}");
        }
        let after =
            tool(&host.netns, "ip route show proto 73") + &tool(&host.netns, "nft list tables");
        assert_eq!(after, before);
        tool(&pods[0].netns, &format!("ping -c 1 -W 2 {}", pods[1].ip));

        // With its own network it does not conflict, although the instance has no name.
        let arguments = format!(
            "agent --init --vni 2 --listen 0.0.0.0:8474 --network 10.50.0.0/16 --state-dir {} --socket {} \
             --subnet-file {}",
            files("third"),
            files("third.sock"),
            files("third.env")
        );
        let mut command = std::process::Command::new(program());
        command.args(arguments.split_whitespace()).stderr(std::process::Stdio::null());
        let _third = Agent(host.netns.spawn(&mut command)?);
        converged(host, &format!("--socket {}", files("third.sock")), 1);
        let tables = tool(&host.netns, "nft list tables");
        assert_eq!(tables, "table inet gossamer.1\ntable inet gossamer.2\n");
        let status = cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        assert_eq!(
            status["kernel"]["repairs"],
            serde_json::json!({}),
            "they undo each other's changes"
        );
        Ok(())
    });
}

#[test]
fn overlapping_networks_of_two_overlays_are_rejected() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let refused = |arguments: &[&str]| -> anyhow::Result<String> {
            let mut agent = gossamer::lab::Agent::start(program(), &host, arguments)?;
            assert_eq!(agent.wait()?.code(), Some(1));
            Ok(agent.log())
        };
        let log = refused(&["--init", "--network", "10.96.0.0/12"])?;
        assert!(
            log.contains("network 10.96.0.0/12 of the overlay and 10.99.0.10/16 of interface"),
            "{log}"
        );
        assert_eq!(devices(&host.netns), 0);
        tool(&host.netns, "ip link add gossamer.7 type vxlan id 7 dstport 8472 dev eth0");
        tool(&host.netns, "ip link set gossamer.7 alias 10.42.7.0/24");
        let log = refused(&["--init"])?;
        assert!(log.contains("and 10.42.7.0/24 of interface gossamer.7"), "{log}");
        Ok(())
    });
}

#[test]
fn link_local_address_of_another_overlays_device_blocks_no_pod() {
    isolated(|lab: &mut Lab| {
        let host = lab.host(1, "n1")?;
        let mut agent =
            gossamer::lab::Agent::start(program(), &host, &["--init", "--network6", "fd42::/48"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let _spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&agent);
        runtime.add("a");
        let netns = &host.netns;
        tool(netns, "ip link add flannel.9 type vxlan id 9 dstport 8479 dev eth0");
        tool(netns, "sysctl -qw net.ipv6.conf.flannel/9.disable_ipv6=0");
        tool(netns, "ip link set flannel.9 up");
        let has_link_local = |shown: &str| shown.contains("fe80:");
        eventually(netns, "ip -6 addr show dev flannel.9", has_link_local);
        eventually(netns, "ip -6 addr show dev gsm0", has_link_local);
        runtime.add("b");
        // The conflict is evaluated again with the bridge.
        tool(netns, "ip link set gsm0 mtu 1400");
        eventually(netns, "ip link show gsm0", |shown| shown.contains("mtu 1450"));
        let status = agent.ask("/v1/status", TIMEOUT)?;
        assert!(!status.to_string().contains("another overlay"), "{status:#}");
        Ok(())
    });
}

#[test]
fn bridge_of_another_overlay_is_reported_and_unchanged() {
    isolated(|lab: &mut Lab| {
        let host = lab.host(1, "n1")?;
        let none: Option<&str> = None;
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), "/var/lib", Some("tmpfs"), flags, none)?;
        let socket = host.dir.join("socket");
        let plain = format!("--socket {}", socket.display());
        let _first = start(&host, "--init");
        converged(&host, &plain, 1);
        let _spaces = namespaces(&["a", "b"])?;
        Runtime::at(&socket).add("a");
        let show = "ip addr show dev gsm0";
        let before = tool(&host.netns, show);
        let _blue = start(&host, "--init --instance blue --network 10.43.0.0/16 --bridge gsm0");
        converged(&host, "--instance blue", 1);
        let words = "bridge gsm0 has the pods of another overlay on this host (gossamer.1)";
        wait_until(words, TIMEOUT, || {
            let status = ask(&host, "status --instance blue -o json");
            status.contains(words)
        });
        assert_eq!(tool(&host.netns, show), before);
        Runtime::at(&socket).add("b");
        Ok(())
    });
}

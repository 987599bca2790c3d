//! Containers started by containerd and by podman, which call the CNI plugin themselves.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use gossamer::lab::{Agent, Host, NetNs};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    common::{Cluster, TIMEOUT, isolated, program, skipped, tool, wait_until},
    dockerd::{BUSYBOX, unpack_busybox},
};

/// Debian's `containernetworking-plugins`.
const PLUGINS: &str = "/usr/lib/cni";

/// Writes the configuration of `gossamer cni install`, with the agent of this host. Returns its
/// directories.
fn install(host: &Host, agent: &Agent) -> (PathBuf, PathBuf) {
    let (bin, conf) = (host.dir.join("cni-bin"), host.dir.join("net.d"));
    fs::create_dir_all(&bin).expect("a directory");
    // The other required plugin, `loopback`, is this program.
    symlink(Path::new(PLUGINS).join("portmap"), bin.join("portmap")).expect("a link");
    let output = Command::new(program())
        .args(["cni", "install", "--bin-dir"])
        .arg(&bin)
        .arg("--conf-dir")
        .arg(&conf)
        .output();
    let output = output.expect("gossamer runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("without"), "{output:?}");
    let file = conf.join("10-gossamer.conflist");
    let text = fs::read_to_string(&file).expect("written");
    let mut list: Value = serde_json::from_str(&text).expect("JSON");
    list["plugins"][0]["socket"] = json!(agent.socket());
    fs::write(&file, list.to_string()).expect("written");
    (bin, conf)
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn missing(programs: &[&str]) -> Option<String> {
    let absent = programs.iter().find(|path| !Path::new(path).exists());
    absent.map(|path| format!("{path} is not installed"))
}

/// Returns the addresses of the containers on an agent's host.
fn addresses(agent: &mut Agent) -> Vec<String> {
    let answer = agent.ask("/v1/pods", TIMEOUT).expect("pods");
    let pods = answer["pods"].as_array().expect("a list");
    pods.iter().map(|pod| pod["addresses"][0].as_str().expect("one").to_owned()).collect()
}

/// A containerd on a host, in a mount namespace with its own /etc/cni and /opt/cni.
struct Containerd {
    child: Child,
    enter: String,
    dir: PathBuf,
}

impl Containerd {
    fn start(host: &Host, agent: &Agent) -> Self {
        let (bin, conf) = install(host, agent);
        let dir = host.dir.join("containerd");
        fs::create_dir_all(dir.join("etc/up")).expect("a directory");
        fs::create_dir_all(dir.join("etc/work")).expect("a directory");
        unpack_busybox(&dir.join("rootfs"));
        let (d, bin, conf) = (dir.display(), bin.display(), conf.display());
        let script = format!(
            "mount -t overlay none -o lowerdir=/etc,upperdir={d}/etc/up,workdir={d}/etc/work /etc && \
             mkdir -p /etc/cni/net.d && mount --bind {conf} /etc/cni/net.d && \
             mount -t tmpfs none /opt && mkdir -p /opt/cni/bin && mount --bind {bin} /opt/cni/bin && \
             exec containerd --root {d}/root --state {d}/state --address {d}/containerd.sock"
        );
        let log = fs::File::create(dir.join("log")).expect("a log");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        let child = host.netns.spawn(&mut command).expect("containerd starts");
        let enter = format!("nsenter --mount --net --target {}", child.id());
        let this = Self { child, enter, dir };
        wait_until("containerd answers", TIMEOUT, || this.run("version").status.success());
        this
    }

    fn run(&self, arguments: &str) -> Output {
        let ctr = format!("{} ctr --address {}/containerd.sock", self.enter, self.dir.display());
        let mut words = ctr.split_whitespace();
        let mut command = Command::new(words.next().expect("a word"));
        command.args(words).args(arguments.split_whitespace()).output().expect("ctr runs")
    }

    fn done(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "ctr {arguments}: {}", text(&output));
        text(&output)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

#[test]
fn containerd_containers_on_two_hosts_reach_each_other() {
    if let Some(why) = missing(&["/usr/bin/containerd", PLUGINS, BUSYBOX]) {
        return skipped("containerd_containers_on_two_hosts_reach_each_other", &why);
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pairs = cluster.hosts.iter().zip(&cluster.agents);
        let containerds: Vec<Containerd> = pairs.map(|(h, a)| Containerd::start(h, a)).collect();
        // runc uses one directory for all of them.
        for (number, containerd) in containerds.iter().enumerate() {
            let rootfs = containerd.dir.join("rootfs");
            containerd.done(&format!(
                "run --detach --cni --rootfs {} box{number} /bin/sleep 600",
                rootfs.display()
            ));
        }
        let given: Vec<Vec<String>> = cluster.agents.iter_mut().map(addresses).collect();
        assert_eq!(given.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
        for (number, to) in [&given[1][0], &given[0][0]].into_iter().enumerate() {
            // The largest packet that fits.
            containerds[number].done(&format!(
                "task exec --exec-id p box{number} /bin/ping -c 2 -W 2 -s 1422 {to}"
            ));
        }
        // ctr's own removal calls DEL.
        containerds[0].done("task kill --signal KILL box0");
        wait_until("the container has ended", TIMEOUT, || {
            containerds[0].done("task ls").contains("STOPPED")
        });
        containerds[0].done("task rm box0");
        containerds[0].done("container rm box0");
        drop(containerds);
        Ok(())
    });
}

/// podman on a host; it has no daemon.
struct Podman<'a> {
    host: &'a Host,
    dir: PathBuf,
}

impl<'a> Podman<'a> {
    fn new(host: &'a Host, agent: &Agent) -> Self {
        let (bin, conf) = install(host, agent);
        let dir = host.dir.join("podman");
        unpack_busybox(&dir.join("rootfs"));
        let settings = format!(
            "[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [{bin:?}]\n\
             network_config_dir = {conf:?}\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"runc\"\n"
        );
        fs::write(dir.join("containers.conf"), settings).expect("written");
        Self { host, dir }
    }

    fn done(&self, arguments: &str) -> String {
        let d = self.dir.display();
        let mut command = Command::new("podman");
        command
            .args(["--root", &format!("{d}/root"), "--runroot", &format!("{d}/run")])
            .args(["--tmpdir", &format!("{d}/tmp"), "--storage-driver", "vfs"])
            .args(arguments.split_whitespace())
            .env("CONTAINERS_CONF", self.dir.join("containers.conf"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = self.host.netns.spawn(&mut command).expect("podman starts");
        let output = child.wait_with_output().expect("podman ends");
        assert!(output.status.success(), "podman {arguments}: {}", text(&output));
        text(&output)
    }
}

#[test]
fn podman_cni_containers_on_two_hosts_reach_each_other() {
    if let Some(why) = missing(&["/usr/bin/podman", PLUGINS, BUSYBOX]) {
        return skipped("podman_cni_containers_on_two_hosts_reach_each_other", &why);
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let pairs = cluster.hosts.iter().zip(&cluster.agents);
        let podmans: Vec<Podman<'_>> =
            pairs.map(|(host, agent)| Podman::new(host, agent)).collect();
        for (number, podman) in podmans.iter().enumerate() {
            let rootfs = podman.dir.join("rootfs");
            let run = format!("run -d --name box{number} --network gossamer --rootfs");
            podman.done(&format!("{run} {} sleep 600", rootfs.display()));
        }
        let given: Vec<Vec<String>> = cluster.agents.iter_mut().map(addresses).collect();
        assert_eq!(given.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
        for (number, to) in [&given[1][0], &given[0][0]].into_iter().enumerate() {
            podmans[number].done(&format!("exec box{number} /bin/ping -c 2 -W 2 -s 1422 {to}"));
        }
        podmans[0].done("rm -f -t 0 box0");
        podmans[1].done("rm -f -t 0 box1");
        drop(podmans);
        let left: Vec<Vec<String>> = cluster.agents.iter_mut().map(addresses).collect();
        assert_eq!(left, [Vec::<String>::new(), Vec::new()]);
        Ok(())
    });
}

/// flannel's own plugin delegates to `bridge` and `host-local`, with the values in `subnet.env`
/// (flannel-io/cni-plugin, README). Debian does not package it, so the test passes the same values to the
/// same plugins.
#[test]
fn flannel_cni_delegation_works_with_gossamers_subnet_env() {
    if let Some(why) = missing(&[PLUGINS]) {
        return skipped("flannel_cni_delegation_works_with_gossamers_subnet_env", &why);
    }
    isolated(|lab| {
        let cluster = Cluster::start(lab, 2)?;
        let mut pods = Vec::new();
        for host in &cluster.hosts {
            let env = fs::read_to_string(host.dir.join("subnet.env"))?;
            let field = |name: &str| {
                let mut fields = env.lines().filter_map(|line| line.split_once('='));
                fields.find(|(key, _)| *key == name).map(|(_, value)| value).expect("a field")
            };
            let subnet: ipnet::Ipv4Net = field("FLANNEL_SUBNET").parse()?;
            let mtu: u32 = field("FLANNEL_MTU").parse()?;
            let config = json!({
                "cniVersion": "1.0.0", "name": "cbr0", "type": "bridge", "bridge": "cni0",
                "mtu": mtu, "isGateway": true, "hairpinMode": true,
                "ipMasq": field("FLANNEL_IPMASQ") != "true",
                "ipam": {
                    "type": "host-local",
                    "dataDir": host.dir.join("host-local"),
                    "ranges": [[{ "subnet": subnet.trunc() }]],
                    "routes": [{ "dst": field("FLANNEL_NETWORK") }],
                },
            });
            let name = format!("{}-flannel", host.name);
            let netns = NetNs::new(&name)?;
            let mut bridge = Command::new(Path::new(PLUGINS).join("bridge"));
            bridge
                .env("CNI_COMMAND", "ADD")
                .env("CNI_CONTAINERID", &name)
                .env("CNI_NETNS", format!("/run/netns/{name}"))
                .env("CNI_IFNAME", "eth0")
                .env("CNI_PATH", PLUGINS)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            let mut child = host.netns.spawn(&mut bridge)?;
            let mut input = child.stdin.take().expect("a pipe");
            input.write_all(config.to_string().as_bytes())?;
            drop(input);
            let output = child.wait_with_output()?;
            assert!(output.status.success(), "{}", text(&output));
            let result: Value = serde_json::from_slice(&output.stdout)?;
            let address = result["ips"][0]["address"].as_str().expect("an address");
            pods.push((netns, address.parse::<ipnet::Ipv4Net>()?.addr()));
        }
        tool(&pods[0].0, &format!("ping -c 2 -i 0.2 -W 2 -M do -s 1422 {}", pods[1].1));
        Ok(())
    });
}

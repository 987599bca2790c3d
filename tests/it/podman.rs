//! Containers that a real Podman 5 starts on two hosts, with a real netavark that calls the plugin.
//!
//! Each host is Debian 13 as built by `tests/podman/build-root`: a writable layer above one directory, in
//! its own mount namespace. The agent runs in that namespace as well, because it opens namespaces that
//! Podman mounts there.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    slice,
};

use gossamer::lab::{Agent, Host, Lab};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use serde_json::Value;

use crate::{
    common::{TIMEOUT, isolated, program, skipped, token_of, wait_until},
    dockerd::unpack_busybox,
};

/// The host's file system, below its directory.
const ROOT: &str = "root";
/// Creates the file system; it ends with the namespaces.
const HOST_SETUP: &str = "mount -t tmpfs tmpfs $DIR/layer; mkdir $DIR/layer/up $DIR/layer/work; \
    mount -t overlay overlay -o lowerdir=$LOWER,upperdir=$DIR/layer/up,workdir=$DIR/layer/work $DIR/root; \
    cd $DIR/root; mount -t proc proc proc; mount -t sysfs sysfs sys; \
    mount -t cgroup2 cgroup2 sys/fs/cgroup; mount --rbind /dev dev; \
    for d in run tmp; do mount -t tmpfs tmpfs $d; done; \
    mkdir -p run/netns run/lab/$NAME; mount --bind $DIR run/lab/$NAME; ln -s lab/$NAME run/gossamer; \
    cp $PROGRAM usr/local/bin/gossamer; echo nameserver 127.0.0.1 > etc/resolv.conf; \
    echo ready > $DIR/ready; exec sleep infinity";

/// Simulates a power cut: the disk content stays; kernel tables, interfaces, mounts and the boot id are
/// lost.
const REBOOT: &str = "cd $DIR/root; umount -l -R run tmp; umount -l proc/sys/kernel/random/boot_id || true; \
    nft flush ruleset; ip link del gsm0; ip link del gossamer.1; \
    for d in run tmp; do mount -t tmpfs tmpfs $d; done; \
    mkdir -p run/netns run/lab/$NAME; mount --bind $DIR run/lab/$NAME; ln -s lab/$NAME run/gossamer; \
    cat proc/sys/kernel/random/uuid > $DIR/boot; mount --bind $DIR/boot proc/sys/kernel/random/boot_id";

/// Checks whether the machine allows such mounts.
const MOUNT_CHECK: &str = "cd $LOWER; mount -t tmpfs tmpfs /tmp; mkdir /tmp/up /tmp/work /tmp/root; \
    mount -t overlay overlay -o lowerdir=.,upperdir=/tmp/up,workdir=/tmp/work /tmp/root; \
    cd /tmp/root/sys; mount -t sysfs sysfs .; mount -t cgroup2 cgroup2 /tmp/root/sys/fs/cgroup";

/// The MAC of a container whose user requests one.
const MAC: &str = "02:00:00:00:00:33";

/// Returns the directory that `tests/podman/build-root` has built.
fn podman_directory() -> Result<PathBuf, String> {
    let home = || std::env::var_os("HOME").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let directory = std::env::var_os("GOSSAMER_PODMAN")
        .map_or_else(|| home().join(".cache/gossamer-podman"), PathBuf::from);
    if !geteuid().is_root() {
        return Err("layers above a directory of root's take root".to_owned());
    }
    if !directory.join("recipe").exists() {
        return Err(format!(
            "there is no Podman 5 in {}: tests/podman/build-root",
            directory.display()
        ));
    }
    let root = directory.join("root");
    let mut probe = Command::new("unshare");
    probe.args([
        "--mount",
        "--cgroup",
        "--net",
        "--propagation",
        "private",
        "sh",
        "-ec",
        MOUNT_CHECK,
    ]);
    let probe = probe.env("LOWER", &root).output().map_err(|error| format!("unshare: {error}"))?;
    match probe.status.success() {
        true => Ok(root),
        false => Err(String::from_utf8_lossy(&probe.stderr).trim().to_owned()),
    }
}

/// A host with Podman.
struct Machine {
    host: Host,
    keeper: Child,
}

impl Machine {
    fn new(lab: &mut Lab, number: u16, lower: &Path) -> anyhow::Result<Self> {
        let host = lab.host(number, &format!("n{number}"))?;
        for directory in ["layer", ROOT] {
            fs::create_dir_all(host.dir.join(directory))?;
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "--cgroup", "--propagation", "private", "sh", "-ec", HOST_SETUP]);
        command.env("DIR", &host.dir).env("NAME", &host.name).env("LOWER", lower);
        command.env("PROGRAM", program()).stdin(Stdio::null());
        let keeper = host.netns.spawn(&mut command)?;
        let ready = host.dir.join("ready");
        wait_until("the host is not ready", TIMEOUT, || ready.exists());
        let machine = Self { host, keeper };
        let script =
            format!("#!/bin/sh\nexec {} /usr/local/bin/gossamer \"$@\"\n", machine.enter());
        fs::write(machine.gossamer(), script)?;
        fs::set_permissions(machine.gossamer(), fs::Permissions::from_mode(0o755))?;
        Ok(machine)
    }

    /// Returns the prefix that runs a command on this host.
    fn enter(&self) -> String {
        let root = self.host.dir.join(ROOT);
        format!("nsenter --mount --target {} chroot {}", self.keeper.id(), root.display())
    }

    /// Returns the path of the program on this host.
    fn gossamer(&self) -> PathBuf {
        self.host.dir.join("gossamer")
    }

    fn agent(&self, arguments: &[&str]) -> anyhow::Result<Agent> {
        Ok(Agent::start(&self.gossamer(), &self.host, arguments)?)
    }

    fn run(&self, command: &str) -> Output {
        let line = format!("{} {command}", self.enter());
        let mut words = line.split_whitespace();
        let mut tool = Command::new(words.next().expect("a word"));
        tool.args(words).env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1");
        tool.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        tool.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.host.netns.spawn(&mut tool).expect(command);
        child.wait_with_output().expect(command)
    }

    /// Runs a command that must succeed, and returns its output.
    fn done(&self, command: &str) -> String {
        let Output { status, stdout, stderr } = self.run(command);
        let [said, error] =
            [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(status.success(), "{}: {command}: {status}\n{said}{error}", self.host.name);
        said.trim().to_owned()
    }

    fn refused(&self, command: &str) -> String {
        let Output { status, stderr, .. } = self.run(command);
        assert!(!status.success(), "{}: {command}: it should have failed", self.host.name);
        String::from_utf8_lossy(&stderr).into_owned()
    }

    /// Imports the image `box`, which contains only busybox.
    fn import(&self) {
        unpack_busybox(&self.host.dir.join("image"));
        let packed = format!("tar -C /run/lab/{0}/image -c -f /tmp/box.tar .", self.host.name);
        self.done(&packed);
        self.done("podman import /tmp/box.tar box");
    }

    /// Kills all processes, and starts the host again, without the agent.
    fn reboot(&self, agent: &mut Agent) -> anyhow::Result<()> {
        let mut doomed = Vec::new();
        for container in self.done("podman ps -q --no-trunc").lines() {
            let said = self.done(&format!("podman inspect {container}"));
            let all: Value = serde_json::from_str(&said)?;
            // The container's monitor first, because it would clean up after the container.
            let process_id = |key: &str| all[0]["State"][key].as_i64().expect("a process");
            doomed.extend(["ConmonPid", "Pid"].map(process_id));
        }
        agent.end(Signal::SIGKILL)?;
        for process in doomed {
            kill(Pid::from_raw(i32::try_from(process)?), Signal::SIGKILL)?;
        }
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &self.keeper.id().to_string(), "sh", "-ec", REBOOT]);
        command.env("DIR", &self.host.dir).env("NAME", &self.host.name).stdin(Stdio::null());
        let status = self.host.netns.spawn(&mut command)?.wait()?;
        anyhow::ensure!(status.success(), "the host does not end");
        Ok(())
    }

    /// Returns the network settings of a container, as Podman reports them.
    fn settings(&self, container: &str) -> Value {
        let said = self.done(&format!("podman inspect {container}"));
        let all: Value = serde_json::from_str(&said).expect("JSON");
        all[0]["NetworkSettings"].clone()
    }

    fn web(&self, container: &str) -> Value {
        self.settings(container)["Networks"]["web"].clone()
    }

    fn address(&self, container: &str) -> String {
        self.web(container)["IPAddress"].as_str().expect("an address").to_owned()
    }

    /// Pings from inside a container with the largest packets that fit, unfragmented.
    fn ping(&self, container: &str, to: &str) {
        let settings = self.settings(container);
        let path = settings["SandboxKey"].as_str().expect("a path");
        let netns = path.rsplit('/').next().expect("a name");
        self.done(&format!("ip netns exec {netns} ping -c 2 -i 0.2 -W 2 -M do -s 1422 {to}"));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn addresses(agent: &mut Agent) -> Vec<String> {
    let answer = agent.ask("/v1/pods", TIMEOUT).expect("pods");
    let pods = answer["pods"].as_array().expect("a list");
    pods.iter().map(|pod| pod["addresses"][0].as_str().expect("one").to_owned()).collect()
}

/// Creates two hosts with the network `web`, and their agents.
fn pair(lab: &mut Lab, lower: &Path) -> anyhow::Result<([Machine; 2], [Agent; 2])> {
    let machines = [Machine::new(lab, 1, lower)?, Machine::new(lab, 2, lower)?];
    let [one, two] = &machines;
    let mut first = one.agent(&["--init"])?;
    first.wait_converged(1, TIMEOUT)?;
    let (seed, token) = (one.host.ip.to_string(), token_of(&mut first)?);
    let second = two.agent(&["--join", &seed, "--token", &token])?;
    let mut agents = [first, second];
    for agent in &mut agents {
        agent.wait_converged(2, TIMEOUT)?;
    }
    for machine in &machines {
        let said = machine.done("gossamer podman install");
        let command = said.lines().last().and_then(|line| line.split_once(": "));
        machine.done(command.expect("a command").1);
        machine.import();
    }
    Ok((machines, agents))
}

fn run(machine: &Machine, arguments: &str) {
    machine.done(&format!("podman run -d {arguments} box /bin/sleep 600"));
}

#[test]
fn podman_5_containers_on_two_hosts_share_one_network() {
    let lower = match podman_directory() {
        Ok(lower) => lower,
        Err(why) => {
            return skipped("podman_5_containers_on_two_hosts_share_one_network", &why);
        }
    };
    isolated(|lab| {
        let (machines, mut agents) = pair(lab, &lower)?;
        let [one, two] = &machines;
        let seed = one.host.ip.to_string();
        run(one, "--name a --network web");
        run(two, "--name b --network web");
        let [a, b] = [one.address("a"), two.address("b")];
        assert_eq!(agents.each_mut().map(addresses), [[a.clone()], [b.clone()]]);
        one.ping("a", &b);
        two.ping("b", &a);

        // Reload, as after a flushed firewall; address and MAC stay.
        let before = one.web("a");
        one.done("podman network reload a");
        assert_eq!(one.web("a"), before);
        two.ping("b", &a);
        one.done("podman restart -t 0 a");
        two.ping("b", &one.address("a"));

        // An address and a MAC that the user requests.
        let subnet = Agent::subnet(&agents[0].ask("/v1/status", TIMEOUT)?)?;
        let wanted = subnet.hosts().nth(50).expect("an address");
        let fixed = format!("--mac-address {MAC} --network web --ip");
        run(one, &format!("--name c {fixed} {wanted}"));
        let c = one.web("c");
        assert_eq!((&c["IPAddress"], &c["MacAddress"]), (&wanted.to_string().into(), &MAC.into()));
        two.ping("b", &wanted.to_string());
        let error = one.refused(&format!("podman run --network web --ip {b} box /bin/true"));
        assert!(error.contains("this node's subnet"), "{error}");
        let error = one.refused("podman network create --driver gossamer --internal other");
        assert!(error.contains("--internal"), "{error}");

        // Published ports belong to Podman's own network, whichever of the two is listed first.
        let ports = "--network web --network podman -p 8080:80";
        one.done(&format!("podman run -d --name d {ports} box /bin/httpd -f -h /bin"));
        two.ping("b", &one.address("d"));
        one.ping("d", &b);
        two.done(&format!("busybox wget -T 10 -q -O /dev/null http://{seed}:8080/busybox"));

        // A container can be removed and started, even if the agent was killed in between.
        agents[0].end(Signal::SIGKILL)?;
        one.done("podman rm -f -t 0 a");
        let error = one.refused("podman run -d --name e --network web box /bin/sleep 600");
        assert!(error.contains("no gossamer agent"), "{error}");
        agents[0] = one.agent(&[])?;
        agents[0].wait_converged(2, TIMEOUT)?;
        wait_until("c and d are left", TIMEOUT, || addresses(&mut agents[0]).len() == 2);
        one.done("podman start e");
        for machine in &machines {
            machine.done("podman rm -f -t 0 --all");
        }
        assert_eq!(agents.each_mut().map(addresses), [Vec::<String>::new(), Vec::new()]);
        Ok(())
    });
}

#[test]
fn podman_5_pod_has_one_address_and_containers_restart_after_a_reboot() {
    let lower = match podman_directory() {
        Ok(lower) => lower,
        Err(why) => {
            let test = "podman_5_pod_has_one_address_and_containers_restart_after_a_reboot";
            return skipped(test, &why);
        }
    };
    isolated(|lab| {
        let (machines, mut agents) = pair(lab, &lower)?;
        let [one, two] = &machines;
        run(two, "--name b --network web");
        let b = two.address("b");

        // Podman's default infra image needs a program that this host does not have.
        let script = "exec podman pod create --name group --network web --infra-image box \
                      --infra-name infra --infra-command '/bin/sleep 600'\n";
        fs::write(one.host.dir.join("create"), script)?;
        one.done(&format!("sh /run/lab/{}/create", one.host.name));
        one.done("podman run -d --pod group --name server box /bin/httpd -f -p 8080 -h /bin");
        run(one, "--pod group --name client");
        let group = one.address("infra");
        assert_eq!(addresses(&mut agents[0]), slice::from_ref(&group));
        let fetch = "wget -T 10 -q -O /dev/null";
        one.done(&format!("podman exec client /bin/{fetch} http://127.0.0.1:8080/busybox"));
        two.done(&format!("podman exec b /bin/{fetch} http://{group}:8080/busybox"));
        one.ping("infra", &b);
        one.done("podman restart -t 0 client");
        assert_eq!(one.address("infra"), group);
        one.done(&format!("podman exec client /bin/{fetch} http://127.0.0.1:8080/busybox"));
        one.done("podman pod stop -t 0 group");
        assert_eq!(addresses(&mut agents[0]), [""; 0]);
        one.done("podman pod start group");
        let group = one.address("infra");
        two.ping("b", &group);

        run(one, "--name a --network web");
        let subnet = Agent::subnet(&agents[0].ask("/v1/status", TIMEOUT)?)?;
        let fixed = subnet.hosts().nth(50).expect("an address").to_string();
        run(one, &format!("--name c --network web --ip {fixed}"));
        one.reboot(&mut agents[0])?;
        // Whichever part of the pod starts first.
        let error = one.refused("podman start a");
        assert!(error.contains("no gossamer agent"), "{error}");
        agents[0] = one.agent(&[])?;
        agents[0].wait_converged(2, TIMEOUT)?;
        assert_eq!(addresses(&mut agents[0]), [""; 0], "none has survived");
        one.done("podman start a c");
        one.done("podman pod start group");
        let now = ["a", "c", "infra"].map(|name| one.address(name));
        assert_eq!(now[1], fixed);
        let mut known = addresses(&mut agents[0]);
        known.sort();
        let mut listed = now.to_vec();
        listed.sort();
        assert_eq!(known, listed);
        now.iter().for_each(|address| two.ping("b", address));
        one.ping("a", &b);
        one.done("podman pod rm -f -t 0 group");
        for machine in &machines {
            machine.done("podman rm -f -t 0 --all");
        }
        assert_eq!(agents.each_mut().map(addresses), [Vec::<String>::new(), Vec::new()]);
        Ok(())
    });
}

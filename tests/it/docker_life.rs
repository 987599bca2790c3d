//! Docker over time: power cuts, agents that start late, restarts and upgrades of dockerd under running
//! containers.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::Duration,
};

use gossamer::lab::{Agent, Host};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

use crate::{
    common::{Cluster, TIMEOUT, isolated, program, run, skipped, tool, wait_until},
    compose::documented,
    dockerd::{BUSYBOX, DOCKERD, import},
};

const ACTIVATE: &str = "/usr/bin/systemd-socket-activate";
/// The agent starts this much later than dockerd after a boot.
const AGENT_DELAY: Duration = Duration::from_secs(20);
/// Interfaces that do not exist after a boot.
const HOST_LINKS: [&str; 4] = ["gsm0", "gossamer.1", "docker0", "docker_gwbridge"];
/// Docker releases beside this machine's, oldest first, as `tests/docker/build-root` names them.
const NEWER_RELEASES: [&str; 2] = ["trixie", "sid"];

/// Returns the program directory of a newer Docker, if it was downloaded and runs here.
fn newer_docker(release: &str) -> Result<String, String> {
    let home = || std::env::var_os("HOME").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let made = std::env::var_os("GOSSAMER_DOCKER")
        .map_or_else(|| home().join(".cache/gossamer-docker"), PathBuf::from);
    let programs = made.join(release);
    let tried = Command::new(programs.join("dockerd")).arg("--version").output();
    match tried.map(|output| output.status.success()) {
        Ok(true) => Ok(programs.display().to_string()),
        _ => Err(format!(
            "no Docker of Debian {release} in {}: tests/docker/build-root",
            made.display()
        )),
    }
}

fn missing() -> Option<&'static str> {
    [DOCKERD, BUSYBOX].into_iter().find(|path| !Path::new(path).exists())
}

/// One boot of a host: its own processes and mounts, which end with it.
struct Boot<'a> {
    host: &'a Host,
    keeper: Child,
    /// The prefix that runs a command inside this boot.
    enter: String,
    socket: String,
}

impl<'a> Boot<'a> {
    fn new(host: &'a Host) -> Self {
        let directory = host.dir.join("docker");
        fs::create_dir_all(&directory).expect("a directory");
        let ready = directory.join("booted");
        let _ = fs::remove_file(&ready);
        let script = format!(
            "mkdir -p /run/docker; mount -t tmpfs none /run/docker; mkdir /run/docker/plugins {plugins}; \
             mount --bind {plugins} /run/docker/plugins; echo $$ > {ready}; exec sleep infinity",
            plugins = host.dir.join("plugins").display(),
            ready = ready.display()
        );
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            &script,
        ]);
        let keeper = host.netns.spawn(command.stdin(Stdio::null())).expect("unshare runs");
        wait_until("the host has not booted", TIMEOUT, || ready.exists());
        let children = format!("/proc/{0}/task/{0}/children", keeper.id());
        let child = fs::read_to_string(children).expect("its first process");
        let enter = format!("nsenter --target {} --mount --pid", child.trim());
        let socket = format!("unix://{}/docker.sock", directory.display());
        Self { host, keeper, enter, socket }
    }

    /// Kills all processes at once; the disk content stays.
    fn cut_power(mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        for link in HOST_LINKS {
            let _ = run(&self.host.netns, &format!("ip link delete {link}"));
        }
        let _ = fs::remove_dir_all(self.host.dir.join("plugins"));
    }

    /// Starts this machine's dockerd, or the one of another directory. Does not wait for it.
    fn begin(&self, programs: Option<&str>, options: &str) {
        let directory = self.host.dir.join("docker");
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let path = programs.map_or_else(|| path.to_owned(), |first| format!("{first}:{path}"));
        let line = format!(
            "{} env PATH={path} dockerd --host {} --data-root {}/data --exec-root /run/docker/exec \
             --pidfile /run/docker/pid --storage-driver vfs {options}",
            self.enter,
            self.socket,
            directory.display()
        );
        let log = fs::File::options().append(true).create(true).open(directory.join("log"));
        let log = log.expect("a log");
        let mut command = Command::new("sh");
        // It ends with the boot.
        command.args(["-c", &format!("{line} &")]).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        let started = self.host.netns.spawn(&mut command).expect("sh runs").wait();
        assert!(started.expect("sh ends").success());
    }

    fn wait(&self) {
        wait_until("dockerd answers", TIMEOUT, || self.docker("version").status.success());
    }

    fn start(&self, programs: Option<&str>, options: &str) {
        self.begin(programs, options);
        self.wait();
    }

    /// Ends dockerd alone.
    fn stop(&self) {
        let pid = format!("{} cat /run/docker/pid", self.enter);
        let pid = tool(&self.host.netns, &pid);
        tool(&self.host.netns, &format!("{} kill {}", self.enter, pid.trim()));
        let there = format!("{} test -e /proc/{}", self.enter, pid.trim());
        wait_until("dockerd ends", TIMEOUT, || !run(&self.host.netns, &there).status.success());
    }

    fn docker(&self, arguments: &str) -> Output {
        let mut docker = Command::new("docker");
        docker.args(["--host", &self.socket]).args(arguments.split_whitespace());
        docker.output().expect("docker runs")
    }

    fn done(&self, arguments: &str) -> String {
        let output = self.docker(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        assert!(output.status.success(), "docker {arguments}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn address(&self, container: &str) -> String {
        let all = "{{range.NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        self.done(&format!("inspect --format {all} {container}"))
    }

    fn process(&self, container: &str) -> String {
        self.done(&format!("inspect --format {{{{.State.Pid}}}} {container}"))
    }

    fn ping(&self, from: &str, to: &str) {
        self.done(&format!("exec {from} ping -c 2 -W 2 {}", self.address(to)));
    }

    /// Waits until a container has started by itself.
    fn comes_up(&self, container: &str) {
        let running = || self.done("ps --format {{.Names}}").lines().any(|name| name == container);
        wait_until(&format!("{container} does not run"), TIMEOUT, running);
    }
}

impl Drop for Boot<'_> {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn plugin_of(host: &Host) -> [String; 2] {
    ["--docker-plugin".to_owned(), host.dir.join("plugins").display().to_string()]
}

/// Restarts the agent of a host, with the plugin.
fn serve(cluster: &mut Cluster, end: Signal) -> anyhow::Result<()> {
    cluster.agents[0].end(end)?;
    let host = &cluster.hosts[0];
    let [flag, directory] = plugin_of(host);
    cluster.agents[0] = Agent::start(program(), host, &[&flag, &directory])?;
    cluster.converge()
}

fn addresses(agent: &mut Agent) -> Vec<String> {
    let answer = agent.ask("/v1/pods", TIMEOUT).expect("pods");
    let pods = answer["pods"].as_array().expect("a list");
    pods.iter().map(|pod| pod["addresses"][0].as_str().expect("one").to_owned()).collect()
}

const CREATE: &str = "network create -d gossamer --ipam-driver gossamer";

#[test]
fn restarting_containers_come_up_after_a_boot_with_a_late_agent() {
    let test = "restarting_containers_come_up_after_a_boot_with_a_late_agent";
    if let Some(missing) = missing() {
        return skipped(test, missing);
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let boot = Boot::new(&cluster.hosts[0]);
        drop(boot);
        serve(&mut cluster, Signal::SIGTERM)?;
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", TIMEOUT)?)?;
        let fixed = subnet.hosts().nth(50).expect("an address").to_string();
        let boot = Boot::new(&cluster.hosts[0]);
        boot.start(None, "");
        import(&boot.socket, &cluster.hosts[0], "nginx");
        boot.done(&format!("{CREATE} web"));
        boot.done(&format!("{CREATE} --subnet {subnet} fixed"));
        boot.done("run -d --restart=always --name any --network web nginx");
        boot.done(&format!(
            "run -d --restart=always --name one --network fixed --ip {fixed} nginx"
        ));
        boot.cut_power();
        cluster.agents[0].end(Signal::SIGKILL)?;

        let boot = Boot::new(&cluster.hosts[0]);
        boot.begin(None, "");
        thread::sleep(AGENT_DELAY);
        let [flag, directory] = plugin_of(&cluster.hosts[0]);
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[&flag, &directory])?;
        boot.wait();
        ["any", "one"].iter().for_each(|name| boot.comes_up(name));
        assert_eq!(boot.address("one"), fixed, "the address that its dead predecessor had");
        boot.ping("any", "one");
        // The address that no container uses any more is free again.
        let agent = &mut cluster.agents[0];
        wait_until("two addresses are in use", TIMEOUT, || addresses(agent).len() == 2);
        Ok(())
    });
}

/// Starts an agent on a socket that the service manager has opened.
fn socket_activated(host: &Host, socket: &UnixListener, more: &str) -> anyhow::Result<Child> {
    let script = format!(
        "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec {} agent --node-name n1 \
         --state-dir {dir}/state --socket {dir}/gossamer.sock --subnet-file {dir}/subnet.env {more}",
        program().display(),
        dir = host.dir.display()
    );
    let log = fs::File::options().append(true).create(true).open(host.dir.join("log"))?;
    let mut command = Command::new("sh");
    command.args(["-c", &script]).stdin(OwnedFd::from(socket.try_clone()?)).stderr(log);
    Ok(host.netns.spawn(&mut command)?)
}

/// Waits until a client connects.
fn wait_for_connection(socket: &UnixListener) {
    let limit = PollTimeout::try_from(TIMEOUT).expect("a limit");
    let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(socket), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, limit).expect("poll"), 1, "no client has connected");
}

#[test]
fn dockerd_waits_at_the_activated_socket_for_a_late_agent() {
    let test = "dockerd_waits_at_the_activated_socket_for_a_late_agent";
    if let Some(missing) = missing() {
        return skipped(test, missing);
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        cluster.agents[0].end(Signal::SIGTERM)?;
        let host = &cluster.hosts[0];
        let unit = fs::read_to_string("config/gossamer-docker.socket")?;
        assert!(unit.contains("ListenStream=/run/docker/plugins/gossamer.sock\n"), "{unit}");
        let plugins = host.dir.join("plugins");
        let listen = || {
            fs::create_dir_all(&plugins)?;
            UnixListener::bind(plugins.join("gossamer.sock"))
        };
        let converged = || {
            let ask = format!("{} status --wait --socket", program().display());
            tool(&host.netns, &format!("{ask} {}", host.dir.join("gossamer.sock").display()));
        };
        let boot = Boot::new(host);
        let socket = listen()?;
        let mut agent = socket_activated(host, &socket, "")?;
        converged();
        boot.start(None, "");
        import(&boot.socket, host, "nginx");
        boot.done(&format!("{CREATE} web"));
        boot.done("run -d --restart=always --name any --network web nginx");
        boot.cut_power();
        agent.kill()?;
        agent.wait()?;
        drop(socket);

        let boot = Boot::new(host);
        let socket = listen()?;
        boot.begin(None, "");
        wait_for_connection(&socket);
        // An agent that cannot start does not block Docker, which connects again.
        let mut broken = socket_activated(host, &socket, "--mtu 1")?;
        assert!(!broken.wait()?.success());
        wait_for_connection(&socket);
        let mut agent = socket_activated(host, &socket, "")?;
        converged();
        boot.wait();
        boot.comes_up("any");
        agent.kill()?;
        agent.wait()?;
        Ok(())
    });
}

/// Uses systemd's own program, which passes a socket as a socket unit does.
#[test]
fn socket_passed_by_systemd_is_served_from_the_first_request() {
    if !Path::new(ACTIVATE).exists() {
        let test = "socket_passed_by_systemd_is_served_from_the_first_request";
        return skipped(test, &format!("{ACTIVATE} is not installed"));
    }
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let socket = host.dir.join("plugin.sock");
        let log = fs::File::create(host.dir.join("log"))?;
        let mut command = Command::new(ACTIVATE);
        command.arg("--listen").arg(&socket).arg("--fdname=gossamer-docker.socket");
        command.arg(program()).args(["agent", "--init", "--node-name", "n1"]);
        for (flag, file) in [
            ("--state-dir", "state"),
            ("--socket", "gossamer.sock"),
            ("--subnet-file", "subnet.env"),
        ] {
            command.arg(flag).arg(host.dir.join(file));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut agent = host.netns.spawn(&mut command)?;
        let mut called = None;
        wait_until("systemd listens", TIMEOUT, || {
            called = UnixStream::connect(&socket).ok();
            called.is_some()
        });
        let mut called = called.expect("a connection");
        called
            .write_all(b"POST /Plugin.Activate HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        called.read_to_string(&mut answer)?;
        agent.kill()?;
        agent.wait()?;
        let log = fs::read_to_string(host.dir.join("log"))?;
        assert!(answer.contains("NetworkDriver"), "{answer}\n{log}");
        Ok(())
    });
}

#[test]
fn containers_keep_running_while_docker_and_the_agent_restart() {
    let test = "containers_keep_running_while_docker_and_the_agent_restart";
    if let Some(missing) = missing() {
        return skipped(test, missing);
    }
    let newer_docker: Vec<Option<String>> = NEWER_RELEASES
        .iter()
        .map(|release| {
            newer_docker(release).map_err(|why| skipped(test, &format!("in part: {why}"))).ok()
        })
        .collect();
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        serve(&mut cluster, Signal::SIGTERM)?;
        let boot = Boot::new(&cluster.hosts[0]);
        boot.start(None, "--live-restore");
        import(&boot.socket, &cluster.hosts[0], "nginx");
        let documented = documented("Docker");
        let mut said = String::new();
        for command in documented.iter().take(2) {
            said = boot.done(command.strip_prefix("docker ").expect("a command of Docker"));
        }
        boot.done(&format!("rename {said} one"));
        // A second network on the same host.
        boot.done(&format!("{CREATE} db"));
        boot.done("run -d --name two --network db nginx");
        boot.ping("one", "two");
        let refused = boot.docker("network connect db one");
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && why.contains("omit this network"), "{why}");
        boot.ping("one", "two");

        // Restarted, and upgraded to each newer release that is available.
        let process = boot.process("one");
        for programs in std::iter::once(None).chain(newer_docker.iter().flatten().map(Some)) {
            boot.stop();
            boot.start(programs.map(String::as_str), "--live-restore");
            assert_eq!(boot.process("one"), process, "the container was restarted");
            boot.ping("one", "two");
            boot.done("network disconnect db two");
            assert_eq!(addresses(&mut cluster.agents[0]), [boot.address("one")]);
            boot.done("network connect db two");
            boot.ping("one", "two");
            boot.done("run -d --name three --network db nginx");
            boot.ping("one", "three");
            boot.done("restart -t 0 two");
            boot.ping("three", "two");
            boot.done("rm -f three");
        }
        let one = boot.address("one");
        // A container that ends while no agent runs: Docker moves the end of the veth pair back to this
        // host, and notifies no plugin.
        cluster.agents[0].end(Signal::SIGKILL)?;
        let mut remove = Command::new("docker");
        remove.args(["--host", &boot.socket, "rm", "-f", "two"]).stdout(Stdio::null());
        let mut remove = remove.stderr(Stdio::null()).spawn()?;
        let loose = || tool(&cluster.hosts[0].netns, "ip -o link show type veth").contains("p@gsm");
        wait_until("the end is not put back", TIMEOUT, loose);
        // Started without the plugin, because Docker must not notify it.
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        let agent = &mut cluster.agents[0];
        wait_until("the address is free again", TIMEOUT, || addresses(agent) == [one.clone()]);
        wait_until("its veth pair is gone", TIMEOUT, || !loose());
        remove.kill()?;
        remove.wait()?;
        Ok(())
    });
}

//! Shared parts of the integration tests: isolated namespaces, clusters, and wrappers of system tools.

use std::{
    io::{self, Write as _},
    os::fd::AsRawFd as _,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use gossamer::{
    config::NO_FILE,
    lab::{Agent, Host, Lab, NetNs, Pod},
};
use nix::{
    ifaddrs::getifaddrs,
    sys::{
        signal::{Signal, kill},
        socket::bind,
    },
    unistd::Pid,
};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// Default time limit of waits.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Time limit of one test, in seconds. No test takes half of it on an idle machine.
const TEST_LIMIT_SECONDS: &str = "400";

/// Returns the path of the program under test.
pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_gossamer"))
}

/// Runs the body of a test in new user, mount, process and network namespaces. To do so, it starts this
/// test alone again inside them. Skips the test where the machine forbids namespaces.
pub fn isolated<F: FnOnce(&mut Lab) -> anyhow::Result<()>>(body: F) {
    // The type of the closure is named after its test: it::module::test::{{closure}}.
    let closure = std::any::type_name::<F>();
    let test = closure.trim_start_matches("it::").trim_end_matches("::{{closure}}");
    if std::env::var_os("GOSSAMER_LAB").is_some() {
        let mut lab = Lab::new().expect("a lab inside the namespaces");
        return body(&mut lab).unwrap_or_else(|error| panic!("{error:?}"));
    }
    let probe =
        Command::new(program()).args(["lab", "--", "true"]).output().expect("gossamer runs");
    if !probe.status.success() {
        let why = String::from_utf8_lossy(&probe.stderr);
        return skipped(test, why.trim());
    }
    let this = std::env::current_exe().expect("the path of this test");
    // A program that fails to end must not block all other tests.
    let output = Command::new("timeout")
        .arg(TEST_LIMIT_SECONDS)
        .arg(program())
        .args(["lab", "--"])
        .arg(this)
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        // The settings of this machine do not concern the hosts of a test.
        .env("GOSSAMER_CONFIG", NO_FILE)
        .output()
        .expect("gossamer lab runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    print!("{}", text(&output.stdout));
    assert!(
        output.status.success() && text(&output.stdout).contains("1 passed"),
        "in its namespaces the test failed ({}):\n{}",
        output.status,
        text(&output.stderr)
    );
}

/// Reports that a test was skipped, and why.
pub fn skipped(test: &str, why: &str) {
    // Not by a macro, because the output of a passing test is captured.
    let _ = writeln!(io::stderr(), "SKIPPED {test}: {why}");
}

/// A cluster of `count` hosts. The first host created it.
pub struct Cluster {
    pub hosts: Vec<Host>,
    pub agents: Vec<Agent>,
    pub token: String,
}

impl Cluster {
    /// Starts hosts number 1 to `count`, and waits until all agents have converged.
    pub fn start(lab: &mut Lab, count: u16) -> anyhow::Result<Self> {
        Self::start_with(lab, count, &[])
    }

    /// As `start`; the first host creates the cluster with these settings.
    pub fn start_with(lab: &mut Lab, count: u16, settings: &[&str]) -> anyhow::Result<Self> {
        let mut cluster = Self { hosts: Vec::new(), agents: Vec::new(), token: String::new() };
        let first = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &first, &[&["--init"], settings].concat())?;
        agent.wait_converged(1, TIMEOUT)?;
        cluster.token = token_of(&mut agent)?;
        cluster.hosts.push(first);
        cluster.agents.push(agent);
        for number in 2..=count {
            cluster.join(lab, number)?;
        }
        cluster.converge()?;
        Ok(cluster)
    }

    /// Adds a host that joins. Does not wait for it.
    pub fn join(&mut self, lab: &mut Lab, number: u16) -> anyhow::Result<()> {
        let host = lab.host(number, &format!("n{number}"))?;
        let agent = self.start_agent(&host, &[])?;
        self.hosts.push(host);
        self.agents.push(agent);
        Ok(())
    }

    /// Starts an agent on a host. It joins through the first host.
    pub fn start_agent(&self, host: &Host, more: &[&str]) -> anyhow::Result<Agent> {
        let seed = self.hosts[0].ip.to_string();
        let arguments = [&["--join", &seed, "--token", &self.token], more].concat();
        Ok(Agent::start(program(), host, &arguments)?)
    }

    /// Ends an agent, starts it again, and waits until it has converged.
    pub fn restart(&mut self, number: usize, arguments: &[&str]) -> anyhow::Result<()> {
        self.agents[number].end(Signal::SIGTERM)?;
        self.agents[number] = self.start_agent(&self.hosts[number], arguments)?;
        self.agents[number].wait_converged(self.hosts.len(), TIMEOUT)?;
        Ok(())
    }

    /// Adds a pod on each host, once all agents have converged.
    pub fn pods(&mut self) -> anyhow::Result<Vec<Pod>> {
        let count = self.agents.len();
        let pairs = self.hosts.iter().zip(&mut self.agents);
        pairs
            .map(|(host, agent)| {
                let status = agent.wait_converged(count, TIMEOUT)?;
                Ok(host.pod(Agent::subnet(&status)?, 1450)?)
            })
            .collect()
    }

    /// Waits until the cluster's agents and another one have converged with `count` members.
    pub fn converge_with(&mut self, other: &mut Agent, count: usize) -> anyhow::Result<()> {
        let agents = self.agents.iter_mut().chain([other]);
        agents.map(|agent| agent.wait_converged(count, TIMEOUT)).try_for_each(|done| done.map(drop))
    }

    /// Waits until all agents have converged.
    pub fn converge(&mut self) -> anyhow::Result<()> {
        let count = self.agents.len();
        self.agents.iter_mut().try_for_each(|agent| agent.wait_converged(count, TIMEOUT).map(drop))
    }
}

/// Returns a token for a cluster that does not exist yet.
pub fn new_token() -> anyhow::Result<String> {
    let output = Command::new(program()).args(["token", "--new"]).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Returns the token of an agent's cluster.
pub fn token_of(agent: &mut Agent) -> anyhow::Result<String> {
    let answer = agent.ask("/v1/token", TIMEOUT)?;
    Ok(answer["token"].as_str().expect("a token").to_owned())
}

/// Runs a command in a namespace. The command must succeed. Returns its standard output.
pub fn tool(netns: &NetNs, command: &str) -> String {
    let output = run(netns, command);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command}: {error}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs several commands, separated by "&&", in a namespace. All must succeed.
pub fn sh(netns: &NetNs, commands: &str) {
    commands.split(" && ").for_each(|command| _ = tool(netns, command));
}

/// Runs a command in a namespace and returns its output. The command may fail.
pub fn run(netns: &NetNs, command: &str) -> Output {
    let mut words = command.split_whitespace();
    let mut tool = Command::new(words.next().expect("a command"));
    tool.args(words).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    netns.spawn(&mut tool).and_then(std::process::Child::wait_with_output).expect(command)
}

/// Runs the program as an operator does, with the socket of an agent.
pub fn client(agent: &Agent, arguments: &[&str]) -> Output {
    let socket = agent.socket().display().to_string();
    let mut command = Command::new(program());
    command.args(arguments).args(["--socket", &socket]).output().expect("gossamer runs")
}

/// Polls a condition until it is true; panics with `what` after `patience`.
pub fn wait_until(what: &str, patience: Duration, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < patience, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for words in an agent's log, which a thread of its own writes.
#[track_caller]
pub fn assert_logged(agent: &Agent, words: &str) {
    let start = Instant::now();
    while !agent.log().contains(words) {
        assert!(start.elapsed() < TIMEOUT, "{words:?} is not in {}", agent.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Suspends an agent. Returns when each of its threads is stopped.
pub fn suspend(agent: &Agent) -> anyhow::Result<()> {
    let pid = agent.pid();
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP)?;
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))?.collect::<Result<Vec<_>, _>>()?;
    wait_until("the agent is not stopped", TIMEOUT, || {
        tasks.iter().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('T'))
        })
    });
    Ok(())
}

/// Resumes a suspended agent.
pub fn resume(agent: &Agent) -> anyhow::Result<()> {
    Ok(kill(Pid::from_raw(agent.pid().cast_signed()), Signal::SIGCONT)?)
}

/// Waits until an agent's status fulfills a condition, and returns the status. The event loop may learn
/// of a change later than the kernel or a pod shows it.
pub fn status_where(agent: &mut Agent, mut wanted: impl FnMut(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
        if wanted(&status) {
            return status;
        }
        assert!(start.elapsed() < TIMEOUT, "not what was expected: {status:#}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns a list of problems or notices as sentences with their remedies, one a line.
pub fn texts(problems: &Value) -> String {
    let text = |problem: &Value| {
        let part = |name: &str| problem[name].as_str().unwrap_or_default().to_owned();
        match part("fix") {
            fix if fix.is_empty() => part("what"),
            fix => format!("{}: {fix}", part("what")),
        }
    };
    problems.as_array().into_iter().flatten().map(text).collect::<Vec<_>>().join("\n")
}

/// Returns whether a problem in the agent's status contains `words`.
pub fn has_problem(agent: &mut Agent, words: &str) -> bool {
    let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
    texts(&status["problems"]).contains(words)
}

/// Returns whether a notice in the agent's status contains `words`.
pub fn has_notice(agent: &mut Agent, words: &str) -> bool {
    let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
    texts(&status["notices"]).contains(words)
}

/// Waits until the output of a command fulfills a condition, and returns the output.
pub fn eventually(netns: &NetNs, command: &str, wanted: impl Fn(&str) -> bool) -> String {
    let start = Instant::now();
    loop {
        // The object in question may not exist yet, so the command may fail.
        let output = String::from_utf8(run(netns, command).stdout).expect("UTF-8");
        if wanted(&output) {
            return output;
        }
        assert!(
            start.elapsed() < TIMEOUT,
            "`{command}` never printed what was expected:\n{output}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns the number of ICMP echo requests that a namespace has received.
pub fn echoes(netns: &NetNs) -> u64 {
    let counters = tool(netns, "cat /proc/net/snmp");
    let mut lines = counters.lines().filter(|line| line.starts_with("Icmp:"));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let place = names.split(' ').position(|name| name == "InEchos").expect("InEchos");
    values.split(' ').nth(place).and_then(|value| value.parse().ok()).expect("a number")
}

/// Returns a socket for frames at `eth0`, and the MAC of `eth0`.
pub fn link_socket(netns: &NetNs) -> io::Result<(Socket, [u8; 6])> {
    netns.run(|| {
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        let found = getifaddrs()?.filter(|found| found.interface_name == "eth0");
        let link = found.filter_map(|found| found.address?.as_link_addr().copied()).next();
        bind(socket.as_raw_fd(), &link.expect("eth0"))?;
        Ok((socket, link.and_then(|link| link.addr()).expect("a MAC")))
    })
}

/// Returns the Internet checksum (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum = words.sum::<u32>();
    !(((sum >> 16) + (sum & 0xffff)) as u16)
}

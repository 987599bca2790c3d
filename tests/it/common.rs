//! What the integration tests share: namespaces of their own, and the tools whose word counts.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Host, Lab, NetNs, Pod};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

pub const TIMEOUT: Duration = Duration::from_secs(60);

/// No test takes half of that on a quiet machine.
const LIMIT_SECONDS: &str = "400";

pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_gossamer"))
}

/// Runs the body of a test in fresh user, mount, process and network namespaces, by running this test
/// alone once more inside them. Where the machine forbids that, says so and skips the test.
pub fn isolated<F: FnOnce(&mut Lab) -> anyhow::Result<()>>(body: F) {
    // The closure's type is named after the test that it stands in: it::module::test::{{closure}}.
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
    // A program that was to end and did not must not hold up all tests.
    let output = Command::new("timeout")
        .arg(LIMIT_SECONDS)
        .arg(program())
        .args(["lab", "--"])
        .arg(this)
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
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

/// Says that a test was not run, and for want of what.
pub fn skipped(test: &str, why: &str) {
    // Not by a macro: the output of a test that passes is not shown.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}

/// A cluster of `count` hosts; the first one created it.
pub struct Cluster {
    pub hosts: Vec<Host>,
    pub agents: Vec<Agent>,
    pub token: String,
}

impl Cluster {
    /// Starts hosts number 1 to `count`, and waits until all have converged.
    pub fn start(lab: &mut Lab, count: u16) -> anyhow::Result<Self> {
        Self::start_with(lab, count, &[])
    }

    /// The same, where the first one creates it with these settings.
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

    /// Adds a host that joins; does not wait for it.
    pub fn join(&mut self, lab: &mut Lab, number: u16) -> anyhow::Result<()> {
        let host = lab.host(number, &format!("n{number}"))?;
        let agent = self.start_agent(&host, &[])?;
        self.hosts.push(host);
        self.agents.push(agent);
        Ok(())
    }

    pub fn start_agent(&self, host: &Host, more: &[&str]) -> anyhow::Result<Agent> {
        let seed = self.hosts[0].ip.to_string();
        let arguments = [&["--join", &seed, "--token", &self.token], more].concat();
        Ok(Agent::start(program(), host, &arguments)?)
    }

    /// Ends one, starts it again, and waits until it has converged.
    pub fn restart(&mut self, number: usize, arguments: &[&str]) -> anyhow::Result<()> {
        self.agents[number].end(Signal::SIGTERM)?;
        self.agents[number] = self.start_agent(&self.hosts[number], arguments)?;
        self.agents[number].wait_converged(self.hosts.len(), TIMEOUT)?;
        Ok(())
    }

    /// A pod on each host, once all have converged.
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

    /// Waits until the agents, and one that is not of this value, have converged with so many members.
    pub fn converge_with(&mut self, other: &mut Agent, count: usize) -> anyhow::Result<()> {
        let agents = self.agents.iter_mut().chain([other]);
        agents.map(|agent| agent.wait_converged(count, TIMEOUT)).try_for_each(|done| done.map(drop))
    }

    pub fn converge(&mut self) -> anyhow::Result<()> {
        let count = self.agents.len();
        self.agents.iter_mut().try_for_each(|agent| agent.wait_converged(count, TIMEOUT).map(drop))
    }
}

/// One for a cluster that is not there yet.
pub fn gossamer_token() -> anyhow::Result<String> {
    let output = Command::new(program()).args(["token", "--new"]).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

pub fn token_of(agent: &mut Agent) -> anyhow::Result<String> {
    let answer = agent.ask("/v1/token", TIMEOUT)?;
    Ok(answer["token"].as_str().expect("a token").to_owned())
}

/// What a tool prints when it runs in a namespace.
pub fn tool(netns: &NetNs, command: &str) -> String {
    let output = run(netns, command);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command}: {error}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs several commands, with "&&" between them, in a namespace.
pub fn sh(netns: &NetNs, commands: &str) {
    commands.split(" && ").for_each(|command| _ = tool(netns, command));
}

pub fn run(netns: &NetNs, command: &str) -> Output {
    let mut words = command.split_whitespace();
    let mut tool = Command::new(words.next().expect("a command"));
    tool.args(words).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    netns.spawn(&mut tool).and_then(std::process::Child::wait_with_output).expect(command)
}

/// The program as an operator runs it on an agent's host.
pub fn client(agent: &Agent, arguments: &[&str]) -> Output {
    let socket = agent.socket().display().to_string();
    let mut command = Command::new(program());
    command.args(arguments).args(["--socket", &socket]).output().expect("gossamer runs")
}

/// Asks again and again until the answer is yes.
pub fn wait_until(what: &str, patience: Duration, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < patience, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Freezes an agent; returns when each of its threads stands still.
pub fn freeze(agent: &Agent) -> anyhow::Result<()> {
    let pid = agent.pid();
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP)?;
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))?.collect::<Result<Vec<_>, _>>()?;
    wait_until("it does not stand still", TIMEOUT, || {
        tasks.iter().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('T'))
        })
    });
    Ok(())
}

/// Lets a frozen one go on.
pub fn thaw(agent: &Agent) -> anyhow::Result<()> {
    Ok(kill(Pid::from_raw(agent.pid().cast_signed()), Signal::SIGCONT)?)
}

/// Waits until an agent's status is as wanted; gives it. What a kernel or a pod shows at once, the
/// agent's loop may hear of a moment later.
pub fn status_where(agent: &mut Agent, wanted: impl Fn(&Value) -> bool) -> Value {
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

/// Whether one of the problems in an agent's status says so.
pub fn has_problem(agent: &mut Agent, words: &str) -> bool {
    let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
    status["problems"].to_string().contains(words)
}

pub fn has_warning(agent: &mut Agent, words: &str) -> bool {
    let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
    status["warnings"].to_string().contains(words)
}

/// Waits until a tool's output satisfies a condition; gives that output.
pub fn eventually(netns: &NetNs, command: &str, wanted: impl Fn(&str) -> bool) -> String {
    let start = Instant::now();
    loop {
        // What it asks for may not be there yet.
        let output = String::from_utf8(run(netns, command).stdout).expect("UTF-8");
        if wanted(&output) {
            return output;
        }
        assert!(start.elapsed() < TIMEOUT, "`{command}` never said what was expected:\n{output}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How many echo requests have reached a namespace.
pub fn echoes(netns: &NetNs) -> u64 {
    let counters = tool(netns, "cat /proc/net/snmp");
    let mut lines = counters.lines().filter(|line| line.starts_with("Icmp:"));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let place = names.split(' ').position(|name| name == "InEchos").expect("InEchos");
    values.split(' ').nth(place).and_then(|value| value.parse().ok()).expect("a number")
}

/// Of the Internet (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum = words.sum::<u32>();
    !(((sum >> 16) + (sum & 0xffff)) as u16)
}

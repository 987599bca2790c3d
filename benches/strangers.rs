//! What strangers can do to a member: floods of first packets, also with a proof that is repeated, and
//! half-open connections to its `http` port.
//! `cargo bench --bench strangers [-- SECONDS]`; `GOSSAMER=PATH` measures another program.
//!
//! Three members and an attacker, in network namespaces on one machine. While a flood goes on hosts join one
//! after the other. What counts: members called down, the time to join, memory and CPU of the flooded member.

#![allow(clippy::expect_used)]

use std::{
    io::Write as _,
    net::{SocketAddr, SocketAddrV4, TcpStream},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use gossamer::lab::{
    self, Agent, Flood, Host, Lab, NetNs, Replay, Source, call_plugin, cpu_seconds, median,
    memory_mib, spread,
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};
use serde_json::json;

const SECONDS: u64 = 60;
const PATIENCE: Duration = Duration::from_secs(30);
const RATES: [u32; 3] = [200, 1_000, 5_000];
const ATTACKS: [(Attack, &str); 4] = [
    (Attack::Flood(Source::UnusedNeighbors), "unused addresses of the underlay"),
    (Attack::Flood(Source::Far), "far addresses"),
    (Attack::Flood(Source::Honest), "one honest address"),
    (Attack::Replay, "the joining host, with one valid token"),
];
const PORT: u16 = 8473;
const HTTP: u16 = 9473;
const HALF_OPEN: usize = 5_000;
const ROUNDS: usize = 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let Some(code) = lab::rerun_inside(&arguments) {
        return code;
    }
    let seconds = arguments.iter().find_map(|a| a.parse().ok()).unwrap_or(SECONDS);
    Bench::start().and_then(|mut bench| bench.measure(seconds)).expect("measured");
    ExitCode::SUCCESS
}

/// What is done while hosts join.
#[derive(Clone, Copy)]
enum Attack {
    /// One host sends first packets without a proof.
    Flood(Source),
    /// A user of each joining host repeats one proof of its address.
    Replay,
}

struct Bench {
    lab: Lab,
    program: PathBuf,
    hosts: Vec<Host>,
    agents: Vec<Agent>,
    attacker: Host,
    token: String,
    /// Hosts that joined so far.
    joined: u16,
}

impl Bench {
    fn start() -> anyhow::Result<Self> {
        let shipped = std::env::var_os("GOSSAMER");
        let program =
            shipped.as_deref().map_or(Path::new(env!("CARGO_BIN_EXE_gossamer")), Path::new);
        let mut lab = Lab::new()?;
        let first = lab.host(1, "n1")?;
        let http = SocketAddrV4::new(first.ip, HTTP).to_string();
        let mut agent = Agent::start(program, &first, &["--init", "--http", &http])?;
        agent.wait_converged(1, PATIENCE)?;
        let token = agent.ask("/v1/token", PATIENCE)?["token"].as_str().expect("one").to_owned();
        let attacker = lab.host(66, "attacker")?;
        let program = program.to_owned();
        let (hosts, agents) = (vec![first], vec![agent]);
        let mut bench = Self { lab, program, hosts, agents, attacker, token, joined: 0 };
        for number in 2..=3 {
            let host = bench.lab.host(number, &format!("n{number}"))?;
            let agent = bench.join(&host)?;
            bench.hosts.push(host);
            bench.agents.push(agent);
        }
        for agent in &mut bench.agents {
            agent.wait_converged(3, PATIENCE)?;
        }
        Ok(bench)
    }

    fn join(&self, host: &Host) -> anyhow::Result<Agent> {
        let seed = self.hosts[0].ip.to_string();
        Ok(Agent::start(&self.program, host, &["--join", &seed, "--token", &self.token])?)
    }

    fn measure(&mut self, seconds: u64) -> anyhow::Result<()> {
        println!(
            "{seconds} s each; joins in s: median (min-max) of those that succeeded within {} s\n",
            PATIENCE.as_secs()
        );
        println!(
            "| from | packets/s | sent | downs | joins | in s | CPU of the flooded | RSS | handshakes |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        for (attack, name) in ATTACKS {
            for rate in RATES {
                self.flood(attack, name, rate, Duration::from_secs(seconds))?;
            }
        }
        self.half_open()
    }

    fn downs(&mut self) -> anyhow::Result<u64> {
        let mut downs = 0;
        for agent in &mut self.agents {
            let status = agent.ask("/v1/status", PATIENCE)?;
            downs += status["counters"]["downs"].as_u64().expect("a number");
        }
        Ok(downs)
    }

    fn flood(
        &mut self,
        attack: Attack,
        name: &str,
        rate: u32,
        span: Duration,
    ) -> anyhow::Result<()> {
        let downs = self.downs()?;
        let pid = self.agents[0].pid();
        let (begun, cpu) = (Instant::now(), cpu_seconds(pid));
        let to = SocketAddrV4::new(self.hosts[0].ip, PORT);
        let flood = match attack {
            Attack::Flood(source) => Some(Flood::start(&self.attacker, to, source, rate)?),
            Attack::Replay => None,
        };
        let mut sent = 0;
        let (mut tried, mut times) = (0, Vec::new());
        while begun.elapsed() < span {
            tried += 1;
            self.joined += 1;
            let number = 100 + self.joined;
            let host = self.lab.host(number, &format!("n{number}"))?;
            let replay = match attack {
                Attack::Replay => Some(replay(&host, to, rate)?),
                Attack::Flood(_) => None,
            };
            let start = Instant::now();
            let mut agent = self.join(&host)?;
            if agent.wait_converged(4, PATIENCE).is_ok() {
                times.push(start.elapsed().as_secs_f64());
                agent.leave()?;
                agent.wait()?;
            } else {
                agent.end(Signal::SIGKILL)?;
            }
            std::thread::sleep(Duration::from_secs(5));
            sent += replay.map_or(0, |replay| replay.sent());
        }
        let cpu = (cpu_seconds(pid) - cpu) / begun.elapsed().as_secs_f64();
        sent += flood.map_or(0, |flood| flood.sent());
        // A joiner that leaves again is called down by each of those that stay.
        let left = (times.len() * self.agents.len()) as u64;
        let downs = (self.downs()? - downs).saturating_sub(left);
        let status = self.agents[0].ask("/v1/status", PATIENCE)?;
        let joins = if times.is_empty() { "-".to_owned() } else { spread(&times, 2) };
        println!(
            "| {name} | {rate} | {sent} | {downs} | {} of {tried} | {joins} | {:.1} % | {:.0} MiB | {} |",
            times.len(),
            cpu * 100.0,
            memory_mib(pid, "VmRSS:"),
            status["handshakes"],
        );
        Ok(())
    }

    /// Status, ADD and gossip beside connections that never say what they want.
    fn half_open(&mut self) -> anyhow::Result<()> {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most.min(HALF_OPEN as u64 + 1_000), most)?;
        let downs = self.downs()?;
        println!(
            "\n{HALF_OPEN} half-open TCP connections to the `http` port, ms: median (min-max)\n"
        );
        println!("| | status | ADD | files of the agent | RSS |\n|---|---|---|---|---|");
        self.ask_and_add("before", 0)?;
        let to = SocketAddr::from((self.hosts[0].ip, HTTP));
        let mut open = Vec::new();
        for _ in 0..HALF_OPEN {
            let connected = self.attacker.netns.run(|| TcpStream::connect(to));
            let Ok(mut stream) = connected else { break };
            // One that is refused may be closed by now.
            let _ = stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: ");
            open.push(stream);
        }
        self.ask_and_add("beside them", open.len())?;
        println!("\nmembers called down meanwhile: {}", self.downs()? - downs);
        Ok(())
    }

    fn ask_and_add(&mut self, when: &str, open: usize) -> anyhow::Result<()> {
        let (mut asked, mut added) = (Vec::new(), Vec::new());
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "pods",
            "type": "gossamer",
            "socket": self.agents[0].socket(),
        });
        for round in 0..ROUNDS {
            let start = Instant::now();
            self.agents[0].ask("/v1/status", PATIENCE)?;
            asked.push(start.elapsed().as_secs_f64() * 1e3);
            let container = format!("pod{open}-{round}");
            let _space = NetNs::new(&container)?;
            let host = &self.hosts[0].netns;
            let call = |verb| call_plugin(&self.program, host, &config, verb, &container)?.done();
            added.push(call("ADD")?.as_secs_f64() * 1e3);
            call("DEL")?;
        }
        let pid = self.agents[0].pid();
        println!(
            "| {when} ({open}) | {} | {} | {} | {:.0} MiB |",
            spread(&asked, 1),
            spread(&added, 1),
            std::fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
            memory_mib(pid, "VmRSS:"),
        );
        anyhow::ensure!(median(asked) < 1_000.0, "status takes too long {when}");
        Ok(())
    }
}

/// Repeats a proof of a host's address; returns when it takes what it can.
fn replay(host: &Host, to: SocketAddrV4, rate: u32) -> anyhow::Result<Replay> {
    let replay = Replay::start(&host.netns, to.into(), &[host.ip.into()], rate)?;
    let begun = Instant::now();
    while replay.sent() < u64::from(rate) / 2 {
        anyhow::ensure!(begun.elapsed() < PATIENCE, "nothing is sent");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(replay)
}

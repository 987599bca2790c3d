//! Measures the TCP throughput between pods on two hosts: gossamer's tunnel against a hand-made one, and
//! gossamer's direct routes against plain ones. `cargo bench --bench throughput [-- SECONDS]`.
//!
//! All four pairs of hosts exist at the same time and alternate, so each ratio compares results of one
//! run. Needs `iperf3`.

#![allow(clippy::expect_used)]

use std::{
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use gossamer::lab::{self, Agent, Host, Lab, NetNs, Pod, median};

const ROUNDS: usize = 12;
const SECONDS: u32 = 2;
const TIMEOUT: Duration = Duration::from_secs(20);
const MTU: u32 = 1450;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let Some(code) = lab::rerun_inside(&arguments) {
        return code;
    }
    if Command::new("iperf3").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("SKIPPED: iperf3 is not installed");
        return ExitCode::SUCCESS;
    }
    let seconds = arguments.iter().find_map(|a| a.parse().ok()).unwrap_or(SECONDS);
    measure(seconds).expect("measured");
    ExitCode::SUCCESS
}

/// Two hosts with a pod each; the pods reach each other.
struct Pair {
    pods: [Pod; 2],
    /// Kept alive, because the agents maintain the path.
    _agents: Vec<Agent>,
    _hosts: [Host; 2],
}

fn measure(seconds: u32) -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let mut number = 0;
    let mut two = |lab: &mut Lab| -> anyhow::Result<[Host; 2]> {
        number += 2;
        let name = |n| format!("h{n}");
        Ok([lab.host(number - 1, &name(number - 1))?, lab.host(number, &name(number))?])
    };
    let pairs = [
        ("VXLAN by hand", by_hand(two(&mut lab)?, true)?),
        ("gossamer", by_gossamer(two(&mut lab)?, "vxlan")?),
        ("plain routes", by_hand(two(&mut lab)?, false)?),
        ("gossamer --mode direct", by_gossamer(two(&mut lab)?, "direct")?),
    ];
    let mut rates: [Vec<f64>; 4] = Default::default();
    for round in 0..ROUNDS {
        // Alternate the order, so that no pair always runs first.
        let order = if round % 2 == 0 { [0, 1, 2, 3] } else { [3, 2, 1, 0] };
        for number in order {
            rates[number].push(pairs[number].1.rate(seconds)?);
        }
    }
    let ratio = |ours: usize, theirs: usize| {
        median(rates[ours].iter().zip(&rates[theirs]).map(|(ours, theirs)| ours / theirs).collect())
    };
    let ratios = [ratio(1, 0), ratio(3, 2)];
    let medians = rates.clone().map(median);
    println!("TCP between pods, Gbit/s, median of {ROUNDS} rounds of {seconds} s, MTU {MTU}");
    for ((name, _), rate) in pairs.iter().zip(medians) {
        println!("{name:<24} {rate:>6.2}");
    }
    println!("gossamer / VXLAN by hand, median of the rounds' ratios         {:.3}", ratios[0]);
    println!("gossamer direct / plain routes, median of the rounds' ratios   {:.3}", ratios[1]);
    Ok(())
}

impl Pair {
    fn rate(&self, seconds: u32) -> anyhow::Result<f64> {
        let [from, to] = &self.pods;
        let mut server = Command::new("iperf3");
        server.arg("-s").stdout(Stdio::null());
        let mut server = to.netns.spawn(&mut server)?;
        let begun = Instant::now();
        let rate = loop {
            let mut client = Command::new("iperf3");
            client.args(["-c", &to.ip.to_string(), "-J", "-t", &seconds.to_string(), "-O", "1"]);
            client.args(["--connect-timeout", "1000"]).stdout(Stdio::piped());
            let output = from.netns.spawn(&mut client)?.wait_with_output()?;
            // The exit code is not meaningful, because the server may not listen yet.
            let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
            match report["end"]["sum_received"]["bits_per_second"].as_f64() {
                Some(rate) => break rate / 1e9,
                None => ensure!(begun.elapsed() < TIMEOUT, "{report}"),
            }
            thread::sleep(Duration::from_millis(20));
        };
        server.kill()?;
        server.wait()?;
        Ok(rate)
    }
}

fn by_gossamer(hosts: [Host; 2], mode: &str) -> anyhow::Result<Pair> {
    let program = Path::new(env!("CARGO_BIN_EXE_gossamer"));
    let mut first = Agent::start(program, &hosts[0], &["--init", "--mode", mode])?;
    first.wait_converged(1, TIMEOUT)?;
    let answer = first.ask("/v1/token", TIMEOUT)?;
    let token = answer["token"].as_str().context("no token")?.to_owned();
    let seed = hosts[0].ip.to_string();
    let joining = ["--join", &seed, "--token", &token, "--mode", mode];
    let mut agents = vec![first, Agent::start(program, &hosts[1], &joining)?];
    let mut pods = Vec::new();
    for (host, agent) in hosts.iter().zip(&mut agents) {
        let subnet = Agent::subnet(&agent.wait_converged(2, TIMEOUT)?)?;
        pods.push(host.pod(subnet, MTU)?);
    }
    let pods = pods.try_into().map_err(|_| anyhow::anyhow!("two pods"))?;
    Ok(Pair { pods, _agents: agents, _hosts: hosts })
}

/// Sets up what an administrator would do with `ip` and `bridge`.
fn by_hand(hosts: [Host; 2], tunnel: bool) -> anyhow::Result<Pair> {
    let subnets = ["10.50.1.0/24", "10.50.2.0/24"];
    let macs = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
    let pods = [0, 1].map(|n| hosts[n].pod(subnets[n].parse()?, MTU).map_err(anyhow::Error::from));
    for (here, there) in [(0, 1), (1, 0)] {
        let (local, remote) = (hosts[here].ip, hosts[there].ip);
        let vtep = format!("10.50.{}.0", there + 1);
        let commands = if tunnel {
            vec![
                format!(
                    "ip link add vx address {} mtu {MTU} type vxlan id 1 dev eth0 local {local} \
                     dstport 8472 nolearning",
                    macs[here]
                ),
                format!("ip addr add 10.50.{}.0/32 dev vx", here + 1),
                "ip link set vx up".to_owned(),
                format!("bridge fdb add {} dev vx dst {remote}", macs[there]),
                format!("ip neigh add {vtep} lladdr {} dev vx nud permanent", macs[there]),
                format!("ip route add {} via {vtep} dev vx onlink", subnets[there]),
            ]
        } else {
            vec![format!("ip route add {} via {remote} dev eth0", subnets[there])]
        };
        commands.iter().try_for_each(|command| run(&hosts[here].netns, command))?;
    }
    let [first, second] = pods;
    Ok(Pair { pods: [first?, second?], _agents: Vec::new(), _hosts: hosts })
}

fn run(netns: &NetNs, command: &str) -> anyhow::Result<()> {
    let mut words = command.split_whitespace();
    let mut tool = Command::new(words.next().context("a command")?);
    ensure!(netns.spawn(tool.args(words))?.wait()?.success(), "{command} failed");
    Ok(())
}

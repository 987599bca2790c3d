//! The steps of the demo. Each step is verified; the first failure ends the demo.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use ipnet::Ipv4Net;
use nix::sys::signal::Signal;

use super::{
    DemoOptions,
    chaos::inject_faults,
    screen::{Screen, span},
    window,
};
use crate::{
    api::{AgentStatus, ClusterToken},
    cli::output::{or_dash, table},
    dataplane::desired::device_name,
    lab::{Agent, Host, Lab, Pinger, Pod, tables},
};

const STEP_TIMEOUT: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
const DASHBOARD_PORT: u16 = 9473;
const POD_MTU: u32 = 1450;
/// Pings sent, one each 10 ms, while an agent is dead.
const STREAM_REQUESTS: u16 = 150;

struct DemoRun {
    screen: Screen,
    program: PathBuf,
    hosts: Vec<Host>,
    agents: Vec<Agent>,
    subnets: Vec<Ipv4Net>,
    pods: Vec<Pod>,
    token: String,
}

pub fn run_demo(nodes: u16, options: DemoOptions) -> anyhow::Result<()> {
    let DemoOptions { chaos, keep, http } = options;
    let mut story = DemoRun {
        screen: Screen::new(),
        program: std::env::current_exe()?,
        hosts: Vec::new(),
        agents: Vec::new(),
        subnets: Vec::new(),
        pods: Vec::new(),
        token: String::new(),
    };
    println!(
        "gossamer demo: {nodes} hosts in network namespaces, each with a real agent and a pod\n"
    );
    story.build(nodes)?;
    story.create(http.is_some())?;
    story.join()?;
    story.lease_table()?;
    story.ping_all()?;
    story.kernel_tables()?;
    if chaos {
        story.chaos()?;
    }
    story.kill()?;
    story.restart()?;
    story.leave()?;
    if keep {
        story.rejoin()?;
    }
    story.screen.summary();
    if keep {
        story.keep(http)?;
    }
    Ok(())
}

impl DemoRun {
    fn build(&mut self, nodes: u16) -> anyhow::Result<()> {
        let hosts = &mut self.hosts;
        self.screen.step("an underlay: hosts on a bridge", || {
            let mut lab = Lab::new()?;
            for number in 1..=nodes {
                hosts.push(lab.host(number, &format!("n{number}"))?);
            }
            let (first, last) = (hosts[0].ip, hosts[hosts.len() - 1].ip);
            Ok(((), format!("n1 to n{nodes}, {first} to {last}")))
        })
    }

    fn create(&mut self, with_dashboard: bool) -> anyhow::Result<()> {
        let (program, host) = (&self.program, &self.hosts[0]);
        let dashboard = format!("--http={}", dashboard_of(host));
        let (agent, token) = self.screen.step("n1 creates the cluster", || {
            let arguments = ["--init", &dashboard];
            let arguments = if with_dashboard { &arguments[..] } else { &arguments[..1] };
            let mut agent = Agent::start(program, host, arguments)?;
            agent.wait_converged(1, STEP_TIMEOUT)?;
            let status: AgentStatus = agent.ask_as("/v1/status", STEP_TIMEOUT)?;
            let ClusterToken { token } = agent.ask_as("/v1/token", STEP_TIMEOUT)?;
            let (cluster, subnet) = (or_dash(status.cluster), or_dash(status.subnet));
            Ok(((agent, token), format!("cluster {cluster}, n1 has {subnet}")))
        })?;
        self.agents.push(agent);
        self.token = token;
        Ok(())
    }

    fn join(&mut self) -> anyhow::Result<()> {
        let count = self.hosts.len();
        let what = format!("n2 to n{count} join at once, and every node knows all others");
        let (program, hosts, token) = (&self.program, &self.hosts, &self.token);
        let (agents, subnets) = (&mut self.agents, &mut self.subnets);
        self.screen.step(&what, || {
            let seed = hosts[0].ip.to_string();
            for host in &hosts[1..] {
                agents.push(Agent::start(program, host, &["--join", &seed, "--token", token])?);
            }
            let begun = Instant::now();
            for agent in agents.iter_mut() {
                subnets.push(Agent::subnet(&agent.wait_converged(count, STEP_TIMEOUT)?)?);
            }
            for (n, subnet) in subnets.iter().enumerate() {
                ensure!(!subnets[..n].contains(subnet), "{subnet} was leased twice");
            }
            Ok((
                (),
                format!(
                    "{count} different subnets, converged {} after the start",
                    span(begun.elapsed())
                ),
            ))
        })
    }

    fn lease_table(&mut self) -> anyhow::Result<()> {
        let rows: Vec<[String; 3]> = self
            .hosts
            .iter()
            .zip(&self.subnets)
            .map(|(host, subnet)| [host.name.clone(), host.ip.to_string(), subnet.to_string()])
            .collect();
        self.screen.details(table(["HOST", "UNDERLAY", "SUBNET"], &rows));
        Ok(())
    }

    fn ping_all(&mut self) -> anyhow::Result<()> {
        let (hosts, subnets, pods) = (&self.hosts, &self.subnets, &mut self.pods);
        let rows =
            self.screen.step("a pod on each host, and every pod pings all others", || {
                for (host, subnet) in hosts.iter().zip(subnets) {
                    pods.push(host.pod(*subnet, POD_MTU)?);
                }
                let mut rows = Vec::new();
                let mut pairs = 0;
                for (host, from) in hosts.iter().zip(pods.iter()) {
                    let mut pinger = Pinger::new(&from.netns)?;
                    let mut row = vec![format!("{} {}", host.name, from.ip)];
                    for to in pods.iter() {
                        row.push(if to.ip == from.ip {
                            "-".to_owned()
                        } else {
                            pairs += 1;
                            reach(&mut pinger, to.ip)?
                        });
                    }
                    rows.push(row);
                }
                Ok((rows, format!("{pairs} of {pairs} pairs reach each other")))
            })?;
        // A wider table would add nothing to the result of the step.
        if rows.len() <= 6 {
            let header = hosts.iter().map(|host| format!("-> {}", host.name));
            let header: Vec<String> = ["pod".to_owned()].into_iter().chain(header).collect();
            self.screen.details(matrix(&header, &rows));
        }
        Ok(())
    }

    fn kernel_tables(&mut self) -> anyhow::Result<()> {
        let (host, peers) = (&self.hosts[0], self.hosts.len() - 1);
        let device = device_name(1);
        let shown = self.screen.step("n1's kernel: device, routes, neighbors, FDB", || {
            let shown = tables(host, &device)?;
            ensure!(
                routes(&shown) == peers,
                "{} routes for {peers} peers:\n{shown}",
                routes(&shown)
            );
            Ok((shown, format!("three entries for each of {peers} peers")))
        })?;
        self.screen.details(shown);
        Ok(())
    }

    fn chaos(&mut self) -> anyhow::Result<()> {
        let (host, pods) = (&self.hosts[0], &self.pods);
        let what = "faults in n1's kernel, while its pod pings another every 5 ms";
        let rows = self.screen.step(what, || {
            let rows = inject_faults(host, &device_name(1), &pods[0], &pods[1])?;
            let text = format!("{} faults, all repaired by n1 itself", rows.len());
            Ok((rows, text))
        })?;
        self.screen.details(table(["FAULT", "REPAIRED AFTER", "PACKETS LOST"], &rows));
        Ok(())
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        let (from, to) = (&self.pods[0], self.pods[1].ip);
        let agent = &mut self.agents[1];
        self.screen.step("the agent of n2 is killed (SIGKILL) under a ping every 10 ms", || {
            let mut pinger = Pinger::new(&from.netns)?;
            let stream = thread::spawn(move || {
                pinger.stream(to, STREAM_REQUESTS, Duration::from_millis(10))
            });
            agent.end(Signal::SIGKILL)?;
            let answered = stream.join().map_err(|_| anyhow::anyhow!("the ping panicked"))??;
            ensure!(
                answered == STREAM_REQUESTS,
                "{} of {STREAM_REQUESTS} packets were lost",
                STREAM_REQUESTS - answered
            );
            Ok((
                (),
                format!(
                    "0 of {STREAM_REQUESTS} packets lost: the kernel forwards without the agent"
                ),
            ))
        })
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        let (program, hosts, agents) = (&self.program, &self.hosts, &mut self.agents);
        let (before, count) = (self.subnets[1], self.hosts.len());
        let (from, to) = (&self.pods[0], self.pods[1].ip);
        self.screen.step("it is started again, without seeds or token", || {
            let begun = Instant::now();
            agents[1] = Agent::start(program, &hosts[1], &[])?;
            let after = agents[1].wait_subnet(STEP_TIMEOUT)?;
            let ready = begun.elapsed();
            ensure!(after == before, "it had {before} and has {after} now");
            agents[1].wait_converged(count, STEP_TIMEOUT)?;
            reach(&mut Pinger::new(&from.netns)?, to)?;
            Ok(((), format!("same subnet {after}, {} after the start", span(ready))))
        })
    }

    fn leave(&mut self) -> anyhow::Result<()> {
        let last = self.hosts.len() - 1;
        let what = format!("n{} leaves for good", last + 1);
        let (hosts, agents, subnet) = (&self.hosts, &mut self.agents, self.subnets[last]);
        let shown = self.screen.step(&what, || {
            agents[last].leave()?;
            let begun = Instant::now();
            let device = device_name(1);
            for host in &hosts[..last] {
                loop {
                    let shown = tables(host, &device)?;
                    if routes(&shown) == last - 1 && !shown.contains(&subnet.to_string()) {
                        break;
                    }
                    ensure!(begun.elapsed() < STEP_TIMEOUT, "{} still has its entries", host.name);
                    thread::sleep(Duration::from_millis(1));
                }
            }
            let gone = span(begun.elapsed());
            let shown = tables(&hosts[0], &device)?;
            Ok((shown, format!("its entries are gone from all others after {gone}")))
        })?;
        self.screen.details(shown);
        Ok(())
    }

    /// Makes the cluster complete again, for `--keep`.
    fn rejoin(&mut self) -> anyhow::Result<()> {
        let last = self.hosts.len() - 1;
        let what = format!("n{} joins again, as a new node", last + 1);
        let (program, hosts, token) = (&self.program, &self.hosts, &self.token);
        let (agents, pods, before) = (&mut self.agents, &mut self.pods, self.subnets[last]);
        self.screen.step(&what, || {
            let (host, seed) = (&hosts[last], hosts[0].ip.to_string());
            let arguments = ["--join", &seed, "--token", token];
            agents[last] = Agent::start(program, host, &arguments)?;
            let subnet = Agent::subnet(&agents[last].wait_converged(last + 1, STEP_TIMEOUT)?)?;
            if subnet != before {
                // The bridge has an address of the subnet that the host had before.
                host.move_pod(&mut pods[last], subnet, POD_MTU)?;
            }
            reach(&mut Pinger::new(&pods[0].netns)?, pods[last].ip)?;
            Ok(((), format!("it has {subnet}, and n1's pod reaches its pod")))
        })
    }

    fn keep(&self, http: Option<SocketAddr>) -> anyhow::Result<()> {
        if let Some(address) = http {
            window::show(dashboard_of(&self.hosts[0]))?;
            println!("\nDashboard of n1: http://{address}/");
        }
        println!(
            "\nThe cluster keeps running until Ctrl-C. From another terminal:\n\n  \
             gossamer demo exec n1 -- gossamer status\n  \
             gossamer demo exec n1 -- ip route\n  \
             gossamer demo exec n1-pod -- ping {}\n",
            self.pods[1].ip
        );
        loop {
            thread::park();
        }
    }
}

/// Returns the address of a host's dashboard inside the demo.
fn dashboard_of(host: &Host) -> SocketAddr {
    (host.ip, DASHBOARD_PORT).into()
}

/// Returns the round trip to a pod. The first ping may be lost, because the pods resolve each other's MAC
/// first.
fn reach(pinger: &mut Pinger, to: Ipv4Addr) -> anyhow::Result<String> {
    pinger.ping(to, PING_TIMEOUT)?;
    let round_trip =
        pinger.ping(to, PING_TIMEOUT)?.with_context(|| format!("{to} does not answer"))?;
    Ok(span(round_trip))
}

fn routes(shown: &str) -> usize {
    shown.lines().filter(|line| line.contains(" via ")).count()
}

fn matrix(header: &[String], rows: &[Vec<String>]) -> String {
    let lines = std::iter::once(header).chain(rows.iter().map(Vec::as_slice));
    let width = lines.clone().flatten().map(|cell| cell.chars().count()).max().unwrap_or(0) + 2;
    lines
        .map(|cells| cells.iter().map(|cell| format!("{cell:<width$}")).collect::<String>())
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}

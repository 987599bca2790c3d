//! `gossamer demo node`: one host of a cluster of containers, for docker-compose. It runs an agent, and
//! pods that ping the pods of all other hosts continuously.
//!
//! Pods are attached through the agent's control socket, as a container runtime does it. A line of output
//! shows what the pods reach, whenever that changes.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode},
    str::FromStr,
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Args;
use ipnet::{IpNet, Ipv4Net};
use nix::{
    sys::signal::{SigSet, Signal, kill},
    unistd::Pid,
};

use super::fail;
use crate::{
    api::{self, AgentStatus, AttachRequest, AttachmentName, ClusterToken},
    config::Instance,
    files::{PRIVATE, replace},
    lab::{NetNs, Pinger},
    netlink::Netlink,
    runtime::block_on,
};

/// Offset of the first pod's address in the subnet. The gateway has offset 1.
const FIRST_POD_OFFSET: u32 = 2;
const ROUND_INTERVAL: Duration = Duration::from_secs(2);
/// An unchanged line is printed again after this number of rounds.
const REPEAT_AFTER_ROUNDS: u32 = 15;
const PING_TIMEOUT: Duration = Duration::from_millis(300);
/// Time for the agent to converge, and for the token to be written.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Number of pods on this host
    #[arg(long, default_value_t = 2, value_name = "COUNT")]
    pods: u32,
    /// File shared by all hosts: the host with --init writes the token to it, the others wait for it
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// Create the cluster, unless the file already has a token
    #[arg(long)]
    init: bool,
    /// Route of this host, as in 10.0.2.0/24=10.0.1.254; repeatable
    #[arg(long, value_name = "NETWORK=VIA")]
    route: Vec<Route>,
    /// Arguments of the agent
    #[arg(last = true, value_name = "SETTING")]
    agent: Vec<String>,
}

/// A route of the underlay.
#[derive(Clone, Copy, Debug)]
struct Route {
    network: Ipv4Net,
    via: Ipv4Addr,
}

impl FromStr for Route {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not NETWORK=VIA, as in 10.0.2.0/24=10.0.1.254");
        let (network, via) = text.split_once('=').ok_or_else(bad)?;
        let network = network.parse().map_err(|_| bad())?;
        Ok(Self { network, via: via.parse().map_err(|_| bad())? })
    }
}

pub fn run(args: &NodeArgs) -> ExitCode {
    match run_node(args) {
        Ok(code) => code,
        Err(error) => fail(format_args!("demo node: {error:#}")),
    }
}

/// Waits for SIGTERM or SIGINT. The kernel does the forwarding.
pub fn run_router() -> ExitCode {
    let mut signals = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT].into_iter().for_each(|signal| signals.add(signal));
    match signals.thread_block().and_then(|()| signals.wait()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => fail(format_args!("demo router: {error:#}")),
    }
}

/// Runs agent and pods. Forwards SIGTERM and SIGINT to the agent, because the first process of a
/// container has to.
fn run_node(args: &NodeArgs) -> anyhow::Result<ExitCode> {
    let mut signals = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT].into_iter().for_each(|signal| signals.add(signal));
    signals.thread_block()?;
    ensure_routes(&args.route)?;
    let mut agent = start_agent(args, &signals)?;
    let pid = Pid::from_raw(agent.id().cast_signed());
    thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            let _ = kill(pid, signal);
        }
    });
    let (pods, token, init) = (args.pods, args.token_file.clone(), args.init);
    let routes = args.route.clone();
    let shown = thread::spawn(move || {
        let shown = run_pods(pods, init.then_some(token.as_path()), &routes);
        if let Err(error) = &shown {
            eprintln!("demo node: {error:#}");
            let _ = kill(pid, Signal::SIGTERM);
        }
        shown
    });
    let status = agent.wait()?;
    // The thread ends only on failure.
    let failed = shown.is_finished() || !status.success();
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn start_agent(args: &NodeArgs, signals: &SigSet) -> anyhow::Result<Child> {
    let has_token = || fs::metadata(&args.token_file).is_ok_and(|meta| meta.len() > 0);
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("agent").args(&args.agent);
    if args.init && !has_token() {
        command.arg("--init");
    } else {
        wait_until("the token has not been written", has_token)?;
        command.arg("--token-file").arg(&args.token_file);
    }
    // The child would inherit blocked signals.
    signals.thread_unblock()?;
    let child = command.spawn();
    signals.thread_block()?;
    child.context("the agent")
}

fn run_pods(count: u32, token_file: Option<&Path>, routes: &[Route]) -> anyhow::Result<()> {
    let socket = Instance::default().socket();
    let status =
        || -> anyhow::Result<AgentStatus> { Ok(block_on(api::get_as(&socket, "/v1/status"))??) };
    let mut subnet = None;
    wait_until("the agent has no subnet", || {
        let status = status().ok().filter(|status| status.converged);
        subnet = status.and_then(|status| ipv4(status.subnet?));
        subnet.is_some()
    })?;
    let subnet = subnet.context("a subnet")?;
    if let Some(path) = token_file {
        let ClusterToken { token } = block_on(api::get_as(&socket, "/v1/token"))??;
        replace(path, &token, PRIVATE).with_context(|| path.display().to_string())?;
    }
    let namespaces: Vec<NetNs> =
        (0..count).map(|pod| NetNs::unnamed(&format!("pod-{pod}"))).collect::<Result<_, _>>()?;
    let own: Vec<Ipv4Addr> = (0..count).map(|pod| address(subnet, pod)).collect();
    let mut pingers = Vec::new();
    for (pod_netns, ip) in namespaces.iter().zip(&own) {
        attach_pod(&socket, pod_netns, *ip)?;
        pingers.push(Pinger::new(pod_netns)?);
    }
    let (mut printed, mut rounds) = (String::new(), 0);
    loop {
        ensure_routes(routes)?;
        if let Ok(status) = status() {
            let line = ping_all_pods(&status, count, &own, &mut pingers);
            if line != printed || rounds % REPEAT_AFTER_ROUNDS == 0 {
                println!("{line}");
                printed = line;
            }
            rounds += 1;
        }
        thread::sleep(ROUND_INTERVAL);
    }
}

/// Attaches a pod as a runtime does. It first detaches the pod of an earlier run of this container.
fn attach_pod(socket: &Path, pod_netns: &NetNs, ip: Ipv4Addr) -> anyhow::Result<()> {
    let name = || (pod_netns.name().to_owned(), "eth0".to_owned());
    let (container, interface) = name();
    let old = AttachmentName { container, interface };
    block_on(api::post_json(socket, "/v1/pods/detach", &old))??;
    let (container, interface) = name();
    let netns = format!("/proc/{}/fd/{}", std::process::id(), pod_netns.file().as_raw_fd());
    let (owner, addresses) = ("demo".to_owned(), vec![IpAddr::V4(ip)]);
    let request = AttachRequest {
        container,
        interface,
        owner,
        netns: netns.into(),
        addresses,
        mac: None,
        default_route: true,
        others_first: false,
    };
    block_on(api::post_json(socket, "/v1/pods/attach", &request))??;
    Ok(())
}

/// Pings all pods of the cluster from every pod of this host, and returns the line of output.
fn ping_all_pods(
    status: &AgentStatus,
    count: u32,
    own: &[Ipv4Addr],
    pingers: &mut [Pinger],
) -> String {
    let (mut sent, mut answered, mut silent) = (0, 0, Vec::new());
    for member in status.members.iter().filter(|member| member.is_present()) {
        let Some(subnet) = member.subnets.iter().find_map(|subnet| ipv4(*subnet)) else {
            continue;
        };
        let before = sent - answered;
        for to in (0..count).map(|pod| address(subnet, pod)) {
            for (pinger, _) in pingers.iter_mut().zip(own).filter(|(_, from)| **from != to) {
                sent += 1;
                answered += u32::from(matches!(pinger.ping(to, PING_TIMEOUT), Ok(Some(_))));
            }
        }
        if sent - answered > before {
            silent.push(member.name.as_str());
        }
    }
    let subnet = status.subnet.map_or("no subnet".to_owned(), |subnet| subnet.to_string());
    let (name, alive) = (&status.name, status.members_alive());
    let line = format!("{name}: {subnet}, {alive} members up, pods reach {answered} of {sent}");
    if silent.is_empty() { line } else { format!("{line}; silent: {}", silent.join(", ")) }
}

/// Returns an IPv4 subnet.
const fn ipv4(subnet: IpNet) -> Option<Ipv4Net> {
    match subnet {
        IpNet::V4(subnet) => Some(subnet),
        IpNet::V6(_) => None,
    }
}

fn address(subnet: Ipv4Net, pod: u32) -> Ipv4Addr {
    (u32::from(subnet.network()) + FIRST_POD_OFFSET + pod).into()
}

/// Adds missing routes. The kernel deletes them when Docker removes an interface.
fn ensure_routes(routes: &[Route]) -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
    for Route { network, via } in routes {
        // Fails if the route exists, or if its interface does not.
        let _ = netlink.add_route(*network, *via);
    }
    Ok(())
}

fn wait_until(what: &str, mut reached: impl FnMut() -> bool) -> anyhow::Result<()> {
    let until = std::time::Instant::now() + STARTUP_TIMEOUT;
    while !reached() {
        if std::time::Instant::now() > until {
            bail!("{what} after {STARTUP_TIMEOUT:?}");
        }
        thread::sleep(RETRY_INTERVAL);
    }
    Ok(())
}

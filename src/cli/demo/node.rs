//! `gossamer demo node`: one host of a cluster of containers, for docker-compose: an agent, and pods that ask
//! the pods of all other hosts without end.
//!
//! The pods are connected as those of a container runtime are, by the agent's control socket. What they reach
//! is one line of output whenever it changes.

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
use ipnet::Ipv4Net;
use nix::{
    sys::signal::{SigSet, Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::fail;
use crate::{
    api::{self, AttachRequest, AttachmentName},
    config::Instance,
    lab::{NetNs, Pinger},
    netlink::Netlink,
    store::{PRIVATE, replace},
};

/// Pods of a host have the addresses from this place on: the gateway has the one before.
const FIRST_PLACE: u32 = 2;
const ROUND: Duration = Duration::from_secs(2);
/// The same line is said again after so many rounds.
const REPEAT: u32 = 15;
const ANSWER: Duration = Duration::from_millis(300);
/// For the agent to come up, and for the token to be written.
const TIMEOUT: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Pods on this host
    #[arg(long, default_value_t = 2, value_name = "COUNT")]
    pods: u32,
    /// A file that all hosts share: the one with --init writes the token into it, others wait for it
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// Create the cluster, unless the file has a token already
    #[arg(long)]
    init: bool,
    /// A route of this host's, as in 10.0.2.0/24=10.0.1.254; repeatable
    #[arg(long, value_name = "NETWORK=VIA")]
    route: Vec<Route>,
    /// Settings of the agent
    #[arg(last = true, value_name = "SETTING")]
    agent: Vec<String>,
}

/// Where a network is to be found.
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
    match stay(args) {
        Ok(code) => code,
        Err(error) => fail(format_args!("demo node: {error:#}")),
    }
}

/// Forwarding is the kernel's work.
pub fn route() -> ExitCode {
    let mut signals = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT].into_iter().for_each(|signal| signals.add(signal));
    match signals.thread_block().and_then(|()| signals.wait()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => fail(format_args!("demo router: {error:#}")),
    }
}

/// The first process of a container has to pass signals on itself.
fn stay(args: &NodeArgs) -> anyhow::Result<ExitCode> {
    let mut signals = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT].into_iter().for_each(|signal| signals.add(signal));
    signals.thread_block()?;
    keep_routes(&args.route)?;
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
        let shown = serve(pods, init.then_some(token.as_path()), &routes);
        if let Err(error) = &shown {
            eprintln!("demo node: {error:#}");
            let _ = kill(pid, Signal::SIGTERM);
        }
        shown
    });
    let status = agent.wait()?;
    // It ends only if it fails.
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
    // Signals that are blocked here would be in there.
    signals.thread_unblock()?;
    let child = command.spawn();
    signals.thread_block()?;
    child.context("the agent")
}

fn serve(count: u32, token_file: Option<&Path>, routes: &[Route]) -> anyhow::Result<()> {
    let socket = Instance::default().socket();
    let ask =
        |target: &str| -> anyhow::Result<Value> { Ok(api::block_on(api::get(&socket, target))??) };
    let mut subnet = None;
    wait_until("the agent has no subnet", || {
        let status = ask("/v1/status").ok().filter(|status| status["converged"] == true);
        subnet = status.and_then(|status| status["subnet"].as_str()?.parse::<Ipv4Net>().ok());
        subnet.is_some()
    })?;
    let subnet = subnet.context("a subnet")?;
    if let Some(path) = token_file {
        let token = ask("/v1/token")?;
        let token = token["token"].as_str().context("a token")?;
        replace(path, token, PRIVATE).with_context(|| path.display().to_string())?;
    }
    let spaces: Vec<NetNs> =
        (0..count).map(|pod| NetNs::unnamed(&format!("pod-{pod}"))).collect::<Result<_, _>>()?;
    let own: Vec<Ipv4Addr> = (0..count).map(|pod| address(subnet, pod)).collect();
    let mut pingers = Vec::new();
    for (space, ip) in spaces.iter().zip(&own) {
        connect(&socket, space, *ip)?;
        pingers.push(Pinger::new(space)?);
    }
    let (mut said, mut rounds) = (String::new(), 0);
    loop {
        keep_routes(routes)?;
        if let Ok(status) = ask("/v1/status") {
            let line = ask_everybody(&status, count, &own, &mut pingers);
            if line != said || rounds % REPEAT == 0 {
                println!("{line}");
                said = line;
            }
            rounds += 1;
        }
        thread::sleep(ROUND);
    }
}

/// As a runtime does, after it has given back what an earlier run of this container may have had.
fn connect(socket: &Path, space: &NetNs, ip: Ipv4Addr) -> anyhow::Result<()> {
    let name = || (space.name().to_owned(), "eth0".to_owned());
    let (container, interface) = name();
    let old = AttachmentName { container, interface };
    api::block_on(api::post_json(socket, "/v1/pods/detach", &old))??;
    let (container, interface) = name();
    let netns = format!("/proc/{}/fd/{}", std::process::id(), space.file().as_raw_fd());
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
    api::block_on(api::post_json(socket, "/v1/pods/attach", &request))??;
    Ok(())
}

/// Every pod of this host asks all pods of the cluster.
fn ask_everybody(status: &Value, count: u32, own: &[Ipv4Addr], pingers: &mut [Pinger]) -> String {
    let (mut asked, mut answered, mut silent) = (0, 0, Vec::new());
    let members = status["members"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_gone = |member: &&Value| member["left"] == true || member["forgotten"] == true;
    for member in members.iter().filter(|member| !is_gone(member)) {
        let subnets = member["subnets"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let Some(subnet) = subnets.filter_map(|text| text.parse::<Ipv4Net>().ok()).next() else {
            continue;
        };
        let before = asked - answered;
        for to in (0..count).map(|pod| address(subnet, pod)) {
            for (pinger, _) in pingers.iter_mut().zip(own).filter(|(_, from)| **from != to) {
                asked += 1;
                answered += u32::from(matches!(pinger.ping(to, ANSWER), Ok(Some(_))));
            }
        }
        if asked - answered > before {
            silent.push(member["name"].as_str().unwrap_or("?"));
        }
    }
    let name = status["name"].as_str().unwrap_or("?");
    let subnet = status["subnet"].as_str().unwrap_or("no subnet");
    let alive = members.iter().filter(|member| member["liveness"] == "alive").count();
    let line = format!("{name}: {subnet}, {alive} members up, pods reach {answered} of {asked}");
    if silent.is_empty() { line } else { format!("{line}; silent: {}", silent.join(", ")) }
}

fn address(subnet: Ipv4Net, pod: u32) -> Ipv4Addr {
    (u32::from(subnet.network()) + FIRST_PLACE + pod).into()
}

/// They go when Docker takes an interface away, and have to be there when it comes back.
fn keep_routes(routes: &[Route]) -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
    for Route { network, via } in routes {
        // It is there, or its interface is not.
        let _ = netlink.add_route(*network, *via);
    }
    Ok(())
}

fn wait_until(what: &str, mut reached: impl FnMut() -> bool) -> anyhow::Result<()> {
    let until = std::time::Instant::now() + TIMEOUT;
    while !reached() {
        if std::time::Instant::now() > until {
            bail!("{what} after {TIMEOUT:?}");
        }
        thread::sleep(RETRY);
    }
    Ok(())
}

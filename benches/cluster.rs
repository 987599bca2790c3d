//! Measures how fast a cluster forms, what a join and a leave cost, and what an idle agent costs. Real agents
//! run on real kernels, in network namespaces on one machine. `cargo bench --bench cluster [-- SIZE ...]
//! [--busy]`; `GOSSAMER=PATH` measures that program.
//!
//! Times come from netlink: a socket in each namespace receives every route, neighbor and FDB entry that
//! the kernel announces. States are on the disk that holds the build, because a flush to a tmpfs is free.
//! `--busy` keeps both cores busy with other work. All hosts share the cores of this machine, so the CPU
//! limits results for many nodes. Compare them only with results from the same machine.

#![allow(clippy::expect_used)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use gossamer::{
    dataplane::desired::ROUTE_PROTOCOL,
    lab::{self, Agent, Host, Lab, NetNs, cpu_seconds, median, memory_mib, spread},
    netlink::parse_messages,
};
use rtnetlink::{
    packet_core::NetlinkPayload,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{NeighbourAttribute, NeighbourState},
        route::{RouteAttribute, RouteProtocol},
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// Where the lab keeps the files of the hosts.
const HOSTS: &str = "/run/lab";
const SIZES: [usize; 3] = [3, 10, 30];
const TIMEOUT: Duration = Duration::from_secs(120);
/// Time until members have told each other all, before the idle measurement.
const SETTLE_TIME: Duration = Duration::from_secs(30);
/// Length of the idle measurement.
const IDLE_PERIOD: Duration = Duration::from_secs(30);
const ENTRIES_PER_PEER: usize = 3;
/// Time until the work of the start is done, before the CPU time of a join is measured.
const QUIET_TIME: Duration = Duration::from_secs(8);
/// Time after a join in which other members' CPU time is counted as the join's.
const JOIN_COST_PERIOD: Duration = Duration::from_secs(2);

/// What one size measured; times in milliseconds.
#[derive(Default)]
struct Figures {
    at_once: Vec<f64>,
    /// CPU of each agent until the full mesh exists.
    mesh_cpu: Vec<f64>,
    seen: Vec<f64>,
    complete: Vec<f64>,
    gone: Vec<f64>,
    /// CPU of each other member for one join, at rest subtracted.
    join_cpu: Vec<f64>,
    connections: Vec<f64>,
}

fn program() -> PathBuf {
    std::env::var_os("GOSSAMER").map_or_else(|| env!("CARGO_BIN_EXE_gossamer").into(), Into::into)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let Some(code) = lab::rerun_inside(&arguments) {
        return code;
    }
    let sizes: Vec<usize> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    let is_busy = arguments.iter().any(|argument| argument == "--busy");
    measure(if sizes.is_empty() { &SIZES } else { &sizes }, is_busy).expect("measured");
    ExitCode::SUCCESS
}

fn measure(sizes: &[usize], is_busy: bool) -> anyhow::Result<()> {
    let size = fs::metadata(program())?.len() as f64 / 1e6;
    println!(
        "program: {size:.1} MB; other load: {}\n",
        if is_busy { "both cores" } else { "none" }
    );
    let mut lab = Lab::new()?;
    let disk = Disk::mount()?;
    let _load: Vec<Load> = (0..2 * usize::from(is_busy)).map(|_| Load::start()).collect();
    println!("ms, median (min-max)\n");
    println!(
        "{:<6}{:<22}{:<20}{:<20}{:<20}{:<18}{:<16}{:<12}",
        "nodes",
        "all at once",
        "joiner seen by all",
        "joiner complete",
        "gone everywhere",
        "CPU to mesh",
        "CPU per join",
        "connections"
    );
    let mut rest = Vec::new();
    for &size in sizes {
        let rounds = match size {
            0..=10 => 8,
            11..=50 => 4,
            _ => 2,
        };
        let hosts = hosts(&mut lab, size)?;
        let mut figures = Figures::default();
        for round in 0..rounds {
            all_at_once(&hosts, &mut figures)?;
            let agents = joiner(&hosts, &mut figures, round == rounds - 1)?;
            if !agents.is_empty() {
                rest.push((size, at_rest(&hosts, &agents)));
            }
        }
        println!(
            "{size:<6}{:<22}{:<20}{:<20}{:<20}{:<18}{:<16}{:<12}",
            spread(&figures.at_once, 0),
            spread(&figures.seen, 0),
            spread(&figures.complete, 0),
            spread(&figures.gone, 0),
            spread(&figures.mesh_cpu, 0),
            spread(&figures.join_cpu, 1),
            spread(&figures.connections, 0),
        );
    }
    println!("\nat rest for {IDLE_PERIOD:?}, after {SETTLE_TIME:?}; medians over the agents");
    println!("nodes  RSS MB (anonymous)  CPU % of a core  B/s received  B/s sent");
    for (size, Rest { rss, anonymous, cpu, received, sent }) in rest {
        let memory = format!("{rss:.1} ({anonymous:.1})");
        println!("{size:<7}{memory:<20}{cpu:<17.3}{received:<14.0}{sent:.0}");
    }
    drop(disk);
    Ok(())
}

/// A directory on the disk of the build, mounted where the lab keeps the hosts' files.
struct Disk(PathBuf);

impl Disk {
    fn mount() -> anyhow::Result<Self> {
        let here = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-bench");
        let _ = fs::remove_dir_all(&here);
        fs::create_dir_all(&here)?;
        fs::create_dir_all(HOSTS)?;
        let mounted = Command::new("mount").arg("--bind").arg(&here).arg(HOSTS).status()?;
        anyhow::ensure!(mounted.success(), "mount of {} failed", here.display());
        Ok(Self(here))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that keeps one core busy.
struct Load(Child);

impl Load {
    fn start() -> Self {
        let work = Command::new("sh").args(["-c", "while :; do :; done"]).spawn();
        Self(work.expect("a shell"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hosts(lab: &mut Lab, size: usize) -> anyhow::Result<Vec<Host>> {
    // Each size uses its own host numbers, because hosts exist until the end.
    let base = (size * 40) as u16;
    let host = |n| Ok(lab.host(base + n, &format!("s{size}-{n}"))?);
    (1..=size as u16).map(host).collect()
}

/// Starts all agents at the same moment; each knows one seed address only.
fn all_at_once(hosts: &[Host], figures: &mut Figures) -> anyhow::Result<()> {
    let token = new_token()?;
    hosts.iter().try_for_each(clean)?;
    let (watch, start) = (EntryWatch::start(hosts)?, Instant::now());
    let agents = boot(hosts, &token)?;
    let done = watch.until(hosts.len() * (hosts.len() - 1) * ENTRIES_PER_PEER)?;
    figures
        .mesh_cpu
        .push(median(agents.iter().map(|agent| cpu_seconds(agent.pid()) * 1e3).collect()));
    figures.at_once.push((done - start).as_secs_f64() * 1e3);
    Ok(())
}

/// Adds one host to an idle cluster, and lets it leave again; if `stays`, returns all agents instead.
fn joiner(hosts: &[Host], figures: &mut Figures, stays: bool) -> anyhow::Result<Vec<Agent>> {
    let token = new_token()?;
    hosts.iter().try_for_each(clean)?;
    let (last, others) = hosts.split_last().expect("at least two hosts");
    let mut agents = boot(others, &token)?;
    for agent in &mut agents {
        agent.wait_converged(others.len(), TIMEOUT)?;
    }
    let cpu = |agents: &[Agent]| -> Vec<f64> {
        agents.iter().map(|agent| cpu_seconds(agent.pid()) * 1e3).collect()
    };
    let used = |agents: &[Agent], before: Vec<f64>| {
        cpu(agents).into_iter().zip(before).map(|(now, before)| now - before).collect::<Vec<_>>()
    };
    thread::sleep(QUIET_TIME);
    let before = cpu(&agents);
    thread::sleep(JOIN_COST_PERIOD);
    let idle = median(used(&agents, before));
    let before = cpu(&agents);
    let seed = hosts[0].ip.to_string();
    let (watch, start) = (EntryWatch::start(hosts)?, Instant::now());
    let mut joined = Agent::start(&program(), last, &["--join", &seed, "--token", &token])?;
    let mut times = [None, None];
    let (mut theirs, mut own) = (vec![0; others.len()], 0);
    while times.contains(&None) {
        let Event { host, at, .. } = watch.next()?;
        match theirs.get_mut(host) {
            Some(count) => *count += 1,
            None => own += 1,
        }
        if times[0].is_none() && theirs.iter().all(|count| *count >= ENTRIES_PER_PEER) {
            times[0] = Some(at - start);
        }
        if times[1].is_none() && own >= others.len() * ENTRIES_PER_PEER {
            times[1] = Some(at - start);
        }
    }
    let [Some(seen), Some(complete)] = times else { unreachable!("both were waited for") };
    figures.seen.push(seen.as_secs_f64() * 1e3);
    figures.complete.push(complete.as_secs_f64() * 1e3);
    thread::sleep(JOIN_COST_PERIOD.saturating_sub(start.elapsed()));
    figures.join_cpu.push(median(used(&agents, before)) - idle);
    let mut connections = Vec::new();
    for agent in &mut agents {
        let status = agent.ask("/v1/status", TIMEOUT)?;
        connections.push(status["connections"].as_f64().unwrap_or(f64::NAN));
    }
    figures.connections.extend(connections);
    if stays {
        agents.push(joined);
        return Ok(agents);
    }
    let start = Instant::now();
    joined.leave()?;
    let mut present = vec![ENTRIES_PER_PEER; others.len()];
    while present.iter().any(|count| *count > 0) {
        let Event { host, at, is_removal } = watch.next()?;
        if let (Some(count), true) = (present.get_mut(host), is_removal) {
            *count = count.saturating_sub(1);
            if present.iter().all(|count| *count == 0) {
                figures.gone.push((at - start).as_secs_f64() * 1e3);
            }
        }
    }
    Ok(Vec::new())
}

fn boot(hosts: &[Host], token: &str) -> anyhow::Result<Vec<Agent>> {
    let seed = hosts[0].ip.to_string();
    hosts
        .iter()
        .enumerate()
        .map(|(n, host)| {
            let enter: &[&str] = if n == 0 { &["--init"] } else { &["--join", &seed] };
            Ok(Agent::start(&program(), host, &[enter, &["--token", token]].concat())?)
        })
        .collect()
}

/// Removes the state and the device of an earlier run. Deleting a device takes the kernel tens of
/// milliseconds, so this is not timed.
fn clean(host: &Host) -> anyhow::Result<()> {
    let _ = fs::remove_dir_all(host.dir.join("state"));
    let mut netlink = host.netns.netlink()?;
    if let Some(link) = netlink.link("gossamer.1")? {
        netlink.delete_link(link.index)?;
    }
    Ok(())
}

fn new_token() -> anyhow::Result<String> {
    let output = Command::new(program()).args(["token", "--new"]).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// An entry of gossamer's that appeared in a kernel, or disappeared.
struct Event {
    host: usize,
    at: Instant,
    is_removal: bool,
}

/// Receives the changes of gossamer's kernel entries, with the time, in all namespaces.
struct EntryWatch {
    events: mpsc::Receiver<Event>,
}

impl EntryWatch {
    fn start(hosts: &[Host]) -> anyhow::Result<Self> {
        let (sender, events) = mpsc::channel();
        for (host, of) in hosts.iter().enumerate() {
            let socket = multicast(&of.netns)?;
            let sender = sender.clone();
            thread::spawn(move || {
                let mut buffer = Vec::with_capacity(1 << 16);
                let mut present = BTreeSet::new();
                loop {
                    buffer.clear();
                    if socket.recv(&mut buffer, 0).is_err() {
                        return;
                    }
                    let at = Instant::now();
                    for message in parse_messages(&buffer).unwrap_or_default() {
                        let NetlinkPayload::InnerMessage(inner) = message.payload else { continue };
                        let Some((key, is_removal)) = key_of_entry(&inner) else { continue };
                        // Entries that were there before the watch began may be removed.
                        let is_change = is_removal || present.insert(key);
                        if is_change && sender.send(Event { host, at, is_removal }).is_err() {
                            return;
                        }
                    }
                }
            });
        }
        Ok(Self { events })
    }

    fn next(&self) -> anyhow::Result<Event> {
        Ok(self.events.recv_timeout(TIMEOUT)?)
    }

    /// Returns the time at which the given total number of entries has appeared.
    fn until(&self, wanted: usize) -> anyhow::Result<Instant> {
        let mut last = Instant::now();
        let mut appeared = 0;
        while appeared < wanted {
            let event = self.next()?;
            appeared += usize::from(!event.is_removal);
            last = event.at;
        }
        Ok(last)
    }
}

fn multicast(netns: &NetNs) -> anyhow::Result<Socket> {
    const NEIGHBORS: u32 = 3;
    const IPV4_ROUTES: u32 = 7;
    Ok(netns.run(|| {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.set_rx_buf_sz(4 << 20)?;
        socket.add_membership(NEIGHBORS)?;
        socket.add_membership(IPV4_ROUTES)?;
        Ok(socket)
    })?)
}

/// Returns the key of an entry of gossamer's and whether it was removed, if the message announces one.
fn key_of_entry(message: &RouteNetlinkMessage) -> Option<(String, bool)> {
    let is_removal =
        matches!(message, RouteNetlinkMessage::DelRoute(_) | RouteNetlinkMessage::DelNeighbour(_));
    match message {
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)
            if route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL) =>
        {
            let to = |a: &&RouteAttribute| matches!(a, RouteAttribute::Destination(_));
            Some((format!("{:?}", route.attributes.iter().find(to)), is_removal))
        }
        RouteNetlinkMessage::NewNeighbour(entry) | RouteNetlinkMessage::DelNeighbour(entry)
            // The kernel announces the removal of a neighbor with another state.
            if (is_removal || entry.header.state == NeighbourState::Permanent)
                && matches!(entry.header.family, AddressFamily::Inet | AddressFamily::Bridge) =>
        {
            let mac =
                |a: &&NeighbourAttribute| matches!(a, NeighbourAttribute::LinkLayerAddress(_));
            let key = format!("{:?} {:?}", entry.header.family, entry.attributes.iter().find(mac));
            Some((key, is_removal))
        }
        _ => None,
    }
}

/// What an idle agent costs, as medians over the agents.
struct Rest {
    /// Resident and anonymous memory in MB.
    rss: f64,
    anonymous: f64,
    /// CPU in percent of a core.
    cpu: f64,
    /// Bytes a second on `eth0`.
    received: f64,
    sent: f64,
}

fn at_rest(hosts: &[Host], agents: &[Agent]) -> Rest {
    thread::sleep(SETTLE_TIME);
    let bytes = |name: &str| -> Vec<f64> {
        let of = |host: &Host| {
            let read = || fs::read_to_string("/proc/thread-self/net/dev");
            let text = host.netns.run(read).unwrap_or_default();
            let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:"));
            let fields: Vec<f64> = line
                .into_iter()
                .flat_map(str::split_whitespace)
                .filter_map(|f| f.parse().ok())
                .collect();
            // proc(5): eight fields about received packets come before those about sent ones.
            fields.get(if name == "rx" { 0 } else { 8 }).copied().unwrap_or(f64::NAN)
        };
        hosts.iter().map(of).collect()
    };
    let cpu = || -> Vec<f64> { agents.iter().map(|agent| cpu_seconds(agent.pid())).collect() };
    let before = (cpu(), bytes("rx"), bytes("tx"));
    thread::sleep(IDLE_PERIOD);
    let rate = |now: Vec<f64>, before: Vec<f64>| {
        let differences = now.into_iter().zip(before).map(|(now, before)| now - before);
        median(differences.collect()) / IDLE_PERIOD.as_secs_f64()
    };
    let memory =
        |field| median(agents.iter().map(|agent| memory_mib(agent.pid(), field)).collect());
    Rest {
        rss: memory("VmRSS:"),
        anonymous: memory("RssAnon:"),
        cpu: rate(cpu(), before.0) * 100.0,
        received: rate(bytes("rx"), before.1),
        sent: rate(bytes("tx"), before.2),
    }
}

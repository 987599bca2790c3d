//! Measures how fast a cluster forms and what an idle agent costs. Real agents run on real kernels, in
//! network namespaces on one machine. `cargo bench --bench cluster [-- SIZE ...]`.
//!
//! Times come from netlink: a socket in each namespace receives every route, neighbor and FDB entry that
//! the kernel announces. All hosts share the cores of this machine, so the CPU limits results for many
//! nodes. Compare them only with results from the same machine.

#![allow(clippy::expect_used)]

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, ExitCode},
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

const PROGRAM: &str = env!("CARGO_BIN_EXE_gossamer");
const SIZES: [usize; 3] = [3, 10, 30];
const TIMEOUT: Duration = Duration::from_secs(60);
/// Length of the idle measurement.
const IDLE_PERIOD: Duration = Duration::from_secs(20);
const ENTRIES_PER_PEER: usize = 3;

/// Reference: flannel v0.28.9 with etcd 3.4 on a 2-core machine of the same kind, measured earlier with
/// the same kind of clock. Medians in ms: (joiner seen by all other nodes, joiner complete, all at once).
const FLANNEL: [(usize, [u32; 3]); 4] =
    [(3, [39, 167, 217]), (10, [42, 170, 598]), (30, [68, 193, 2185]), (100, [197, 406, 12_927])];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let Some(code) = lab::rerun_inside(&arguments) {
        return code;
    }
    let sizes: Vec<usize> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    measure(if sizes.is_empty() { &SIZES } else { &sizes }).expect("measured");
    ExitCode::SUCCESS
}

fn measure(sizes: &[usize]) -> anyhow::Result<()> {
    let size = fs::metadata(PROGRAM)?.len() as f64 / 1e6;
    println!("program: {size:.1} MB\n");
    println!(
        "ms, median (min-max); flannel + etcd in brackets, measured earlier on such a machine\n"
    );
    println!(
        "nodes  joiner seen by all others   joiner complete             all at once to full mesh"
    );
    let mut lab = Lab::new()?;
    let mut rest = Vec::new();
    for &size in sizes {
        let rounds = if size <= 10 { 10 } else { 5 };
        let hosts = hosts(&mut lab, size)?;
        let mut seen = Vec::new();
        let mut complete = Vec::new();
        let mut at_once = Vec::new();
        for round in 0..rounds {
            at_once.push(all_at_once(&hosts)?);
            let (others, own, agents) = joiner(&hosts)?;
            seen.push(others);
            complete.push(own);
            if round == rounds - 1 {
                rest.push((size, at_rest(&agents)));
            }
        }
        let flannel = FLANNEL.iter().find(|(n, _)| *n == size).map(|(_, figures)| figures);
        let cell = |times: Vec<Duration>, i: usize| {
            let peer = flannel.map(|figures| format!(" [{}]", figures[i])).unwrap_or_default();
            format!("{:<27}", format!("{}{peer}", summary(times)))
        };
        println!("{size:<6} {} {} {}", cell(seen, 0), cell(complete, 1), cell(at_once, 2));
    }
    println!("\nat rest for {IDLE_PERIOD:?} [flannel: 36-38 MB (9-10), CPU 0.20-0.26 %, and etcd]");
    println!("nodes  RSS MB (anonymous)  CPU % of a core, median of the agents");
    for (size, (rss, anonymous, cpu)) in rest {
        println!("{size:<6} {rss:.1} ({anonymous:.1})          {cpu:.3}");
    }
    Ok(())
}

fn hosts(lab: &mut Lab, size: usize) -> anyhow::Result<Vec<Host>> {
    // Each size uses its own host numbers, because hosts exist until the end.
    let base = (size * 40) as u16;
    let host = |n| Ok(lab.host(base + n, &format!("s{size}-{n}"))?);
    (1..=size as u16).map(host).collect()
}

/// Starts all agents at the same moment; each knows one seed address only. Returns the time until all
/// entries exist.
fn all_at_once(hosts: &[Host]) -> anyhow::Result<Duration> {
    let token = new_token()?;
    hosts.iter().try_for_each(clean)?;
    let (watch, start) = (EntryWatch::start(hosts)?, Instant::now());
    let _agents = boot(hosts, &token)?;
    let done = watch.until(hosts.len() * (hosts.len() - 1) * ENTRIES_PER_PEER)?;
    Ok(done.duration_since(start))
}

/// Adds one host to an idle cluster. Returns the time until all other nodes have programmed it, and until
/// it has programmed them.
fn joiner(hosts: &[Host]) -> anyhow::Result<(Duration, Duration, Vec<Agent>)> {
    let token = new_token()?;
    hosts.iter().try_for_each(clean)?;
    let (last, others) = hosts.split_last().expect("at least two hosts");
    let mut agents = boot(others, &token)?;
    for agent in &mut agents {
        agent.wait_converged(others.len(), TIMEOUT)?;
    }
    let seed = hosts[0].ip.to_string();
    let (watch, start) = (EntryWatch::start(hosts)?, Instant::now());
    agents.push(Agent::start(Path::new(PROGRAM), last, &["--join", &seed, "--token", &token])?);
    let mut times = [None, None];
    let (mut theirs, mut own) = (vec![0; others.len()], 0);
    while times.contains(&None) {
        let (host, at) = watch.next()?;
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
    Ok((seen, complete, agents))
}

fn boot(hosts: &[Host], token: &str) -> anyhow::Result<Vec<Agent>> {
    let seed = hosts[0].ip.to_string();
    hosts
        .iter()
        .enumerate()
        .map(|(n, host)| {
            let enter: &[&str] = if n == 0 { &["--init"] } else { &["--join", &seed] };
            Ok(Agent::start(Path::new(PROGRAM), host, &[enter, &["--token", token]].concat())?)
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
    let output = Command::new(PROGRAM).args(["token", "--new"]).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Receives gossamer's kernel entries as they appear, with the time, in all namespaces.
struct EntryWatch {
    events: mpsc::Receiver<(usize, Instant)>,
}

impl EntryWatch {
    fn start(hosts: &[Host]) -> anyhow::Result<Self> {
        let (sender, events) = mpsc::channel();
        for (n, host) in hosts.iter().enumerate() {
            let socket = multicast(&host.netns)?;
            let sender = sender.clone();
            thread::spawn(move || {
                let mut buffer = Vec::with_capacity(1 << 16);
                let mut seen = BTreeSet::new();
                loop {
                    buffer.clear();
                    if socket.recv(&mut buffer, 0).is_err() {
                        return;
                    }
                    let at = Instant::now();
                    for message in parse_messages(&buffer).unwrap_or_default() {
                        let NetlinkPayload::InnerMessage(inner) = message.payload else { continue };
                        if let Some(key) = key_of_entry(&inner)
                            && seen.insert(key)
                            && sender.send((n, at)).is_err()
                        {
                            return;
                        }
                    }
                }
            });
        }
        Ok(Self { events })
    }

    fn next(&self) -> anyhow::Result<(usize, Instant)> {
        Ok(self.events.recv_timeout(TIMEOUT)?)
    }

    /// Returns the time at which the given total number of entries has appeared.
    fn until(&self, wanted: usize) -> anyhow::Result<Instant> {
        (1..wanted).try_for_each(|_| self.next().map(drop))?;
        Ok(self.next()?.1)
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

/// Returns the key of a gossamer entry, if the message announces one.
fn key_of_entry(message: &RouteNetlinkMessage) -> Option<String> {
    match message {
        RouteNetlinkMessage::NewRoute(route)
            if route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL) =>
        {
            let to = |a: &&RouteAttribute| matches!(a, RouteAttribute::Destination(_));
            Some(format!("{:?}", route.attributes.iter().find(to)))
        }
        RouteNetlinkMessage::NewNeighbour(entry)
            if entry.header.state == NeighbourState::Permanent
                && matches!(entry.header.family, AddressFamily::Inet | AddressFamily::Bridge) =>
        {
            let mac =
                |a: &&NeighbourAttribute| matches!(a, NeighbourAttribute::LinkLayerAddress(_));
            Some(format!("{:?} {:?}", entry.header.family, entry.attributes.iter().find(mac)))
        }
        _ => None,
    }
}

/// Returns resident and anonymous memory in MB and CPU in percent of a core, as medians over the agents.
fn at_rest(agents: &[Agent]) -> (f64, f64, f64) {
    thread::sleep(Duration::from_secs(5));
    let before: Vec<f64> = agents.iter().map(|agent| cpu_seconds(agent.pid())).collect();
    thread::sleep(IDLE_PERIOD);
    let used = agents.iter().zip(before).map(|(agent, before)| {
        (cpu_seconds(agent.pid()) - before) / IDLE_PERIOD.as_secs_f64() * 100.0
    });
    let memory = |field| agents.iter().map(|agent| memory_mib(agent.pid(), field)).collect();
    (median(memory("VmRSS:")), median(memory("RssAnon:")), median(used.collect()))
}

fn summary(times: Vec<Duration>) -> String {
    let ms: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    spread(&ms, 0)
}

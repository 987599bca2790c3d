//! Measures how fast a kernel is programmed from nothing: three entries for each of many peers. Compares
//! this with `bridge -batch` and `ip -batch` for the same entries, and with the kernel's own time for the
//! same bytes. `cargo bench --bench netlink [-- PEERS ...]`.
//!
//! Each run has a new namespace. The ways alternate, and medians are compared.

#![allow(clippy::expect_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io,
    net::Ipv4Addr,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use gossamer::{
    dataplane::{
        desired::{Desired, RouteTarget, Tables, Underlay},
        kernel::{Kernel, requests},
        plan::{Actual, Found, plan},
    },
    lab::{self, Lab},
    model::{ClusterSettings, Mac, NodeId, Own, Peer, Pool, PoolSpec, Slot, View, Vtep},
    netlink::{Netlink, Request},
};

const SIZES: [u32; 2] = [1_000, 10_000];
const ROUNDS: usize = 5;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let Some(code) = lab::rerun_inside(&arguments) {
        return code;
    }
    let sizes: Vec<u32> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    println!("ms, median of {ROUNDS}: FDB, neighbor and route of every peer");
    println!(
        "peers    gossamer, from nothing   nothing to do   after the device was deleted   \
         bridge + ip -batch             encoded before, only sent"
    );
    let mut lab = Lab::new().expect("a lab");
    let mut hosts = 0;
    for &peers in if sizes.is_empty() { &SIZES[..] } else { &sizes } {
        let next = || {
            hosts += 1;
            hosts
        };
        measure(&mut lab, peers, next).expect("measured");
    }
    ExitCode::SUCCESS
}

fn measure(lab: &mut Lab, peers: u32, mut next_host: impl FnMut() -> u16) -> io::Result<()> {
    let mut times: [Vec<Duration>; 5] = Default::default();
    for _ in 0..ROUNDS {
        let number = next_host();
        let host = lab.host(number, &format!("h{number}"))?;
        let desired = desired(peers, host.ip, host.netns.netlink()?.index_of("eth0")?);
        let ours = host.netns.run(|| {
            let mut kernel = Kernel::open()?;
            let mut timed = || {
                let begun = Instant::now();
                let report = kernel.reconcile(&desired).map_err(io::Error::other)?;
                assert_eq!(report.failed, []);
                Ok::<_, io::Error>(begun.elapsed())
            };
            let first = timed()?;
            let nothing = timed()?;
            assert!(
                Command::new("ip").args(["link", "del", &desired.device.name]).status()?.success()
            );
            Ok([first, nothing, timed()?])
        })?;
        let number = next_host();
        let host = lab.host(number, &format!("h{number}"))?;
        let theirs = host.netns.run(|| batch(&desired, &host.dir))?;
        let number = next_host();
        let host = lab.host(number, &format!("h{number}"))?;
        let bytes = host.netns.run(|| send_encoded(&desired))?;
        for (times, time) in times.iter_mut().zip(ours.into_iter().chain([theirs, bytes])) {
            times.push(time);
        }
    }
    let [first, nothing, again, theirs, bytes] = times.map(median);
    println!(
        "{peers:>6}   {first:>10.1}               {nothing:>8.1}        {again:>10.1}                  \
         {theirs:>8.1} ({:.1} times as long)   {bytes:>8.1} (gossamer: {:.2} times as long)",
        theirs / first,
        first / bytes
    );
    Ok(())
}

fn median(times: Vec<Duration>) -> f64 {
    lab::median(times.iter().map(|time| time.as_secs_f64() * 1000.0).collect())
}

fn desired(peers: u32, local: Ipv4Addr, link: u32) -> Desired {
    let spec = PoolSpec {
        subnet_len: Some(24),
        ..PoolSpec::of("100.64.0.0/10".parse().expect("network"))
    };
    let pool = Pool::new(&spec).expect("pool");
    let node = |n: u32| NodeId::from_bytes((u64::from(n) + 1).to_be_bytes());
    let vtep = |n: u32| Vtep {
        mac: Mac::of_node(node(n)),
        underlay: Ipv4Addr::from(0xac10_0000 + n).into(),
    };
    let peer = |n: u32| {
        let slot = Slot(n + 1);
        (node(n), Peer { vtep: vtep(n), leases: vec![(slot, pool.subnets(slot))] })
    };
    let view = View {
        settings: ClusterSettings { pool, vni: 1, vxlan_port: 8472 },
        own: Own { subnets: pool.subnets(Slot(1)), vtep: vtep(0) },
        peers: (1..=peers).map(peer).collect::<BTreeMap<_, _>>(),
        unconfirmed: Vec::new(),
    };
    Desired::new(&view, &Underlay::of_tunnels(link, local.into(), 1450), &BTreeSet::new())
}

/// Sends the same entries, encoded in advance, to an existing device. This is the time that the kernel
/// itself needs.
fn send_encoded(desired: &Desired) -> io::Result<Duration> {
    let mut netlink = Netlink::open()?;
    let alone = Desired { tables: Tables::default(), ..desired.clone() };
    Kernel::open()?.reconcile(&alone).map_err(io::Error::other)?;
    let index = netlink.index_of(&desired.device.name)?;
    let addresses = desired.device.addresses.iter();
    let found = Found {
        up: true,
        is_port: false,
        device: desired.device.clone(),
        foreign: false,
        addresses: addresses.map(|ip| (*ip, 32)).collect(),
        unreceived: BTreeSet::new(),
    };
    let there = Actual { device: Some(found), ..Actual::default() };
    let mut changes = requests(&plan(desired, &there).entries, index).into_iter();
    let mut batches = Vec::new();
    loop {
        let some: Vec<Request> = changes.by_ref().take(128).collect();
        if some.is_empty() {
            break;
        }
        batches.push(netlink.encode(some));
    }
    let begun = Instant::now();
    for batch in &batches {
        assert_eq!(netlink.send(batch)?.len(), 0, "nothing is refused");
    }
    Ok(begun.elapsed())
}

/// Programs the same entries with `bridge` and `ip`. Only the run time of the tools is measured.
fn batch(desired: &Desired, directory: &std::path::Path) -> io::Result<Duration> {
    let device = "vx";
    let mac = desired.device.mac;
    let create = format!(
        "link add {device} address {mac} type vxlan id 1 dev eth0 dstport 8472 nolearning\n\
         link set {device} up\n"
    );
    let (mut fdb, mut rest) = (String::new(), String::new());
    for (mac, underlay) in &desired.tables.fdb {
        let _ = writeln!(fdb, "fdb replace {mac} dev {device} dst {underlay} self permanent");
    }
    for (address, mac) in &desired.tables.neighbors {
        let _ = writeln!(rest, "neigh replace {address} lladdr {mac} dev {device} nud permanent");
    }
    for (subnet, hop) in &desired.tables.routes {
        let RouteTarget::Overlay(via) = hop.way else { continue };
        let _ = writeln!(
            rest,
            "route add {subnet} via {via} dev {device} onlink proto 73 metric {}",
            hop.metric
        );
    }
    let files = [("create", create), ("fdb", fdb), ("rest", rest)].map(|(name, text)| {
        let path = directory.join(name);
        std::fs::write(&path, text).map(|()| path)
    });
    let [create, fdb, rest] = files;
    let run = |tool: &str, path: &std::path::Path| {
        let done = Command::new(tool).arg("-batch").arg(path).status()?;
        if done.success() { Ok(()) } else { Err(io::Error::other(format!("{tool} -batch failed"))) }
    };
    let begun = Instant::now();
    run("ip", &create?)?;
    run("bridge", &fdb?)?;
    run("ip", &rest?)?;
    Ok(begun.elapsed())
}

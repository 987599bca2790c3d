//! Measures convergence against its limits, in virtual time, on a network without faults.
//!
//! The clock starts before the change that is measured. Datagrams take 0.5 to 1.5 ms.

use std::time::Duration;

use super::world::World;
use crate::{
    dataplane::desired::RouteTarget,
    model::{ClusterSettings, Pool, PoolSpec, Time},
};

/// One measured value and its limit.
struct Figure {
    what: String,
    measured: f64,
    ceiling: f64,
    unit: &'static str,
}

/// Measures and prints all figures for clusters of these sizes. Returns whether all are within their limits.
pub fn print_all(sizes: &[usize]) -> bool {
    let mut all = true;
    for &nodes in sizes {
        for figure in at_size(nodes) {
            let Figure { what, measured, ceiling, unit } = figure;
            let holds = measured <= ceiling;
            all &= holds;
            let result = if holds { "" } else { "  ABOVE THE LIMIT" };
            println!(
                "{nodes:>5} nodes  {what:<58} {measured:>8.2} {unit:<7} (<= {ceiling} {unit}){result}"
            );
        }
    }
    let figure = lossy(100);
    all &= figure.measured <= figure.ceiling;
    println!("  100 nodes  {:<58} {:>8} (<= {})", figure.what, figure.measured, figure.ceiling);
    all
}

/// Measures a start, quiet traffic, a join and the end of a partition in a cluster of `nodes`.
#[expect(clippy::too_many_lines, reason = "one block for each figure")]
fn at_size(nodes: usize) -> Vec<Figure> {
    let ceiling = |small: f64, middle: f64, large: f64| match nodes {
        0..=100 => small,
        101..=500 => middle,
        _ => large,
    };
    let seconds = |span: Duration| span.as_secs_f64();
    let mut figures = Vec::new();
    let mut figure = |what: &str, measured: f64, ceiling: f64, unit| {
        figures.push(Figure { what: what.to_owned(), measured, ceiling, unit });
    };

    let mut world = cluster(nodes);
    let started = until(&mut world, Duration::from_secs(120), |world| settled(world, nodes));
    figure(
        "simultaneous start: full view, full tables",
        seconds(started),
        ceiling(5.0, 20.0, 40.0),
        "s",
    );

    // Within ten minutes each node has opened all the connections that it keeps. Beyond 256 nodes it does not
    // keep all of them; handshakes then continue for hours, and the bytes on the wire are not measured.
    let all_connected = nodes <= 256;
    world.run_for(Duration::from_secs(if all_connected { 600 } else { 60 }));
    let (before, span) =
        ((world.network.sent, world.network.sent_on_wire), Duration::from_secs(60));
    world.run_for(span);
    let kbits = |bytes: u64| bytes as f64 * 8.0 / seconds(span) / nodes as f64 / 1000.0;
    figure(
        "quiet traffic per node, comparisons included",
        kbits(world.network.sent - before.0),
        5.0,
        "kbit/s",
    );
    if all_connected {
        figure(
            "the same on the wire, with QUIC, UDP, IP, handshakes",
            kbits(world.network.sent_on_wire - before.1),
            10.0,
            "kbit/s",
        );
    }

    let joiner = world.add_joiner(&[nodes / 2]);
    let started_at = world.now;
    world.start(joiner);
    let mut known = Vec::new();
    while known.len() < nodes && world.now.since(started_at) < Duration::from_secs(30) {
        world.run_for(Duration::from_millis(5));
        let count = (0..nodes).filter(|host| routes(&world, *host) >= nodes).count();
        known.extend(std::iter::repeat_n(
            world.now.since(started_at),
            count.saturating_sub(known.len()),
        ));
    }
    let p99 = known.get(nodes * 99 / 100).copied().unwrap_or(Duration::from_secs(999));
    figure("a joiner programmed everywhere (99 %)", seconds(p99), ceiling(0.5, 1.0, 1.0), "s");

    let nodes = nodes + 1;
    for one in 0..nodes / 2 {
        for other in nodes / 2..nodes {
            world.network.cut(one, other);
            world.network.cut(other, one);
        }
    }
    world.run_for(Duration::from_secs(60));
    // Each half gets a member that the other one does not know.
    let (left, right) = (world.add_joiner(&[0]), world.add_joiner(&[nodes - 1]));
    for (joiner, half) in [(left, 0..nodes / 2), (right, nodes / 2..nodes)] {
        for other in (0..nodes).filter(|other| !half.contains(other)) {
            world.network.cut(joiner, other);
            world.network.cut(other, joiner);
        }
        world.start(joiner);
    }
    world.run_for(Duration::from_secs(5));
    world.network.mend();
    let healed = until(&mut world, Duration::from_secs(120), |world| settled(world, nodes + 2));
    figure(
        "converged after a 60 s split into halves",
        seconds(healed),
        ceiling(10.0, 15.0, 30.0),
        "s",
    );
    if let Some(violation) = &world.oracle.violation {
        figure(&format!("violation: {violation}"), 1.0, 0.0, "");
    }
    figures
}

/// Counts how often living members are considered down in ten minutes at 10 % loss.
fn lossy(nodes: usize) -> Figure {
    let mut world = cluster(nodes);
    until(&mut world, Duration::from_secs(60), |world| settled(world, nodes));
    world.network.loss = 0.1;
    let before = downs(&world);
    world.run_for(Duration::from_secs(600));
    let measured = (downs(&world) - before) as f64;
    let what = "living members called down in 600 s at 10 % loss".to_owned();
    Figure { what, measured, ceiling: 0.0, unit: "" }
}

/// Sums the nodes' counts of members that they have called down.
fn downs(world: &World) -> u64 {
    world.hosts.iter().filter_map(|host| host.node()).map(|node| node.status().counters.downs).sum()
}

/// Starts all nodes at once; each joiner has the first three hosts as seeds.
fn cluster(nodes: usize) -> World {
    let spec = PoolSpec {
        subnet_len: Some(23),
        ..PoolSpec::of("10.128.0.0/9".parse().unwrap_or_default())
    };
    let pool = match Pool::new(&spec) {
        Ok(pool) => pool,
        Err(error) => unreachable!("{error}"),
    };
    let mut world = World::new(nodes as u64, ClusterSettings { pool, vni: 1, vxlan_port: 8472 });
    world.oracle.subnets_only = true;
    world.add_creator();
    for _ in 1..nodes {
        world.add_joiner(&[0, 1, 2]);
    }
    (0..nodes).for_each(|host| world.start(host));
    world
}

/// Whether every kernel has a route to every other host, and all nodes hold the same facts.
fn settled(world: &World, nodes: usize) -> bool {
    let hosts = world.hosts.len().min(nodes);
    if (0..hosts).any(|host| routes(world, host) + 1 < nodes) {
        return false;
    }
    let mut roots = world.hosts.iter().filter_map(|host| Some(host.node()?.roots()));
    let first = roots.next();
    roots.all(|other| Some(other) == first)
}

/// Counts the routes of a host that are not `unreachable`.
fn routes(world: &World, host: usize) -> usize {
    let hops = world.hosts[host].kernel.routes.values();
    hops.filter(|hop| hop.way != RouteTarget::Unreachable).count()
}

/// Runs the world until a condition holds or `limit` has passed. Returns the virtual time that passed.
fn until(world: &mut World, limit: Duration, reached: impl Fn(&World) -> bool) -> Duration {
    let started_at: Time = world.now;
    while !reached(world) && world.now.since(started_at) < limit {
        world.run_for(Duration::from_millis(50));
    }
    world.now.since(started_at)
}

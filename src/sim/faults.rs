//! The faults of a run. The seed determines which kinds occur and how often: a run with all of them would
//! hide bugs.

use std::{collections::BTreeSet, fmt, net::Ipv4Addr, str::FromStr, time::Duration};

use rand::{RngExt as _, prelude::IteratorRandom as _, rngs::StdRng};

use super::{disk::Disk, host::Host, world::World};
use crate::{core::Command, model::Quorum};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Datagrams are lost, up to 30 %.
    Loss,
    /// Datagrams arrive twice, up to 50 %.
    Doubles,
    /// Up to 20 % of the messages are late, by up to 5 s or, in a third of the runs, 30 s.
    Late,
    /// A half, one host or a random group of hosts cannot reach the rest.
    Partition,
    /// One direction of a link is dead.
    OneWay,
    /// Agents are killed.
    Kill,
    /// Hosts lose power and come back.
    PowerCut,
    /// Agents are frozen.
    Pause,
    /// Disks take up to 2 s for a batch.
    SlowDisk,
    /// Kernel passes start up to 5 s late.
    SlowKernel,
    /// Clocks have different offsets and rates.
    Drift,
    /// Hosts change their address.
    Move,
    /// The kernel refuses operations, or another program changes entries or deletes the device.
    Kernel,
    /// Random bytes arrive as messages.
    Garbage,
    /// Hosts leave.
    Leave,
    /// Many agents are killed at once.
    Blackout,
    /// Hosts are destroyed, and an operator forgets them later.
    Death,
    /// Hosts are destroyed and replaced by hosts with the same name.
    Recreate,
    /// Byzantine: a member publishes impossible facts about itself.
    Errs,
    /// Byzantine: a member publishes false facts about other members, or sends in their names.
    Lies,
    /// Breaks a precondition: a host loses its database.
    LoseDisk,
    /// Breaks a precondition: a disk is set back to an older state.
    Rollback,
    /// Breaks a precondition: a disk is copied, and both hosts run.
    Clone,
    /// Breaks a precondition: a running member is forgotten.
    ForgetAlive,
    /// Breaks a precondition: voters forget members by time, disconnected ones included.
    Voters,
}

impl Fault {
    /// The kinds under which single ownership must hold.
    pub const ALL: [Self; 18] = [
        Self::Loss,
        Self::Doubles,
        Self::Late,
        Self::Partition,
        Self::OneWay,
        Self::Kill,
        Self::PowerCut,
        Self::Pause,
        Self::SlowDisk,
        Self::SlowKernel,
        Self::Drift,
        Self::Move,
        Self::Kernel,
        Self::Garbage,
        Self::Leave,
        Self::Blackout,
        Self::Death,
        Self::Recreate,
    ];

    /// The kinds of a Byzantine member, drawn from a separate generator.
    pub const BYZANTINE: [Self; 2] = [Self::Errs, Self::Lies];

    /// The kinds that break a precondition: two owners of a slot are possible, and must be detected and
    /// settled.
    pub const BREAKING: [Self; 5] =
        [Self::LoseDisk, Self::Rollback, Self::Clone, Self::ForgetAlive, Self::Voters];
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::ALL.into_iter().chain(Self::BYZANTINE).chain(Self::BREAKING);
        let mut named = all.filter(|fault| fault.to_string() == text);
        named.next().ok_or_else(|| format!("unknown kind of fault {text:?}"))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&format!("{self:?}").to_lowercase(), f)
    }
}

/// The faults of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults {
    /// Kinds that are injected.
    pub kinds: BTreeSet<Fault>,
}

impl Faults {
    /// Draws each kind with the same chance, which is itself drawn: most runs have a few kinds, some have
    /// most.
    pub fn draw(rng: &mut StdRng) -> Self {
        let chance = [0.1, 0.25, 0.5][rng.random_range(0..3)];
        let mut kinds: BTreeSet<Fault> =
            Fault::ALL.into_iter().filter(|_| rng.random_bool(chance)).collect();
        // One run in eight breaks a precondition.
        if rng.random_ratio(1, 8) {
            kinds.extend(Fault::BREAKING.into_iter().choose(rng));
        }
        Self { kinds }
    }

    /// Adds each Byzantine kind with a chance of one in four. The separate generator keeps the rest of the
    /// seed's run unchanged.
    pub fn add_byzantine(&mut self, rng: &mut StdRng) {
        self.kinds.extend(Fault::BYZANTINE.into_iter().filter(|_| rng.random_ratio(1, 4)));
    }

    /// Makes the Byzantine member send facts, with a chance of one half for each kind. Also used during
    /// recovery.
    pub fn send_byzantine_facts(&self, world: &mut World, rng: &mut StdRng) {
        if self.kinds.contains(&Fault::Errs) && rng.random_bool(0.5) {
            world.send_impossible_facts(rng);
        }
        if self.kinds.contains(&Fault::Lies) && rng.random_bool(0.5) {
            world.send_false_facts(rng);
        }
    }

    /// Applies the faults that last for the whole faulty phase.
    pub fn apply_constant_faults(&self, world: &mut World, rng: &mut StdRng) {
        let on = |fault| self.kinds.contains(&fault);
        world.oracle.lenient = Fault::BREAKING.into_iter().any(on);
        if on(Fault::Loss) {
            world.network.loss = rng.random_range(0.01..0.3);
        }
        if on(Fault::Doubles) {
            world.network.duplication = rng.random_range(0.01..0.5);
        }
        if on(Fault::Late) {
            world.network.late = rng.random_range(0.01..0.2);
            let most = if rng.random_ratio(1, 3) { 30_000 } else { 5_000 };
            world.network.max_extra_delay = Duration::from_millis(rng.random_range(50..most));
        }
        if on(Fault::Voters) {
            let names = world.hosts.iter().take(3).filter_map(|host| host.name.parse().ok());
            world.quorum = Quorum::new(Quorum::SHORTEST, &names.collect::<Vec<_>>()).ok();
        }
        for host in &mut world.hosts {
            host.quorum.clone_from(&world.quorum);
            if on(Fault::SlowDisk) {
                let slow = Duration::from_millis(rng.random_range(5..2000));
                host.disk_latency = (Duration::from_millis(1), slow);
            }
            if on(Fault::SlowKernel) {
                host.kernel_latency = Duration::from_millis(rng.random_range(1..5000));
            }
            if on(Fault::Drift) {
                host.clock.offset = Duration::from_secs(rng.random_range(0..10_000_000));
                host.clock.drift_ppm = rng.random_range(-500..500);
            }
        }
    }

    /// Injects one random fault, or ends one.
    #[expect(clippy::too_many_lines, reason = "one arm for each fault")]
    pub fn inject_one(&self, world: &mut World, rng: &mut StdRng) {
        let Some(fault) = self.kinds.iter().copied().choose(rng) else { return };
        let hosts = world.hosts.len();
        let Some(host) = (0..hosts).filter(|host| world.hosts[*host].is_powered).choose(rng) else {
            return;
        };
        match fault {
            Fault::Loss | Fault::Doubles | Fault::Late | Fault::SlowDisk => {}
            Fault::SlowKernel | Fault::Drift | Fault::Errs | Fault::Lies => {}
            // Two of the three voters, which are the first three hosts, survive.
            Fault::Voters if host < 2 => {}
            Fault::Voters => _ = destroy_host(world, host),
            Fault::Partition | Fault::OneWay if rng.random_bool(0.4) => world.network.mend(),
            Fault::Partition => partition(world, rng),
            Fault::OneWay => world.network.cut(host, rng.random_range(0..hosts)),
            Fault::Kill | Fault::PowerCut | Fault::Move if world.hosts[host].process.is_none() => {
                world.start(host);
            }
            Fault::Kill => world.kill(host),
            Fault::PowerCut => world.cut_power(host),
            Fault::Move => {
                world.kill(host);
                world.oracle.record_situation("address changed");
                let third = rng.random_range(1..250);
                world.move_host(host, Ipv4Addr::new(10, 100, third, host as u8));
                if rng.random_bool(0.5) {
                    world.start(host);
                }
            }
            Fault::Pause if rng.random_bool(0.5) => (0..hosts).for_each(|host| world.resume(host)),
            Fault::Pause => world.pause(host),
            Fault::Kernel => tamper_with_kernel(world, host, rng),
            Fault::Garbage => world.send_garbage(host, rng),
            Fault::Leave => start_leave(world, host),
            Fault::Death if rng.random_bool(0.5) => forget_dead_host(world, rng),
            Fault::Death => _ = destroy_host(world, host),
            Fault::Recreate => recreate(world, host),
            Fault::LoseDisk => {
                // At most one host: a cluster does not survive the loss of all disks.
                let others = member_count(world) > 3 && !world.hosts[host].saved_seeds.is_empty();
                if std::mem::replace(&mut world.disk_lost, true) || !others {
                    return;
                }
                world.oracle.record_situation("disk lost");
                world.kill(host);
                world.hosts[host].disk = Disk::default();
                world.start(host);
            }
            Fault::Rollback => match world.hosts[host].snapshot.take() {
                Some(snapshot) => {
                    world.oracle.record_situation("rolled back");
                    world.kill(host);
                    world.hosts[host].disk = snapshot;
                    world.start(host);
                    // The joiner requests a slot, which the host may have granted already.
                    let joiner = world.add_joiner(&[host]);
                    world.start(joiner);
                }
                None => world.hosts[host].snapshot = Some(world.hosts[host].disk.clone()),
            },
            Fault::Clone => world.copy_host(host),
            Fault::ForgetAlive => {
                let victim = world.hosts[rng.random_range(0..hosts)].key;
                // Two members that forget each other, with no third one, never reunite.
                if member_count(world) > 2 && world.hosts[host].members_on_disk().len() > 2 {
                    world.forget(host, victim, true);
                }
            }
            Fault::Blackout => {
                world.oracle.record_situation("blackout");
                let survivors = rng.random_range(0.0..0.7);
                for host in 0..hosts {
                    if !rng.random_bool(survivors) {
                        world.kill(host);
                    } else {
                        world.start(host);
                    }
                }
            }
        }
    }
}

/// Cuts all links between two groups of hosts.
fn partition(world: &mut World, rng: &mut StdRng) {
    world.oracle.record_situation("partition");
    let hosts = world.hosts.len();
    let style = rng.random_range(0..3);
    let alone = rng.random_range(0..hosts);
    let side: Vec<bool> = (0..hosts)
        .map(|host| match style {
            0 => host < hosts / 2,
            1 => host == alone,
            _ => rng.random_bool(0.5),
        })
        .collect();
    for from in 0..hosts {
        for to in 0..hosts {
            if side[from] != side[to] {
                world.network.cut(from, to);
            }
        }
    }
}

/// Makes the kernel refuse operations, or changes its entries as another program would.
fn tamper_with_kernel(world: &mut World, host: usize, rng: &mut StdRng) {
    let kind = rng.random_range(0..6);
    world.change_kernel(host, |host| {
        let kernel = &mut host.kernel;
        match kind {
            0 => host.kernel_refuses = 1 + host.identity_count as u32,
            1 => _ = kernel.routes.pop_first(),
            2 => _ = kernel.neighbors.pop_last(),
            3 => _ = kernel.fdb.pop_first(),
            4 => {
                if let Some((mac, _)) = kernel.fdb.pop_first() {
                    kernel.fdb.insert((mac, [10, 255, 255, 1].into()));
                }
            }
            _ => *kernel = Default::default(),
        }
    });
}

/// Whether another host has the same identity. Such a host neither leaves nor is destroyed before an operator
/// has resolved that.
fn has_duplicate_identity(world: &World, host: usize) -> bool {
    world.hosts.iter().any(|other| other.index != host && other.key == world.hosts[host].key)
}

/// Number of hosts that belong to the cluster and are not leaving.
fn member_count(world: &World) -> usize {
    world.hosts.iter().filter(|host| host.saved_cluster.is_some() && !host.is_departing).count()
}

/// Acts as an operator: makes a host leave. Two members remain, so that the cluster persists.
fn start_leave(world: &mut World, host: usize) {
    let runs = world.hosts[host].process.is_some() && !has_duplicate_identity(world, host);
    if member_count(world) > 2 && runs && world.hosts[host].saved_cluster.is_some() {
        world.hosts[host].is_departing = true;
        world.command(host, Command::Leave);
    }
}

/// Limit of re-created hosts in one run. All other members must acknowledge each forget.
const MAX_RECREATED: usize = 6;

/// Destroys a host and adds one with the same name, as docker-compose re-creates a container.
fn recreate(world: &mut World, host: usize) {
    let name = world.hosts[host].name.clone();
    let members = world.hosts.iter().filter(|other| other.index != host && other.is_powered);
    let seeds: Vec<usize> = members.map(|host| host.index).collect();
    let recreated = world.hosts.iter().filter(|host| host.replaces).count();
    if recreated > MAX_RECREATED || !destroy_host(world, host) {
        return;
    }
    let replacement = world.add_joiner(&seeds);
    world.hosts[replacement].name = name;
    world.hosts[replacement].replaces = true;
    world.oracle.record_situation("recreated");
    world.start(replacement);
}

/// Switches a host off for good, unless fewer than two members would remain. Returns whether it did.
fn destroy_host(world: &mut World, host: usize) -> bool {
    let known = world.hosts[host].saved_cluster.is_some() && !has_duplicate_identity(world, host);
    if member_count(world) > 2 + usize::from(world.disk_lost)
        && known
        && !world.hosts[host].is_departing
    {
        world.oracle.record_situation("died");
        world.hosts[host].is_departing = true;
        world.destroy(host);
        return true;
    }
    false
}

/// Acts as an operator: forgets a dead host at a random member, if the preconditions hold.
fn forget_dead_host(world: &mut World, rng: &mut StdRng) {
    let dead = |host: &&Host| !host.is_powered && host.stopped.is_none();
    let Some(victim) = world.hosts.iter().filter(dead).map(|host| host.key).choose(rng) else {
        return;
    };
    let issuer = (0..world.hosts.len()).filter(|host| world.hosts[*host].process.is_some());
    let Some(issuer) = issuer.choose(rng) else { return };
    if world.is_forgettable(victim, issuer) {
        world.forget(issuer, victim, false);
    }
}

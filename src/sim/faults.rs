//! What goes wrong in a run. Which kinds, and how much of each, is drawn from the seed: everything on all
//! the time hides bugs.

use std::{collections::BTreeSet, fmt, net::Ipv4Addr, str::FromStr, time::Duration};

use rand::{RngExt as _, prelude::IteratorRandom as _, rngs::StdRng};

use super::{disk::Disk, host::Host, world::World};
use crate::{core::Command, model::Quorum};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Datagrams are lost, up to 30 %.
    Loss,
    Doubles,
    /// Messages are late by up to 5 s.
    Late,
    /// Two halves, or one host alone, or pairs, do not reach each other.
    Partition,
    /// One direction of a link is dead.
    OneWay,
    Kill,
    PowerCut,
    /// A process is frozen.
    Pause,
    SlowDisk,
    SlowKernel,
    /// Clocks run at different rates, from any start.
    Drift,
    /// A host comes back under another address.
    Move,
    /// The kernel refuses operations, loses entries, gets others, loses the device.
    Kernel,
    /// Bytes that mean nothing, old bytes again.
    Garbage,
    /// Hosts leave for good, and new ones come.
    Leave,
    /// Many are killed at once.
    Blackout,
    /// A host dies for good, and later an operator has it forgotten.
    Death,
    /// A host dies, and one re-created takes its name and place.
    Recreate,
    /// A member says of itself what cannot be.
    Errs,
    /// A member says of others what cannot be, or speaks in their names.
    Lies,
    /// Breaks the promise's proviso: a database is lost.
    LoseDisk,
    /// Breaks it: a disk is set back to an older state.
    Rollback,
    /// Breaks it: a disk is copied, and both hosts run.
    Clone,
    /// Breaks it: a member that runs is forgotten.
    ForgetAlive,
    /// Breaks it: members are forgotten by time, among them such as are only cut off.
    Voters,
}

impl Fault {
    /// Those under which the promise holds.
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

    /// Those of members, drawn apart.
    pub const BYZANTINE: [Self; 2] = [Self::Errs, Self::Lies];

    /// Those under which two owners may come about, and must be found out.
    pub const BREAKING: [Self; 5] =
        [Self::LoseDisk, Self::Rollback, Self::Clone, Self::ForgetAlive, Self::Voters];
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::ALL.into_iter().chain(Self::BYZANTINE).chain(Self::BREAKING);
        let mut named = all.filter(|fault| fault.to_string() == text);
        named.next().ok_or_else(|| format!("{text:?} is no kind of fault"))
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
    pub kinds: BTreeSet<Fault>,
}

impl Faults {
    /// Each kind with one chance for all, so that most runs have some and few have most.
    pub fn draw(rng: &mut StdRng) -> Self {
        let chance = [0.1, 0.25, 0.5][rng.random_range(0..3)];
        let mut kinds: BTreeSet<Fault> =
            Fault::ALL.into_iter().filter(|_| rng.random_bool(chance)).collect();
        // Now and then a proviso is broken.
        if rng.random_ratio(1, 8) {
            kinds.extend(Fault::BREAKING.into_iter().choose(rng));
        }
        Self { kinds }
    }

    /// Whether a member errs or lies is drawn apart, so that all else of a seed stays as it was.
    pub fn add_byzantine(&mut self, rng: &mut StdRng) {
        self.kinds.extend(Fault::BYZANTINE.into_iter().filter(|_| rng.random_ratio(1, 4)));
    }

    /// A member errs or lies now and then, also while all else is calm.
    pub fn speak(&self, world: &mut World, rng: &mut StdRng) {
        if self.kinds.contains(&Fault::Errs) && rng.random_bool(0.5) {
            world.err(rng);
        }
        if self.kinds.contains(&Fault::Lies) && rng.random_bool(0.5) {
            world.lie(rng);
        }
    }

    /// What holds for the whole of the faulty phase.
    pub fn begin(&self, world: &mut World, rng: &mut StdRng) {
        let on = |fault| self.kinds.contains(&fault);
        world.oracle.lenient = Fault::BREAKING.into_iter().any(on);
        if on(Fault::Loss) {
            world.network.loss = rng.random_range(0.01..0.3);
        }
        if on(Fault::Doubles) {
            world.network.doubled = rng.random_range(0.01..0.5);
        }
        if on(Fault::Late) {
            world.network.late = rng.random_range(0.01..0.2);
            let most = if rng.random_ratio(1, 3) { 30_000 } else { 5_000 };
            world.network.tail = Duration::from_millis(rng.random_range(50..most));
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

    /// One thing goes wrong, or comes right again.
    pub fn strike(&self, world: &mut World, rng: &mut StdRng) {
        let Some(fault) = self.kinds.iter().copied().choose(rng) else { return };
        let hosts = world.hosts.len();
        let Some(host) = (0..hosts).filter(|host| world.hosts[*host].power).choose(rng) else {
            return;
        };
        match fault {
            Fault::Loss | Fault::Doubles | Fault::Late | Fault::SlowDisk => {}
            Fault::SlowKernel | Fault::Drift | Fault::Errs | Fault::Lies => {}
            // Of the voters, the first three hosts, most stay.
            Fault::Voters if host < 2 => {}
            Fault::Voters => _ = die(world, host),
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
                world.oracle.reach("address changed");
                let third = rng.random_range(1..250);
                world.move_host(host, Ipv4Addr::new(10, 100, third, host as u8));
                if rng.random_bool(0.5) {
                    world.start(host);
                }
            }
            Fault::Pause if rng.random_bool(0.5) => (0..hosts).for_each(|host| world.resume(host)),
            Fault::Pause => world.pause(host),
            Fault::Kernel => tamper(world, host, rng),
            Fault::Garbage => world.babble(host, rng),
            Fault::Leave => leave(world, host),
            Fault::Death if rng.random_bool(0.5) => forget(world, rng),
            Fault::Death => _ = die(world, host),
            Fault::Recreate => recreate(world, host),
            Fault::LoseDisk => {
                // One at most: where all have lost everything there is no cluster any more.
                let others = members(world) > 3 && !world.hosts[host].saved_seeds.is_empty();
                if std::mem::replace(&mut world.disk_lost, true) || !others {
                    return;
                }
                world.oracle.reach("disk lost");
                world.kill(host);
                world.hosts[host].disk = Disk::default();
                world.start(host);
            }
            Fault::Rollback => match world.hosts[host].snapshot.take() {
                Some(snapshot) => {
                    world.oracle.reach("rolled back");
                    world.kill(host);
                    world.hosts[host].disk = snapshot;
                    world.start(host);
                    // Somebody who asks it for a slot, which it may have granted before.
                    let joiner = world.add_joiner(&[host]);
                    world.start(joiner);
                }
                None => world.hosts[host].snapshot = Some(world.hosts[host].disk.clone()),
            },
            Fault::Clone => world.copy_host(host),
            Fault::ForgetAlive => {
                let victim = world.hosts[rng.random_range(0..hosts)].key;
                // Whoever forgets all others, and is forgotten by all, stays apart: outside the promise.
                if members(world) > 2 && world.hosts[host].members_on_disk().len() > 2 {
                    world.forget(host, victim, true);
                }
            }
            Fault::Blackout => {
                world.oracle.reach("blackout");
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

fn partition(world: &mut World, rng: &mut StdRng) {
    world.oracle.reach("partition");
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

/// Somebody's hand in the kernel's tables.
fn tamper(world: &mut World, host: usize, rng: &mut StdRng) {
    let what = rng.random_range(0..6);
    world.change_kernel(host, |host| {
        let kernel = &mut host.kernel;
        match what {
            0 => host.kernel_refuses = 1 + host.identities as u32,
            1 => _ = kernel.routes.pop_first(),
            2 => _ = kernel.neighbours.pop_last(),
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

/// Another host has the same identity: nobody takes away one of two before that is cured.
fn is_shared(world: &World, host: usize) -> bool {
    world.hosts.iter().any(|other| other.index != host && other.key == world.hosts[host].key)
}

/// Hosts of the cluster that are there to stay.
fn members(world: &World) -> usize {
    world.hosts.iter().filter(|host| host.saved_cluster.is_some() && !host.going).count()
}

/// An operator takes a host away, the proper way. Two members stay, so that there is a cluster.
fn leave(world: &mut World, host: usize) {
    let runs = world.hosts[host].process.is_some() && !is_shared(world, host);
    if members(world) > 2 && runs && world.hosts[host].saved_cluster.is_some() {
        world.hosts[host].going = true;
        world.command(host, Command::Leave);
    }
}

/// Hosts that are re-created in one run: all the others must acknowledge that each is gone.
const MAX_RECREATED: usize = 6;

/// As docker-compose does it: the container is gone, and another one has its name.
fn recreate(world: &mut World, host: usize) {
    let name = world.hosts[host].name.clone();
    let members = world.hosts.iter().filter(|other| other.index != host && other.power);
    let seeds: Vec<usize> = members.map(|host| host.index).collect();
    let anew = world.hosts.iter().filter(|host| host.replaces).count();
    if anew > MAX_RECREATED || !die(world, host) {
        return;
    }
    let anew = world.add_joiner(&seeds);
    world.hosts[anew].name = name;
    world.hosts[anew].replaces = true;
    world.oracle.reach("recreated");
    world.start(anew);
}

/// A host is switched off and never comes back; two members stay. Says whether it was.
fn die(world: &mut World, host: usize) -> bool {
    let known = world.hosts[host].saved_cluster.is_some() && !is_shared(world, host);
    if members(world) > 2 + usize::from(world.disk_lost) && known && !world.hosts[host].going {
        world.oracle.reach("died");
        world.hosts[host].going = true;
        world.destroy(host);
        return true;
    }
    false
}

/// An operator tells some member that a dead one is gone, where that is within the promise.
fn forget(world: &mut World, rng: &mut StdRng) {
    let dead = |host: &&Host| !host.power && host.stopped.is_none();
    let Some(victim) = world.hosts.iter().filter(dead).map(|host| host.key).choose(rng) else {
        return;
    };
    let issuer = (0..world.hosts.len()).filter(|host| world.hosts[*host].process.is_some());
    let Some(issuer) = issuer.choose(rng) else { return };
    if world.is_forgettable(victim, issuer) {
        world.forget(issuer, victim, false);
    }
}

//! A simulated host: a machine with a disk, a kernel and a clock, on which a process may run.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

use super::disk::Disk;
use crate::{
    core::{Bootstrap, CallId, Gate, Input, Node, NodeConfig, Stop, View},
    dataplane::{
        desired::{Desired, Underlay},
        fake::FakeKernel,
    },
    model::{
        BootId, ClusterId, ClusterSettings, Mac, NodeId, Pool, Quorum, SettingsWish, Time, Vtep,
    },
    wire::{Key, Record},
};

/// The cluster of hosts whose subnets somebody outside gives.
const ASSIGNED: ClusterId = ClusterId::from_bytes([7; 8]);
/// UDP port of every simulated endpoint.
const PORT: u16 = 8473;

pub const DISK_LATENCY: (Duration, Duration) =
    (Duration::from_micros(300), Duration::from_millis(2));
pub const KERNEL_LATENCY: Duration = Duration::from_micros(300);

/// The machine, and what runs on it.
pub struct Host {
    pub index: usize,
    /// Present identity; a host that restarts gets another one.
    pub key: NodeId,
    pub identities: u8,
    /// Those it had before.
    pub former: Vec<NodeId>,
    pub name: String,
    pub underlay: Ipv4Addr,
    /// What the operator wrote down; seeds by name, so that they are found at their present address.
    pub creates: Option<ClusterSettings>,
    pub seeds: Vec<usize>,
    /// What the token file remembers, beside the database.
    pub saved_cluster: Option<ClusterId>,
    pub saved_seeds: Vec<SocketAddr>,
    pub disk: Disk,
    /// An older state of it that somebody kept.
    pub snapshot: Option<Disk>,
    /// Its state directory is a copy of another host's.
    pub is_copy: bool,
    pub kernel: FakeKernel,
    pub clock: Clock,
    /// Switched off for good otherwise.
    pub power: bool,
    /// The operator has told this host to leave, or its cluster that it is gone.
    pub going: bool,
    pub process: Option<Process>,
    /// Counts processes: what was meant for an earlier one is void.
    pub life: u32,
    /// First address of the subnet that somebody outside has given to it.
    pub assigned: Option<Ipv4Addr>,
    /// Networks that lead elsewhere on it.
    pub occupied: Vec<IpNet>,
    /// An address in the subnet that it would like.
    pub prefers: Option<IpAddr>,
    /// Its agent runs with `replace_by_name`.
    pub replaces: bool,
    /// Who of the cluster forgets by time.
    pub quorum: Option<Quorum>,
    pub stopped: Option<Stop>,
    pub disk_latency: (Duration, Duration),
    /// From a new view to the pass that programs it.
    pub kernel_latency: Duration,
    /// Operations that the kernel refuses next.
    pub kernel_refuses: u32,
    /// Extra entropy of this host's processes.
    pub luck: [u8; 24],
}

/// A running agent: the production node and gate, and what the shell would hold.
pub struct Process {
    pub node: Node,
    pub gate: Gate,
    pub desired_state: Option<DesiredState>,
    /// When the kernel is next made equal to the goal.
    pub programs_at: Option<Time>,
    /// The wake-up that is in the queue.
    pub timer: Option<Time>,
    /// Frozen: what comes meanwhile waits here.
    pub paused: Option<Vec<Input>>,
    pub open_calls: BTreeSet<CallId>,
    /// Comparisons under way, and with whom.
    pub comparisons: BTreeMap<CallId, NodeId>,
    /// The member that did not answer the last one that ended.
    pub last_silent: Option<NodeId>,
    /// Members it knew when it started, none of whom it has met since.
    pub unmet: BTreeSet<NodeId>,
}

/// What the kernel is to be made equal to.
#[derive(Clone, Debug)]
pub enum DesiredState {
    Overlay(View),
    Nothing,
}

/// A monotonic clock of its own: any offset, and a rate that is off by parts in a million.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    pub offset: Duration,
    pub drift_ppm: i32,
}

impl Clock {
    pub fn local(&self, now: Time) -> Time {
        let nanos = now.since(Time::ZERO).as_nanos() as i128;
        let skew = nanos * i128::from(self.drift_ppm) / 1_000_000;
        Time::from_nanos((nanos + skew) as u64) + self.offset
    }

    /// The first moment at which this clock shows `local`.
    pub fn global(&self, local: Time) -> Time {
        let nanos = local.since(Time::ZERO).saturating_sub(self.offset).as_nanos() as i128;
        let rate = 1_000_000 + i128::from(self.drift_ppm);
        let global = (nanos * 1_000_000 + rate - 1) / rate;
        let mut at = Time::from_nanos(global as u64);
        while self.local(at) < local {
            at = at + Duration::from_nanos(1);
        }
        at
    }
}

impl Host {
    pub fn new(index: usize, luck: [u8; 24]) -> Self {
        let mut host = Self {
            index,
            key: NodeId::from_bytes([0; 8]),
            identities: 0,
            former: Vec::new(),
            name: format!("n{index}"),
            underlay: Ipv4Addr::from(0x0a63_000a + index as u32),
            creates: None,
            seeds: Vec::new(),
            saved_cluster: None,
            saved_seeds: Vec::new(),
            disk: Disk::default(),
            snapshot: None,
            is_copy: false,
            kernel: FakeKernel::default(),
            clock: Clock::default(),
            power: true,
            going: false,
            process: None,
            life: 0,
            assigned: None,
            occupied: Vec::new(),
            prefers: None,
            replaces: false,
            quorum: None,
            stopped: None,
            disk_latency: DISK_LATENCY,
            kernel_latency: KERNEL_LATENCY,
            kernel_refuses: 0,
            luck,
        };
        host.new_identity();
        host
    }

    /// Forgets who it was: key and database go, the token stays.
    pub fn new_identity(&mut self) {
        if self.identities > 0 {
            self.former.push(self.key);
        }
        self.identities += 1;
        let mut key = [self.identities; 32];
        key[..8].copy_from_slice(&(self.index as u64).to_le_bytes());
        key[8..31].copy_from_slice(&self.luck[..23]);
        self.key = NodeId::of_public_key(&key);
        self.disk = Disk::default();
    }

    pub fn address(&self) -> SocketAddr {
        (self.underlay, PORT).into()
    }

    pub fn node(&self) -> Option<&Node> {
        self.process.as_ref().map(|process| &process.node)
    }

    /// Members by its disk, itself included, that are not gone.
    pub fn members_on_disk(&self) -> BTreeSet<NodeId> {
        let records = self.disk.records().unwrap_or_default();
        let forgotten = |node| records.iter().any(|(key, _)| *key == Key::Forget(node));
        let member = |(_, record): &(Key, Record)| match record {
            Record::Member(record) if !record.has_left() && !forgotten(record.node) => {
                Some(record.node)
            }
            _ => None,
        };
        records.iter().filter_map(member).collect()
    }

    /// Whether it owns slots, for all that its disk says.
    pub fn owns_by_its_disk(&self) -> bool {
        let records = self.disk.records().unwrap_or_default();
        records.iter().any(|(_, record)| match record {
            Record::Slots(runs) => runs.iter().any(|run| run.record.owner == self.key),
            _ => false,
        })
    }

    /// Whether its disk says for sure that a node has left.
    pub fn knows_as_left(&self, node: NodeId) -> bool {
        let record = self.disk.flushed(Key::Member(node));
        record.is_some_and(|record| matches!(record, Record::Member(record) if record.has_left()))
    }

    /// The subnet that this host's kernel uses, whether or not a process runs.
    pub fn subnet_in_use(&self, pool: &Pool) -> Option<IpNet> {
        let found = self.kernel.device.as_ref()?;
        let (address, _) = found.addresses.first()?;
        Some(pool.subnet(pool.slot_of(*address)?))
    }

    /// Where packets for this host's pods must be sent.
    pub fn tunnel_end(&self) -> Option<(Mac, IpAddr)> {
        let found = self.kernel.device.as_ref()?;
        Some((found.device.mac, self.underlay.into()))
    }

    /// As `agent::start` makes it.
    pub fn config(&self) -> NodeConfig {
        let remembers = self.saved_cluster.is_some();
        let mut seed = [0; 32];
        seed[..24].copy_from_slice(&self.luck);
        seed[24..28].copy_from_slice(&self.life.to_le_bytes());
        seed[28..].copy_from_slice(&(self.index as u32).to_le_bytes());
        let mut boot = [0; 8];
        boot[..4].copy_from_slice(&(self.index as u32).to_le_bytes());
        boot[4..].copy_from_slice(&self.life.to_le_bytes());
        NodeConfig {
            node: self.key,
            boot: BootId::from_bytes(boot),
            name: self.name.parse().unwrap_or_else(|_| unreachable!("n and a number")),
            address: self.address(),
            vtep: Vtep { mac: Mac::of_node(self.key), underlay: self.underlay.into() },
            bootstrap: match self.creates {
                Some(settings) if !remembers => Bootstrap::Create(settings),
                _ => Bootstrap::Join,
            },
            seeds: self.seed_count(),
            cluster: self.saved_cluster.or(self.assigned.map(|_| ASSIGNED)),
            wish: SettingsWish::default(),
            prefer_subnet: self.prefers,
            occupied: self.occupied.clone(),
            assigned: self.assigned.map(Into::into),
            replace_by_name: self.replaces,
            quorum: self.quorum.clone(),
            rng_seed: seed,
        }
    }

    /// Of those given, or else of those remembered.
    pub fn seed_count(&self) -> usize {
        if self.seeds.is_empty() { self.saved_seeds.len() } else { self.seeds.len() }
    }

    pub fn desired(&self, view: &View) -> Desired {
        let underlay = Underlay::of_tunnels(2, self.underlay.into(), 1450);
        Desired::new(view, &underlay, &BTreeSet::new())
    }
}

/// Hosts by the address at which they can be reached now.
pub fn by_address(hosts: &[Host]) -> BTreeMap<SocketAddr, usize> {
    hosts.iter().filter(|host| host.power).map(|host| (host.address(), host.index)).collect()
}

//! A simulated host: a machine with a disk, a kernel and a clock, on which an agent may run.

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

/// Id of the cluster whose hosts are assigned their subnets from outside (`lease_source = "podcidr"`).
const ASSIGNED: ClusterId = ClusterId::from_bytes([7; 8]);
/// UDP port of every simulated endpoint.
const PORT: u16 = 8473;

/// Least and greatest time until a batch is flushed, without faults.
pub const DISK_LATENCY: (Duration, Duration) =
    (Duration::from_micros(300), Duration::from_millis(2));
/// Time from a new view to the pass that programs it, without faults.
pub const KERNEL_LATENCY: Duration = Duration::from_micros(300);

/// A machine and the agent that runs on it.
pub struct Host {
    /// Position in [`World::hosts`](super::world::World::hosts).
    pub index: usize,
    /// Present node id. A host that was expelled or has left gets another one.
    pub key: NodeId,
    /// Number of identities so far, the present one included.
    pub identity_count: u8,
    /// Earlier node ids.
    pub former_ids: Vec<NodeId>,
    /// Node name.
    pub name: String,
    /// Underlay address.
    pub underlay: Ipv4Addr,
    /// Configuration: the cluster to create.
    pub creates: Option<ClusterSettings>,
    /// Configuration: indices of the seeds. An index stands for a host name: it resolves to the present
    /// address.
    pub seeds: Vec<usize>,
    /// Token file: the cluster.
    pub saved_cluster: Option<ClusterId>,
    /// Token file: addresses of seeds.
    pub saved_seeds: Vec<SocketAddr>,
    /// The database.
    pub disk: Disk,
    /// An older state of the disk, for [`Fault::Rollback`](super::faults::Fault::Rollback).
    pub snapshot: Option<Disk>,
    /// Whether its state directory is a copy of another host's.
    pub is_copy: bool,
    /// The kernel.
    pub kernel: FakeKernel,
    /// The monotonic clock.
    pub clock: Clock,
    /// Whether the machine is switched on. A host that has left or was destroyed stays off.
    pub is_powered: bool,
    /// Whether the host is leaving or was destroyed.
    pub is_departing: bool,
    /// The running agent.
    pub process: Option<Process>,
    /// Number of the present or last process. Events of earlier ones are dropped.
    pub process_id: u32,
    /// First address of the subnet that is assigned from outside.
    pub assigned: Option<Ipv4Addr>,
    /// Networks that routes of this host already lead to.
    pub occupied: Vec<IpNet>,
    /// Configuration: an address in the preferred subnet.
    pub prefers: Option<IpAddr>,
    /// Configuration: `replace_by_name`.
    pub replaces: bool,
    /// Configuration: voters that forget by time.
    pub quorum: Option<Quorum>,
    /// Why the last process stopped by itself.
    pub stopped: Option<Stop>,
    /// Least and greatest time until a batch is flushed.
    pub disk_latency: (Duration, Duration),
    /// Time from a new view to the pass that programs it.
    pub kernel_latency: Duration,
    /// Number of kernel operations that will fail.
    pub kernel_refuses: u32,
    /// Makes keys and random seeds of this host unique.
    pub entropy: [u8; 24],
}

/// A running agent: the production node and gate, and the state that the agent's loop holds.
pub struct Process {
    /// The production core.
    pub node: Node,
    /// The production gate.
    pub gate: Gate,
    /// State to program into the kernel.
    pub desired_state: Option<DesiredState>,
    /// When the next pass of the data plane is scheduled.
    pub next_program_at: Option<Time>,
    /// When the scheduled timeout fires.
    pub timer: Option<Time>,
    /// Inputs that arrived while the process is frozen; `None` while it runs.
    pub paused: Option<Vec<Input>>,
    /// Calls without an answer.
    pub open_calls: BTreeSet<CallId>,
    /// Comparisons without an answer, each with its partner.
    pub comparisons: BTreeMap<CallId, NodeId>,
    /// The partner of the last ended comparison, if it did not answer.
    pub last_silent: Option<NodeId>,
    /// Whether its node leaves: by an order that it has not refused, or by its disk.
    pub is_leaving: bool,
    /// Members that the disk held at the start. Emptied by the first contact with one of them.
    pub awaited_peers: BTreeSet<NodeId>,
}

/// What a pass makes the kernel equal to.
#[derive(Clone, Debug)]
pub enum DesiredState {
    /// The device and entries of a view.
    Overlay(View),
    /// No device.
    Nothing,
}

/// A monotonic clock with an offset and a rate error.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// Value at virtual time zero.
    pub offset: Duration,
    /// Rate error, in parts per million.
    pub drift_ppm: i32,
}

impl Clock {
    /// Returns what the clock shows at virtual time `now`.
    pub fn local(&self, now: Time) -> Time {
        let nanos = now.since(Time::ZERO).as_nanos() as i128;
        let skew = nanos * i128::from(self.drift_ppm) / 1_000_000;
        Time::from_nanos((nanos + skew) as u64) + self.offset
    }

    /// Returns the first virtual time at which the clock shows `local`.
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
    /// Returns a powered host without a running agent.
    pub fn new(index: usize, entropy: [u8; 24]) -> Self {
        let mut host = Self {
            index,
            key: NodeId::from_bytes([0; 8]),
            identity_count: 0,
            former_ids: Vec::new(),
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
            is_powered: true,
            is_departing: false,
            process: None,
            process_id: 0,
            assigned: None,
            occupied: Vec::new(),
            prefers: None,
            replaces: false,
            quorum: None,
            stopped: None,
            disk_latency: DISK_LATENCY,
            kernel_latency: KERNEL_LATENCY,
            kernel_refuses: 0,
            entropy,
        };
        host.new_identity();
        host
    }

    /// Draws a new key and clears the database. The token file remains.
    pub fn new_identity(&mut self) {
        if self.identity_count > 0 {
            self.former_ids.push(self.key);
        }
        self.identity_count += 1;
        let mut key = [self.identity_count; 32];
        key[..8].copy_from_slice(&(self.index as u64).to_le_bytes());
        key[8..31].copy_from_slice(&self.entropy[..23]);
        self.key = NodeId::of_public_key(&key);
        self.disk = Disk::default();
    }

    /// Returns the address of the QUIC endpoint.
    pub fn address(&self) -> SocketAddr {
        (self.underlay, PORT).into()
    }

    /// Returns the running node.
    pub fn node(&self) -> Option<&Node> {
        self.process.as_ref().map(|process| &process.node)
    }

    /// Returns the members on disk that have neither left nor been forgotten, itself included.
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

    /// Whether the disk holds a slot record with this host as the owner.
    pub fn owns_by_its_disk(&self) -> bool {
        let records = self.disk.records().unwrap_or_default();
        records.iter().any(|(_, record)| match record {
            Record::Slots(runs) => runs.iter().any(|run| run.record.owner == self.key),
            _ => false,
        })
    }

    /// Whether the disk holds the record that a node has left.
    pub fn knows_as_left(&self, node: NodeId) -> bool {
        let record = self.disk.flushed(Key::Member(node));
        record.is_some_and(|record| matches!(record, Record::Member(record) if record.has_left()))
    }

    /// Returns the subnet that the kernel uses, whether or not an agent runs.
    pub fn subnet_in_use(&self, pool: &Pool) -> Option<IpNet> {
        let found = self.kernel.device.as_ref()?;
        let (address, _) = found.addresses.first()?;
        Some(pool.subnet(pool.slot_of(*address)?))
    }

    /// Returns the MAC and underlay address to which peers must send packets for this host's pods.
    pub fn tunnel_end(&self) -> Option<(Mac, IpAddr)> {
        let found = self.kernel.device.as_ref()?;
        Some((found.device.mac, self.underlay.into()))
    }

    /// Returns the node's configuration, as `agent::start` builds it.
    pub fn config(&self) -> NodeConfig {
        let remembers = self.saved_cluster.is_some();
        let mut seed = [0; 32];
        seed[..24].copy_from_slice(&self.entropy);
        seed[24..28].copy_from_slice(&self.process_id.to_le_bytes());
        seed[28..].copy_from_slice(&(self.index as u32).to_le_bytes());
        let mut boot = [0; 8];
        boot[..4].copy_from_slice(&(self.index as u32).to_le_bytes());
        boot[4..].copy_from_slice(&self.process_id.to_le_bytes());
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

    /// Returns the number of configured seeds, or of saved ones if none is configured.
    pub fn seed_count(&self) -> usize {
        if self.seeds.is_empty() { self.saved_seeds.len() } else { self.seeds.len() }
    }

    /// Returns the desired state of the kernel for a view.
    pub fn desired(&self, view: &View) -> Desired {
        let underlay = Underlay::of_tunnels(2, self.underlay.into(), 1450);
        Desired::new(view, &underlay, &BTreeSet::new())
    }
}

/// Maps the present address of each powered host to its index.
pub fn by_address(hosts: &[Host]) -> BTreeMap<SocketAddr, usize> {
    hosts.iter().filter(|host| host.is_powered).map(|host| (host.address(), host.index)).collect()
}

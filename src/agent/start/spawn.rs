//! Last phase: the core starts with its records, and the threads start.

use std::{net::IpAddr, time::Instant};

use ipnet::IpNet;
use tokio::sync::mpsc;

use super::{
    StartFailure,
    identity::Identity,
    memory::{Memory, StoredRecords},
    preflight::Preflight,
    wait::StartupWait,
};
use crate::{
    agent::{
        Agent, Clock, GossipState, Journal, KernelState, KnownSecrets, Lifetime, LoopEvent,
        PodState, Prober, Requests, Service, Sources, Storage, Threads,
        diagnosis::isolation::Isolation,
        threads::{self, Monitors},
        workers::{
            archive::Archive,
            attach_worker::{AttachWorker, Job},
            programmer::Programmer,
        },
    },
    config::Config,
    core::{Bootstrap, Node, NodeConfig},
    dataplane::overlap::ForeignKind,
    icmp::IcmpEvent,
    model::{BootId, Mac, NodeId, Time, Vtep},
    random::random,
    store::{EssentialsCopy, WriteEvent, Writer},
    transport::Transport,
    underlay::ChosenUnderlay,
};

/// The results of the earlier phases.
pub(super) struct Ready {
    pub(super) config: Config,
    pub(super) memory: Memory,
    pub(super) identity: Identity,
    pub(super) host: Preflight,
    pub(super) transport: Transport,
}

impl Ready {
    /// Starts the core and the threads. Returns the agent and the receiver of its probes' answers.
    ///
    /// # Errors
    /// Fails if the core refuses the records, or the system cannot create a thread.
    pub(super) fn spawn(
        mut self,
        waiting: StartupWait<'_>,
        sender: threads::Sender,
    ) -> Result<(Agent, mpsc::Receiver<IcmpEvent>), StartFailure> {
        let listener_problems = waiting.closed();
        let (waiters, early_requests) = waiting.into_requests();
        let mut pods = self.restore_pods();
        pods.early_requests = early_requests;
        pods.lost = std::mem::take(&mut self.memory.lost_pods);
        let node = self.node_config(&pods)?;
        let isolation = self.isolation();
        let Self { config, memory, identity, host, transport } = self;
        let Preflight { underlay, bridge, view } = host;
        let StoredRecords { database, records, is_new } = memory.stored;
        let knows_cluster = identity.known_cluster.is_some();
        let copy =
            EssentialsCopy::new(memory.state.essentials(), node.node, &records, database.batches());
        log_start(memory.key.id(), &config, &underlay);
        let node = Node::start(Time::ZERO, node, records)?;
        if is_new {
            // The running loop then writes all known records.
            let _ = sender.send(LoopEvent::Disk(WriteEvent::Emptied));
        }
        let path = memory.state.database();
        let writer = Writer::start(database, path, copy, forward(&sender, LoopEvent::Disk))?;
        let report = forward(&sender, LoopEvent::Kernel);
        let programmer = Programmer::start(view.kernel, config.clone(), underlay.clone(), report)?;
        let attach_worker = AttachWorker::start(forward(&sender, LoopEvent::Pods))?;
        pods.save_initial(&writer);
        if knows_cluster {
            // All existing pods are known, so other veth pairs belong to no pod.
            attach_worker.ask(Job::Sweep { bridge, keep: pods.links() });
        }
        let archive = Archive::start(memory.state.clone(), forward(&sender, LoopEvent::Archive))?;
        let (prober, heard) = Prober::start(u16::from_ne_bytes(random()?), config.withdraw_after);
        let now = Instant::now();
        let fresh = memory.is_fresh && pods.table.is_empty();
        let saved_token = identity.token.filter(|_| knows_cluster);
        let (seeds, kubernetes) = (identity.configured_seeds, identity.source);
        let mut agent = Agent {
            node,
            clock: Clock(now),
            config,
            transport,
            underlay,
            threads: Threads { programmer, attach_worker, monitors: Monitors::start(sender)? },
            kernel: KernelState::default(),
            pods,
            storage: Storage::new(memory.state, writer, archive),
            secrets: KnownSecrets::new(identity.keyring, saved_token),
            prober,
            gossip: GossipState { isolation, ..GossipState::default() },
            sources: Sources { seeds, kubernetes },
            requests: Requests::new(listener_problems, waiters),
            journal: Journal::new(now),
            service: Service::new(now),
            lifetime: Lifetime::new(fresh),
        };
        if agent.underlay.is_present() {
            agent.save_underlay();
        }
        Ok((agent, heard))
    }

    /// Returns the pods of the last run that still exist.
    fn restore_pods(&mut self) -> PodState {
        let (memory, view) = (&self.memory, &mut self.host.view);
        let StoredRecords { records, is_new, .. } = &memory.stored;
        let found = std::mem::take(&mut view.pods);
        let mut pods = PodState::from_records(records, memory.is_same_boot, &found);
        if self.identity.known_cluster.is_none() || *is_new || !memory.is_same_boot {
            // Pods outlive the state directory and the database. If the database is complete, a pod without
            // a record was disconnected, and its veth pair is removed.
            pods.adopt(found);
        }
        pods.table.learn_macs(&view.macs);
        pods
    }

    /// Returns the configuration of the core.
    fn node_config(&self, pods: &PodState) -> Result<NodeConfig, StartFailure> {
        let Self { config, memory, identity, host, transport } = self;
        let node = memory.key.id();
        let (ip, port) = config.advertise.unwrap_or((host.underlay.local, None));
        let port = match port {
            Some(port) => port,
            None => transport.local_address()?.port(),
        };
        Ok(NodeConfig {
            node,
            boot: BootId::from_bytes(random()?),
            name: config.name.clone(),
            address: (ip, port).into(),
            vtep: Vtep { mac: Mac::of_node(node), underlay: ip },
            bootstrap: config.create.map_or(Bootstrap::Join, Bootstrap::Create),
            seeds: config.seeds.len(),
            cluster: identity.cluster_id(),
            wish: config.wish,
            prefer_subnet: config.prefer_subnet,
            occupied: self.occupied_networks(pods),
            assigned: identity.assigned.map(|(address, _)| address),
            replace_by_name: config.replace_by_name,
            quorum: config.quorum.clone(),
            rng_seed: random()?,
        })
    }

    /// Returns the networks of other programs, in which this node must have no subnet. Networks of bridges
    /// belong to this host's containers. Running pods keep their addresses, and so their subnet.
    fn occupied_networks(&self, pods: &PodState) -> Vec<IpNet> {
        let pool = self.identity.known_cluster.map(|cluster| cluster.settings.pool);
        let addresses: Vec<IpAddr> =
            pods.table.iter().flat_map(|pod| pod.addresses.iter()).collect();
        let foreign = self.host.view.foreign.iter();
        foreign
            .filter(|found| {
                found.kind != ForeignKind::Bridge && !found.is_among(&addresses, pool.as_ref())
            })
            .map(|found| found.network.trunc())
            .collect()
    }

    /// Returns what is known about this host's isolation: whether its address has changed.
    fn isolation(&self) -> Isolation {
        let mut isolation = Isolation::default();
        if let Some((before, _)) = self.memory.underlay
            && self.host.underlay.is_present()
            && self.config.advertise.is_none()
        {
            isolation.on_address_change(before, self.host.underlay.local);
        }
        isolation
    }
}

/// Returns a function that sends events of a thread to the event loop.
fn forward<E>(
    sender: &threads::Sender,
    event: impl Fn(E) -> LoopEvent + Send + 'static,
) -> impl Fn(E) + Send + 'static {
    let sender = sender.clone();
    move |report| _ = sender.send(event(report))
}

fn log_start(node: NodeId, config: &Config, underlay: &ChosenUnderlay) {
    tracing::info!(
        %node,
        name = %config.name,
        underlay = %format_args!("{} ({})", underlay.local, underlay.name),
        version = env!("CARGO_PKG_VERSION"),
        "starting"
    );
}

//! Startup, from the configuration to a running agent. Everything that may be refused is checked before
//! anything is written; what is written earlier is removed on refusal.

mod host_view;
pub(super) mod memory;
pub(super) mod wait;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::net,
    time::Instant,
};

use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use self::{
    host_view::HostView,
    memory::{Memory, StoredRecords},
    wait::StartupWait,
};
use crate::{
    agent::{
        Agent, Archive, Arrivals, AttachWorker, Clock, Ending, Gate, Isolation, Journal,
        KernelState, LoopEvent, PodCidrSource, PodState, Prober, Programmer, ReceiveDrops, Service,
        SettingsReader, Signals, Surveys, kubernetes, listeners::Listeners,
        operator::secrets::Steps, threads, workers::attach_worker::Job,
    },
    api,
    config::{Config, ConfigError, DEFAULT_VXLAN_PORT},
    core::{Bootstrap, Node, NodeConfig, StartError},
    dataplane::{kernel::KernelError, overlap::ForeignKind},
    icmp::IcmpEvent,
    model::{BootId, ClusterId, ClusterRecord, ClusterSettings, Mac, NodeId, Time, Vtep},
    netlink::Netlink,
    random::random,
    rpc::Inquiries,
    store::{EssentialsCopy, StoreError, WriteEvent, Writer},
    transport::{BindError, CredentialError, Credentials, Event, Transport},
    underlay,
    wire::{Key, Keyring, Record, Secret, Token, TokenError},
};

/// Length of a new secret in bytes.
const SECRET_LEN: usize = 32;

/// The reason why an agent did not start: one sentence with the cause and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum StartFailure {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state directory or the database cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No interface can carry tunnels.
    #[error(transparent)]
    Underlay(#[from] underlay::UnderlayError),
    /// A kernel request failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The gossip port cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The core refused the configuration or the records.
    #[error(transparent)]
    Node(#[from] StartError),
    /// The TLS credentials cannot be made.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    /// The token or secret is invalid.
    #[error(transparent)]
    Secret(#[from] TokenError),
    /// The node is to join a cluster without a token.
    #[error("join: a token is needed: pass --token-file with the output of `gossamer token`")]
    NoToken,
    /// A cluster is to be created with the token of an existing one.
    #[error(
        "init: the token is of cluster {0}, which exists: enter it with --join, \
         or use a token made by `gossamer token --new`"
    )]
    TokenOfACluster(ClusterId),
    /// The database of a member is lost, and no seed is known.
    #[error(
        "state_dir: this host is in cluster {0}, but its database is lost and no other member is known: \
         name one with --join, or remove the state directory to restart"
    )]
    LostDatabase(ClusterId),
    /// The listening address does not receive packets to the underlay address.
    #[error(
        "listen: {listen} does not receive what is sent to the underlay address {underlay}: \
         leave it out, or set --advertise or --iface"
    )]
    Listen {
        /// The configured address.
        listen: SocketAddr,
        /// The address of the underlay.
        underlay: IpAddr,
    },
    /// The podCIDR of this node cannot be determined.
    #[error("pod_cidr: {0}")]
    PodCidr(String),
    /// The HTTP server cannot listen.
    #[error("http: {address}: {error}: choose another address, or leave it out")]
    Http {
        /// The configured address.
        address: SocketAddr,
        /// The reason.
        error: io::Error,
    },
    /// The control socket cannot be opened.
    #[error(transparent)]
    Socket(#[from] api::SocketError),
    /// The system's random number generator failed.
    #[error("the system's random number generator failed: {0}")]
    Random(#[from] getrandom::Error),
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Runs an agent until it ends. Must be called within its own tokio runtime, which closes the sockets
/// when it is dropped. Must be called again after [`Ending::Restart`] and [`Ending::Reassigned`].
///
/// `plugin` is the socket of Docker's plugin, if the service manager has opened it. `read_settings` is called
/// at SIGHUP.
///
/// # Errors
/// Fails if the agent cannot start.
pub async fn run(
    config: Config,
    plugin: Option<net::UnixListener>,
    read_settings: &SettingsReader,
) -> Result<Ending, StartFailure> {
    let mut signals = Signals::catch()?;
    let (sender, mut threads) = mpsc::unbounded_channel();
    let listeners = Listeners::open(&config, plugin, &sender)?;
    let mut waiting =
        StartupWait::new(config.name.clone(), listeners.problems(), &mut signals, &mut threads);
    let Some(memory) = memory::load(&config, &mut waiting).await? else {
        return Ok(Ending::Stopped);
    };
    let (state, fresh) = (memory.state.clone(), memory.is_fresh);
    match prepare(config, memory, waiting, sender).await {
        Ok(None) => Ok(Ending::Stopped),
        Ok(Some(Prepared { agent, network, heard })) => {
            let arrivals = Arrivals { threads, network, icmp: heard };
            let ending = agent.run(signals, arrivals, read_settings, &listeners).await;
            if ending == Ending::Restart {
                state.new_identity(&random()?)?;
            }
            Ok(ending)
        }
        Err(failure) => {
            if fresh {
                state.wipe()?;
            }
            Err(failure)
        }
    }
}

/// An agent that is ready for its loop, and the receivers of its events.
struct Prepared {
    agent: Agent,
    network: mpsc::Receiver<Event>,
    heard: mpsc::Receiver<IcmpEvent>,
}

/// Prepares the agent. Returns `None` if a signal ends it before it is ready.
async fn prepare(
    mut config: Config,
    memory: Memory,
    mut waiting: StartupWait<'_>,
    sender: mpsc::UnboundedSender<LoopEvent>,
) -> Result<Option<Prepared>, StartFailure> {
    waiting.identify(memory.key.id());
    let Memory { state, key, is_fresh: fresh, saved, keyring: kept, .. } = memory;
    let StoredRecords { database, records, is_new } = memory.stored;
    let configured_seeds = config.seeds.clone();
    let known_cluster = records.iter().find_map(|(_, record)| match record {
        Record::Cluster(cluster) => Some(*cluster),
        _ => None,
    });
    let is_assigned = config.pod_cidr.is_some();
    if !is_assigned {
        complete_config(&mut config, saved.as_ref(), known_cluster.is_some())?;
    } else if config.seeds.is_empty() {
        config.seeds.extend(saved.iter().flat_map(|token| token.seeds.clone()));
    }
    let token = config.token.clone().or(saved);
    let secret = match &token {
        Some(token) => token.secret.clone(),
        None if is_assigned => return Err(StartFailure::NoToken),
        None if config.create.is_some() => Secret::new(random::<SECRET_LEN>()?.to_vec())?,
        None if config.seeds.is_empty() && known_cluster.is_none() => {
            return Err(StartError::NoCluster.into());
        }
        None => return Err(StartFailure::NoToken),
    };
    if token.is_none() {
        // A cluster is being created: the secret must be on disk before the database.
        let seeds = Vec::new();
        state.save_token(&Token { cluster: ClusterId::UNKNOWN, secret: secret.clone(), seeds })?;
    }
    let mut keyring = kept.unwrap_or_else(|| Keyring::new(secret.clone()));
    if let Some(given) =
        config.token.as_ref().filter(|token| keyring.has_dropped(token.secret.id()))
    {
        tracing::warn!(
            secret = %given.secret.id(),
            "the configured token has a secret that the cluster no longer uses: replace it \
             (gossamer token)"
        );
    }
    keyring.adopt(&secret);
    let (assigned, source) = match (&config.pod_cidr, config.create) {
        (Some(from), Some(settings)) => {
            let (name, pool) = (config.name.as_str(), settings.pool);
            let found = kubernetes::find(from, name, &pool, &state, &mut waiting).await?;
            let Some(given) = found else { return Ok(None) };
            let seeds = kubernetes::seeds(given.others.as_deref().unwrap_or_default(), config.port);
            let source =
                PodCidrSource::new(from, name, pool, &given, seeds.clone(), sender.clone());
            config.seeds.extend(seeds);
            (Some((given.address, settings)), source)
        }
        _ => (None, None),
    };
    let peers = records.iter().filter_map(|(_, record)| match record {
        Record::Member(member) if member.node != key.id() => Some(member.vtep.underlay),
        _ => None,
    });
    let chosen = match underlay::choose(&mut Netlink::open()?, &config, peers) {
        Ok(chosen) => chosen,
        Err(error @ underlay::UnderlayError::Mtu { .. }) => return Err(error.into()),
        Err(error) => match saved_underlay(memory.underlay, &records, key.id()) {
            Some(chosen) => {
                tracing::warn!(%error, "starting without an underlay");
                chosen
            }
            None => match waiting.wait_for_underlay(&config).await? {
                Some(found) => found,
                None => return Ok(None),
            },
        },
    };
    let (vni, port) = match known_cluster {
        Some(cluster) => (cluster.settings.vni, cluster.settings.vxlan_port),
        None => (config.vni, config.wish.vxlan_port.unwrap_or(DEFAULT_VXLAN_PORT)),
    };
    let bridge = config.bridge_name(vni);
    let plan = host_view::PlannedOverlay {
        vni,
        port,
        underlay: chosen.local,
        settings: known_cluster.map(|cluster| cluster.settings).or(config.create),
        created: config
            .create
            .filter(|_| known_cluster.is_none() && assigned.is_none())
            .map(|s| s.pool),
        bridge: &bridge,
    };
    let Some(view) = waiting.retry_kernel(|| host_view::inspect(&plan)).await? else {
        return Ok(None);
    };
    let HostView { kernel, foreign, pods: found, macs } = view;
    let listen = listen_address(&config, chosen.local)?;
    let credentials = Credentials::new(keyring.accepted(), &key)?;
    let bound = waiting.bind_port(|| Transport::bind(listen, &credentials)).await?;
    let Some((transport, network)) = bound else { return Ok(None) };
    let closed = waiting.closed();
    let (waiters, early) = waiting.into_questions();
    let port = transport.local_address()?.port();
    let (ip, advertised) = config.advertise.unwrap_or((chosen.local, None));
    let mut pods = PodState::from_records(&records, memory.is_same_boot, &found);
    if known_cluster.is_none() || is_new || !memory.is_same_boot {
        // Pods outlive the state directory and the database. If the database is complete, a pod without
        // a record was disconnected, and its veth pair is removed.
        pods.adopt(found);
    }
    pods.early_requests = early;
    let fresh = fresh && pods.table.is_empty();
    pods.table.learn_macs(&macs);
    // Networks of bridges belong to this host's containers. Running pods keep their addresses, and so
    // their subnet.
    let pool = known_cluster.map(|cluster| cluster.settings.pool);
    let addresses: Vec<IpAddr> = pods.table.iter().flat_map(|pod| pod.addresses.iter()).collect();
    let occupied = foreign.into_iter().filter(|found| {
        found.kind != ForeignKind::Bridge && !found.is_among(&addresses, pool.as_ref())
    });
    let occupied = occupied.map(|found| found.network.trunc()).collect();
    let node = NodeConfig {
        node: key.id(),
        boot: BootId::from_bytes(random()?),
        name: config.name.clone(),
        address: (ip, advertised.unwrap_or(port)).into(),
        vtep: Vtep { mac: Mac::of_node(key.id()), underlay: ip },
        bootstrap: config.create.map_or(Bootstrap::Join, Bootstrap::Create),
        seeds: config.seeds.len(),
        cluster: match assigned {
            Some((_, settings)) => Some(common_id(&secret, settings)),
            None => token.as_ref().and_then(Token::known_cluster),
        },
        wish: config.wish,
        prefer_subnet: config.prefer_subnet,
        occupied,
        assigned: assigned.map(|(address, _)| address),
        replace_by_name: config.replace_by_name,
        quorum: config.quorum.clone(),
        rng_seed: random()?,
    };
    let copy = EssentialsCopy::new(state.essentials(), key.id(), &records, database.batches());
    let node = Node::start(Time::ZERO, node, records)?;
    tracing::info!(
        node = %key.id(),
        name = %config.name,
        underlay = %format_args!("{} ({})", chosen.local, chosen.name),
        version = env!("CARGO_PKG_VERSION"),
        "starting"
    );

    if is_new {
        // The running loop then writes all known records.
        let _ = sender.send(LoopEvent::Disk(WriteEvent::Emptied));
    }
    let report = sender.clone();
    let writer = Writer::start(database, state.database(), copy, move |written| {
        let _ = report.send(LoopEvent::Disk(written));
    })?;
    let report = sender.clone();
    let programmer = Programmer::start(kernel, config.clone(), chosen.clone(), move |told| {
        let _ = report.send(LoopEvent::Kernel(told));
    })?;
    let forwarder = threads::start_forwarder(sender.clone())?;
    let remote_pods = threads::start_remote_pods(sender.clone())?;
    let answer_check = threads::start_answer_check(sender.clone())?;
    let silence_diagnosis = threads::start_silence_diagnosis(sender.clone())?;
    let report = sender.clone();
    let attach_worker = AttachWorker::start(move |wired| {
        let _ = report.send(LoopEvent::Pods(wired));
    })?;
    pods.save_initial(&writer);
    if known_cluster.is_some() {
        // All existing pods are known, so other veth pairs belong to no pod.
        attach_worker.ask(Job::Sweep { bridge, keep: pods.links() });
    }
    let report = sender.clone();
    let archive = Archive::start(state.clone(), move |event| {
        let _ = report.send(LoopEvent::Archive(event));
    })?;
    let (prober, heard) = Prober::start(u16::from_ne_bytes(random()?), config.withdraw_after);
    let mut isolation = Isolation::default();
    if let Some((before, _)) = memory.underlay
        && chosen.is_present()
        && config.advertise.is_none()
    {
        isolation.on_address_change(before, chosen.local);
    }
    let mut agent = Agent {
        node,
        clock: Clock(Instant::now()),
        transport,
        writer,
        gate: Gate::default(),
        programmer,
        forwarder,
        remote_pods,
        answer_check,
        silence_diagnosis,
        kernel: KernelState::default(),
        prober,
        isolation,
        receive_drops: ReceiveDrops::default(),
        pods,
        attach_worker,
        underlay: chosen,
        config,
        configured_seeds,
        archive,
        state,
        saved_token: token.filter(|_| known_cluster.is_some()),
        keyring,
        steps: Steps::default(),
        fresh,
        waiters,
        ping_rounds: Vec::new(),
        leave_reply: None,
        store_failure: None,
        service: Service::new(Instant::now()),
        journal: Journal::new(Instant::now()),
        listener_problems: closed,
        inquiries: Inquiries::default(),
        surveys: Surveys::default(),
        source,
        giving_up: None,
        news: sender,
        ended: threads::Ended::default(),
        ending: None,
    };
    if agent.underlay.is_present() {
        agent.save_underlay();
    }
    Ok(Some(Prepared { agent, network, heard }))
}

/// Returns the underlay that a known member had when its host last had a network; `None` for a new node.
fn saved_underlay(
    saved: Option<(IpAddr, u32)>,
    records: &[(Key, Record)],
    me: NodeId,
) -> Option<underlay::ChosenUnderlay> {
    let own = records.iter().find_map(|(_, record)| match record {
        Record::Member(member) if member.node == me => Some(member.vtep.underlay),
        _ => None,
    });
    let local = own.map(|published| saved.map_or(published, |(local, _)| local));
    let mtu = saved.map(|(_, mtu)| mtu);
    local.map(|local| underlay::ChosenUnderlay::remembered(local, mtu))
}

/// Derives the id of a cluster whose subnets are assigned from outside. Such a cluster has no creator
/// that could draw an id. Nodes with other settings compute another id, and are refused with the reason.
fn common_id(secret: &Secret, settings: ClusterSettings) -> ClusterId {
    let record = Record::Cluster(ClusterRecord { id: ClusterId::UNKNOWN, settings }).encode();
    let mut hash = Sha256::new();
    hash.update(b"gossamer: a cluster without a creator");
    hash.update(secret.as_bytes());
    hash.update(record);
    let hash = hash.finalize();
    ClusterId::from_bytes(std::array::from_fn(|i| hash[i]))
}

/// Returns the address on which gossip listens. Peers must be able to reach it at the underlay address.
fn listen_address(config: &Config, underlay: IpAddr) -> Result<SocketAddr, StartFailure> {
    match config.listen {
        None if underlay.is_ipv4() => Ok((Ipv4Addr::UNSPECIFIED, config.port).into()),
        None => Ok((Ipv6Addr::UNSPECIFIED, config.port).into()),
        Some(listen) if config.advertise.is_none() && !is_reached_by(listen, underlay) => {
            Err(StartFailure::Listen { listen, underlay })
        }
        Some(listen) => Ok(listen),
    }
}

/// Returns whether packets to this host's underlay address arrive at this listening address.
fn is_reached_by(listen: SocketAddr, underlay: IpAddr) -> bool {
    let families = listen.is_ipv6() || underlay.is_ipv4();
    families && (!listen.ip().is_loopback() || underlay.is_loopback())
}

/// Completes the configuration from the last run. A host that was in a cluster never creates another
/// one, even if its database is gone: it finds the cluster again.
///
/// # Errors
/// Fails if the configuration contradicts the saved token, or no seed is known although the database is
/// lost.
fn complete_config(
    config: &mut Config,
    saved: Option<&Token>,
    knows_cluster: bool,
) -> Result<(), StartFailure> {
    if let (Some(given), Some(_), false) =
        (config.token.as_ref().and_then(Token::known_cluster), config.create, knows_cluster)
    {
        return Err(StartFailure::TokenOfACluster(given));
    }
    if config.seeds.is_empty()
        && let Some(saved) = saved
    {
        config.seeds.clone_from(&saved.seeds);
    }
    if let (Some(cluster), false) = (saved.and_then(Token::known_cluster), knows_cluster) {
        if config.seeds.is_empty() {
            return Err(StartFailure::LostDatabase(cluster));
        }
        config.create = None;
    }
    Ok(())
}

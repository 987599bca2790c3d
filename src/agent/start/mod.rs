//! Startup, from the configuration to a running agent. Everything that may be refused is checked before
//! anything is written; what is written earlier is removed on refusal.
//!
//! The phases: the listeners are opened, so that a waiting agent can report why it waits; [`memory`]
//! reads the state directory; [`identity`] determines cluster, secret and assigned subnet;
//! [`preflight`] chooses the underlay and checks the kernel; the gossip port is bound; [`spawn`] starts
//! the core and the threads.

mod bind;
mod host_view;
mod identity;
pub(super) mod memory;
mod pod_cidr;
mod preflight;
mod spawn;
pub(super) mod wait;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::unix::net,
};

use tokio::sync::mpsc;

use self::{
    identity::Identity, memory::Memory, preflight::Preflight, spawn::Ready, wait::StartupWait,
};
use crate::{
    agent::{Agent, Arrivals, Ending, SettingsReader, Signals, listeners::Listeners, threads},
    config::{Config, ConfigError},
    core::StartError,
    dataplane::kernel::KernelError,
    http,
    icmp::IcmpEvent,
    model::ClusterId,
    random::random,
    store::StoreError,
    transport::{BindError, CredentialError, Credentials, Event, Transport},
    underlay,
    wire::TokenError,
};

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
    Socket(#[from] http::SocketError),
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

/// Prepares the agent, phase by phase. Returns `None` if a signal ends it before it is ready.
async fn prepare(
    mut config: Config,
    mut memory: Memory,
    mut waiting: StartupWait<'_>,
    sender: threads::Sender,
) -> Result<Option<Prepared>, StartFailure> {
    waiting.identify(memory.key.id());
    let identity = Identity::resolve(&mut config, &mut memory, &mut waiting, &sender).await?;
    let Some(identity) = identity else { return Ok(None) };
    let chosen = preflight::choose_underlay(&config, &memory)?;
    let host = Preflight::check(&config, chosen, &identity, &mut waiting).await?;
    let Some(host) = host else { return Ok(None) };
    let listen = bind::listen_address(&config, host.underlay.local)?;
    let credentials = Credentials::new(identity.keyring.accepted(), &memory.key)?;
    let bound = waiting.bind_port(|| Transport::bind(listen, &credentials)).await?;
    let Some((transport, network)) = bound else { return Ok(None) };
    let ready = Ready { config, memory, identity, host, transport };
    let (agent, heard) = ready.spawn(waiting, sender)?;
    Ok(Some(Prepared { agent, network, heard }))
}

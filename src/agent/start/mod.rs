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

use std::os::unix::net;

use tokio::sync::mpsc;

use self::{
    identity::Identity, memory::Memory, preflight::Preflight, spawn::Ready, wait::StartupWait,
};
use crate::{
    agent::{
        Agent, Arrivals, EndRequest, Ending, SettingsReader, Signals, StartFailure,
        listeners::{Listeners, open_control},
        threads,
    },
    config::Config,
    icmp::IcmpEvent,
    random::random,
    transport::{Credentials, Event, Transport},
};

/// Runs an agent until it ends. Must be called within its own tokio runtime, which closes the sockets
/// when it is dropped. Must be called again after [`Ending::Restart`] and [`Ending::Reassigned`].
///
/// `plugin` is the socket of Docker's plugin, if the service manager has opened it. `end` is that of
/// [`super::guard`]. `read_settings` is called at SIGHUP.
///
/// # Errors
/// Fails if the agent cannot start.
pub async fn run(
    config: Config,
    plugin: Option<net::UnixListener>,
    end: EndRequest,
    read_settings: &SettingsReader,
) -> Result<Ending, StartFailure> {
    let mut signals = Signals::catch(end)?;
    let (sender, mut threads) = mpsc::unbounded_channel();
    let Some(control) = open_control(&config, &mut signals, &sender).await? else {
        return Ok(Ending::Stopped);
    };
    let listeners = Listeners::open(&config, control, plugin, &sender)?;
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
            listeners.close().await;
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

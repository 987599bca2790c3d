//! What `init` and `join` check on this host before they write settings.

use std::{io::ErrorKind, path::Path};

use anyhow::bail;

use crate::{
    config::{Config, IfaceChoice},
    dataplane::kernel::{Kernel, KernelError},
    model::is_link_local,
    netlink::Netlink,
    store::{StateDir, StoreError},
    underlay::{self, UnderlayError},
};

/// Fails if the agent would refuse these settings on this host. `is_new`: no agent runs here, and none has
/// run. `is_trial`: this process may lack rights that the agent has.
///
/// # Errors
/// Also fails if the kernel does not answer.
pub(super) fn require_usable(config: &Config, is_new: bool, is_trial: bool) -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
    require_interface(&mut netlink, config)?;
    require_listen_address(&mut netlink, config)?;
    // The agent waits for a network.
    let chosen = match underlay::choose(&mut netlink, config, std::iter::empty()) {
        Err(error @ UnderlayError::Mtu { .. }) => bail!(error),
        chosen => chosen.ok(),
    };
    if !is_new {
        return Ok(());
    }
    require_state_dir(&config.state_dir, is_trial)?;
    let plan = config.planned_overlay(None, chosen.map(|chosen| chosen.local));
    match Kernel::open()
        .map_err(KernelError::from)
        .and_then(|mut kernel| kernel.refuse_conflicts(&plan))
    {
        Err(KernelError::NotPermitted) if is_trial => Ok(()),
        Err(KernelError::Netlink(error)) => {
            Err(anyhow::Error::new(error).context("the networks of this host"))
        }
        checked => Ok(checked.map(drop)?),
    }
}

/// Fails if another program uses the state directory.
fn require_state_dir(path: &Path, is_trial: bool) -> anyhow::Result<()> {
    match StateDir::peek_node_key(path) {
        Err(StoreError::Directory { error, .. }) if error.kind() == ErrorKind::NotFound => Ok(()),
        // Only root can look into it.
        Err(StoreError::Directory { .. }) if is_trial => Ok(()),
        peeked => Ok(peeked.map(drop)?),
    }
}

/// Fails if the settings name an interface or an address that this host does not have.
fn require_interface(netlink: &mut Netlink, config: &Config) -> anyhow::Result<()> {
    let links = netlink.links()?;
    let wanted = match &config.iface {
        IfaceChoice::Name(name) if !links.iter().any(|link| link.is_called(name)) => name.clone(),
        IfaceChoice::Address(ip) if !netlink.addresses()?.iter().any(|at| at.ip == *ip) => {
            ip.to_string()
        }
        IfaceChoice::Regex(_)
        | IfaceChoice::Name(_)
        | IfaceChoice::Address(_)
        | IfaceChoice::CanReach(_)
        | IfaceChoice::Default => return Ok(()),
    };
    let names: Vec<&str> =
        links.iter().map(|link| link.name.as_str()).filter(|name| *name != "lo").collect();
    bail!("iface: this host has no interface {wanted}; it has {}", names.join(", "))
}

/// Fails if gossip is to listen at an address that this host does not have.
fn require_listen_address(netlink: &mut Netlink, config: &Config) -> anyhow::Result<()> {
    let Some(listen) = config.bound_address() else { return Ok(()) };
    let addresses = netlink.addresses()?;
    if addresses.iter().any(|address| address.ip == listen) {
        return Ok(());
    }
    let others = addresses.iter().map(|address| address.ip);
    let others = others.filter(|ip| !ip.is_loopback() && !is_link_local(*ip));
    let others: Vec<String> = others.map(|ip| ip.to_string()).collect();
    bail!("listen: this host has no address {listen}; it has {}", others.join(", "))
}

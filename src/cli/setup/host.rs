//! What `init` and `join` check on this host before they write settings.

use anyhow::{Context as _, bail};

use crate::{
    config::{Config, IfaceChoice},
    dataplane::{
        kernel::{Kernel, KernelError},
        overlap,
    },
    model::is_link_local,
    netlink::Netlink,
};

/// Fails if this host has no such interface, or, for a new node that creates a cluster, if its networks
/// overlap with the pool.
///
/// # Errors
/// Also fails if the kernel does not answer.
pub(super) fn require_usable(config: &Config, is_new: bool) -> anyhow::Result<()> {
    require_interface(config)?;
    require_listen_address(config)?;
    // A host that joins learns the pool from the cluster.
    let Some(settings) = config.create.filter(|_| is_new) else { return Ok(()) };
    let foreign = Kernel::open().and_then(|mut kernel| kernel.foreign_networks());
    let foreign = foreign.context("the networks of this host")?;
    if let Some((network, found)) = overlap::find_forbidding(&foreign, &settings.pool) {
        let (what, interface) = (found.network, found.interface.clone());
        bail!(KernelError::Overlap { network, what, interface });
    }
    Ok(())
}

/// Fails if the settings name an interface or an address that this host does not have.
fn require_interface(config: &Config) -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
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
fn require_listen_address(config: &Config) -> anyhow::Result<()> {
    let Some(listen) = config.bound_address() else { return Ok(()) };
    let addresses = Netlink::open()?.addresses()?;
    if addresses.iter().any(|address| address.ip == listen) {
        return Ok(());
    }
    let others = addresses.iter().map(|address| address.ip);
    let others = others.filter(|ip| !ip.is_loopback() && !is_link_local(*ip));
    let others: Vec<String> = others.map(|ip| ip.to_string()).collect();
    bail!("listen: this host has no address {listen}; it has {}", others.join(", "))
}

//! Ends of pods' veth pairs that another program has renamed. gossamer refers to the ends by name, so it
//! restores their names.

use std::{collections::BTreeSet, io};

use super::{
    desired::{RepairReport, Tenants},
    names::original_name,
};
use crate::netlink::{Netlink, link::Link};

/// Restores the names of renamed ends, in the kernel and in `links`.
pub(super) fn restore_names(
    netlink: &mut Netlink,
    links: &mut [Link],
    ports: &Tenants,
    report: &mut RepairReport,
) -> io::Result<()> {
    let existing: BTreeSet<String> = links.iter().map(|link| link.name.clone()).collect();
    // If an interface of the original name exists, the renamed one is an earlier end about to be removed.
    let is_restorable = |name: &String| ports.contains_key(name) && !existing.contains(name);
    for link in links {
        let Some(name) = original_name(link).filter(is_restorable) else { continue };
        netlink.rename_link(link.index, &name)?;
        // Kernels before 6.2 rename an interface only while it is down.
        link.up = false;
        link.name = name;
        report.note_port(&link.name, link.index);
    }
    Ok(())
}

/// Returns whether an interface in a message is a renamed port.
pub(super) fn is_renamed(link: &Link, ports: &Tenants) -> bool {
    original_name(link).is_some_and(|name| ports.contains_key(&name))
}

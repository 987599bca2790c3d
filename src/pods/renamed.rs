//! Ends of pods' veth pairs that another program has renamed: what keeps a pod connected goes by their names.

use std::{collections::BTreeSet, io};

use super::{
    bridge::{Mended, Tenants},
    names::told_name,
};
use crate::netlink::{Netlink, link::Link};

/// Gives renamed ends their names again, in the kernel and in the list.
pub(super) fn take_names_back(
    netlink: &mut Netlink,
    links: &mut [Link],
    ports: &Tenants,
    mended: &mut Mended,
) -> io::Result<()> {
    let there: BTreeSet<String> = links.iter().map(|link| link.name.clone()).collect();
    // An earlier end of a pod may be about to be removed.
    let may_be = |name: &String| ports.contains_key(name) && !there.contains(name);
    for link in links {
        let Some(name) = told_name(link).filter(may_be) else { continue };
        netlink.rename_link(link.index, &name)?;
        // Kernels before 6.2 rename only what is down.
        link.up = false;
        link.name = name;
        mended.note_port(&link.name, link.index);
    }
    Ok(())
}

/// Whether what the kernel tells of an interface is that one of the ports has got another name.
pub(super) fn is_renamed(link: &Link, ports: &Tenants) -> bool {
    told_name(link).is_some_and(|name| ports.contains_key(&name))
}

//! The address that peers send tunnel packets to, which the kernel may no longer treat as its own.

use std::{io, net::IpAddr};

use crate::{
    model::{Problem, ProblemCode},
    netlink::Netlink,
};

/// Returns the problem that an address of this host has no route in the table `local`.
///
/// # Errors
/// If the kernel does not answer.
pub(super) fn problem(netlink: &mut Netlink, local: IpAddr) -> io::Result<Option<Problem>> {
    let (links, addresses) = (netlink.links()?, netlink.addresses()?);
    let mut holders = addresses.iter().filter(|address| address.ip == local);
    // The routes of a VRF are in its own table.
    let link = holders.find_map(|holder| {
        links
            .iter()
            .find(|link| link.index == holder.link && link.up && link.controller().is_none())
    });
    let Some(link) = link else { return Ok(None) };
    if !netlink.unreceived(link.index, &addresses)?.contains(&local) {
        return Ok(None);
    }
    let what = format!(
        "this host does not receive packets for {local}, its underlay address: the address is on {}, but its \
         route in the table local is missing",
        link.name
    );
    let (family, more) = match local {
        IpAddr::V4(_) => ("", format!(" proto kernel scope host src {local}")),
        IpAddr::V6(_) => (" -6", " proto kernel".to_owned()),
    };
    let fix = format!("ip{family} route add local {local} dev {} table local{more}", link.name);
    Ok(Some(Problem::new(ProblemCode::Diverted, local, what, fix)))
}

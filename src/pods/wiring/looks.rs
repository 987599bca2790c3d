//! What the kernel shows of pods' veth pairs and bridges.

use std::{collections::BTreeMap, io, path::Path};

use super::{Wiring, open_netns};
use crate::{
    model::{Attachment, Mac, Pod},
    pods::{alias::from_alias, bridge::ALIAS, names::told_name},
};

impl Wiring {
    /// All interfaces of this host by their names, with the kernel's number for the namespace that the other
    /// end of a veth pair is in. An end that another program has renamed is there under its own name, too.
    pub fn links(&mut self) -> io::Result<BTreeMap<String, Option<i32>>> {
        let links = self.netlink.links()?;
        let names = links.iter().flat_map(|link| {
            let names = [Some(link.name.clone()), told_name(link)];
            names.into_iter().flatten().map(|name| (name, link.peer_namespace()))
        });
        Ok(names.collect())
    }

    /// Whether a path leads to the namespace with the kernel's number, or to any at all, if that is not
    /// known.
    pub fn leads_to(&mut self, path: &Path, namespace: Option<i32>) -> bool {
        match (open_netns(path), namespace) {
            (Err(error), _) => error.kind() != io::ErrorKind::NotFound,
            (Ok(_), None) => true,
            // One that is ending has no number.
            (Ok(file), Some(number)) => {
                number >= 0
                    && self.netlink.namespace(&file).is_ok_and(|found| found == Some(number))
            }
        }
    }

    /// Pods that are plugged into a bridge, by what their ends say: for a node that has lost its memory.
    pub fn found(&mut self, bridge: &str) -> io::Result<Vec<Pod>> {
        let links = self.netlink.links()?;
        let Some(found) = links.iter().find(|link| link.name == bridge) else {
            return Ok(Vec::new());
        };
        let ports = links.iter().filter(|link| link.is_plugged_into(found.index));
        Ok(ports.filter_map(|port| from_alias(&port.alias)).map(|told| told.pod).collect())
    }

    /// MACs that pods of this host were given, where they do not follow from their addresses.
    pub fn macs(&mut self) -> io::Result<BTreeMap<Attachment, Mac>> {
        let links = self.netlink.links()?;
        let pods = links.iter().filter_map(|link| from_alias(&link.alias));
        Ok(pods.filter_map(|told| Some((told.pod.attachment, told.pod.mac?))).collect())
    }

    /// Bridges of pods on this host, whichever overlay they are of.
    pub fn bridges(&mut self) -> io::Result<Vec<String>> {
        let ours = self.netlink.links()?.into_iter().filter(|link| link.alias == ALIAS);
        Ok(ours.filter(|link| link.kind == "bridge").map(|link| link.name).collect())
    }
}

//! Reads the state of pods' veth pairs and bridges from the kernel.

use std::{collections::BTreeMap, fs::File, io, net::IpAddr, path::Path};

use super::{Wiring, WiringError, failed, is_peer_of, open_netns};
use crate::{
    model::{Attachment, Mac, Pod, Problem},
    pods::{
        alias::parse_alias,
        desired::{ALIAS, Bridge},
        names::{link_name, original_name},
        obstacle,
    },
};

impl Wiring {
    /// Returns all interfaces of this host by name, with the kernel's id of the namespace of their peer. A
    /// renamed end is listed under its original name, too.
    ///
    /// # Errors
    /// If the kernel's interfaces cannot be read.
    pub fn links(&mut self) -> io::Result<BTreeMap<String, Option<i32>>> {
        let links = self.netlink.links()?;
        let names = links.iter().flat_map(|link| {
            let names = [Some(link.name.clone()), original_name(link)];
            names.into_iter().flatten().map(|name| (name, link.peer_namespace()))
        });
        Ok(names.collect())
    }

    /// Returns whether a path leads to the namespace with this id, or to any namespace if the id is `None`.
    pub fn leads_to(&mut self, path: &Path, namespace: Option<i32>) -> bool {
        match (open_netns(path), namespace) {
            (Err(error), _) => error.kind() != io::ErrorKind::NotFound,
            (Ok(_), None) => true,
            // A namespace that is being removed has a negative id.
            (Ok(file), Some(number)) => {
                number >= 0
                    && self.netlink.namespace(&file).is_ok_and(|found| found == Some(number))
            }
        }
    }

    /// Returns the pods whose ends are on a bridge, from the ends' aliases, for a node whose database is
    /// lost.
    ///
    /// # Errors
    /// If the kernel's interfaces cannot be read.
    pub fn found(&mut self, bridge: &str) -> io::Result<Vec<Pod>> {
        let links = self.netlink.links()?;
        let Some(found) = links.iter().find(|link| link.name == bridge) else {
            return Ok(Vec::new());
        };
        let ports = links.iter().filter(|link| link.is_plugged_into(found.index));
        Ok(ports.filter_map(|port| parse_alias(&port.alias)).map(|content| content.pod).collect())
    }

    /// Returns the MACs of this host's pods that do not follow from their addresses, from the aliases.
    ///
    /// # Errors
    /// If the kernel's interfaces cannot be read.
    pub fn macs(&mut self) -> io::Result<BTreeMap<Attachment, Mac>> {
        let links = self.netlink.links()?;
        let pods = links.iter().filter_map(|link| parse_alias(&link.alias));
        Ok(pods.filter_map(|content| Some((content.pod.attachment, content.pod.mac?))).collect())
    }

    /// Returns the names of all bridges of pods on this host, of any overlay.
    ///
    /// # Errors
    /// If the kernel's interfaces cannot be read.
    pub fn bridges(&mut self) -> io::Result<Vec<String>> {
        let ours = self.netlink.links()?.into_iter().filter(|link| link.alias == ALIAS);
        Ok(ours.filter(|link| link.kind == "bridge").map(|link| link.name).collect())
    }

    /// Returns why no pod can be plugged into a bridge, if another interface has its name.
    ///
    /// # Errors
    /// If the kernel's interfaces or addresses cannot be read.
    pub fn obstacle(&mut self, bridge: &Bridge) -> io::Result<Option<Problem>> {
        let Some(link) = self.netlink.link(&bridge.name)? else { return Ok(None) };
        obstacle::to(bridge, &link, &mut self.netlink)
    }

    /// Returns the MAC of the pod's end of a veth pair that another program has configured.
    pub fn mac_behind(&mut self, port: &str, netns: &Path) -> Option<Mac> {
        let index = self.netlink.link(port).ok()??.index;
        let (_, mut inside) = self.enter(netns, None).ok()?;
        inside.links().ok()?.into_iter().find(|link| is_peer_of(link, index))?.mac
    }

    /// Checks that a pod has both ends of its veth pair, its addresses and the MAC that it must use. Returns
    /// all addresses of its interface.
    ///
    /// # Errors
    /// If the namespace is unusable, or one of these is missing or wrong.
    pub fn check(
        &mut self,
        pod: &Pod,
        netns: Option<&File>,
        mac: Option<Mac>,
    ) -> Result<Vec<IpAddr>, WiringError> {
        let step = "looking for the interface";
        let incomplete = |what: String| Err(WiringError::Incomplete(what));
        let link = link_name(&pod.attachment);
        if !self.netlink.link(&link).map_err(failed(step))?.is_some_and(|link| link.up) {
            return incomplete(format!("interface {link} of this host is gone or down"));
        }
        let (_, mut inside) = self.enter(Path::new(&pod.netns), netns)?;
        let interface = pod.attachment.interface();
        let found = inside.link(interface).map_err(failed(step))?.filter(|link| link.up);
        let Some(found) = found else {
            return incomplete(format!("interface {interface} in {} is gone or down", pod.netns));
        };
        if let (Some(wanted), Some(has)) = (mac, found.mac.filter(|has| Some(*has) != mac)) {
            return incomplete(format!(
                "interface {interface} in {} has the MAC {has} instead of {wanted}, so its packets are \
                 dropped: request the MAC from gossamer (capability mac), not from another plugin",
                pod.netns
            ));
        }
        let has = inside.addresses().map_err(failed("looking for addresses"))?;
        let has = has.iter().filter(|has| has.link == found.index);
        let has: Vec<IpAddr> = has.map(|has| has.ip).collect();
        match pod.addresses.iter().find(|ip| !has.contains(ip)) {
            Some(ip) => incomplete(format!("interface {interface} in {} has lost {ip}", pod.netns)),
            None => Ok(has),
        }
    }

    /// Returns the index of a pod's end on this host, also if another program has renamed it.
    ///
    /// # Errors
    /// If the kernel's interfaces cannot be read.
    pub fn index(&mut self, attachment: &Attachment) -> io::Result<Option<u32>> {
        let name = link_name(attachment);
        if let Some(link) = self.netlink.link(&name)? {
            return Ok(Some(link.index));
        }
        let links = self.netlink.links()?;
        let found = links.iter().find(|link| original_name(link).as_ref() == Some(&name));
        Ok(found.map(|link| link.index))
    }
}

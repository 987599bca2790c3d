//! A pod's veth pair: a veth pair from the bridge of this host's pods into a network namespace, with
//! addresses and routes, by netlink alone.
//!
//! The kernel answers for what is there: an end on this host is known by its name, which follows from the
//! attachment, so that whatever an agent left half-made is found again. Which addresses a pod has is not
//! decided here.

mod looks;

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io,
    net::IpAddr,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::OFlag;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        link::{InfoData, InfoVeth, LinkAttribute},
    },
};

pub use super::names::{LINK_NAME, is_link_name, link_name, loose_end, loose_name};
use super::{
    alias::{alias, from_alias},
    announce::Announcer,
    bridge::{self, ALIAS, Bridge, Mended, PREFIX, Provided, Tenants, mac_at},
    furnish::{DefaultRoute, Inside, Route},
    link_updates::LinkUpdates,
    names::{link_mac, told_name},
    obstacle, port,
};
use crate::{
    dataplane::kernel::interface::{self, Ipv6},
    model::{Addresses, Attachment, Mac, Pod},
    netlink::{
        Netlink, Refused, Request,
        link::{ENODEV, Link},
        neighbour,
    },
};

/// A new port of a bridge takes packets within this time, or something else is wrong with it.
pub(super) const OPENING: Duration = Duration::from_millis(500);
/// Places in the batch of changes that must be made; the kernel may refuse the others.
const NEEDED: [usize; 2] = [0, 2];

/// What a veth pair uses. The kernel would make a queue for each processor and wait, for each end, until no
/// processor uses any but the first.
const ONE_QUEUE: [LinkAttribute; 2] =
    [LinkAttribute::NumTxQueues(1), LinkAttribute::NumRxQueues(1)];

/// Why a pod was not connected. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    #[error("network namespace {}: {error}", path.display())]
    NoNamespace { path: PathBuf, error: io::Error },
    #[error("network namespace {}: that is none", .0.display())]
    NotANamespace(PathBuf),
    #[error("network namespace {}: that is this host's own", .0.display())]
    Host(PathBuf),
    #[error("interface {interface}: there is one of that name in {} already", netns.display())]
    InterfaceTaken { interface: String, netns: PathBuf },
    #[error(
        "MAC {0}: an interface of this host has it, on the bridge of pods: ask for another one"
    )]
    MacOfPort(Mac),
    #[error("{0}")]
    Lacks(String),
    #[error("{what}: {error}")]
    Kernel { what: &'static str, error: io::Error },
}

/// Where a pod's end of its veth pair is to be.
#[derive(Debug)]
pub enum End {
    /// In the pod's namespace, with addresses and routes.
    Inside {
        /// The namespace, where it was opened already; by its path, without.
        netns: Option<File>,
        default_route: DefaultRoute,
    },
    /// On this host under a name of its own ([`loose_name`]), for a runtime that fetches it.
    Loose,
}

impl End {
    /// Whether the pod may have a default route by this interface.
    const fn may_lead_out(&self) -> bool {
        !matches!(self, Self::Inside { default_route: DefaultRoute::None, .. })
    }
}

/// What a veth pair is made like.
struct Veth<'a> {
    mac: Mac,
    mtu: u32,
    netns: Option<&'a File>,
    default_route: bool,
    /// The host has its MAC for good.
    pinned: bool,
}

/// A connected pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    pub mac: Mac,
    pub link_mac: Mac,
    pub bridge_mac: Option<Mac>,
    pub routes: Vec<Route>,
}

/// Makes and removes veth pairs on this host.
#[derive(Debug)]
pub struct Wiring {
    netlink: Netlink,
    /// This host's namespace.
    home: File,
    /// As it was when last looked at.
    bridge: Option<Provided>,
    announcer: Announcer,
}

impl Wiring {
    /// For the network namespace of this thread, which is to be the one that uses it.
    pub fn open() -> io::Result<Self> {
        let home = File::open("/proc/thread-self/ns/net")?;
        Ok(Self { netlink: Netlink::open()?, home, bridge: None, announcer: Announcer::default() })
    }

    /// The bridge gives what is sent to the MAC of one of its ports to this host.
    fn expect_no_port_has(
        &mut self,
        mac: Mac,
        bridge: &Bridge,
        pod: &Pod,
    ) -> Result<(), WiringError> {
        let own = link_name(&pod.attachment);
        let found = self.port(bridge).and_then(|bridge| {
            let links = self.netlink.links()?.into_iter();
            let mut ports = links.filter(|link| link.is_plugged_into(bridge) && link.name != own);
            Ok(ports.any(|port| port.mac == Some(mac)))
        });
        match found.map_err(failed("looking for ports with this MAC"))? {
            true => Err(WiringError::MacOfPort(mac)),
            false => Ok(()),
        }
    }

    /// Plugs a pod in.
    ///
    /// # Errors
    /// Why not; nothing of it is left then.
    pub fn connect(
        &mut self,
        bridge: &Bridge,
        pod: &Pod,
        mac: Option<Mac>,
        end: &End,
    ) -> Result<Connected, WiringError> {
        let netns = Path::new(&pod.netns);
        let known = mac;
        let mac = mac.unwrap_or_else(|| mac_at(pod.addresses.first));
        let inside = match end {
            End::Inside { netns: opened, .. } => Some(self.enter(netns, opened.as_ref())?),
            End::Loose => None,
        };
        let netns_of_pod = inside.as_ref().map(|(file, _)| file);
        let veth = Veth {
            mac,
            mtu: bridge.mtu,
            netns: netns_of_pod,
            default_route: end.may_lead_out(),
            pinned: bridge.anti_spoofing,
        };
        if mac != mac_at(pod.addresses.first) {
            self.expect_no_port_has(mac, bridge, pod)?;
        }
        let plugged = self.port(bridge).and_then(|port| self.plug(pod, &veth, port));
        if plugged.is_err() {
            // An interface of an attachment that nobody knows any more may be there, or another bridge.
            self.bridge = None;
            self.disconnect(&pod.attachment).map_err(failed("removing an old interface"))?;
            let port = self.port(bridge).map_err(failed("making the bridge"))?;
            if let Err(error) = self.plug(pod, &veth, port) {
                let _ = self.disconnect(&pod.attachment);
                return Err(match error.kind() {
                    io::ErrorKind::AlreadyExists => WiringError::InterfaceTaken {
                        interface: pod.attachment.interface().to_owned(),
                        netns: netns.to_owned(),
                    },
                    _ => failed("making the interface")(error),
                });
            }
        }
        if let (Some(mac), Some(provided)) = (known, &self.bridge) {
            self.announcer.announce(&bridge.name, provided.index, pod.addresses, mac);
        }
        let furnished = match (inside, end) {
            (Some((netns, netlink)), End::Inside { default_route, .. }) => {
                let mut inside = Inside { netlink, netns: &netns, home: &self.home };
                let mac = self.bridge.as_ref().and_then(|provided| provided.mac);
                inside.furnish(pod, bridge, *default_route, mac)
            }
            _ => Ok(Vec::new()),
        };
        let routes = match furnished {
            Ok(routes) => routes,
            Err(error) => {
                let _ = self.disconnect(&pod.attachment);
                return Err(failed("setting addresses")(error));
            }
        };
        if matches!(end, End::Inside { .. }) {
            self.await_port(bridge, &link_name(&pod.attachment));
        }
        Ok(Connected {
            mac,
            link_mac: link_mac(&pod.attachment),
            bridge_mac: self.bridge.as_ref().and_then(|provided| provided.mac),
            routes,
        })
    }

    /// Waits until packets get from the bridge to a port: what is sent before that is lost.
    fn await_port(&mut self, bridge: &Bridge, port: &str) {
        let opened = self
            .netlink
            .await_link(port, OPENING, port::is_open)
            .and_then(|()| self.netlink.await_link(&bridge.name, OPENING, Link::is_operational));
        if let Err(error) = opened {
            tracing::debug!(port, %error, "the bridge does not take packets of a new port yet");
        }
    }

    /// Makes bridge and ports what they should be. Says how much was not.
    pub fn mend(&mut self, bridge: &Bridge, ports: &Tenants) -> io::Result<Mended> {
        self.bridge = None;
        ports.values().for_each(|tenant| self.announcer.note(tenant));
        let (provided, mut mended) = bridge::provide(&mut self.netlink, bridge)?;
        bridge::plug_again(&mut self.netlink, &provided, ports, &mut mended)?;
        self.bridge = Some(provided);
        Ok(mended)
    }

    /// Takes the neighbor entries of a pod away that is disconnected.
    pub fn forget_neighbors(&mut self, addresses: Addresses) {
        let Some(bridge) = self.bridge.as_ref().map(|provided| provided.index) else { return };
        let changes = addresses.iter().map(|ip| neighbour::without(bridge, ip)).collect();
        if let Err(error) = self.netlink.apply(changes) {
            tracing::debug!(%error, "neighbor entries of a pod not removed");
        }
    }

    /// Why no pod can be plugged into a bridge, if another interface has its name.
    pub fn obstacle(&mut self, bridge: &Bridge) -> io::Result<Option<String>> {
        let Some(link) = self.netlink.link(&bridge.name)? else { return Ok(None) };
        obstacle::to(bridge, &link, &mut self.netlink)
    }

    /// Takes note of what the kernel tells: it may make [`Wiring::mend`] necessary.
    pub fn hear(&self, ports: &Tenants, told: RouteNetlinkMessage, news: &mut LinkUpdates) {
        if let Some(provided) = &self.bridge {
            news.add(provided, ports, told);
        }
    }

    /// Of a pod's end on this host, if there is one, whatever another program calls it.
    pub fn index(&mut self, attachment: &Attachment) -> io::Result<Option<u32>> {
        let name = link_name(attachment);
        if let Some(link) = self.netlink.link(&name)? {
            return Ok(Some(link.index));
        }
        let links = self.netlink.links()?;
        let found = links.iter().find(|link| told_name(link).as_ref() == Some(&name));
        Ok(found.map(|link| link.index))
    }

    /// Removes an end on this host, and the other with it; whether there was one.
    pub fn delete(&mut self, index: u32) -> io::Result<bool> {
        match self.netlink.delete_link(index) {
            Err(error) if error.raw_os_error() == Some(ENODEV) => Ok(false),
            result => result.map(|()| true),
        }
    }

    fn disconnect(&mut self, attachment: &Attachment) -> io::Result<bool> {
        self.index(attachment)?.map_or(Ok(false), |index| self.delete(index))
    }

    /// The MAC at the other end of a veth pair whose pod another program has furnished.
    pub fn mac_behind(&mut self, port: &str, netns: &Path) -> Option<Mac> {
        let index = self.netlink.link(port).ok()??.index;
        let (_, mut inside) = self.enter(netns, None).ok()?;
        inside.links().ok()?.into_iter().find(|link| is_behind(link, index))?.mac
    }

    /// Gives the routes of an interface that is to be removed to another one of the same pod, if there is
    /// one: by `others`, the names of their ends on this host.
    pub fn hand_over(
        &mut self,
        bridge: &Bridge,
        leaving: u32,
        (netns, opened): (&Path, Option<&File>),
        others: &[&String],
    ) -> Result<(), WiringError> {
        let look = "looking for the pod's other interfaces";
        let mut successors = Vec::new();
        for name in others {
            let link = self.netlink.link(name).map_err(failed(look))?;
            successors.extend(link.and_then(|link| Some((link.index, from_alias(&link.alias)?))));
        }
        successors.sort_by(|(_, one), (_, other)| one.cmp_as_successor(other));
        let (netns, mut netlink) = self.enter(netns, opened)?;
        let links = netlink.links().map_err(failed(look))?;
        let inside = |index: u32| links.iter().find(|link| is_behind(link, index));
        let successor = successors.iter().find_map(|(index, told)| Some((inside(*index)?, told)));
        let (Some(leaving), Some((successor, told))) = (inside(leaving), successor) else {
            return Ok(());
        };
        let mut inside = Inside { netlink, netns: &netns, home: &self.home };
        inside
            .hand_over(bridge, leaving.index, successor.index, told.default_route)
            .map_err(failed("giving its routes to another interface"))
    }

    /// Removes a bridge of pods with all veth pairs on it.
    pub fn remove(&mut self, bridge: &str) -> io::Result<()> {
        self.sweep(bridge, &BTreeSet::new())?;
        match self.netlink.link(bridge)?.filter(|link| link.alias == ALIAS) {
            Some(link) => self.delete(link.index).map(drop),
            None => Ok(()),
        }
    }

    /// Removes all veth pairs on a bridge of pods but these; says how many.
    pub fn sweep(&mut self, bridge: &str, keep: &BTreeSet<String>) -> io::Result<usize> {
        let links = self.netlink.links()?;
        let found = links.iter().find(|link| link.name == bridge && link.alias == ALIAS);
        let Some(found) = found else { return Ok(0) };
        let is_stray = |link: &&Link| {
            let name = told_name(link).unwrap_or_else(|| link.name.clone());
            link.is_plugged_into(found.index) && name.starts_with(PREFIX) && !keep.contains(&name)
        };
        let strays: Vec<&Link> = links.iter().filter(is_stray).collect();
        strays.iter().try_for_each(|link| self.delete(link.index).map(drop))?;
        Ok(strays.len())
    }

    /// Looks whether a pod still has both ends of its veth pair, its addresses, and the MAC that it is held
    /// to; returns all addresses of its interface.
    ///
    /// # Errors
    /// What it lacks.
    pub fn check(
        &mut self,
        pod: &Pod,
        netns: Option<&File>,
        mac: Option<Mac>,
    ) -> Result<Vec<IpAddr>, WiringError> {
        let look = "looking for the interface";
        let lacks = |what: String| Err(WiringError::Lacks(what));
        let link = link_name(&pod.attachment);
        if !self.netlink.link(&link).map_err(failed(look))?.is_some_and(|link| link.up) {
            return lacks(format!("interface {link} of this host is gone or down"));
        }
        let (_, mut inside) = self.enter(Path::new(&pod.netns), netns)?;
        let interface = pod.attachment.interface();
        let found = inside.link(interface).map_err(failed(look))?.filter(|link| link.up);
        let Some(found) = found else {
            return lacks(format!("interface {interface} in {} is gone or down", pod.netns));
        };
        if let (Some(wanted), Some(has)) = (mac, found.mac.filter(|has| Some(*has) != mac)) {
            return lacks(format!(
                "interface {interface} in {} has the MAC {has} and was given {wanted}: what it sends is \
                 dropped; ask gossamer for a MAC (capability mac), not another plugin",
                pod.netns
            ));
        }
        let has = inside.addresses().map_err(failed("looking for addresses"))?;
        let has = has.iter().filter(|has| has.link == found.index);
        let has: Vec<IpAddr> = has.map(|has| has.ip).collect();
        match pod.addresses.iter().find(|ip| !has.contains(ip)) {
            Some(ip) => lacks(format!("interface {interface} in {} has lost {ip}", pod.netns)),
            None => Ok(has),
        }
    }

    /// The bridge's index. One that was there a moment ago is not looked at: whoever mends it will.
    fn port(&mut self, bridge: &Bridge) -> io::Result<u32> {
        if let Some(provided) = self.bridge.as_ref().filter(|known| known.bridge == *bridge) {
            return Ok(provided.index);
        }
        let (provided, _) = bridge::provide(&mut self.netlink, bridge)?;
        Ok(self.bridge.insert(provided).index)
    }

    fn plug(
        &mut self,
        pod: &Pod,
        &Veth { mac, mtu, netns, default_route, pinned }: &Veth<'_>,
        port: u32,
    ) -> io::Result<()> {
        let name = link_name(&pod.attachment);
        let end = LinkMessageBuilder::<LinkUnspec>::new().address(mac.as_bytes().to_vec()).mtu(mtu);
        let end = ONE_QUEUE.into_iter().fold(end, LinkMessageBuilder::append_extra_attribute);
        let end = match netns {
            Some(netns) => end.name(pod.attachment.interface()).setns_by_fd(netns.as_raw_fd()),
            None => end.name(loose_name(&pod.attachment)),
        };
        let pair = LinkVeth::new(&name, pod.attachment.interface())
            .set_info_data(InfoData::Veth(InfoVeth::Peer(end.build())))
            .address(link_mac(&pod.attachment).as_bytes().to_vec())
            .mtu(mtu)
            .controller(port);
        let pair = ONE_QUEUE.into_iter().fold(pair, LinkMessageBuilder::append_extra_attribute);
        let made = Request {
            message: RouteNetlinkMessage::NewLink(pair.build()),
            flags: NLM_F_CREATE | NLM_F_EXCL,
        };
        let up = port::up(&name, alias(pod, mac, default_route));
        let mut changes = vec![made, bridge::without_address(&name), up];
        changes.extend(pod.addresses.iter().map(|ip| match pinned {
            true => neighbour::permanent(port, ip, mac),
            // A pod that had the address before may have had another MAC.
            false => neighbour::without(port, ip),
        }));
        let refused = self.netlink.apply(changes)?;
        all_done(refused.iter().filter(|refused| NEEDED.contains(&refused.index)))
    }

    /// Closes the ends of a veth pair on this host. What cannot be set is told when the bridge is looked at.
    ///
    /// A port of a bridge hands nothing to this host itself, so the pod need not wait for that.
    pub fn close(attachment: &Attachment, end: &End) {
        interface::close(&link_name(attachment), Ipv6::AsItIs);
        if matches!(end, End::Loose) {
            interface::close(&loose_name(attachment), Ipv6::AsItIs);
        }
    }

    /// A namespace, and a socket inside.
    fn enter(&self, netns: &Path, opened: Option<&File>) -> Result<(File, Netlink), WiringError> {
        let path = || netns.to_owned();
        let no = |error| WiringError::NoNamespace { path: path(), error };
        let file = opened.map_or_else(|| open_netns(netns), File::try_clone).map_err(no)?;
        if is_same(&file, &self.home).map_err(no)? {
            return Err(WiringError::Host(path()));
        }
        let inside = Netlink::open_in(&file, &self.home).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => WiringError::NotANamespace(path()),
            _ => no(error),
        })?;
        Ok((file, inside))
    }
}

/// Opens the file of a namespace. It waits for nothing, whatever is at that path: opening a FIFO would.
pub fn open_netns(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}

/// Whether two files are the same namespace.
pub fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// Whether an interface in another namespace is the other end of the one with this index.
fn is_behind(link: &Link, index: u32) -> bool {
    link.message.attributes.contains(&LinkAttribute::Link(index))
}

fn all_done<'a>(mut refused: impl Iterator<Item = &'a Refused>) -> io::Result<()> {
    refused.next().map_or(Ok(()), |refused| Err(refused.to_io()))
}

const fn failed(what: &'static str) -> impl Fn(io::Error) -> WiringError {
    move |error| WiringError::Kernel { what, error }
}

//! Creates and removes pods' veth pairs by netlink. A veth pair connects the bridge of this host's pods with
//! a pod's network namespace, where it gets addresses and routes.
//!
//! The kernel holds the state: the name of an end on this host follows from the attachment, so an end that a
//! killed agent left half configured is found again. The caller allocates the addresses.

mod looks;

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{fcntl::OFlag, libc::ENODEV};
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        link::{InfoData, InfoVeth, LinkAttribute},
    },
};

pub use super::names::{LINK_NAME_LEN, is_link_name, link_name, loose_end, loose_name};
use super::{
    alias::{alias, parse_alias},
    announce::Announcer,
    bridge,
    desired::{ALIAS, Bridge, ReadyBridge, RepairReport, Tenants},
    furnish::{DefaultRoute, PodNamespace, Route},
    link_updates::LinkUpdates,
    mac_at,
    names::{PREFIX, link_mac, original_name},
    port,
    requests::without_address,
};
use crate::{
    model::{Addresses, Attachment, Mac, Pod},
    netlink::{Netlink, RefusedChange, Request, link::Link, neighbour},
    sysctl::interface::{self, Ipv6},
};

/// Indices of the requests in [`Wiring::plug`] that must succeed. The kernel may refuse the others.
const REQUIRED_CHANGES: [usize; 2] = [0, 2];

/// Attributes that limit a veth end to one queue. By default the kernel creates a queue per CPU and waits,
/// for each end, until no CPU uses any but the first.
const ONE_QUEUE: [LinkAttribute; 2] =
    [LinkAttribute::NumTxQueues(1), LinkAttribute::NumRxQueues(1)];

/// Why a pod was not connected. Nothing remains of the attempt.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    /// The namespace cannot be opened or entered.
    #[error("network namespace {}: {error}", path.display())]
    NoNamespace {
        /// Path of the namespace.
        path: PathBuf,
        /// The error of the system.
        error: io::Error,
    },
    /// The path is not a network namespace.
    #[error("{}: not a network namespace", .0.display())]
    NotANamespace(PathBuf),
    /// The path is this host's own namespace.
    #[error("network namespace {}: it is this host's own", .0.display())]
    Host(PathBuf),
    /// The namespace already has an interface of this name.
    #[error("interface {interface}: one of that name is in {} already", netns.display())]
    InterfaceTaken {
        /// Name of the interface.
        interface: String,
        /// Path of the namespace.
        netns: PathBuf,
    },
    /// A port of the bridge has the MAC.
    #[error("MAC {0}: an interface of this host on the pods' bridge has it: request another one")]
    MacOfPort(Mac),
    /// A part of the pod is missing or wrong. Has the sentence about it.
    #[error("{0}")]
    Incomplete(String),
    /// The kernel refused a step.
    #[error("{what}: {error}")]
    Kernel {
        /// The step.
        what: &'static str,
        /// The kernel's error.
        error: io::Error,
    },
}

/// Where the pod's end of its veth pair is placed.
#[derive(Debug)]
pub enum End {
    /// In the pod's namespace, with addresses and routes.
    Inside {
        /// The namespace, if it is already open. Otherwise it is opened by its path.
        netns: Option<File>,
        /// The default routes that the pod gets.
        default_route: DefaultRoute,
    },
    /// On this host as [`loose_name`], for a runtime that moves it into the pod.
    Loose,
}

impl End {
    /// Returns whether the pod may have a default route through this interface.
    const fn may_have_default_route(&self) -> bool {
        !matches!(self, Self::Inside { default_route: DefaultRoute::None, .. })
    }
}

/// The properties of a new veth pair.
struct Veth<'a> {
    mac: Mac,
    mtu: u32,
    netns: Option<&'a File>,
    default_route: bool,
    /// Whether the host has a permanent neighbor entry for the pod.
    pinned: bool,
}

/// A connected pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectedPod {
    /// MAC of the pod's end.
    pub mac: Mac,
    /// MAC of the end on this host.
    pub link_mac: Mac,
    /// MAC of the bridge, if it is known.
    pub bridge_mac: Option<Mac>,
    /// The routes that the pod got.
    pub routes: Vec<Route>,
}

/// Creates and removes veth pairs on this host.
#[derive(Debug)]
pub struct Wiring {
    netlink: Netlink,
    /// This host's namespace.
    host_netns: File,
    /// The bridge as it was after the last repair. `None` if it has to be checked.
    bridge: Option<ReadyBridge>,
    announcer: Announcer,
}

impl Wiring {
    /// Opens sockets in the network namespace of this thread. Only this thread may use the value.
    ///
    /// # Errors
    /// If the namespace or a netlink socket cannot be opened.
    pub fn open() -> io::Result<Self> {
        let host_netns = File::open("/proc/thread-self/ns/net")?;
        Ok(Self {
            netlink: Netlink::open()?,
            host_netns,
            bridge: None,
            announcer: Announcer::default(),
        })
    }

    /// Checks that no port of the bridge has this MAC. The bridge would pass packets to that MAC to this
    /// host.
    fn expect_mac_unused(
        &mut self,
        mac: Mac,
        bridge: &Bridge,
        pod: &Pod,
    ) -> Result<(), WiringError> {
        let own = link_name(&pod.attachment);
        let found = self.bridge_index(bridge).and_then(|bridge| {
            let links = self.netlink.links()?.into_iter();
            let mut ports = links.filter(|link| link.is_plugged_into(bridge) && link.name != own);
            Ok(ports.any(|port| port.mac == Some(mac)))
        });
        match found.map_err(failed("looking for ports with this MAC"))? {
            true => Err(WiringError::MacOfPort(mac)),
            false => Ok(()),
        }
    }

    /// Connects a pod: creates its veth pair, and configures its end inside the namespace.
    ///
    /// # Errors
    /// If the namespace is unusable, the MAC or interface name is taken, or the kernel refuses a step.
    /// Nothing remains of the attempt.
    pub fn connect(
        &mut self,
        bridge: &Bridge,
        pod: &Pod,
        mac: Option<Mac>,
        end: &End,
    ) -> Result<ConnectedPod, WiringError> {
        let netns = Path::new(&pod.netns);
        let known_mac = mac;
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
            default_route: end.may_have_default_route(),
            pinned: bridge.anti_spoofing,
        };
        if mac != mac_at(pod.addresses.first) {
            self.expect_mac_unused(mac, bridge, pod)?;
        }
        let plugged = self.bridge_index(bridge).and_then(|port| self.plug(pod, &veth, port));
        if plugged.is_err() {
            // There may be an interface of an unknown attachment of this name, or another bridge.
            self.bridge = None;
            self.disconnect(&pod.attachment).map_err(failed("removing an old interface"))?;
            let port = self.bridge_index(bridge).map_err(failed("making the bridge"))?;
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
        if let (Some(mac), Some(ready_bridge)) = (known_mac, &self.bridge) {
            self.announcer.announce(&bridge.name, ready_bridge.index, pod.addresses, mac);
        }
        let configured = match (inside, end) {
            (Some((netns, netlink)), End::Inside { default_route, .. }) => {
                let mut inside =
                    PodNamespace { netlink, netns: &netns, host_netns: &self.host_netns };
                let mac = self.bridge.as_ref().and_then(|ready_bridge| ready_bridge.mac);
                inside.configure(pod, bridge, *default_route, mac)
            }
            _ => Ok(Vec::new()),
        };
        let routes = match configured {
            Ok(routes) => routes,
            Err(error) => {
                let _ = self.disconnect(&pod.attachment);
                return Err(failed("setting addresses")(error));
            }
        };
        if matches!(end, End::Inside { .. }) {
            self.await_port(bridge, &link_name(&pod.attachment));
        }
        Ok(ConnectedPod {
            mac,
            link_mac: link_mac(&pod.attachment),
            bridge_mac: self.bridge.as_ref().and_then(|ready_bridge| ready_bridge.mac),
            routes,
        })
    }

    /// Waits until the bridge forwards packets to a port. Packets sent before that are lost.
    fn await_port(&mut self, bridge: &Bridge, port: &str) {
        let opened =
            self.netlink.await_link(port, port::PORT_OPEN_TIMEOUT, port::is_open).and_then(|()| {
                self.netlink.await_link(&bridge.name, port::PORT_OPEN_TIMEOUT, Link::is_operational)
            });
        if let Err(error) = opened {
            tracing::debug!(port, %error, "new port not forwarding yet");
        }
    }

    /// Repairs the bridge and its ports. Returns the counts.
    ///
    /// # Errors
    /// If another interface has the bridge's name, or the kernel refuses a step.
    pub fn repair(&mut self, bridge: &Bridge, ports: &Tenants) -> io::Result<RepairReport> {
        self.bridge = None;
        ports.values().for_each(|tenant| self.announcer.note(tenant));
        let (ready_bridge, mut report) = bridge::ensure(&mut self.netlink, bridge)?;
        bridge::repair_ports(&mut self.netlink, &ready_bridge, ports, &mut report)?;
        self.bridge = Some(ready_bridge);
        Ok(report)
    }

    /// Removes the neighbor entries of a disconnected pod.
    pub fn forget_neighbors(&mut self, addresses: Addresses) {
        let Some(bridge) = self.bridge.as_ref().map(|ready_bridge| ready_bridge.index) else {
            return;
        };
        let changes = addresses.iter().map(|ip| neighbour::entry_removal(bridge, ip)).collect();
        if let Err(error) = self.netlink.apply(changes) {
            tracing::debug!(%error, "neighbor entries of a pod not removed");
        }
    }

    /// Records a message of the kernel. It may make [`Wiring::repair`] necessary.
    pub fn record_update(
        &self,
        ports: &Tenants,
        content: RouteNetlinkMessage,
        updates: &mut LinkUpdates,
    ) {
        if let Some(ready_bridge) = &self.bridge {
            updates.add(ready_bridge, ports, content);
        }
    }

    /// Removes an end on this host, and the other end with it. Returns whether it existed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete(&mut self, index: u32) -> io::Result<bool> {
        match self.netlink.delete_link(index) {
            Err(error) if error.raw_os_error() == Some(ENODEV) => Ok(false),
            result => result.map(|()| true),
        }
    }

    fn disconnect(&mut self, attachment: &Attachment) -> io::Result<bool> {
        self.index(attachment)?.map_or(Ok(false), |index| self.delete(index))
    }

    /// Moves the routes of an interface that is about to be removed to another interface of the same pod, if
    /// there is one. `others` are the names of the other interfaces' ends on this host.
    ///
    /// # Errors
    /// If the namespace is unusable or the kernel refuses a step.
    pub fn hand_over(
        &mut self,
        bridge: &Bridge,
        leaving: u32,
        (netns, opened): (&Path, Option<&File>),
        others: &[&String],
    ) -> Result<(), WiringError> {
        let step = "looking for the pod's other interfaces";
        let mut successors = Vec::new();
        for name in others {
            let link = self.netlink.link(name).map_err(failed(step))?;
            successors.extend(link.and_then(|link| Some((link.index, parse_alias(&link.alias)?))));
        }
        successors.sort_by(|(_, one), (_, other)| one.cmp_as_successor(other));
        let (netns, mut netlink) = self.enter(netns, opened)?;
        let links = netlink.links().map_err(failed(step))?;
        let inside = |index: u32| links.iter().find(|link| is_peer_of(link, index));
        let successor =
            successors.iter().find_map(|(index, content)| Some((inside(*index)?, content)));
        let (Some(leaving), Some((successor, content))) = (inside(leaving), successor) else {
            return Ok(());
        };
        let mut inside = PodNamespace { netlink, netns: &netns, host_netns: &self.host_netns };
        inside
            .hand_over(bridge, leaving.index, successor.index, content.default_route)
            .map_err(failed("giving its routes to another interface"))
    }

    /// Removes a bridge of pods with all veth pairs on it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove(&mut self, bridge: &str) -> io::Result<()> {
        self.sweep(bridge, &BTreeSet::new())?;
        match self.netlink.link(bridge)?.filter(|link| link.alias == ALIAS) {
            Some(link) => self.delete(link.index).map(drop),
            None => Ok(()),
        }
    }

    /// Removes all veth pairs on a bridge of pods, except those in `keep`. Returns how many it removed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn sweep(&mut self, bridge: &str, keep: &BTreeSet<String>) -> io::Result<usize> {
        let links = self.netlink.links()?;
        let found = links.iter().find(|link| link.name == bridge && link.alias == ALIAS);
        let Some(found) = found else { return Ok(0) };
        let is_stray = |link: &&Link| {
            let name = original_name(link).unwrap_or_else(|| link.name.clone());
            link.is_plugged_into(found.index) && name.starts_with(PREFIX) && !keep.contains(&name)
        };
        let strays: Vec<&Link> = links.iter().filter(is_stray).collect();
        strays.iter().try_for_each(|link| self.delete(link.index).map(drop))?;
        Ok(strays.len())
    }

    /// Returns the bridge's index. Does not check a bridge that exists since the last repair; the next repair
    /// does.
    fn bridge_index(&mut self, bridge: &Bridge) -> io::Result<u32> {
        if let Some(ready_bridge) = self.bridge.as_ref().filter(|ready| ready.bridge == *bridge) {
            return Ok(ready_bridge.index);
        }
        let (ready_bridge, _) = bridge::ensure(&mut self.netlink, bridge)?;
        Ok(self.bridge.insert(ready_bridge).index)
    }

    /// Creates a veth pair with its neighbor entries.
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
        let mut changes = vec![made, without_address(&name), up];
        changes.extend(pod.addresses.iter().map(|ip| match pinned {
            true => neighbour::permanent_entry(port, ip, mac),
            // The previous owner of the address may have had another MAC.
            false => neighbour::entry_removal(port, ip),
        }));
        let refused = self.netlink.apply(changes)?;
        all_done(refused.iter().filter(|refused| REQUIRED_CHANGES.contains(&refused.index)))
    }

    /// Sets the sysctls of a veth pair's ends on this host. Problems are reported by the next repair of the
    /// bridge.
    ///
    /// A port of a bridge passes no packets to this host itself, so the pod need not wait for this.
    pub fn close(attachment: &Attachment, end: &End) {
        interface::close_port(&link_name(attachment));
        if matches!(end, End::Loose) {
            interface::close(&loose_name(attachment), Ipv6::Unchanged);
        }
    }

    /// Opens a namespace, and a netlink socket inside.
    fn enter(&self, netns: &Path, opened: Option<&File>) -> Result<(File, Netlink), WiringError> {
        let path = || netns.to_owned();
        let no = |error| WiringError::NoNamespace { path: path(), error };
        let file = opened.map_or_else(|| open_netns(netns), File::try_clone).map_err(no)?;
        if is_same(&file, &self.host_netns).map_err(no)? {
            return Err(WiringError::Host(path()));
        }
        let inside =
            Netlink::open_in(&file, &self.host_netns).map_err(|error| match error.kind() {
                io::ErrorKind::InvalidInput => WiringError::NotANamespace(path()),
                _ => no(error),
            })?;
        Ok((file, inside))
    }
}

/// Opens the file of a namespace. Never blocks, even if the path is a FIFO.
///
/// # Errors
/// If the file cannot be opened.
pub fn open_netns(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}

/// Returns whether two files are the same namespace.
///
/// # Errors
/// If the metadata of a file cannot be read.
pub fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// Returns whether an interface in another namespace is the peer of the interface with this index.
fn is_peer_of(link: &Link, index: u32) -> bool {
    link.message.attributes.contains(&LinkAttribute::Link(index))
}

/// Returns the first error.
fn all_done<'a>(mut refused: impl Iterator<Item = &'a RefusedChange>) -> io::Result<()> {
    refused.next().map_or(Ok(()), |refused| Err(refused.to_io()))
}

const fn failed(what: &'static str) -> impl Fn(io::Error) -> WiringError {
    move |error| WiringError::Kernel { what, error }
}

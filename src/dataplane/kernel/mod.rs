//! The real kernel: dumps what is there on our account and applies operations, by netlink.
//!
//! Ours is what can be recognised without memory: the VXLAN device of our name, permanent neighbours and
//! FDB entries on it, and routes with our protocol number. Objects of others are neither listed nor
//! touched. A failing operation never stops the others; each failure is named.

mod advertised;
mod error;
mod firewall;
mod forward;
pub mod interface;
mod leftovers;
mod messages;
pub mod next_hops;
mod observe;
mod partial;
pub mod pod_tables;
mod ports;
mod rules;
mod sets;
mod spoofing;
pub mod sysctl;
pub mod trace;
pub mod tunnels;
mod unused;
pub mod users;
mod watch;

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
};

use ipnet::IpNet;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, packet_core::NLM_F_REPLACE, packet_route::link::LinkAttribute,
};

pub use self::{
    error::KernelError,
    firewall::{FirewallTable, Pass, TRIAL_MARK},
    forward::{Closing, ForeignChains, Lost, OwnHook},
    leftovers::Leftovers,
    observe::overlaps,
    partial::{Act, ForeignRules, LegacyTable, Partial, Traffic, Way},
    ports::{ClosedPort, open_port},
    watch::{ForeignRoutes, Touched},
};
use self::{
    interface::Ipv6,
    messages::{device_message, fixed_attributes, request, solicit_us},
    watch::miss,
};
use super::{
    demand::Miss,
    desired::{Desired, Device, Hop, is_device_name, networks_in_alias},
    plan::{Op, full_len, plan},
};
use crate::{
    model::Pool,
    netlink::{
        Netlink, Request,
        ethtool::{Ethtool, TX_CHECKSUM},
        link::{Link, no_ipv6_address},
        monitor::Monitor,
    },
};

/// "There is no such thing" in its three spellings: what was to be removed is gone already.
const GONE: [i32; 3] = [2, 3, 19];
const EPERM: i32 = 1;
const ENOMEM: i32 = 12;
const EEXIST: i32 = 17;
const ENODEV: i32 = 19;
const EOPNOTSUPP: i32 = 95;
const EADDRINUSE: i32 = 98;
const ENETDOWN: i32 = 100;
const ENOBUFS: i32 = 105;

/// Questions that are answered in one turn; the kernel asks again.
const MAX_MISSES: usize = 4_096;

/// The kernel's tables of the network namespace in which it was opened.
pub struct Kernel {
    netlink: Netlink,
    monitor: Monitor,
    /// None where the kernel is too old for it.
    ethtool: Option<Ethtool>,
    /// The index that our device had when it was last seen.
    device: Option<u32>,
    /// Since they were last taken.
    foreign: ForeignRoutes,
}

/// What the kernel has told.
#[derive(Debug, Default)]
pub struct Heard {
    pub touched: Touched,
    /// What it asks for.
    pub misses: Vec<Miss>,
    /// More happened than was told.
    pub overrun: bool,
}

/// What one pass over the kernel did.
#[derive(Debug, Default)]
pub struct Report {
    /// Operations that were carried out, by what they changed.
    pub done: BTreeMap<&'static str, u64>,
    /// Entries that the kernel refused.
    pub failed: Vec<RefusedEntry>,
    /// Index of our device.
    pub device: Option<u32>,
    /// Whether checksums are left to it, as far as is known.
    pub checksum_offload: Option<bool>,
}

/// An entry that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedEntry {
    pub op: Op,
    pub errno: i32,
}

impl RefusedEntry {
    /// Whether it is about this host and not about the entry: no such entry would have been taken.
    pub const fn is_of_host(&self) -> bool {
        matches!(self.errno, EPERM | ENOMEM | ENODEV | ENETDOWN | ENOBUFS)
    }
}

impl Kernel {
    /// Opens the kernel of the present network namespace.
    pub fn open() -> io::Result<Self> {
        let (netlink, monitor) = (Netlink::open()?, Monitor::open()?);
        Ok(Self {
            netlink,
            monitor,
            ethtool: Ethtool::open().ok(),
            device: None,
            foreign: ForeignRoutes::default(),
        })
    }

    /// Routes of other programs that have changed.
    pub fn take_foreign(&mut self) -> ForeignRoutes {
        std::mem::take(&mut self.foreign)
    }

    /// The index of our device, once it has been seen.
    pub const fn device(&self) -> Option<u32> {
        self.device
    }

    /// Readable when something has changed somewhere.
    pub fn changes(&self) -> BorrowedFd<'_> {
        self.monitor.as_fd()
    }

    /// Reads what has changed, and says what of it is our business, and what the kernel asks for.
    pub fn listen(&mut self, desired: Option<&Desired>) -> io::Result<Heard> {
        let Self { monitor, foreign, device, .. } = self;
        let device = *device;
        let mut heard = Heard::default();
        let overrun = monitor.read(|message| {
            heard.touched.add(&message, desired, device);
            foreign.add(&message, desired);
            if heard.misses.len() < MAX_MISSES {
                heard.misses.extend(device.and_then(|device| miss(&message, device)));
            }
        })?;
        heard.overrun = overrun;
        // What was not told may be any.
        self.foreign.has_conditional |= overrun;
        Ok(heard)
    }

    /// Makes the kernel ask us for neighbours on our device instead of the network, where nobody would
    /// answer.
    pub fn be_asked(&mut self) -> io::Result<()> {
        let Some(index) = self.device else { return Ok(()) };
        for table in ["arp_cache", "ndisc_cache"] {
            let asked = self.netlink.apply_one(solicit_us(table, index), NLM_F_REPLACE);
            if table == "arp_cache" {
                asked?;
            }
        }
        Ok(())
    }

    /// Carries out operations on entries, without looking first. What cannot be done is left to the next
    /// [`Kernel::reconcile`].
    pub fn answer(&mut self, ops: &[Op]) -> io::Result<()> {
        let Some(index) = self.device.filter(|_| !ops.is_empty()) else { return Ok(()) };
        self.netlink.apply(requests(ops, index)).map(drop)
    }

    /// Makes the kernel equal to `desired`: dump, difference, operations.
    pub fn reconcile(&mut self, desired: &Desired) -> Result<Report, KernelError> {
        self.take_the_name_back(&desired.device)?;
        let actual = self.observe(&desired.device.name, Some(&desired.pool))?;
        if actual.device.is_none() {
            self.refuse_overlap(&desired.device.name, desired.device.local, &desired.pool)?;
        }
        let mut report = self.apply(desired, plan(desired, &actual))?;
        report.device = self.device;
        let found = actual.device.and_then(|found| found.device.checksum_offload);
        report.checksum_offload = desired.device.checksum_offload.or(found);
        Ok(report)
    }

    /// Finds out, before anything is made, whether the device could be.
    pub fn preflight(&mut self, name: &str, vni: u32, port: u16) -> Result<(), KernelError> {
        // The kernel checks the permission before it looks what is to be changed, which is nothing.
        let lo = self.netlink.index_of("lo")?;
        if let Err(error) = self.netlink.set_link(LinkUnspec::new_with_index(lo))
            && error.raw_os_error() == Some(EPERM)
        {
            return Err(KernelError::NotPermitted);
        }
        let vxlans: Vec<Link> =
            self.netlink.links()?.into_iter().filter(|link| link.kind == "vxlan").collect();
        if let Some(holder) = vxlans.iter().find(|l| fixed_attributes(l).0 == (vni, port)) {
            // One of our own name is left from an earlier life and will be taken over.
            return if holder.name == name {
                Ok(())
            } else {
                Err(KernelError::VniTaken { vni, port, holder: holder.name.clone() })
            };
        }
        self.observe(name, None)?;
        // VXLAN devices of one namespace share the kernel's socket; anybody else's blocks it.
        let shared = vxlans.iter().any(|link| listens_on(link, port));
        match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && !shared => {
                Err(KernelError::PortTaken { name: name.to_owned(), port, by: None })
            }
            _ => Ok(()),
        }
    }

    /// Removes our device, every entry on it, and our routes into this pool's networks that are not on it.
    pub fn remove(&mut self, name: &str, pool: &Pool) -> Result<(), KernelError> {
        self.remove_device(name)?;
        let routes = self.our_routes(None, Some(pool))?.into_iter();
        let ops: Vec<Op> = routes.map(|(subnet, hop)| Op::RemoveRoute(subnet, hop)).collect();
        self.netlink.apply(requests(&ops, 0))?;
        Ok(())
    }

    fn remove_device(&mut self, name: &str) -> io::Result<()> {
        match self.netlink.link(name)? {
            Some(link) if link.kind == "vxlan" => self.netlink.delete_link(link.index),
            _ => Ok(()),
        }
    }

    /// Our device under another name is still the one that carries the pods' traffic.
    fn take_the_name_back(&mut self, wanted: &Device) -> io::Result<()> {
        if self.netlink.link(&wanted.name)?.is_some() {
            return Ok(());
        }
        let links = self.netlink.links()?;
        let is_ours = |link: &&Link| {
            link.kind == "vxlan"
                && link.mac == Some(wanted.mac)
                && fixed_attributes(link).0 == (wanted.vni, wanted.port)
        };
        let Some(link) = links.iter().find(is_ours) else { return Ok(()) };
        self.netlink.rename_link(link.index, &wanted.name)
    }

    /// The underlay's address must not be in a network of this overlay, nor may another overlay on this host
    /// have a network in common with it.
    pub fn refuse_overlap(
        &mut self,
        name: &str,
        underlay: IpAddr,
        pool: &Pool,
    ) -> Result<(), KernelError> {
        let links = self.netlink.links()?;
        let all = self.netlink.addresses()?;
        let carrier = all.iter().find(|address| address.ip == underlay).map(|found| found.link);
        let of_underlay = all.iter().filter(|address| Some(address.link) == carrier);
        let addresses = of_underlay.map(|address| (IpNet::from(address.ip), address.link));
        let others = links.iter().filter(|link| is_gossamers(link) && link.name != name);
        let networks = others
            .flat_map(|link| networks_in_alias(&link.alias).map(|network| (network, link.index)));
        for (what, holder) in addresses.chain(networks) {
            let overlaps = |network: &IpNet| network.contains(&what) || what.contains(network);
            if let Some(network) = pool.networks().iter().find(overlaps) {
                let holder = links.iter().find(|link| link.index == holder);
                let interface = holder.map(|link| link.name.clone()).unwrap_or_default();
                return Err(KernelError::Overlap { network, what, interface });
            }
        }
        Ok(())
    }

    fn apply(&mut self, desired: &Desired, ops: Vec<Op>) -> Result<Report, KernelError> {
        let (device_ops, entry_ops): (Vec<_>, Vec<_>) = ops.into_iter().partition(Op::is_of_device);
        let mut report = Report::default();
        for op in device_ops {
            self.apply_to_device(&desired.device, &op)
                .map_err(|error| self.explain(desired, &op, error))?;
            *report.done.entry(op.kind()).or_default() += 1;
        }
        let index = match self.device {
            Some(index) if report.done.is_empty() => index,
            _ => self.netlink.index_of(&desired.device.name)?,
        };
        self.device = Some(index);
        let mut failed = vec![None; entry_ops.len()];
        for refused in self.netlink.apply(requests(&entry_ops, index))? {
            if !(entry_ops[refused.index].is_removal() && GONE.contains(&refused.errno)) {
                failed[refused.index] = Some(refused.errno);
            }
        }
        for (op, errno) in entry_ops.into_iter().zip(failed) {
            match errno {
                Some(errno) => report.failed.push(RefusedEntry { op, errno }),
                None => *report.done.entry(op.kind()).or_default() += 1,
            }
        }
        Ok(report)
    }

    fn apply_to_device(&mut self, device: &Device, op: &Op) -> io::Result<()> {
        let name = &device.name;
        match op {
            Op::CreateDevice(device) => {
                self.netlink.create_link(device_message(device))?;
                // A device with an IPv6 address of its own would send router solicitations into the
                // tunnel. Where the kernel has no IPv6 there is nothing to turn off.
                let _ = self.set(name, |link| link.append_extra_attribute(no_ipv6_address()));
                // Whatever cannot be set is named when the host's sysctls are looked at.
                interface::close(name, Ipv6::AsItIs);
                Ok(())
            }
            Op::DeleteDevice => {
                let index = self.netlink.index_of(name)?;
                self.netlink.delete_link(index)
            }
            Op::SetMac(mac) => self.set(name, |link| link.address(mac.as_bytes().to_vec())),
            Op::SetMtu(mtu) => self.set(name, |link| link.mtu(*mtu)),
            Op::SetAlias(alias) => {
                let alias = LinkAttribute::IfAlias(alias.clone());
                self.set(name, |link| link.append_extra_attribute(alias))
            }
            Op::SetChecksumOffload(on) => {
                let index = self.netlink.index_of(name)?;
                self.ethtool.as_mut().map_or(Ok(()), |tool| tool.set(index, TX_CHECKSUM, *on))
            }
            Op::Release => self.set(name, |link| link.nocontroller()),
            Op::SetUp => self.set(name, |link| link.up()),
            Op::AddAddress(address) => {
                if address.is_ipv6() {
                    // Where new devices begin without IPv6; if it cannot be written, the address says so.
                    let _ = sysctl::write(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0");
                }
                let index = self.netlink.index_of(name)?;
                self.netlink.add_address(index, *address, full_len(*address))
            }
            Op::RemoveAddress(address, len) => {
                let index = self.netlink.index_of(name)?;
                self.netlink.remove_address(index, *address, *len)
            }
            _ => Ok(()),
        }
    }

    fn set(
        &mut self,
        name: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> io::Result<()> {
        let index = self.netlink.index_of(name)?;
        self.netlink.set_link(change(LinkUnspec::new_with_index(index)))
    }

    /// Finds the cause behind the kernel's number; a device that could not be brought up is removed.
    fn explain(&mut self, desired: &Desired, op: &Op, error: io::Error) -> KernelError {
        let Device { name, vni, port, .. } = &desired.device;
        match error.raw_os_error() {
            _ if matches!(op, Op::AddAddress(IpAddr::V6(_))) => {
                KernelError::NoIpv6 { name: name.clone() }
            }
            Some(EPERM) => KernelError::NotPermitted,
            Some(EOPNOTSUPP) => KernelError::NoVxlan,
            Some(EADDRINUSE) => {
                let _ = self.remove_device(name);
                let links = self.netlink.links().unwrap_or_default();
                let by = links.into_iter().find(|link| link.up && listens_on(link, *port));
                let by = by.map(|link| link.name);
                KernelError::PortTaken { name: name.clone(), port: *port, by }
            }
            Some(EEXIST) => {
                let links = self.netlink.links().unwrap_or_default();
                let holder = links
                    .into_iter()
                    .find(|link| link.name != *name && fixed_attributes(link).0 == (*vni, *port))
                    .map_or_else(|| "unknown".to_owned(), |link| link.name);
                KernelError::VniTaken { vni: *vni, port: *port, holder }
            }
            _ => KernelError::Netlink(error),
        }
    }
}

/// Operations on entries as changes for a device with this index.
///
/// # Panics
/// If one of them is an operation on the device itself.
pub fn requests(ops: &[Op], index: u32) -> Vec<Request> {
    ops.iter().map(|op| request(op, index)).collect()
}

/// Whether it is a VXLAN device for tunnel packets to this port.
fn listens_on(link: &Link, port: u16) -> bool {
    link.kind == "vxlan" && fixed_attributes(link).0.1 == port
}

/// Whether a device is named and made as gossamer does it.
fn is_gossamers(link: &Link) -> bool {
    link.kind == "vxlan" && is_device_name(&link.name)
}

impl Op {
    fn is_of_device(&self) -> bool {
        matches!(
            self,
            Self::DeleteDevice
                | Self::CreateDevice(_)
                | Self::SetMac(_)
                | Self::SetMtu(_)
                | Self::SetAlias(_)
                | Self::SetChecksumOffload(_)
                | Self::Release
                | Self::SetUp
                | Self::AddAddress(_)
                | Self::RemoveAddress(..)
        )
    }

    fn is_removal(&self) -> bool {
        matches!(self, Self::RemoveRoute(..) | Self::RemoveNeighbour(_) | Self::RemoveFdb(..))
    }
}

impl fmt::Display for RefusedEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.op {
            Op::AddRoute(subnet, Hop { metric, .. }) if self.errno == EEXIST => write!(
                f,
                "another program has a route to {subnet} with metric {metric}: remove it \
                 (ip route show {subnet})"
            ),
            op => write!(f, "{op:?}: {}", io::Error::from_raw_os_error(self.errno)),
        }
    }
}

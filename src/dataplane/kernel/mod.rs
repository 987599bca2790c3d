//! The kernel adapter: dumps gossamer's objects and applies operations, by netlink.
//!
//! Objects of gossamer are recognizable without stored state: the VXLAN device by its name,
//! permanent neighbors and FDB entries on that device, and routes by their protocol number. Objects
//! of other programs are read only to report them. Of the host's settings, only the sysctls in
//! `required_sysctls` are written. A failed operation does not stop the others, and each failure is
//! reported.

mod advertised;
mod error;
mod firewall;
mod leftovers;
mod messages;
pub mod next_hops;
mod observe;
pub mod pod_tables;
mod preflight;
pub mod required_sysctls;
mod shape;
mod spoofing;
pub mod tunnels;
mod unused;
pub mod users;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
};

use ipnet::IpNet;
use nix::libc::{
    EADDRINUSE, EEXIST, ENETDOWN, ENOBUFS, ENODEV, ENOENT, ENOMEM, EOPNOTSUPP, EPERM, ESRCH,
};
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, packet_core::NLM_F_REPLACE, packet_route::link::LinkAttribute,
};

pub use self::{
    error::KernelError,
    firewall::{FirewallTable, TRIAL_MARK, Verification},
    leftovers::{Extent, Leftovers},
    observe::overlaps,
    preflight::PlannedOverlay,
    watch::{ForeignRoutes, Recheck},
};
use self::{
    messages::{device_message, fixed_attributes, request, user_space_solicitations},
    watch::miss,
};
use super::{
    demand::Miss,
    desired::{Desired, Device, Hop, is_device_name, networks_in_alias},
    plan::{DeviceOp, EntryOp, Plan, full_len, plan, plan_change},
};
use crate::{
    model::{Pool, Slot},
    netlink::{
        Netlink, Request,
        ethtool::{Ethtool, TX_CHECKSUM},
        link::{Link, no_ipv6_address},
        local::local_route,
        monitor::Monitor,
    },
    sysctl::{
        self,
        interface::{self, Ipv6},
    },
};

/// The object to remove is already gone.
const GONE: [i32; 3] = [ENOENT, ESRCH, ENODEV];

/// Upper limit of the misses that one read returns; the kernel repeats the rest.
const MAX_MISSES: usize = 4_096;

/// Netlink access to the network namespace in which it was opened.
pub struct Kernel {
    netlink: Netlink,
    monitor: Monitor,
    /// `None` if the kernel does not support ethtool over netlink.
    ethtool: Option<Ethtool>,
    /// Index of gossamer's device when it was last seen.
    device: Option<u32>,
    /// Changed routes of other programs since [`Kernel::take_foreign`].
    foreign: ForeignRoutes,
}

/// The kernel's notifications.
#[derive(Debug, Default)]
pub struct KernelEvents {
    /// What has to be checked because of them.
    pub recheck: Recheck,
    /// Entries that the kernel lacks.
    pub misses: Vec<Miss>,
    /// Whether notifications were lost, because the socket's buffer was full.
    pub overrun: bool,
}

/// The result of [`Kernel::reconcile`].
#[derive(Debug, Default)]
pub struct Report {
    /// Number of executed operations, by kind.
    pub done: BTreeMap<&'static str, u64>,
    /// Operations on entries that the kernel refused.
    pub failed: Vec<RefusedEntry>,
    /// Index of gossamer's device.
    pub device: Option<u32>,
    /// Whether the device uses checksum offload; `None` if unknown.
    pub checksum_offload: Option<bool>,
    /// The slots with entries of no known member that stay until the slot's owner is confirmed.
    pub retained: BTreeSet<Slot>,
}

/// An entry that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedEntry {
    /// The operation.
    pub op: EntryOp,
    /// The kernel's error number.
    pub errno: i32,
}

impl RefusedEntry {
    /// Whether the cause is the host and not the entry: the kernel would have refused any entry.
    pub const fn is_of_host(&self) -> bool {
        matches!(self.errno, EPERM | ENOMEM | ENODEV | ENETDOWN | ENOBUFS)
    }
}

impl Kernel {
    /// Opens sockets in the present network namespace.
    ///
    /// # Errors
    /// When a netlink socket cannot be opened.
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

    /// Returns and clears the changed routes of other programs.
    pub fn take_foreign(&mut self) -> ForeignRoutes {
        std::mem::take(&mut self.foreign)
    }

    /// Returns the index of gossamer's device, once it has been seen.
    pub const fn device(&self) -> Option<u32> {
        self.device
    }

    /// Returns the socket that is readable when the kernel has sent notifications.
    pub fn changes(&self) -> BorrowedFd<'_> {
        self.monitor.as_fd()
    }

    /// Reads the kernel's notifications; returns what concerns gossamer, and the entries that the
    /// kernel lacks.
    ///
    /// # Errors
    /// When the socket cannot be read.
    pub fn listen(&mut self, desired: Option<&Desired>) -> io::Result<KernelEvents> {
        let Self { monitor, foreign, device, .. } = self;
        let device = *device;
        let mut events = KernelEvents::default();
        let overrun = monitor.read(|message| {
            events.recheck.add(&message, desired, device);
            foreign.add(&message, desired);
            if events.misses.len() < MAX_MISSES {
                events.misses.extend(device.and_then(|device| miss(&message, device)));
            }
        })?;
        events.overrun = overrun;
        // Any route may have changed in a lost notification.
        self.foreign.has_conditional |= overrun;
        Ok(events)
    }

    /// Makes the kernel report missing neighbors on gossamer's device to the agent. Nothing on the
    /// network would answer its solicitations.
    ///
    /// # Errors
    /// When the kernel refuses the setting for IPv4.
    pub fn request_misses(&mut self) -> io::Result<()> {
        let Some(index) = self.device else { return Ok(()) };
        for table in ["arp_cache", "ndisc_cache"] {
            let applied =
                self.netlink.apply_one(user_space_solicitations(table, index), NLM_F_REPLACE);
            if table == "arp_cache" {
                applied?;
            }
        }
        Ok(())
    }

    /// Executes operations on entries without a dump. [`Kernel::reconcile`] repeats what fails.
    ///
    /// # Errors
    /// When the messages cannot be sent.
    pub fn answer(&mut self, ops: &[EntryOp]) -> io::Result<()> {
        let Some(index) = self.device.filter(|_| !ops.is_empty()) else { return Ok(()) };
        self.netlink.apply(requests(ops, index)).map(drop)
    }

    /// Makes the kernel equal to `desired`: dumps, computes the difference and executes it.
    ///
    /// # Errors
    /// When a dump fails, or an operation on the device; refused entries are in the report.
    pub fn reconcile(&mut self, desired: &Desired) -> Result<Report, KernelError> {
        self.restore_device_name(&desired.device)?;
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

    /// Makes the kernel, which equals `before`, equal to `desired` without reading it. Both describe the same
    /// device and pool.
    ///
    /// # Errors
    /// When the kernel cannot be asked; refused entries are in the report.
    pub fn change(&mut self, before: &Desired, desired: &Desired) -> Result<Report, KernelError> {
        self.apply(desired, plan_change(before, desired))
    }

    /// Checks whether the device can be created, before anything is.
    ///
    /// # Errors
    /// The reason why it cannot.
    fn preflight(&mut self, name: &str, vni: u32, port: u16) -> Result<(), KernelError> {
        // The kernel checks permissions before it looks for the changes, of which there are none.
        let lo = self.netlink.index_of("lo")?;
        if let Err(error) = self.netlink.set_link(LinkUnspec::new_with_index(lo))
            && error.raw_os_error() == Some(EPERM)
        {
            return Err(KernelError::NotPermitted);
        }
        let vxlans: Vec<Link> =
            self.netlink.links()?.into_iter().filter(|link| link.kind == "vxlan").collect();
        if let Some(holder) = vxlans.iter().find(|l| fixed_attributes(l).0 == (vni, port)) {
            // A device with gossamer's name is from an earlier run and is reused.
            return if holder.name == name {
                Ok(())
            } else {
                Err(KernelError::VniTaken { vni, port, holder: holder.name.clone() })
            };
        }
        self.observe(name, None)?;
        // VXLAN devices of one namespace share the kernel's socket; any other socket blocks the
        // port.
        let shared = vxlans.iter().any(|link| listens_on(link, port));
        match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && !shared => {
                Err(KernelError::PortTaken { name: name.to_owned(), port, by: None })
            }
            _ => Ok(()),
        }
    }

    /// Removes the VXLAN device with this name, if there is one.
    fn remove_device(&mut self, name: &str) -> io::Result<()> {
        match self.netlink.link(name)? {
            Some(link) if link.kind == "vxlan" => self.netlink.delete_link(link.index),
            _ => Ok(()),
        }
    }

    /// Renames gossamer's device back if another program has renamed it: the device still carries
    /// the pods' traffic.
    fn restore_device_name(&mut self, wanted: &Device) -> io::Result<()> {
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

    /// Checks that neither an address of the underlay interface nor another overlay on this host
    /// overlaps with the pool's networks.
    ///
    /// # Errors
    /// When one does, or the kernel's tables cannot be read.
    fn refuse_overlap(
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
        let others = links.iter().filter(|link| is_overlay_device(link) && link.name != name);
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

    /// Executes the operations; those on the device first, each of which must succeed.
    fn apply(&mut self, desired: &Desired, plan: Plan) -> Result<Report, KernelError> {
        let Plan { device: device_ops, entries: entry_ops, retained } = plan;
        let mut report = Report { retained, ..Report::default() };
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

    fn apply_to_device(&mut self, device: &Device, op: &DeviceOp) -> io::Result<()> {
        let name = &device.name;
        match op {
            DeviceOp::CreateDevice(device) => {
                self.netlink.create_link(device_message(device))?;
                // A device with a link-local IPv6 address would send router solicitations into the
                // tunnel. A kernel without IPv6 has nothing to turn off.
                let _ = self.set(name, |link| link.append_extra_attribute(no_ipv6_address()));
                // The check of this host's sysctls reports what cannot be set.
                interface::close(name, Ipv6::Unchanged);
                Ok(())
            }
            DeviceOp::DeleteDevice => {
                let index = self.netlink.index_of(name)?;
                self.netlink.delete_link(index)
            }
            DeviceOp::SetMac(mac) => self.set(name, |link| link.address(mac.as_bytes().to_vec())),
            DeviceOp::SetMtu(mtu) => self.set(name, |link| link.mtu(*mtu)),
            DeviceOp::SetAlias(alias) => {
                let alias = LinkAttribute::IfAlias(alias.clone());
                self.set(name, |link| link.append_extra_attribute(alias))
            }
            DeviceOp::SetChecksumOffload(on) => {
                let index = self.netlink.index_of(name)?;
                self.ethtool.as_mut().map_or(Ok(()), |tool| tool.set(index, TX_CHECKSUM, *on))
            }
            DeviceOp::Release => self.set(name, |link| link.nocontroller()),
            DeviceOp::SetUp => {
                if self.netlink.link(name)?.is_some_and(|link| link.is_proto_down()) {
                    let off = LinkAttribute::ProtoDown(0);
                    self.set(name, |link| link.append_extra_attribute(off))?;
                }
                self.set(name, |link| link.up())
            }
            DeviceOp::AddAddress(address) => {
                if address.is_ipv6() {
                    // New devices may have IPv6 disabled. If this fails, adding the address reports
                    // it.
                    let _ = sysctl::write(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0");
                }
                let index = self.netlink.index_of(name)?;
                self.netlink.add_address(index, *address, full_len(*address))
            }
            DeviceOp::AddLocalRoute(address) => {
                let index = self.netlink.index_of(name)?;
                let Request { message, flags } = local_route(index, *address);
                self.netlink.apply_one(message, flags)
            }
            DeviceOp::RemoveAddress(address, len) => {
                let index = self.netlink.index_of(name)?;
                self.netlink.remove_address(index, *address, *len)
            }
        }
    }

    /// Changes attributes of a link.
    fn set(
        &mut self,
        name: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> io::Result<()> {
        let index = self.netlink.index_of(name)?;
        self.netlink.set_link(change(LinkUnspec::new_with_index(index)))
    }

    /// Finds the cause behind the kernel's error number. Removes a device that could not be brought
    /// up.
    fn explain(&mut self, desired: &Desired, op: &DeviceOp, error: io::Error) -> KernelError {
        let Device { name, vni, port, .. } = &desired.device;
        match error.raw_os_error() {
            _ if matches!(op, DeviceOp::AddAddress(IpAddr::V6(_))) => {
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

/// Returns the requests for operations on entries of the device with this index.
pub fn requests(ops: &[EntryOp], index: u32) -> Vec<Request> {
    ops.iter().map(|op| request(op, index)).collect()
}

/// Whether it is a VXLAN device with this UDP port.
fn listens_on(link: &Link, port: u16) -> bool {
    link.kind == "vxlan" && fixed_attributes(link).0.1 == port
}

/// Whether a device has the kind and name of gossamer's devices.
fn is_overlay_device(link: &Link) -> bool {
    link.kind == "vxlan" && is_device_name(&link.name)
}

impl fmt::Display for RefusedEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.op {
            EntryOp::AddRoute(subnet, Hop { metric, .. }) if self.errno == EEXIST => write!(
                f,
                "another program has a route to {subnet} with metric {metric}: remove it \
                 (ip route show {subnet})"
            ),
            op => write!(f, "{op:?}: {}", io::Error::from_raw_os_error(self.errno)),
        }
    }
}

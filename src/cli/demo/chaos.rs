//! `gossamer demo --chaos`: injects faults into a host's kernel while its pod sends pings, and measures
//! the time until repair and the packets lost.
//!
//! Faults are injected by netlink, so no other program is needed. The agent gets no hint.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rtnetlink::{LinkUnspec, packet_route::RouteNetlinkMessage};

use super::screen::span;
use crate::{
    dataplane::{
        desired::{Hop, RouteTarget},
        kernel::{FirewallTable, Kernel},
        plan::{Actual, EntryOp},
    },
    lab::{Host, Pinger, Pod, tables},
    model::Mac,
    netlink::{Netlink, Request},
};

/// Time after which a fault counts as not repaired.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(5);
/// Number of requests sent during each fault, and the interval between them.
const REQUESTS_PER_FAULT: u16 = 100;
const REQUEST_INTERVAL: Duration = Duration::from_millis(5);
/// Requests are sent for this time before the fault.
const DELAY_BEFORE_FAULT: Duration = Duration::from_millis(50);

/// Attempts to rename the device, which succeeds only between two repairs.
const MAX_RENAME_ATTEMPTS: u32 = 100;

/// A change to the kernel that the agent must repair.
#[derive(Clone, Copy)]
enum Fault {
    DeleteFdb,
    WrongFdb,
    DeleteNeighbor,
    WrongNeighbor,
    DeleteRoute,
    ForeignRoute,
    RemoveAddress,
    DeviceDown,
    DeviceMtu,
    DeviceMac,
    DeviceName,
    DeleteDevice,
    DropTable,
}

const FAULTS: [(Fault, &str); 13] = [
    (Fault::DeleteFdb, "FDB entry of a peer deleted"),
    (Fault::WrongFdb, "FDB entry leads to another host"),
    (Fault::DeleteNeighbor, "neighbor entry deleted"),
    (Fault::WrongNeighbor, "neighbor entry with another MAC"),
    (Fault::DeleteRoute, "route deleted"),
    (Fault::ForeignRoute, "route replaced by an unreachable one"),
    (Fault::RemoveAddress, "address of the device removed"),
    (Fault::DeviceDown, "device set down"),
    (Fault::DeviceMtu, "MTU of the device changed"),
    (Fault::DeviceMac, "MAC of the device changed"),
    (Fault::DeviceName, "device renamed"),
    (Fault::DeleteDevice, "device deleted with all its entries"),
    (Fault::DropTable, "nftables table deleted"),
];

/// Injects every fault into `host` while its pod `from` pings `to`. Returns one row per fault:
/// description, time until repair, packets lost.
pub fn inject_faults(
    host: &Host,
    device: &str,
    from: &Pod,
    to: &Pod,
) -> anyhow::Result<Vec<[String; 3]>> {
    let mut rows = Vec::new();
    for (fault, what) in FAULTS {
        let before = owned_state(host, device)?;
        let (mut pinger, to) = (Pinger::new(&from.netns)?, to.ip);
        let stream = thread::spawn(move || pinger.stream(to, REQUESTS_PER_FAULT, REQUEST_INTERVAL));
        thread::sleep(DELAY_BEFORE_FAULT);
        let begun = Instant::now();
        host.netns.run(|| fault.inject(device)).with_context(|| what)?;
        while owned_state(host, device)? != before {
            ensure!(
                begun.elapsed() < REPAIR_TIMEOUT,
                "{what}: not repaired within {}",
                span(REPAIR_TIMEOUT)
            );
            thread::sleep(Duration::from_micros(500));
        }
        let took = begun.elapsed();
        let answered = stream.join().map_err(|_| anyhow::anyhow!("the ping panicked"))??;
        let lost = format!("{} of {REQUESTS_PER_FAULT}", REQUESTS_PER_FAULT - answered);
        rows.push([what.to_owned(), span(took), lost]);
    }
    Ok(rows)
}

/// Returns gossamer's entries and nftables tables, as the kernel has them now.
fn owned_state(host: &Host, device: &str) -> io::Result<(String, Vec<String>)> {
    let tables_of_nft =
        || FirewallTable::open().and_then(|mut nft| nft.tables(|name| name == device));
    // A kernel without nftables has no table to lose.
    let of_nft = host.netns.run(tables_of_nft).unwrap_or_default();
    Ok((tables(host, device)?, of_nft))
}

/// Sets the device down and renames it in one batch: kernels before 6.2 rename no device that is up. It
/// retries, because the agent may set the device up between the two requests.
fn rename(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let link = || LinkUnspec::new_with_index(index);
    let mut attempts = 0;
    loop {
        let both = [link().down().build(), link().name("stolen").build()];
        let both =
            both.map(|link| Request { message: RouteNetlinkMessage::SetLink(link), flags: 0 });
        attempts += 1;
        match netlink.apply(both.into())?.pop() {
            None => return Ok(()),
            Some(refused) if attempts == MAX_RENAME_ATTEMPTS => return Err(refused.to_io()),
            Some(_) => {}
        }
    }
}

impl Fault {
    fn inject(self, device: &str) -> io::Result<()> {
        let mut kernel = Kernel::open()?;
        let actual = kernel.observe(device, None).map_err(io::Error::other)?;
        if let Some(op) = self.entry_operations(&actual) {
            return kernel.answer(&op);
        }
        let mut netlink = Netlink::open()?;
        let index = netlink.index_of(device)?;
        let link = || LinkUnspec::new_with_index(index);
        match self {
            Self::DeviceDown => netlink.set_link(link().down()),
            Self::DeviceMtu => netlink.set_link(link().mtu(1300)),
            Self::DeviceMac => netlink.set_link(link().address(vec![2, 0, 0, 0, 0, 0x99])),
            Self::DeviceName => rename(&mut netlink, index),
            Self::DeleteDevice => netlink.delete_link(index),
            Self::RemoveAddress => {
                let addresses = actual.device.map(|found| found.addresses).unwrap_or_default();
                addresses.iter().try_for_each(|(ip, len)| netlink.remove_address(index, *ip, *len))
            }
            _ => FirewallTable::open()?.remove(device),
        }
    }

    /// Returns the operations of a fault that concerns entries, for all peers alike: this function does
    /// not know which peer the pod pings.
    fn entry_operations(self, actual: &Actual) -> Option<Vec<EntryOp>> {
        let wrong_mac = Mac::from_bytes([2, 0, 0, 0, 0, 0x99]);
        let (fdb, neighbors, routes) = (&actual.fdb, &actual.neighbors, &actual.routes);
        Some(match self {
            Self::DeleteFdb => fdb.iter().map(|(mac, to)| EntryOp::RemoveFdb(*mac, *to)).collect(),
            Self::WrongFdb => {
                fdb.iter().map(|(mac, _)| EntryOp::SetFdb(*mac, [10, 99, 255, 1].into())).collect()
            }
            Self::DeleteNeighbor => {
                neighbors.keys().map(|ip| EntryOp::RemoveNeighbor(*ip)).collect()
            }
            Self::WrongNeighbor => {
                neighbors.keys().map(|ip| EntryOp::SetNeighbor(*ip, wrong_mac)).collect()
            }
            Self::DeleteRoute => {
                routes.iter().map(|(subnet, hop)| EntryOp::RemoveRoute(*subnet, *hop)).collect()
            }
            Self::ForeignRoute => {
                let nowhere = |hop: &Hop| Hop::new(RouteTarget::Unreachable, hop.metric);
                routes.iter().map(|(net, hop)| EntryOp::ReplaceRoute(*net, nowhere(hop))).collect()
            }
            _ => return None,
        })
    }
}

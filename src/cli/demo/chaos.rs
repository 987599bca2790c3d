//! `gossamer demo --chaos`: somebody lays hands on a host's kernel while its pod is talking, and a table
//! shows how long that lasts and what it costs.
//!
//! Done by netlink, so that no other program is needed. The agent under test is told nothing.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rtnetlink::{LinkUnspec, packet_route::RouteNetlinkMessage};

use super::screen::span;
use crate::{
    dataplane::{
        desired::{Hop, Way},
        kernel::{FirewallTable, Kernel},
        plan::{Actual, Op},
    },
    lab::{Host, Pinger, Pod, tables},
    model::Mac,
    netlink::{Netlink, Request},
};

/// A deed that is not undone after this time will not be.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Requests while one deed is done and undone, and between two of them.
const REQUESTS: u16 = 100;
const INTERVAL: Duration = Duration::from_millis(5);
/// Requests before the deed.
const BEFORE: Duration = Duration::from_millis(50);

/// Renames that are tried until one comes between two repairs.
const RENAMES: u32 = 100;

/// What is done to the kernel.
#[derive(Clone, Copy)]
enum Fault {
    DeleteFdb,
    WrongFdb,
    DeleteNeighbour,
    WrongNeighbour,
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
    (Fault::DeleteNeighbour, "neighbour entry deleted"),
    (Fault::WrongNeighbour, "neighbour entry with another MAC"),
    (Fault::DeleteRoute, "route deleted"),
    (Fault::ForeignRoute, "route that leads nowhere in its place"),
    (Fault::RemoveAddress, "address of the device removed"),
    (Fault::DeviceDown, "device set down"),
    (Fault::DeviceMtu, "MTU of the device changed"),
    (Fault::DeviceMac, "MAC of the device changed"),
    (Fault::DeviceName, "device renamed"),
    (Fault::DeleteDevice, "device deleted with all its entries"),
    (Fault::DropTable, "our table of nftables deleted"),
];

/// Does everything to `host` while `from`, a pod of it, pings `to`; gives a row for each deed: what, after
/// how long it was undone, and how many packets were lost.
pub fn vandalise(
    host: &Host,
    device: &str,
    from: &Pod,
    to: &Pod,
) -> anyhow::Result<Vec<[String; 3]>> {
    let mut rows = Vec::new();
    for (fault, what) in FAULTS {
        let before = shown(host, device)?;
        let (mut pinger, to) = (Pinger::new(&from.netns)?, to.ip);
        let stream = thread::spawn(move || pinger.stream(to, REQUESTS, INTERVAL));
        thread::sleep(BEFORE);
        let begun = Instant::now();
        host.netns.run(|| fault.commit(device)).with_context(|| what)?;
        while shown(host, device)? != before {
            ensure!(begun.elapsed() < TIMEOUT, "{what}: not put right in {}", span(TIMEOUT));
            thread::sleep(Duration::from_micros(500));
        }
        let took = begun.elapsed();
        let answered = stream.join().map_err(|_| anyhow::anyhow!("the ping panicked"))??;
        let lost = format!("{} of {REQUESTS}", REQUESTS - answered);
        rows.push([what.to_owned(), span(took), lost]);
    }
    Ok(rows)
}

/// Everything of ours, as the kernel has it now.
fn shown(host: &Host, device: &str) -> io::Result<(String, Vec<String>)> {
    let tables_of_nft =
        || FirewallTable::open().and_then(|mut nft| nft.tables(|name| name == device));
    // Without nftables in the kernel there is no table to lose.
    let of_nft = host.netns.run(tables_of_nft).unwrap_or_default();
    Ok((tables(host, device)?, of_nft))
}

/// Sets the device down and renames it, which kernels before 6.2 refuse to a device that is up. The agent may
/// have set it up again between the two.
fn rename(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let change = || LinkUnspec::new_with_index(index);
    let mut tries = 0;
    loop {
        let both = [change().down().build(), change().name("stolen").build()];
        let both =
            both.map(|link| Request { message: RouteNetlinkMessage::SetLink(link), flags: 0 });
        tries += 1;
        match netlink.apply(both.into())?.pop() {
            None => return Ok(()),
            Some(refused) if tries == RENAMES => return Err(refused.to_io()),
            Some(_) => {}
        }
    }
}

impl Fault {
    fn commit(self, device: &str) -> io::Result<()> {
        let mut kernel = Kernel::open()?;
        let actual = kernel.observe(device, None).map_err(io::Error::other)?;
        if let Some(op) = self.on_an_entry(&actual) {
            return kernel.answer(&op);
        }
        let mut netlink = Netlink::open()?;
        let index = netlink.index_of(device)?;
        let change = || LinkUnspec::new_with_index(index);
        match self {
            Self::DeviceDown => netlink.set_link(change().down()),
            Self::DeviceMtu => netlink.set_link(change().mtu(1300)),
            Self::DeviceMac => netlink.set_link(change().address(vec![2, 0, 0, 0, 0, 0x99])),
            Self::DeviceName => rename(&mut netlink, index),
            Self::DeleteDevice => netlink.delete_link(index),
            Self::RemoveAddress => {
                let addresses = actual.device.map(|found| found.addresses).unwrap_or_default();
                addresses.iter().try_for_each(|(ip, len)| netlink.remove_address(index, *ip, *len))
            }
            _ => FirewallTable::open()?.remove(device),
        }
    }

    /// All peers' entries suffer alike: which of them the pod talks to is not known here.
    fn on_an_entry(self, actual: &Actual) -> Option<Vec<Op>> {
        let nobody = Mac::from_bytes([2, 0, 0, 0, 0, 0x99]);
        let (fdb, neighbours, routes) = (&actual.fdb, &actual.neighbours, &actual.routes);
        Some(match self {
            Self::DeleteFdb => fdb.iter().map(|(mac, to)| Op::RemoveFdb(*mac, *to)).collect(),
            Self::WrongFdb => {
                fdb.iter().map(|(mac, _)| Op::SetFdb(*mac, [10, 99, 255, 1].into())).collect()
            }
            Self::DeleteNeighbour => neighbours.keys().map(|ip| Op::RemoveNeighbour(*ip)).collect(),
            Self::WrongNeighbour => {
                neighbours.keys().map(|ip| Op::SetNeighbour(*ip, nobody)).collect()
            }
            Self::DeleteRoute => {
                routes.iter().map(|(subnet, hop)| Op::RemoveRoute(*subnet, *hop)).collect()
            }
            Self::ForeignRoute => {
                let nowhere = |hop: &Hop| Hop::new(Way::Unreachable, hop.metric);
                routes.iter().map(|(net, hop)| Op::ReplaceRoute(*net, nowhere(hop))).collect()
            }
            _ => return None,
        })
    }
}

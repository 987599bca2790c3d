//! An in-memory kernel for property tests and the simulator.
//!
//! Each operation changes the device and the three tables as measured on Linux. The contract is that of
//! `kernel`: "already exists" and "already gone" are success; a route requires a device that is up; a second
//! route with the same destination and metric is refused; deleting the device deletes all entries on it;
//! changing its MAC drops its neighbor entries.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    desired::{Desired, Hop, RouteTarget, Tables},
    plan::{Actual, DeviceOp, EntryOp, Found, Op, full_len, plan},
};
use crate::model::Mac;

/// The part of a host's kernel that gossamer programs.
#[derive(Clone, Debug, Default)]
pub struct FakeKernel {
    /// The VXLAN device, if it exists.
    pub device: Option<Found>,
    /// FDB entries: MAC and underlay address.
    pub fdb: BTreeSet<(Mac, IpAddr)>,
    /// Neighbor entries: overlay address -> MAC.
    pub neighbors: BTreeMap<IpAddr, Mac>,
    /// Routes by the kernel's key: destination and metric.
    pub routes: BTreeMap<(IpNet, u32), Hop>,
}

/// An operation that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op:?}: {why}")]
pub struct RefusedOp {
    /// The refused operation.
    pub op: Op,
    /// The kernel's error message.
    pub why: &'static str,
}

impl FakeKernel {
    /// Returns the state as a dump would.
    pub fn dump(&self) -> Actual {
        let routes = self.routes.iter().map(|(&(subnet, _), &hop)| (subnet, hop));
        Actual {
            device: self.device.clone(),
            fdb: self.fdb.clone(),
            neighbors: self.neighbors.clone(),
            routes: routes.collect(),
        }
    }

    /// Applies one operation.
    ///
    /// # Errors
    /// The kernel would refuse the operation, for example because the device is down or the route exists.
    pub fn apply(&mut self, op: &Op) -> Result<(), RefusedOp> {
        let done = match op {
            Op::Device(op) => self.apply_to_device(op),
            Op::Entry(op) => self.apply_to_entry(op),
        };
        done.map_err(|why| RefusedOp { op: op.clone(), why })
    }

    fn apply_to_device(&mut self, op: &DeviceOp) -> Result<(), &'static str> {
        match (op, &mut self.device) {
            (DeviceOp::CreateDevice(_), Some(_)) => return Err("File exists"),
            (DeviceOp::CreateDevice(device), none) => {
                *none = Some(Found {
                    up: false,
                    is_port: false,
                    device: (**device).clone(),
                    foreign: false,
                    addresses: Vec::new(),
                    unreceived: BTreeSet::new(),
                });
            }
            (DeviceOp::DeleteDevice, _) => {
                self.routes.retain(|_, hop| {
                    !matches!(hop.way, RouteTarget::Overlay(_) | RouteTarget::Device)
                });
                *self = Self { routes: std::mem::take(&mut self.routes), ..Self::default() };
            }
            (_, None) => return Err("No such device"),
            (DeviceOp::SetMac(mac), Some(found)) => {
                found.device.mac = *mac;
                self.neighbors.clear();
            }
            (DeviceOp::SetMtu(mtu), Some(found)) => found.device.mtu = *mtu,
            (DeviceOp::SetAlias(alias), Some(found)) => found.device.alias.clone_from(alias),
            (DeviceOp::SetChecksumOffload(on), Some(found)) => {
                found.device.checksum_offload = Some(*on);
            }
            (DeviceOp::Release, Some(found)) => found.is_port = false,
            (DeviceOp::SetUp, Some(found)) => found.up = true,
            (DeviceOp::AddAddress(address), Some(found)) => {
                found.addresses.push((*address, full_len(*address)));
            }
            (DeviceOp::AddLocalRoute(address), Some(found)) => {
                _ = found.unreceived.remove(address);
            }
            (DeviceOp::RemoveAddress(address, len), Some(found)) => {
                found.addresses.retain(|known| *known != (*address, *len));
            }
        }
        Ok(())
    }

    fn apply_to_entry(&mut self, op: &EntryOp) -> Result<(), &'static str> {
        let is_absent = self.device.is_none();
        match *op {
            EntryOp::RemoveRoute(subnet, hop) => _ = self.routes.remove(&(subnet, hop.metric)),
            EntryOp::RemoveNeighbor(address) => _ = self.neighbors.remove(&address),
            EntryOp::RemoveFdb(mac, underlay) => _ = self.fdb.remove(&(mac, underlay)),
            EntryOp::SetFdb(..) | EntryOp::SetNeighbor(..) | EntryOp::Resolve(..) if is_absent => {
                return Err("No such device");
            }
            EntryOp::SetFdb(mac, underlay) => {
                // The kernel replaces the first destination of the MAC.
                if let Some(first) = self.fdb.iter().find(|(known, _)| *known == mac).copied() {
                    self.fdb.remove(&first);
                }
                self.fdb.insert((mac, underlay));
            }
            EntryOp::SetNeighbor(address, mac) | EntryOp::Resolve(address, mac) => {
                _ = self.neighbors.insert(address, mac)
            }
            EntryOp::AddRoute(subnet, hop) | EntryOp::ReplaceRoute(subnet, hop) => {
                if !self.device.as_ref().is_some_and(|found| found.up) {
                    return Err("Network is down");
                }
                let taken = self.routes.contains_key(&(subnet, hop.metric));
                match (op, taken) {
                    (EntryOp::AddRoute(..), true) => return Err("File exists"),
                    (EntryOp::ReplaceRoute(..), false) => return Err("No such process"),
                    _ => _ = self.routes.insert((subnet, hop.metric), hop),
                }
            }
        }
        Ok(())
    }

    /// Applies the whole plan for `desired`. Returns the refused operations; the others take effect.
    pub fn settle(&mut self, desired: &Desired) -> Vec<RefusedOp> {
        let ops = plan(desired, &self.dump()).into_ops();
        ops.filter_map(|op| self.apply(&op).err()).collect()
    }

    /// Returns whether the tables hold exactly these entries.
    pub fn holds(&self, tables: &Tables) -> bool {
        let actual = self.dump();
        actual.fdb == tables.fdb.clone().into_iter().collect()
            && actual.neighbors == tables.neighbors
            && actual.routes == tables.routes.clone().into_iter().collect()
    }

    /// Returns where a packet to `subnet` goes: it takes the route with the lowest metric, the neighbor entry
    /// of the route's VTEP, and the FDB entry of that MAC.
    pub fn forward(&self, subnet: IpNet) -> Option<(Mac, IpAddr)> {
        let mut routes = self.routes.range((subnet, 0)..=(subnet, u32::MAX));
        let RouteTarget::Overlay(vtep) = routes.next()?.1.way else { return None };
        let mac = self.neighbors.get(&vtep)?;
        self.fdb.iter().find(|(known, _)| known == mac).copied()
    }
}

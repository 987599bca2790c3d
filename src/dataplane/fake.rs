//! A kernel in memory: what each operation does to the device and the three tables, as measured on Linux.
//!
//! For property tests and the simulator. Its contract is the one of `kernel`: "exists already" and "gone
//! already" are success; a route needs a device that is up; a second route with one metric is refused; a
//! device that is deleted takes all its entries along, one whose MAC changes its neighbours. It never
//! decides anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    desired::{Desired, Hop, Tables, Way},
    plan::{Actual, Found, Op, full_len, plan},
};
use crate::model::Mac;

/// The part of a host's kernel that gossamer programs.
#[derive(Clone, Debug, Default)]
pub struct FakeKernel {
    pub device: Option<Found>,
    pub fdb: BTreeSet<(Mac, IpAddr)>,
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Routes by destination and metric, as the kernel keys them.
    pub routes: BTreeMap<(IpNet, u32), Hop>,
}

/// What the kernel said no to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op:?}: {why}")]
pub struct Refused {
    pub op: Op,
    pub why: &'static str,
}

impl FakeKernel {
    pub fn dump(&self) -> Actual {
        let routes = self.routes.iter().map(|(&(subnet, _), &hop)| (subnet, hop));
        Actual {
            device: self.device.clone(),
            fdb: self.fdb.clone(),
            neighbours: self.neighbours.clone(),
            routes: routes.collect(),
        }
    }

    pub fn apply(&mut self, op: &Op) -> Result<(), Refused> {
        let refused = |why| Err(Refused { op: op.clone(), why });
        let absent = self.device.is_none();
        match op.clone() {
            Op::CreateDevice(_) if !absent => return refused("File exists"),
            Op::CreateDevice(device) => {
                let found = Found {
                    up: false,
                    is_port: false,
                    device: *device,
                    foreign: false,
                    addresses: Vec::new(),
                };
                self.device = Some(found);
            }
            Op::DeleteDevice => {
                self.routes.retain(|_, hop| !matches!(hop.way, Way::Overlay(_) | Way::Device));
                *self = Self { routes: std::mem::take(&mut self.routes), ..Self::default() };
            }
            Op::RemoveRoute(subnet, hop) => _ = self.routes.remove(&(subnet, hop.metric)),
            Op::RemoveNeighbour(address) => _ = self.neighbours.remove(&address),
            Op::RemoveFdb(mac, underlay) => _ = self.fdb.remove(&(mac, underlay)),
            Op::SetFdb(mac, underlay) if !absent => {
                // Replaces the first destination of the MAC, whichever that is.
                if let Some(first) = self.fdb.iter().find(|(known, _)| *known == mac).copied() {
                    self.fdb.remove(&first);
                }
                self.fdb.insert((mac, underlay));
            }
            Op::SetNeighbour(address, mac) | Op::Resolve(address, mac) if !absent => {
                _ = self.neighbours.insert(address, mac)
            }
            Op::AddRoute(subnet, hop) | Op::ReplaceRoute(subnet, hop) => {
                if !self.device.as_ref().is_some_and(|found| found.up) {
                    return refused("Network is down");
                }
                let taken = self.routes.contains_key(&(subnet, hop.metric));
                match (op, taken) {
                    (Op::AddRoute(..), true) => return refused("File exists"),
                    (Op::ReplaceRoute(..), false) => return refused("No such process"),
                    _ => _ = self.routes.insert((subnet, hop.metric), hop),
                }
            }
            on_device => {
                let Some(found) = &mut self.device else { return refused("No such device") };
                match on_device {
                    Op::SetMac(mac) => {
                        found.device.mac = mac;
                        self.neighbours.clear();
                    }
                    Op::SetMtu(mtu) => found.device.mtu = mtu,
                    Op::SetAlias(alias) => found.device.alias = alias,
                    Op::SetChecksumOffload(on) => found.device.checksum_offload = Some(on),
                    Op::Release => found.is_port = false,
                    Op::SetUp => found.up = true,
                    Op::AddAddress(address) => found.addresses.push((address, full_len(address))),
                    Op::RemoveAddress(address, len) => {
                        found.addresses.retain(|known| *known != (address, len));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Applies a whole plan for `desired`; what is refused is left out.
    pub fn settle(&mut self, desired: &Desired) -> Vec<Refused> {
        let ops = plan(desired, &self.dump());
        ops.iter().filter_map(|op| self.apply(op).err()).collect()
    }

    /// Whether the tables hold exactly these entries.
    pub fn holds(&self, tables: &Tables) -> bool {
        let actual = self.dump();
        actual.fdb == tables.fdb.clone().into_iter().collect()
            && actual.neighbours == tables.neighbours
            && actual.routes == tables.routes.clone().into_iter().collect()
    }

    /// Where a packet to `subnet` goes: by the route of the lowest metric, its VTEP's neighbour entry, and
    /// the FDB entry of that MAC.
    pub fn forward(&self, subnet: IpNet) -> Option<(Mac, IpAddr)> {
        let mut routes = self.routes.range((subnet, 0)..=(subnet, u32::MAX));
        let Way::Overlay(vtep) = routes.next()?.1.way else { return None };
        let mac = self.neighbours.get(&vtep)?;
        self.fdb.iter().find(|(known, _)| known == mac).copied()
    }
}

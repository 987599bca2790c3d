//! Changes to the kernel: to the VXLAN device, and to entries.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::desired::{Device, Hop};
use crate::model::{Mac, Slot};

/// The changes that make the kernel equal to a desired state, those to the device first. All are idempotent:
/// "already exists" and "already gone" count as success.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The changes to the device.
    pub device: Vec<DeviceOp>,
    /// The changes to entries.
    pub entries: Vec<EntryOp>,
    /// The slots with entries of no known member that stay until the slot's owner is confirmed.
    pub retained: BTreeSet<Slot>,
}

/// One change of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A change to the VXLAN device.
    Device(DeviceOp),
    /// A change to an entry.
    Entry(EntryOp),
}

/// One change to the VXLAN device, its attributes or its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceOp {
    /// Delete the VXLAN device and, with it, all entries on it.
    DeleteDevice,
    /// Create the VXLAN device, down and without addresses.
    CreateDevice(Box<Device>),
    /// Set the device's MAC. The kernel then drops the device's neighbor entries.
    SetMac(Mac),
    /// Set the device's MTU in bytes.
    SetMtu(u32),
    /// Set the device's alias.
    SetAlias(String),
    /// Turn checksum offload of the device on or off.
    SetChecksumOffload(bool),
    /// Remove the device from the bridge or bond that it is a port of.
    Release,
    /// Set the interface up.
    SetUp,
    /// Add a single address (/32 or /128) to the device.
    AddAddress(IpAddr),
    /// Add the route of an address of the device to the table `local`.
    AddLocalRoute(IpAddr),
    /// Remove an address with this prefix length from the device.
    RemoveAddress(IpAddr, u8),
}

/// One change to an entry of the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryOp {
    /// Add or replace the FDB entry of a MAC.
    SetFdb(Mac, IpAddr),
    /// Add or replace a permanent neighbor entry.
    SetNeighbor(IpAddr, Mac),
    /// Add a neighbor entry that is not permanent; it releases packets that wait for the address.
    Resolve(IpAddr, Mac),
    /// Add a route, unless another program has one with the same destination and metric.
    AddRoute(IpNet, Hop),
    /// Replace a gossamer route with the same destination and metric.
    ReplaceRoute(IpNet, Hop),
    /// Remove a route.
    RemoveRoute(IpNet, Hop),
    /// Remove a neighbor entry.
    RemoveNeighbor(IpAddr),
    /// Remove an FDB entry.
    RemoveFdb(Mac, IpAddr),
}

impl Plan {
    /// Returns all changes in their order.
    pub fn into_ops(self) -> impl Iterator<Item = Op> {
        let entries = self.entries.into_iter().map(Op::Entry);
        self.device.into_iter().map(Op::Device).chain(entries)
    }
}

impl DeviceOp {
    /// Returns what the operation changes, as a label for counters.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::DeleteDevice | Self::CreateDevice(_) => "device",
            Self::SetMac(_)
            | Self::SetMtu(_)
            | Self::SetAlias(_)
            | Self::SetChecksumOffload(_)
            | Self::Release
            | Self::SetUp => "device attribute",
            Self::AddAddress(_) | Self::AddLocalRoute(_) | Self::RemoveAddress(..) => "address",
        }
    }
}

impl EntryOp {
    /// Returns what the operation changes, as a label for counters.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::SetFdb(..) | Self::RemoveFdb(..) => "FDB entry",
            Self::SetNeighbor(..) | Self::Resolve(..) | Self::RemoveNeighbor(_) => "neighbor",
            Self::AddRoute(..) | Self::ReplaceRoute(..) | Self::RemoveRoute(..) => "route",
        }
    }

    /// Whether the operation removes an entry.
    pub const fn is_removal(&self) -> bool {
        matches!(self, Self::RemoveRoute(..) | Self::RemoveNeighbor(_) | Self::RemoveFdb(..))
    }
}

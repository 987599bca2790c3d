//! Definitions of tables about pods.

use std::collections::BTreeSet;

use crate::{
    model::Problem,
    netlink::nftables::{Rule, sets::Elements},
    pods::desired::{Bridge, Tenant, Tenants},
};

/// The definition of a table.
pub struct Shape {
    /// Family of nftables.
    pub family: u8,
    /// Returns the table's name, given that of the overlay's device.
    pub name: fn(&str) -> String,
    /// Sets with the length of their elements in bytes, and their type as the `nft` program encodes
    /// it.
    pub sets: &'static [(&'static str, u32, u32)],
    /// A set whose elements match only up to this number of times per second.
    pub limited: Option<(&'static str, u64)>,
    /// The alarm of the table, if it has one.
    pub alarm: Option<Alarm>,
    /// Chains with their hooks and priorities.
    pub chains: &'static [(&'static str, u32, i32)],
    /// Returns chains and rules, from top to bottom.
    pub rules: fn(&Bridge) -> Vec<(&'static str, Rule)>,
    /// Returns the elements, given the bridge, its pods, and its foreign ports.
    pub elements: fn(&Bridge, &Tenants, &BTreeSet<String>) -> Elements,
    /// Returns the elements to remove with a pod's veth pair.
    pub leaving: fn(&Bridge, &str, &Tenant, &Elements) -> Elements,
    /// A set of veth pairs whose elements stay until the kernel has removed the interface.
    pub veths: Option<&'static str>,
    /// The consequence for new pods of a table that stays as it was; `None` if they pass it.
    pub stale: Option<&'static str>,
    /// The consequence of a missing table, and what the kernel needs for it.
    pub requirement: (&'static str, &'static str),
}

/// A chain that should count no packets, and the problem that is reported when it does.
pub struct Alarm {
    pub chain: &'static str,
    pub problem: fn(&Bridge) -> Problem,
}

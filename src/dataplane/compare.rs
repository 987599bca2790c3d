//! Compares the desired with the actual entries of the three tables, for display to operators.
//!
//! Pure. `plan` computes the operations that remove the differences.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use super::{
    desired::{Hop, RouteTarget, Tables},
    plan::Actual,
};
use crate::model::Mac;

/// The key by which the kernel identifies an entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// The destination of a route.
    Route(IpNet),
    /// The overlay address of a neighbor entry.
    Neighbor(IpAddr),
    /// The MAC of an FDB entry.
    Fdb(Mac),
}

/// The desired and the actual values of one key, as text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The desired value; `None` if no entry is wanted.
    pub wanted: Option<String>,
    /// The actual values. The kernel allows several entries of one key.
    pub found: Vec<String>,
}

/// The result of comparing one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel holds exactly the desired entry.
    Same,
    /// The kernel has no entry of this key.
    Missing,
    /// The kernel has another entry, or several of this key.
    Different,
    /// The kernel has an entry that is not wanted.
    Surplus,
}

impl Entry {
    /// Compares the desired with the actual values.
    pub fn verdict(&self) -> Verdict {
        match (&self.wanted, &self.found[..]) {
            (Some(wanted), [found]) if wanted == found => Verdict::Same,
            (Some(_), []) => Verdict::Missing,
            (Some(_), _) => Verdict::Different,
            (None, _) => Verdict::Surplus,
        }
    }
}

/// Returns every key that is desired or exists, with its values.
pub fn compare(wanted: &Tables, actual: &Actual) -> BTreeMap<Key, Entry> {
    let mut entries: BTreeMap<Key, Entry> = BTreeMap::new();
    let mut want = |key, value| entries.entry(key).or_default().wanted = Some(value);
    wanted.routes.iter().for_each(|(subnet, hop)| want(Key::Route(*subnet), hop_text(hop)));
    wanted.neighbors.iter().for_each(|(ip, mac)| want(Key::Neighbor(*ip), mac.to_string()));
    wanted.fdb.iter().for_each(|(mac, ip)| want(Key::Fdb(*mac), ip.to_string()));
    let mut find = |key, value| entries.entry(key).or_default().found.push(value);
    actual.routes.iter().for_each(|(subnet, hop)| find(Key::Route(*subnet), hop_text(hop)));
    actual.neighbors.iter().for_each(|(ip, mac)| find(Key::Neighbor(*ip), mac.to_string()));
    actual.fdb.iter().for_each(|(mac, ip)| find(Key::Fdb(*mac), ip.to_string()));
    entries
}

/// Formats a hop like `ip route`; the metric is left out.
fn hop_text(hop: &Hop) -> String {
    let way = match hop.way {
        RouteTarget::Overlay(gateway) => format!("via {gateway}"),
        RouteTarget::Direct { gateway, .. } => format!("via {gateway} on the underlay"),
        RouteTarget::Device => "on the device".to_owned(),
        RouteTarget::Unreachable => "unreachable".to_owned(),
    };
    hop.mtu.map_or_else(|| way.clone(), |mtu| format!("{way} mtu {mtu}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_told_apart() {
        let subnet = |n: u8| IpNet::new([10, 42, n, 0].into(), 24).expect("a subnet");
        let hop = |n: u8| Hop::new(RouteTarget::Overlay([10, 42, n, 0].into()), 0);
        let wanted =
            Tables { routes: [1, 2, 3].map(|n| (subnet(n), hop(n))).into(), ..Tables::default() };
        let actual = Actual {
            routes: [(subnet(1), hop(1)), (subnet(3), hop(9)), (subnet(4), hop(4))].into(),
            ..Actual::default()
        };
        let entries = compare(&wanted, &actual);
        let verdicts: Vec<Verdict> = entries.values().map(Entry::verdict).collect();
        let expected = [Verdict::Same, Verdict::Missing, Verdict::Different, Verdict::Surplus];
        assert_eq!(verdicts, expected);
    }
}

//! Shows the kernel's entries next to the desired ones.

use std::collections::BTreeMap;

use tokio::sync::oneshot::Sender;

use crate::{
    agent::{Agent, workers::programmer::Tables},
    api::{ApiError, KernelEntry},
    dataplane::compare::{Entry, Key, Verdict, compare},
};

impl Agent {
    /// Sends the comparison to `reply`. The kernel thread reads the tables between two of its tasks.
    pub(in crate::agent) fn show_routes(&self, reply: Sender<Result<Vec<KernelEntry>, ApiError>>) {
        let mut names: BTreeMap<Key, String> = BTreeMap::new();
        for (node, peer) in self.kernel.wanted.iter().flat_map(|view| &view.peers) {
            let name = self.node.name_of(*node);
            names.insert(Key::Fdb(peer.vtep.mac), name.to_owned());
            for subnet in peer.leases.iter().flat_map(|(_, subnets)| subnets.iter()) {
                names.insert(Key::Route(subnet), name.to_owned());
                names.insert(Key::Neighbor(subnet.network()), name.to_owned());
            }
        }
        self.programmer.read_tables(move |tables: Result<Tables, String>| {
            let _ = reply.send(tables.map_err(ApiError::from).map(|(wanted, actual)| {
                let entries = compare(&wanted, &actual);
                entries.into_iter().map(|(key, entry)| row(key, entry, &names)).collect()
            }));
        });
    }
}

fn row(key: Key, entry: Entry, names: &BTreeMap<Key, String>) -> KernelEntry {
    let (table, text) = match key {
        Key::Route(subnet) => ("route", subnet.to_string()),
        Key::Neighbor(ip) => ("neighbor", ip.to_string()),
        Key::Fdb(mac) => ("fdb", mac.to_string()),
    };
    let verdict = match entry.verdict() {
        Verdict::Same => "same",
        Verdict::Missing => "missing",
        Verdict::Different => "different",
        Verdict::Surplus => "surplus",
    };
    let (peer, Entry { wanted, found }) = (names.get(&key).cloned(), entry);
    let (table, verdict) = (table.to_owned(), verdict.to_owned());
    KernelEntry { table, key: text, peer, wanted, found, verdict }
}

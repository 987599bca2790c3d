//! Shows the kernel's entries next to the desired ones.

use std::collections::BTreeMap;

use tokio::sync::oneshot::Sender;

use crate::{
    agent::{Agent, workers::programmer::Tables},
    api::{ApiError, EntryVerdict, KernelEntry},
    dataplane::compare::{Entry, Key, Verdict, compare},
    model::NodeId,
};

impl Agent {
    /// Sends the comparison to `reply`. The kernel thread reads the tables between two of its tasks.
    pub(in crate::agent) fn show_routes(&self, reply: Sender<Result<Vec<KernelEntry>, ApiError>>) {
        let mut peers: BTreeMap<Key, (NodeId, String)> = BTreeMap::new();
        for (node, peer) in self.kernel.wanted.view.iter().flat_map(|view| &view.peers) {
            let named = || (*node, self.node.name_of(*node).to_owned());
            peers.insert(Key::Fdb(peer.vtep.mac), named());
            for subnet in peer.leases.iter().flat_map(|(_, subnets)| subnets.iter()) {
                peers.insert(Key::Route(subnet), named());
                peers.insert(Key::Neighbor(subnet.network()), named());
            }
        }
        self.threads.programmer.read_tables(move |tables: Result<Tables, String>| {
            let _ = reply.send(tables.map_err(ApiError::from).map(|(wanted, actual)| {
                let entries = compare(&wanted, &actual);
                entries.into_iter().map(|(key, entry)| row(key, entry, &peers)).collect()
            }));
        });
    }
}

fn row(key: Key, entry: Entry, peers: &BTreeMap<Key, (NodeId, String)>) -> KernelEntry {
    let (table, text) = match key {
        Key::Route(subnet) => ("route", subnet.to_string()),
        Key::Neighbor(ip) => ("neighbor", ip.to_string()),
        Key::Fdb(mac) => ("fdb", mac.to_string()),
    };
    let verdict = match entry.verdict() {
        Verdict::Same => EntryVerdict::Same,
        Verdict::Missing => EntryVerdict::Missing,
        Verdict::Different => EntryVerdict::Different,
        Verdict::Surplus => EntryVerdict::Surplus,
    };
    let Entry { wanted, found } = entry;
    let (node, peer) = peers.get(&key).cloned().unzip();
    KernelEntry { table: table.to_owned(), key: text, node, peer, wanted, found, verdict }
}

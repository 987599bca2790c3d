//! Model check: visits every reachable state of a small cluster that uses the production table: three nodes,
//! three slots.
//!
//! The network is the set of all tables ever sent. Each may arrive at any node, any number of times, at any
//! time, or never. A crash resets a node to its last flushed table; it then grants nothing until it has
//! compared its state with another node. In no reachable state do two records of one slot and epoch differ,
//! and in none do two nodes lease one slot according to their disks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Grant, SlotTable, state_hash};
use crate::{
    model::{NodeId, Pool, PoolSpec, Run, SlotState},
    wire::Record,
};

const NODES: usize = 3;
/// Limits of grants and crashes on one path; they bound the search.
const MAX_GRANTS: u8 = 3;
const MAX_CRASHES: u8 = 1;

#[derive(Clone)]
struct Node {
    table: SlotTable,
    disk: SlotTable,
    /// True from a crash until the node has compared its state with another.
    is_unverified: bool,
}

#[derive(Clone)]
struct State {
    nodes: Vec<Node>,
    /// All tables ever sent, by their encoding; none is ever lost.
    sent: BTreeMap<Vec<u8>, Vec<Run>>,
    grants: u8,
    crashes: u8,
}

/// Rules that can be switched off, to show that the search detects it.
#[derive(Clone, Copy)]
struct Rules {
    flush_first: bool,
    raise_epoch: bool,
}

fn id(node: usize) -> NodeId {
    NodeId::of_public_key(&[node as u8; 32])
}

fn pool() -> Pool {
    let spec =
        PoolSpec { subnet_len: Some(26), ..PoolSpec::of("10.42.0.0/24".parse().expect("network")) };
    Pool::new(&spec).expect("pool")
}

impl State {
    fn first() -> Self {
        let mut created = SlotTable::created_by(pool(), id(0));
        created.lease_own(id(0), None);
        let creator = Node { table: created.clone(), disk: created, is_unverified: false };
        let empty = SlotTable::empty(pool());
        let non_member = Node { table: empty.clone(), disk: empty, is_unverified: false };
        let nodes = vec![creator, non_member.clone(), non_member];
        Self { nodes, sent: BTreeMap::new(), grants: 0, crashes: 0 }
    }

    /// Returns a key that is unique per state.
    fn key(&self) -> Vec<u8> {
        let mut key = vec![self.grants, self.crashes];
        for node in &self.nodes {
            for table in [&node.table, &node.disk] {
                key.extend(Record::Slots(table.runs().to_vec()).encode());
            }
            key.push(u8::from(node.is_unverified));
        }
        key.extend(self.sent.keys().flatten());
        key
    }

    fn send(&mut self, runs: &[Run]) {
        self.sent.insert(Record::Slots(runs.to_vec()).encode(), runs.to_vec());
    }

    fn next_states(&self, rules: Rules) -> Vec<Self> {
        let mut next = Vec::new();
        let mut step = |change: &dyn Fn(&mut Self)| {
            let mut state = self.clone();
            change(&mut state);
            next.push(state);
        };
        for node in 0..NODES {
            step(&|state| {
                // All changes are flushed before they are sent.
                state.nodes[node].disk = state.nodes[node].table.clone();
                let runs = state.nodes[node].disk.runs().to_vec();
                state.send(&runs);
            });
            if self.crashes < MAX_CRASHES {
                step(&|state| {
                    state.nodes[node].table = state.nodes[node].disk.clone();
                    state.nodes[node].is_unverified = true;
                    state.crashes += 1;
                });
            }
            for runs in self.sent.values() {
                step(&|state| {
                    state.nodes[node].table.merge(runs);
                });
            }
            for other in (0..NODES).filter(|other| *other != node) {
                step(&|state| {
                    let theirs = state.nodes[other].disk.runs().to_vec();
                    state.nodes[node].table.merge(&theirs);
                    state.nodes[node].is_unverified = false;
                });
                if self.grants < MAX_GRANTS && !self.nodes[node].is_unverified {
                    step(&|state| state.grant(node, other, rules));
                }
            }
        }
        next
    }

    fn grant(&mut self, node: usize, to: usize, rules: Rules) {
        self.grants += 1;
        let table = &mut self.nodes[node].table;
        let Ok(Grant::New(changes)) = table.grant(id(node), id(to), None) else { return };
        let mut runs: Vec<Run> = changes.iter().map(|(run, _)| *run).collect();
        if !rules.raise_epoch {
            for run in &mut runs {
                run.record.epoch -= 1;
                table.set(*run);
            }
        }
        if !rules.flush_first {
            self.send(&runs);
        }
    }

    fn is_safe(&self) -> bool {
        let disks = self.nodes.iter().map(|node| node.disk.runs());
        let all = self.sent.values().map(Vec::as_slice).chain(disks).flatten();
        let records: BTreeSet<_> =
            all.flat_map(|run| run.slots().map(|slot| (slot, run.record))).collect();
        let mut known = BTreeSet::new();
        let one_record_per_epoch =
            records.iter().all(|(slot, record)| known.insert((*slot, record.epoch)));
        let mut used = BTreeSet::new();
        let one_owner_per_slot = self.nodes.iter().enumerate().all(|(number, node)| {
            let own = |run: &&Run| {
                run.record.owner == id(number) && run.record.state == SlotState::Leased
            };
            node.disk.runs().iter().filter(own).flat_map(Run::slots).all(|slot| used.insert(slot))
        });
        one_record_per_epoch && one_owner_per_slot
    }
}

/// Visits all reachable states. Returns how many it found and whether all of them are safe; stops at an
/// unsafe one.
fn explore(rules: Rules) -> (usize, bool) {
    let first = State::first();
    let mut seen = BTreeSet::from([state_hash(&first.key())]);
    let mut queue = VecDeque::from([first]);
    while let Some(state) = queue.pop_front() {
        if !state.is_safe() {
            return (seen.len(), false);
        }
        let next = state.next_states(rules).into_iter();
        queue.extend(next.filter(|next| seen.insert(state_hash(&next.key()))));
    }
    (seen.len(), true)
}

#[test]
fn reachable_states_never_have_two_owners_of_a_slot() {
    let (states, safe) = explore(Rules { flush_first: true, raise_epoch: true });
    println!("{states} states");
    assert!(safe && states > 1_000, "{states} states");
}

#[test]
fn search_without_a_rule_finds_an_unsafe_state() {
    assert!(!explore(Rules { flush_first: false, raise_epoch: true }).1);
    assert!(!explore(Rules { flush_first: true, raise_epoch: false }).1);
}

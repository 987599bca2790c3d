//! The neighborhood: the ring neighbors, which a node probes, pushes to and compares with.
//!
//! The active members form several rings. Each ring orders them by another hash of their ids. A node's
//! neighbors are its successor and its predecessor on each ring, so every node has the same small number
//! of neighbors in a cluster of any size, and a member that joins or ends changes the neighborhoods of
//! those next to it only. Such a graph is random and regular: it stays connected when many of its nodes
//! fail, and any member is a few hops away (Rapid, USENIX ATC 2018, uses the same rings).
//!
//! A member is met once a message of it has arrived, which proves its key and that it runs. Anyone with
//! the secret can name members that do not exist, and choose their places on the rings. So next to a
//! neighbor that this node has not met, the nearest member that it has met is a neighbor as well.
//!
//! The neighbors on the first two rings are the relays: they pass on facts of other members to each
//! other. Each of these rings alone connects all members, and both together do so in few hops.
//!
//! Nodes with different views have different neighborhoods. No rule depends on their agreement.

use std::collections::BTreeSet;

use rand::{Rng, seq::IteratorRandom as _};

use crate::model::NodeId;

use super::rank::ring_position;

/// Number of rings. Each adds two neighbors.
const RINGS: usize = 4;
/// Number of rings on which facts of other members are passed on.
const RELAY_RINGS: usize = 2;

type Rings = [BTreeSet<(u64, NodeId)>; RINGS];

/// The rings of the active members, and the neighbors of one of them.
#[derive(Clone, Debug)]
pub(super) struct Neighborhood {
    me: NodeId,
    /// The members with their positions.
    rings: Rings,
    /// Those that this node has met, and itself.
    met: Rings,
    neighbors: BTreeSet<NodeId>,
    relays: BTreeSet<NodeId>,
}

impl Neighborhood {
    /// Returns the neighborhood of a node that knows no other member.
    pub(super) fn new(me: NodeId) -> Self {
        let mut rings = Rings::default();
        insert(&mut rings, me);
        Self { me, met: rings.clone(), rings, neighbors: BTreeSet::new(), relays: BTreeSet::new() }
    }

    /// Adds a member.
    pub(super) fn insert(&mut self, node: NodeId) {
        insert(&mut self.rings, node);
        self.update();
    }

    /// Notes that a message of a node has arrived. Nothing changes if it is no member.
    pub(super) fn meet(&mut self, node: NodeId) {
        let place = (ring_position(0, node), node);
        if self.rings[0].contains(&place) && !self.met[0].contains(&place) {
            insert(&mut self.met, node);
            self.update();
        }
    }

    /// Removes a member. This node itself stays.
    pub(super) fn remove(&mut self, node: NodeId) {
        if node == self.me {
            return;
        }
        for rings in [&mut self.rings, &mut self.met] {
            for (number, ring) in rings.iter_mut().enumerate() {
                ring.remove(&(ring_position(number, node), node));
            }
        }
        self.update();
    }

    /// Returns the neighbors in order of their ids.
    pub(super) const fn neighbors(&self) -> &BTreeSet<NodeId> {
        &self.neighbors
    }

    /// Returns the relays in order of their ids. All of them are neighbors.
    pub(super) const fn relays(&self) -> &BTreeSet<NodeId> {
        &self.relays
    }

    /// Returns a random neighbor that is not `excluded`.
    pub(super) fn choose(&self, rng: &mut impl Rng, excluded: Option<NodeId>) -> Option<NodeId> {
        self.neighbors.iter().copied().filter(|node| Some(*node) != excluded).choose(rng)
    }

    fn update(&mut self) {
        let me = self.me;
        self.neighbors.clear();
        self.relays.clear();
        for (number, (all, met)) in self.rings.iter().zip(&self.met).enumerate() {
            let here = (ring_position(number, me), me);
            // Equal if the adjacent members are met.
            let adjacent = adjacent(all, here).chain(adjacent(met, here));
            let adjacent = adjacent.filter(|node| *node != me);
            if number < RELAY_RINGS {
                self.relays.extend(adjacent.clone());
            }
            self.neighbors.extend(adjacent);
        }
    }
}

fn insert(rings: &mut Rings, node: NodeId) {
    for (number, ring) in rings.iter_mut().enumerate() {
        ring.insert((ring_position(number, node), node));
    }
}

/// Returns the successor and the predecessor of a place on a ring.
fn adjacent(
    ring: &BTreeSet<(u64, NodeId)>,
    here: (u64, NodeId),
) -> impl Iterator<Item = NodeId> + Clone {
    let successor = ring.range(here..).nth(1).or_else(|| ring.first());
    let predecessor = ring.range(..here).next_back().or_else(|| ring.last());
    successor.into_iter().chain(predecessor).map(|(_, node)| *node)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MAX_NEIGHBORS: usize = 2 * RINGS;

    fn nodes(count: u32) -> Vec<NodeId> {
        let node = |number: u32| {
            let mut key = [7; 32];
            key[..4].copy_from_slice(&number.to_le_bytes());
            NodeId::of_public_key(&key)
        };
        (0..count).map(node).collect()
    }

    fn graph(nodes: &[NodeId]) -> BTreeMap<NodeId, Neighborhood> {
        let of = |me: &NodeId| {
            let mut neighborhood = Neighborhood::new(*me);
            nodes.iter().for_each(|node| neighborhood.insert(*node));
            (*me, neighborhood)
        };
        nodes.iter().map(of).collect()
    }

    /// Returns the number of hops from `start` to the farthest of `among`; `None` if one is not reachable.
    fn hops(
        graph: &BTreeMap<NodeId, Neighborhood>,
        links: fn(&Neighborhood) -> &BTreeSet<NodeId>,
        among: &[NodeId],
    ) -> Option<usize> {
        let mut reached = BTreeSet::from([among[0]]);
        for hop in 0.. {
            if reached.len() == among.len() {
                return Some(hop);
            }
            let next = reached.iter().flat_map(|node| links(&graph[node]));
            let next: BTreeSet<NodeId> =
                next.filter(|node| among.contains(node)).copied().collect();
            let before = reached.len();
            reached.extend(next);
            if reached.len() == before {
                return None;
            }
        }
        None
    }

    #[test]
    fn neighborhood_is_mutual_bounded_and_spans_the_cluster() {
        for (count, most_hops, most_relayed) in
            [(2, 1, 1), (3, 1, 1), (10, 2, 3), (100, 4, 6), (500, 5, 8)]
        {
            let nodes = nodes(count);
            let graph = graph(&nodes);
            for (node, neighborhood) in &graph {
                assert!((1..=MAX_NEIGHBORS).contains(&neighborhood.neighbors().len()));
                assert!(!neighborhood.neighbors().contains(node));
                for other in neighborhood.neighbors() {
                    assert!(graph[other].neighbors().contains(node), "not mutual");
                }
            }
            let direct = hops(&graph, Neighborhood::neighbors, &nodes).expect("connected");
            assert!(direct <= most_hops, "{count} members: {direct} hops");
            let relayed = hops(&graph, Neighborhood::relays, &nodes).expect("connected");
            assert!(relayed <= most_relayed, "{count} members: {relayed} hops by relays");
        }
    }

    #[test]
    fn met_members_stay_neighbors_behind_members_that_were_never_met() {
        let nodes = nodes(1_000);
        let (real, invented) = nodes.split_at(50);
        let real_graph = graph(real);
        for (me, among_real) in &real_graph {
            let mut neighborhood = among_real.clone();
            real.iter().for_each(|node| neighborhood.meet(*node));
            assert_eq!(neighborhood.neighbors(), among_real.neighbors());
            invented.iter().for_each(|node| neighborhood.insert(*node));
            assert!(among_real.neighbors().is_subset(neighborhood.neighbors()), "{me}");
            assert!(neighborhood.neighbors().len() <= 2 * MAX_NEIGHBORS);
            invented.iter().for_each(|node| neighborhood.remove(*node));
            assert_eq!(neighborhood.neighbors(), among_real.neighbors());
        }
    }

    #[test]
    fn graph_stays_connected_without_a_fifth_of_its_members() {
        let nodes = nodes(200);
        let living: Vec<NodeId> = nodes.iter().copied().skip(40).collect();
        assert!(hops(&graph(&nodes), Neighborhood::neighbors, &living).is_some());
    }

    #[test]
    fn member_that_joins_and_ends_changes_few_neighborhoods_and_leaves_no_trace() {
        let nodes = nodes(201);
        let (others, joiner) = (&nodes[..200], nodes[200]);
        let before = graph(others);
        let after = graph(&nodes);
        let has_changed = |node: &&NodeId| before[node].neighbors() != after[node].neighbors();
        let changed = others.iter().filter(has_changed).count();
        assert!(changed <= MAX_NEIGHBORS, "{changed}");
        for node in others {
            let mut neighborhood = after[node].clone();
            neighborhood.remove(joiner);
            assert_eq!(neighborhood.neighbors(), before[node].neighbors());
        }
    }
}

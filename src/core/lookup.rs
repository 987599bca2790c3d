//! Finds the member that an operator means, and names members so that a command finds them again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use crate::model::{MemberRecord, NodeId, NodeName};

use super::{CannotForget, Liveness, Node};

/// Separates a name and the beginning of an id in a label.
const LABEL_SEPARATOR: char = '~';
/// Limit of members that the answer to an ambiguous name lists.
const MAX_CHOICES: usize = 5;
/// Fewest digits of an id that stand for it.
const MIN_ID_DIGITS: usize = 4;

/// Members that were seen to be followed by a later identity of the same host, each with the latest one. It
/// outlives the end of that one's agent, after which gossip cannot tell the two apart.
pub(super) type Successions = BTreeMap<NodeId, NodeId>;

/// Labels of all members. Making them takes one pass over the directory, and a label takes no other pass: a
/// member may invent as many others of one name as the directory holds.
pub struct Labels<'a> {
    node: &'a Node,
    by_name: BTreeMap<&'a str, Namesakes>,
    opinions: BTreeMap<NodeId, Liveness>,
    /// Members that are earlier identities of living ones, or of ones that were alive after them.
    former: BTreeSet<NodeId>,
    /// Members that are not gone and that gossip does not consider down, by their host.
    active: BTreeMap<(&'a NodeName, SocketAddr), Vec<NodeId>>,
}

/// Members of one name.
#[derive(Default)]
struct Namesakes {
    all: usize,
    /// Those that are neither gone nor earlier identities of living members.
    present: usize,
}

impl Node {
    /// Returns the one member with this name, label (`name~digits`), id, beginning of an id, or address.
    /// Of several, those that were forgotten and earlier identities of living members do not count.
    pub(super) fn member_named(&self, whom: &str) -> Result<NodeId, CannotForget> {
        let by_name = |record: &MemberRecord| record.name.as_str() == whom;
        let by_id = |record: &MemberRecord| record.node.to_string() == whom;
        let by_label = |record: &MemberRecord| {
            whom.rsplit_once(LABEL_SEPARATOR).is_some_and(|(name, digits)| {
                record.name.as_str() == name && record.node.to_string().starts_with(digits)
            })
        };
        let is_id_part = whom.len() >= MIN_ID_DIGITS;
        let by_id_part =
            |record: &MemberRecord| is_id_part && record.node.to_string().starts_with(whom);
        let ip: Option<IpAddr> = whom.parse().ok();
        let by_address = |record: &MemberRecord| {
            ip.is_some_and(|ip| record.address.ip() == ip || record.vtep.underlay == ip)
        };
        let ways: [&dyn Fn(&MemberRecord) -> bool; 4] =
            [&|record| by_name(record) || by_id(record), &by_label, &by_id_part, &by_address];
        for matches in ways {
            let mut found: BTreeSet<NodeId> = self
                .replica
                .directory
                .iter()
                .filter(|record| !record.has_left() && matches(record))
                .map(|record| record.node)
                .collect();
            if found.len() > 1 {
                found.retain(|node| self.replica.directory.forgotten(*node).is_none());
            }
            if found.len() > 1 {
                let labels = self.labels();
                found.retain(|node| !labels.is_former_self(*node));
            }
            let mut found = found.into_iter();
            match (found.next(), found.next()) {
                (None, _) => {}
                (Some(node), None) if node == self.replica.me.node => {
                    return Err(CannotForget::Myself);
                }
                (Some(node), None) => return Ok(node),
                (Some(one), Some(other)) => {
                    let all = [one, other].into_iter().chain(found);
                    let labels = self.labels();
                    let all: Vec<NodeId> = all.collect();
                    let named = all.iter().take(MAX_CHOICES);
                    let mut choices: Vec<String> = named.map(|node| labels.choice(*node)).collect();
                    if let more @ 1.. = all.len().saturating_sub(MAX_CHOICES) {
                        choices.push(format!("and {more} more"));
                    }
                    let (count, whom) = (all.len(), whom.to_owned());
                    return Err(CannotForget::Ambiguous(count, whom, choices.join(", ")));
                }
            }
        }
        let referenced = whom.parse().ok().filter(|node| self.replica.is_referenced(*node));
        referenced.ok_or_else(|| CannotForget::Unknown(whom.to_owned()))
    }

    /// Returns the member with this name, label (`name~digits`), id, beginning of an id, or address; it may
    /// be this node.
    ///
    /// # Errors
    /// Fails if no member or several members match.
    pub fn find(&self, whom: &str) -> Result<NodeId, String> {
        match self.member_named(whom) {
            Err(CannotForget::Myself) => Ok(self.replica.me.node),
            Err(CannotForget::Unknown(_)) if self.replica.cluster_state.is_none() => {
                Err(CannotForget::NoCluster.to_string())
            }
            found => found.map_err(|error| error.to_string()),
        }
    }

    /// Records which identity of a host is the latest one, after this one went up or down.
    pub(super) fn note_succession(&mut self, changed: NodeId) {
        let Some(record) = self.replica.directory.get(changed) else { return };
        let is_same = |other: &&MemberRecord| other.host() == record.host();
        let same = self.replica.directory.iter().filter(is_same).map(|other| other.node);
        let others: Vec<NodeId> = same.filter(|other| *other != changed).collect();
        let latest = match self.membership.is_active(changed) {
            true => Some(changed),
            false => others.iter().copied().find(|other| self.membership.is_active(*other)),
        };
        let Some(latest) = latest.filter(|_| !others.is_empty()) else { return };
        self.successions.remove(&latest);
        let earlier = others.into_iter().chain([changed]).filter(|other| *other != latest);
        self.successions.extend(earlier.map(|other| (other, latest)));
    }

    /// Returns whether a later identity of the member's host was seen and is still a member.
    fn is_succeeded(&self, record: &MemberRecord) -> bool {
        let latest = self.successions.get(&record.node);
        let latest = latest.and_then(|latest| self.replica.directory.get(*latest));
        latest.is_some_and(|latest| {
            latest.host() == record.host() && !self.replica.is_gone(latest.node)
        })
    }

    /// Returns the label of a member, see [`Labels::of`]. It takes a pass over all members.
    pub fn label(&self, node: NodeId) -> String {
        self.labels().of(node)
    }

    /// Returns the labels of all members, for many uses at once.
    pub fn labels(&self) -> Labels<'_> {
        let opinions = self.membership.opinions();
        let is = |node: NodeId, liveness| opinions.get(&node) == Some(&liveness);
        let is_alive = |node| node == self.replica.me.node || is(node, Liveness::Alive);
        let mut by_name: BTreeMap<&str, Namesakes> = BTreeMap::new();
        let mut active: BTreeMap<_, Vec<NodeId>> = BTreeMap::new();
        let mut alive = BTreeSet::new();
        for record in self.replica.directory.iter() {
            let same = by_name.entry(record.name.as_str()).or_default();
            same.all += 1;
            if !self.replica.is_gone(record.node) {
                same.present += 1;
                if is_alive(record.node) {
                    alive.insert(record.host());
                }
                if record.node == self.replica.me.node || self.membership.is_active(record.node) {
                    active.entry(record.host()).or_default().push(record.node);
                }
            }
        }
        let mut former = BTreeSet::new();
        for record in self.replica.directory.iter() {
            let answers = is_alive(record.node) || is(record.node, Liveness::Suspect);
            if answers || self.replica.is_gone(record.node) {
                continue;
            }
            if alive.contains(&record.host()) || self.is_succeeded(record) {
                by_name.entry(record.name.as_str()).or_default().present -= 1;
                former.insert(record.node);
            }
        }
        Labels { node: self, by_name, opinions, former, active }
    }
}

impl Labels<'_> {
    /// Returns the state of each member according to gossip.
    pub const fn opinions(&self) -> &BTreeMap<NodeId, Liveness> {
        &self.opinions
    }

    /// Returns the members that are earlier identities of living ones, or of ones that were alive after them.
    pub const fn former_selves(&self) -> &BTreeSet<NodeId> {
        &self.former
    }

    /// Returns the member that is the same host as another one, installed again, if gossip does not consider
    /// it down. Gossip may not have judged the earlier one yet; once it considers that one down, it is one of
    /// the [`Self::former_selves`].
    pub fn living_namesake(&self, node: NodeId) -> Option<NodeId> {
        let record = self.node.replica.directory.get(node)?;
        self.active.get(&record.host())?.iter().copied().find(|other| *other != node)
    }

    /// Returns whether a member is an earlier identity of another one: it does not answer, and a member that
    /// is alive, or was so later, has its name and its address.
    pub(super) fn is_former_self(&self, node: NodeId) -> bool {
        self.former.contains(&node)
    }

    /// Returns a label with the member's state.
    fn choice(&self, node: NodeId) -> String {
        let state = match self.opinions.get(&node) {
            _ if node == self.node.replica.me.node => "this node",
            Some(Liveness::Alive) => "alive",
            Some(Liveness::Suspect) => "suspect",
            Some(Liveness::Down) => "down",
            None => "unknown",
        };
        format!("{} ({state})", self.of(node))
    }

    /// Returns a name that every command understands: the member's name; with the beginning of its id if the
    /// name alone stands for another member; or its id if the name is not known.
    pub fn of(&self, node: NodeId) -> String {
        let directory = &self.node.replica.directory;
        let Some(record) = directory.get(node) else { return node.to_string() };
        let name = record.name.as_str();
        let is_past = self.node.replica.is_gone(node) || self.is_former_self(node);
        let rivals = self.by_name.get(name).map_or(0, |same| match is_past {
            true => same.all - 1,
            false => same.present - 1,
        });
        if rivals == 0 {
            return name.to_owned();
        }
        let id = node.to_string();
        let shared = |other: &MemberRecord| {
            let other = other.node.to_string();
            id.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count()
        };
        let neighbors = directory.neighbors(node);
        let digits = neighbors.map(|other| shared(other) + 1).max().unwrap_or(0).max(MIN_ID_DIGITS);
        format!("{name}{LABEL_SEPARATOR}{}", id.get(..digits).unwrap_or(&id))
    }
}

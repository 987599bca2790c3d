//! Texts about packets that are lost between pods of this host and pods of other hosts.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    agent::Agent,
    api::{CheckState, CheckStatus},
    dataplane::forwarding::{
        Half, InwardWay, RemoteLoss, RemoteWay,
        remote::message::{Kind, REMOTE_PORT, Sort},
    },
    model::{NodeId, PathState, Problem, ProblemCode, family_name},
};

/// Maximum number of peers named in one text.
const NAMED: usize = 3;

impl Agent {
    /// Adds the results for pods of other hosts to the status of forwarding.
    pub(in crate::agent) fn add_remote_pods_status(&self, known: CheckStatus) -> CheckStatus {
        let CheckStatus { state, mut detail } = known;
        if !self.kernel.diagnoses.remote_pods.overrun.is_empty() {
            let names = self.names(&self.kernel.diagnoses.remote_pods.overrun);
            detail = format!(
                "{detail}; skipped with pods of {names}: more packets come to port {REMOTE_PORT} of the \
                 agent's own pod there than it answers"
            );
        }
        let unheard = self.members_without_arrivals().into_values().flatten();
        let nodes: Vec<NodeId> = self.lost_to_remote_pods().into_keys().chain(unheard).collect();
        match (nodes.as_slice(), self.kernel.diagnoses.remote_pods.answering.len()) {
            ([], 0) => CheckStatus { state, detail },
            ([], count) => {
                let hosts =
                    if count == 1 { "of 1 other host" } else { &format!("of {count} other hosts") };
                CheckStatus { state, detail: format!("{detail}; pods {hosts} answer") }
            }
            (nodes, _) => CheckStatus {
                state: CheckState::Failing,
                detail: format!("{detail}; lost to or from pods of {}", self.names(nodes)),
            },
        }
    }

    /// Returns the problems about packets that do not reach pods of other hosts, or whose answers do not
    /// return. Peers with the same losses share a problem.
    pub(in crate::agent) fn remote_pod_problems(&self) -> Vec<Problem> {
        let mut alike: BTreeMap<Vec<(Half, Sort)>, Vec<NodeId>> = BTreeMap::new();
        for (node, lost) in self.lost_to_remote_pods() {
            alike.entry(lost).or_default().push(node);
        }
        let suspects = self.kernel.diagnoses.forwarding.suspects.join("; ");
        let of_peers = |(lost, nodes): (Vec<(Half, Sort)>, Vec<NodeId>)| {
            let of = |half| {
                let sorts = lost.iter().filter(move |(of, _)| *of == half).map(|(_, sort)| *sort);
                sorts.collect::<Vec<Sort>>()
            };
            problem(&self.names(&nodes), &of(Half::There), &of(Half::Back), &suspects)
        };
        let of_trials = alike.into_iter().map(of_peers);
        let of_members = self
            .members_without_arrivals()
            .into_iter()
            .map(|(families, nodes)| inward_problem(&self.names(&nodes), &families, &suspects));
        of_trials.chain(of_members).collect()
    }

    /// Returns the members whose packets do not arrive at pods here, by family. Excludes members to which
    /// this host's own trials or probes find losses: the cause is the same.
    fn members_without_arrivals(&self) -> BTreeMap<Vec<&'static str>, Vec<NodeId>> {
        if self.kernel.diagnoses.remote_pods.inward.is_empty() {
            return BTreeMap::new();
        }
        let answering = &self.kernel.diagnoses.remote_pods.answering;
        let mut known: BTreeSet<NodeId> = self.lost_to_remote_pods().into_keys().collect();
        let lost = self.path_states().filter(|(_, state, _)| state.is_lost());
        known.extend(lost.map(|(node, ..)| node).filter(|node| !answering.contains(node)));
        let mut families: BTreeMap<NodeId, Vec<&str>> = BTreeMap::new();
        for InwardWay { node, ipv4 } in self.kernel.diagnoses.remote_pods.inward.iter().rev() {
            if !known.contains(node) {
                families.entry(*node).or_default().push(family_name(*ipv4));
            }
        }
        let mut alike: BTreeMap<Vec<&str>, Vec<NodeId>> = BTreeMap::new();
        for (node, families) in families {
            alike.entry(families).or_default().push(node);
        }
        alike
    }

    /// Returns the notices about packets of which a part is lost at random, with the share and the
    /// direction.
    pub(in crate::agent) fn remote_pod_notices(&self) -> Vec<Problem> {
        let tried = self.kernel.diagnoses.remote_pods.answering.len();
        let of = |half: Half| {
            let losses =
                self.kernel.diagnoses.remote_pods.losses.iter().filter(|loss| loss.half == half);
            let losses: Vec<RemoteLoss> = losses.copied().collect();
            let (least, most) = losses.iter().fold((u32::MAX, 0), |(least, most), loss| {
                (least.min(loss.percent), most.max(loss.percent))
            });
            let nodes: Vec<NodeId> = losses.iter().map(|loss| loss.node).collect();
            let is_all = nodes.len() > 1 && nodes.len() >= tried;
            let share = if least == most { most.to_string() } else { format!("{least} to {most}") };
            let link = &self.underlay.name;
            (!nodes.is_empty())
                .then(|| loss_notice(half, &self.names(&nodes), &share, link, is_all))
        };
        [Half::There, Half::Back].into_iter().filter_map(of).collect()
    }

    /// Returns what is lost to or from the pods of each peer. Excludes peers that receive nothing,
    /// because the status of the path reports those, and large packets while the path MTU is being
    /// measured.
    fn lost_to_remote_pods(&self) -> BTreeMap<NodeId, Vec<(Half, Sort)>> {
        let answering = &self.kernel.diagnoses.remote_pods.answering;
        let unanswered: BTreeSet<NodeId> = self
            .path_states()
            .filter(|(node, state, _)| {
                let is_lost = matches!(state, PathState::Unanswered | PathState::OneWay);
                is_lost && !answering.contains(node)
            })
            .map(|(node, ..)| node)
            .collect();
        let mut lost = by_node(&self.kernel.diagnoses.remote_pods.closed);
        for (node, lost) in &mut lost {
            let is_measured = self.prober.paths.is_measuring_size(*node);
            lost.retain(|(_, sort)| !(is_measured && sort.kind.is_large()));
        }
        lost.retain(|node, lost| {
            !unanswered.contains(node) && !lost.is_empty() && self.silent_span(*node).is_none()
        });
        lost
    }

    /// Joins the names of the first [`NAMED`] peers and the number of the others.
    fn names(&self, nodes: &[NodeId]) -> String {
        let labels = self.node.labels();
        let mut named: Vec<String> =
            nodes.iter().take(NAMED).map(|node| labels.of(*node)).collect();
        if let more @ 1.. = nodes.len().saturating_sub(NAMED) {
            named.push(format!("{more} more hosts"));
        }
        match named.split_last() {
            Some((last, others @ [_, ..])) => format!("{} and {last}", others.join(", ")),
            _ => named.join(""),
        }
    }
}

fn by_node(closed: &[RemoteWay]) -> BTreeMap<NodeId, Vec<(Half, Sort)>> {
    let mut lost: BTreeMap<NodeId, Vec<(Half, Sort)>> = BTreeMap::new();
    for RemoteWay { node, half, sort } in closed {
        lost.entry(*node).or_default().push((*half, *sort));
    }
    lost
}

fn problem(names: &str, there: &[Sort], back: &[Sort], suspects: &str) -> Problem {
    let seen = match (there, back) {
        (there, []) => {
            format!("packets of pods here do not arrive at pods of {names} ({})", list(there))
        }
        ([], back) => format!(
            "packets of pods here arrive at pods of {names}, and their answers do not come back ({})",
            list(back)
        ),
        (there, back) => format!(
            "packets of pods here do not arrive at pods of {names} ({}), and answers do not come back ({})",
            list(there),
            list(back)
        ),
    };
    let others = format!("{names} (there: gossamer status) or the network between");
    let fix = match suspects {
        "" => format!(
            "check nft list ruleset here as well as on {others}. This host's own tests found no loss \
             here, and none of its rules seems to drop them. The tests do not detect rules about \
             established connections, or rules that change packets (TTL, NFQUEUE)"
        ),
        suspects => format!("{suspects}; if it is none of that, check {others}"),
    };
    Problem::new(ProblemCode::RemotePods, names, seen, fix)
}

fn inward_problem(names: &str, families: &[&str], suspects: &str) -> Problem {
    let seen = format!(
        "packets of pods of {names} do not arrive at pods here ({}), as tests from there show",
        families.join("; ")
    );
    let others = format!("{names} (there: gossamer status) or the network between");
    let fix = match suspects {
        "" => format!(
            "check nft list ruleset here as well as on {others}: no rule of this host was found that \
             might drop them"
        ),
        suspects => format!("{suspects}; if it is none of that, check {others}"),
    };
    Problem::new(ProblemCode::RemotePods, format!("from {names}"), seen, fix)
}

fn loss_notice(half: Half, names: &str, share: &str, link: &str, is_all: bool) -> Problem {
    let seen = match half {
        Half::There => {
            format!(
                "about {share} % of the packets of pods here to pods of {names} are lost on their way there"
            )
        }
        Half::Back => {
            format!(
                "about {share} % of the packets of pods of {names} to pods here are lost on their way here"
            )
        }
    };
    let place = if is_all {
        "it is so with all hosts that were tried, so look at this host first".to_owned()
    } else {
        format!("the loss is on this host, on {names} or on the network between")
    };
    let what = format!("{seen}, so their connections are slow (small packets were counted)");
    let fix = format!(
        "{place}. Check errors and drops of interfaces (ip -s -s link show dev {link}; ethtool -S \
         {link}), cables, radio links and switches, full queues (tc -s qdisc show dev {link}), and \
         rules that drop by chance or by rate (nft list ruleset)"
    );
    Problem::new(ProblemCode::RandomLoss, names, what, fix).notice()
}

/// Lists kinds of packets by family. A family that loses all kinds is named without them.
fn list(sorts: &[Sort]) -> String {
    let of_family = |ipv4: bool| {
        let kinds: Vec<Kind> =
            sorts.iter().filter(|sort| sort.ipv4 == ipv4).map(|sort| sort.kind).collect();
        let family = family_name(ipv4);
        // Lost large packets imply lost aggregates, and lost TCP segments imply lost data.
        let [has_large, has_first] = [Kind::Large, Kind::Segment].map(|kind| kinds.contains(&kind));
        let named = kinds.iter().filter_map(|kind| match kind {
            Kind::Segment => Some("TCP"),
            Kind::Small => Some("UDP"),
            Kind::Large => Some("large packets"),
            Kind::Fragmented => Some("fragments"),
            Kind::Aggregate => (!has_large).then_some("packets of several segments"),
            Kind::Data => (!has_first).then_some("data of TCP connections"),
            Kind::Sample => None,
        });
        let is_all = Kind::ALL.iter().all(|kind| *kind == Kind::Data || kinds.contains(kind));
        match kinds.is_empty() {
            true => None,
            false if is_all => Some(family.to_owned()),
            false => Some(format!("{family} {}", named.collect::<Vec<_>>().join(", "))),
        }
    };
    [true, false].into_iter().filter_map(of_family).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorts(ipv4: bool, kinds: &[Kind]) -> Vec<Sort> {
        kinds.iter().map(|kind| Sort { ipv4, kind: *kind }).collect()
    }

    #[test]
    fn family_that_loses_all_kinds_is_named_without_kinds() {
        let all = sorts(true, &Kind::ALL);
        assert_eq!(list(&all), "IPv4");
        let both = [all, sorts(false, &[Kind::Large, Kind::Fragmented])].concat();
        assert_eq!(list(&both), "IPv4; IPv6 large packets, fragments");
        let all_but_data: Vec<Sort> =
            sorts(true, &Kind::ALL).into_iter().filter(|sort| sort.kind != Kind::Data).collect();
        assert_eq!(list(&all_but_data), "IPv4", "data takes a connection");
        assert_eq!(list(&sorts(true, &[Kind::Data])), "IPv4 data of TCP connections");
        assert_eq!(list(&sorts(true, &[Kind::Segment, Kind::Data])), "IPv4 TCP");
        let in_one = sorts(true, &[Kind::Aggregate]);
        assert_eq!(list(&in_one), "IPv4 packets of several segments");
        let with_large = sorts(true, &[Kind::Large, Kind::Aggregate]);
        assert_eq!(list(&with_large), "IPv4 large packets");
    }

    #[test]
    fn random_loss_is_described_with_share_direction_and_peers() {
        let there = loss_notice(Half::There, "n2", "20", "eth0", false);
        assert!(there.starts_with(
            "about 20 % of the packets of pods here to pods of n2 are lost on their way there"
        ));
        assert!(there.contains("on this host, on n2 or on the network between"), "{there}");
        let back = loss_notice(Half::Back, "n2 and n3", "20 to 35", "eth0", true);
        assert!(
            back.starts_with("about 20 to 35 % of the packets of pods of n2 and n3 to pods here")
        );
        assert!(back.contains("look at this host first"), "{back}");
    }

    #[test]
    fn loss_is_described_with_direction() {
        let fragments = sorts(true, &[Kind::Fragmented]);
        let said = problem("n2", &fragments, &[], "a rule");
        assert!(said.starts_with(
            "packets of pods here do not arrive at pods of n2 (IPv4 fragments): a rule"
        ));
        let said = problem("n2", &[], &fragments, "");
        assert!(said.contains(
            "arrive at pods of n2, and their answers do not come back (IPv4 fragments): "
        ));
    }
}

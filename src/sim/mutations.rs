//! Mutations: deliberate defects of the product, by which the simulator checks that its oracle detects
//! defects.
//!
//! The product's sources contain none of them. A mutation is a change of source text: an expression, and the
//! one that replaces it. `gossamer-sim mutations` builds a copy of the simulator in which every such
//! expression is `if active { replacement } else { original }`, switches the mutations on one by one, and
//! searches for a seed whose run breaks a rule.

use std::cell::Cell;

/// Whether this is the mutated copy.
pub const IS_MUTATED: bool = option_env!("GOSSAMER_MUTATED").is_some();

/// A deliberate defect.
#[derive(Clone, Copy, Debug)]
pub struct Mutation {
    /// Its name.
    pub name: &'static str,
    /// What the defective product does.
    pub defect: &'static str,
    /// The expressions to replace, all at once.
    pub changes: &'static [Change],
}

/// An expression of the product, and its replacement.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// The file, below `src`.
    pub file: &'static str,
    /// The expression. It occurs exactly once in the file; white space does not count.
    pub original: &'static str,
    /// The defective expression.
    pub replacement: &'static str,
}

const fn change(file: &'static str, original: &'static str, replacement: &'static str) -> Change {
    Change { file, original, replacement }
}

/// All mutations.
pub const MUTATIONS: [Mutation; 25] = [
    Mutation {
        name: "AnswerBeforeFlush",
        defect: "outputs do not wait for the write that they depend on",
        changes: &[change("core/gate.rs", "after <= self.durable", "true")],
    },
    Mutation {
        name: "GrantBeforeSync",
        defect: "a restarted node grants slots with unverified memory",
        changes: &[change("core/serve.rs", "!self.replica.sync.synced()", "false")],
    },
    Mutation {
        name: "MergeByLowerEpoch",
        defect: "of two records of a slot the later one to arrive is kept, even with a lower epoch",
        changes: &[change(
            "core/slots/merge.rs",
            "ours == part.record || ours.epoch > part.record.epoch",
            "ours == part.record",
        )],
    },
    Mutation {
        name: "SameEpoch",
        defect: "a grant does not raise the slot's epoch",
        changes: &[change(
            "core/slots.rs",
            "before.map_or(0, |record| next_epoch(&record))",
            "before.map_or(0, |record| record.epoch + u64::from(owner == me))",
        )],
    },
    Mutation {
        name: "DownFreesSlots",
        defect: "a member that gossip considers down loses its slots",
        changes: &[change(
            "core/mod.rs",
            "is_member_down = true",
            "{ is_member_down = true; self.declare_gone(now, node, true) }",
        )],
    },
    Mutation {
        name: "ForgetWithoutAcknowledgements",
        defect: "a successor reclaims without waiting for acknowledgements",
        changes: &[change(
            "core/forget.rs",
            "self.replica.missing(&acknowledgers, forget).next().is_none()",
            "true",
        )],
    },
    Mutation {
        name: "ReclaimKeepsGeneration",
        defect: "a reclaimed slot's epoch does not exceed what the forgotten node wrote",
        changes: &[change(
            "core/slots.rs",
            "later_generation(run.record.epoch, u64::from(round))",
            "run.record.epoch + 1",
        )],
    },
    Mutation {
        name: "NeverCompareWithDown",
        defect: "states are never compared with down members, nor with a seed whose node is known",
        changes: &[
            change("core/sync.rs", "!is_active(node)", "false"),
            change(
                "core/sync.rs",
                "if preferred.is_empty() { &all } else { &preferred }",
                "&preferred",
            ),
            change("core/sync.rs", "!absent_seeds.is_empty()", "false"),
        ],
    },
    Mutation {
        name: "RemoveBeforeAdd",
        defect: "any difference in the kernel removes all entries before the wanted ones are added",
        changes: &[change(
            "dataplane/plan.rs",
            "plan_additions(&desired.tables, actual, &mut plan.entries)",
            "{ let routes = actual.routes.iter();
               plan.entries.extend(routes.map(|(subnet, hop)| EntryOp::RemoveRoute(*subnet, *hop)));
               let actual = Actual { routes: BTreeSet::new(), ..actual.clone() };
               plan_additions(&desired.tables, &actual, &mut plan.entries) }",
        )],
    },
    Mutation {
        name: "RemoveUnconfirmedEntries",
        defect: "unknown kernel entries are removed before the first comparison",
        changes: &[change(
            "core/view.rs",
            "self.replica.unconfirmed(self.config.assigned.is_some())",
            "Vec::new()",
        )],
    },
    Mutation {
        name: "LeaveWithoutWithdrawal",
        defect: "a leaving node hands its subnet over while its kernel still uses it",
        changes: &[change(
            "core/leave.rs",
            "self.lifecycle.kernel_subnet == KernelSubnet::Nothing",
            "true",
        )],
    },
    Mutation {
        name: "LeaveWithoutAcceptance",
        defect: "a leaving node stops before a member has accepted its records",
        changes: &[change(
            "core/leave.rs",
            "matches!(answer, Ok((_, Response::Accepted)))",
            "true",
        )],
    },
    Mutation {
        name: "LeaseWhileLeaving",
        defect: "a leaving node continues its search for a lease",
        changes: &[change("core/lifecycle.rs", "!self.is_leaving()", "true")],
    },
    Mutation {
        name: "ReleaseLeaseInUse",
        defect: "a surplus lease is released while the kernel still uses it",
        changes: &[change(
            "core/lease.rs",
            "self.lifecycle.kernel_subnet == KernelSubnet::Subnet(subnet)",
            "true",
        )],
    },
    Mutation {
        name: "StartsNotCounted",
        defect: "starts are not counted, so an incarnation is used twice",
        changes: &[change("core/boot.rs", "memory.starts.saturating_add(1)", "1")],
    },
    Mutation {
        name: "GrantAnotherSlot",
        defect: "a repeated grant request gets another slot instead of the same one",
        changes: &[change("core/slots.rs", "!known.is_empty()", "false")],
    },
    Mutation {
        name: "NeverExchangeSlots",
        defect: "comparisons never exchange slots",
        changes: &[change("core/sync.rs", "cluster_state.slots.bucket(*bucket)", "Vec::new()")],
    },
    Mutation {
        name: "IgnoreVersions",
        defect: "member records are merged whatever their version",
        changes: &[change(
            "core/directory.rs",
            "precedence(record) > precedence(entry.get())",
            "record != entry.get()",
        )],
    },
    Mutation {
        name: "AcceptUnfitRecords",
        defect: "member records are merged whatever their addresses and MAC",
        changes: &[
            change("core/vet.rs", "record.why_unusable(pool)", "None"),
            change("core/serve.rs", "self.unusable(&hello.member)", "None"),
        ],
    },
    Mutation {
        name: "AcceptJumps",
        defect: "counters are accepted beyond their horizon",
        changes: &[change(
            "core/horizon.rs",
            "value <= self.base + self.leap + uptime.as_secs()",
            "true",
        )],
    },
    Mutation {
        name: "AcceptAnyIdentity",
        defect: "gossip accepts identities of nodes without a record",
        changes: &[change(
            "core/vet.rs",
            "record.is_some() && self.horizons.allows_incarnation(now, incarnation, record)",
            "true",
        )],
    },
    Mutation {
        name: "AcceptAnySender",
        defect: "a gossip packet may name any sender",
        changes: &[change("core/vet.rs", "sender.node != from", "false")],
    },
    Mutation {
        name: "FruitlessComparisonUnsettles",
        defect: "a member whose differences never resolve keeps this node unsettled",
        changes: &[change(
            "core/sync.rs",
            "self.replica.sync.partners.count_fruitless(from, has_news) || refused && !has_news",
            "{ self.replica.sync.partners.count_fruitless(from, has_news); false }",
        )],
    },
    Mutation {
        name: "RetrySilentPartner",
        defect: "the next comparison may be with the member that just did not answer",
        changes: &[change(
            "core/sync.rs",
            "self.replica.sync.partners.may_compare(now, record.node, peers.len() == 1)",
            "true",
        )],
    },
    Mutation {
        name: "IgnoreForgedRecords",
        defect: "a forged record of this node is not exceeded",
        changes: &[change(
            "core/learn.rs",
            "record.version < self.replica.me.version || *record == self.replica.me",
            "true",
        )],
    },
];

thread_local! {
    /// Index of the active mutation in [`MUTATIONS`].
    static ACTIVE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Returns whether a mutation is active in this thread. The mutated copy calls this function.
pub fn is_active(index: usize) -> bool {
    ACTIVE.get() == Some(index)
}

/// Runs `work` with one mutation active, in this thread only.
pub fn with<T>(index: usize, work: impl FnOnce() -> T) -> T {
    ACTIVE.set(Some(index));
    let result = work();
    ACTIVE.set(None);
    result
}

/// Returns the text of a file, below `src`, with the switches of all mutations in it.
///
/// # Errors
/// Fails if an expression to replace does not occur exactly once: the rule has changed, and with it its
/// mutation has to.
pub fn mutate(file: &str, text: String) -> Result<String, String> {
    let all = MUTATIONS.iter().enumerate();
    let changes = all.flat_map(|(index, mutation)| {
        mutation.changes.iter().map(move |change| (index, mutation, change))
    });
    changes.filter(|(.., change)| change.file == file).try_fold(
        text,
        |text, (index, mutation, Change { original, replacement, .. })| {
            let (start, end) = find_once(&text, original)
                .ok_or_else(|| format!("{}: not once in {file}: {original}", mutation.name))?;
            let (before, found, after) = (&text[..start], &text[start..end], &text[end..]);
            let active = format!("crate::sim::mutations::is_active({index})");
            Ok(format!("{before}(if {active} {{ {replacement} }} else {{ {found} }}){after}"))
        },
    )
}

/// Returns the range of an expression that occurs exactly once in `text`. White space does not count.
fn find_once(text: &str, expression: &str) -> Option<(usize, usize)> {
    let solid = |text: &str| -> Vec<(usize, char)> {
        text.char_indices().filter(|(_, c)| !c.is_whitespace()).collect()
    };
    let (text, expression) = (solid(text), solid(expression));
    let mut found = text.windows(expression.len()).filter(|window| {
        window.iter().zip(&expression).all(|((_, ours), (_, theirs))| ours == theirs)
    });
    let ((start, _), (last, end)) = match (found.next()?, found.next()) {
        ([first, .., last], None) => (*first, *last),
        _ => return None,
    };
    Some((start, last + end.len_utf8()))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn each_mutation_applies_to_the_present_sources() {
        let files = MUTATIONS.iter().flat_map(|mutation| mutation.changes);
        let files: BTreeSet<&str> = files.map(|change| change.file).collect();
        for file in files {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file);
            let text = fs::read_to_string(path).expect(file);
            let mutated = mutate(file, text).expect("each expression once");
            assert!(mutated.contains("is_active("), "{file}");
        }
        let names: BTreeSet<&str> = MUTATIONS.iter().map(|mutation| mutation.name).collect();
        assert_eq!(names.len(), MUTATIONS.len());
    }

    #[test]
    fn find_once_ignores_white_space_and_refuses_two_places() {
        let text = "let sum = a\n    + b;\nlet other = a * b;";
        assert_eq!(find_once(text, "a + b").map(|(from, to)| &text[from..to]), Some("a\n    + b"));
        assert_eq!(find_once(text, "a - b"), None);
        assert_eq!(find_once("f(x); f (x);", "f(x)"), None);
    }
}

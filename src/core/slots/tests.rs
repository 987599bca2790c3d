//! Tests of the slot table's rules, by example and by property.

use proptest::prelude::*;

use crate::model::PoolSpec;

use super::{merge::Merged, *};

fn pool(network: &str, len: u8) -> Pool {
    Pool::new(&PoolSpec {
        subnet_len: Some(len),
        ..PoolSpec::of(network.parse().expect("network"))
    })
    .expect("pool")
}

fn node(seed: u8) -> NodeId {
    NodeId::of_public_key(&[seed; 32])
}

/// Counts the slots that have two records of one epoch.
fn contested(merged: &Merged) -> u32 {
    merged.contested.iter().map(|(run, _)| run.len).sum()
}

/// Returns the table's records by slot.
fn as_map(table: &SlotTable) -> BTreeMap<u32, SlotRecord> {
    table.runs().iter().flat_map(|run| run.slots().map(|slot| (slot.0, run.record))).collect()
}

/// Returns the runs that a grant names.
fn granted(grant: Result<Grant, Refusal>) -> Vec<Run> {
    match grant.expect("a free slot") {
        Grant::New(changes) => changes.into_iter().map(|(run, _)| run).collect(),
        Grant::Again(runs) => runs,
    }
}

fn assert_canonical(table: &SlotTable) {
    for pair in table.runs().windows(2) {
        assert!(pair[0].end() <= pair[1].start.0, "sorted and disjoint: {pair:?}");
        let touching = pair[0].end() == pair[1].start.0;
        assert!(!touching || pair[0].record != pair[1].record, "maximal: {pair:?}");
    }
    assert_eq!(table.hashes(), remerged(table).hashes());
}

/// Returns a table with the same records, merged one by one in reverse order.
fn remerged(table: &SlotTable) -> SlotTable {
    let mut other = SlotTable::empty(table.pool);
    let singly = table.runs().iter().flat_map(|run| run.slots().map(|start| (start, run.record)));
    let mut singly: Vec<_> = singly.map(|(start, record)| Run { start, len: 1, record }).collect();
    singly.reverse();
    other.merge(&singly);
    other
}

#[test]
fn grant_gives_one_lease_and_a_sixteenth_of_the_free_slots() {
    let mut table = SlotTable::created_by(pool("10.42.0.0/16", 24), node(1));
    let (own, _) = table.lease_own(node(1), None).expect("a free slot");
    assert_eq!(own.record.state, SlotState::Leased);
    let granted = granted(table.grant(node(1), node(2), None));
    assert_eq!(granted.iter().map(|run| run.len).sum::<u32>(), 1 + 253 / 16);
    assert_eq!(table.leased_by(node(2)).count(), 1);
    assert!(granted.iter().all(|run| run.record.epoch == 1 && run.record.granter == node(1)));
    assert_canonical(&table);
    assert_eq!(as_map(&table).len(), 255, "every slot has exactly one record");
}

#[test]
fn repeated_grant_request_returns_the_same_slots_and_changes_nothing() {
    let mut table = SlotTable::created_by(pool("10.42.0.0/16", 24), node(1));
    let first: u32 = granted(table.grant(node(1), node(2), None)).iter().map(|r| r.len).sum();
    let before = table.runs().to_vec();
    let again: u32 = granted(table.grant(node(1), node(2), None)).iter().map(|r| r.len).sum();
    assert_eq!(first, again);
    assert_eq!(table.runs(), before);
}

#[test]
fn preferred_slot_is_granted_when_free_and_refused_when_another_owner_has_it() {
    let mut table = SlotTable::created_by(pool("10.42.0.0/16", 24), node(1));
    table.grant(node(1), node(2), Some(Slot(9))).expect("free_slots");
    assert_eq!(table.leased_by(node(2)).collect::<Vec<_>>(), [Slot(9)]);
    let elsewhere = table.free_slots_of(node(2)).next().expect("node 2 has free slots").start;
    let refusal =
        table.grant(node(1), node(3), Some(elsewhere)).expect_err("only node 2 may grant it");
    assert!(matches!(refusal, Refusal::NoFreeSlotHere { free_elsewhere } if free_elsewhere > 0));
    table.grant(node(1), node(3), Some(Slot(9))).expect("it is leased, so another one is granted");
    assert_ne!(table.leased_by(node(3)).next(), Some(Slot(9)));
}

#[test]
fn exhausted_pool_is_refused_with_its_slot_counts() {
    let mut table = SlotTable::created_by(pool("10.42.0.0/24", 26), node(1));
    for seed in 1..=3 {
        if seed == 1 {
            table.lease_own(node(1), None).expect("three slots");
        } else {
            let granter = *table.census().free.keys().next().expect("free left");
            table.grant(granter, node(seed), None).expect("free left");
        }
    }
    let refusal = table.grant(node(1), node(9), None).expect_err("full");
    assert_eq!(refusal, Refusal::Exhausted { total: 3, leased: 3 });
}

#[test]
fn hand_over_makes_all_slots_free_slots_of_the_successor() {
    let mut table = SlotTable::created_by(pool("10.42.0.0/16", 24), node(1));
    table.grant(node(1), node(2), None).expect("free_slots");
    let owned: u32 = table.runs_of(node(2)).map(|run| run.len).sum();
    let moved = table.hand_over(node(2), node(1));
    assert_eq!(moved.iter().map(|(run, _)| run.len).sum::<u32>(), owned);
    assert_eq!(table.runs_of(node(2)).count(), 0);
    assert_eq!(table.census().free[&node(1)], 255);
}

#[test]
fn ownership_conflict_is_reported_and_resolved_alike_on_both_sides() {
    let pool = pool("10.42.0.0/24", 26);
    let mut one = SlotTable::created_by(pool, node(1));
    let mut two = SlotTable::created_by(pool, node(2));
    let (ours, theirs) = (one.runs().to_vec(), two.runs().to_vec());
    assert_eq!(contested(&one.merge(&theirs)), 3);
    assert_eq!(contested(&two.merge(&ours)), 3);
    assert_eq!(one.runs(), two.runs());
}

#[test]
fn records_outside_the_pool_are_ignored() {
    let mut table = SlotTable::created_by(pool("10.42.0.0/24", 26), node(1));
    let before = table.runs().to_vec();
    let record = SlotRecord { epoch: 9, ..before[0].record };
    let outside =
        [Run { start: Slot(4), len: u32::MAX, record }, Run { start: Slot(0), len: 1, record }];
    assert_eq!(table.merge(&outside), Merged::default());
    assert_eq!(table.runs(), before);
}

#[test]
fn bucket_hashes_cover_the_table_and_localize_a_difference() {
    let one = SlotTable::created_by(pool("10.42.0.0/16", 24), node(1));
    let covered: u32 = (0..Buckets::COUNT).flat_map(|b| one.bucket(b)).map(|run| run.len).sum();
    assert_eq!(covered, 255);
    let mut two = one.clone();
    two.lease_own(node(1), Some(Slot(100))).expect("free");
    let (a, b) = (one.hashes(), two.hashes());
    let differing: Vec<usize> = (0..Buckets::COUNT).filter(|&i| a[i] != b[i]).collect();
    assert_eq!(differing, [one.bucket_of(Slot(100))]);
}

/// Generates runs as any mix of correct and faulty nodes could send them.
fn any_runs() -> impl Strategy<Value = Vec<Run>> {
    let run = (0_u32..40, 1_u32..20, 0_u64..3, 0_u8..3, any::<bool>()).prop_map(
        |(start, len, epoch, owner, leased)| Run {
            start: Slot(start),
            len,
            record: SlotRecord {
                epoch,
                owner: node(owner),
                state: if leased { SlotState::Leased } else { SlotState::Free },
                granter: node(0),
            },
        },
    );
    prop::collection::vec(run, 0..12)
}

fn merged(parts: &[&[Run]]) -> BTreeMap<u32, SlotRecord> {
    let mut table = SlotTable::empty(pool("10.42.0.0/19", 24));
    for part in parts {
        table.merge(part);
        assert_canonical(&table);
    }
    as_map(&table)
}

/// Returns the merged records as a third node would pass them on.
fn relayed(parts: &[&[Run]]) -> Vec<Run> {
    let mut table = SlotTable::empty(pool("10.42.0.0/19", 24));
    for part in parts {
        table.merge(part);
    }
    table.runs().to_vec()
}

proptest! {
    #[test]
    fn merging_is_commutative_associative_and_idempotent(
        a in any_runs(), b in any_runs(), c in any_runs(),
    ) {
        let all = merged(&[&a, &b, &c]);
        prop_assert_eq!(&all, &merged(&[&c, &b, &a]), "commutative");
        prop_assert_eq!(&all, &merged(&[&relayed(&[&b, &c]), &a]), "associative");
        prop_assert_eq!(&all, &merged(&[&a, &b, &c, &a, &relayed(&[&a, &b, &c])]), "idempotent");
    }

    #[test]
    fn reported_changes_are_exactly_the_differing_slots(a in any_runs(), b in any_runs()) {
        let mut table = SlotTable::empty(pool("10.42.0.0/19", 24));
        table.merge(&a);
        let before = as_map(&table);
        let changed = table.merge(&b).changed;
        let after = as_map(&table);
        let named: std::collections::BTreeSet<u32> =
            changed.iter().flat_map(|(run, _)| run.slots()).map(|slot| slot.0).collect();
        let differing: std::collections::BTreeSet<u32> =
            after.iter().filter(|(slot, r)| before.get(slot) != Some(r)).map(|(s, _)| *s).collect();
        prop_assert_eq!(named, differing);
    }

    #[test]
    fn merge_never_lowers_an_epoch(a in any_runs(), b in any_runs()) {
        let mut table = SlotTable::empty(pool("10.42.0.0/19", 24));
        table.merge(&a);
        let before = as_map(&table);
        table.merge(&b);
        for (slot, record) in as_map(&table) {
            prop_assert!(before.get(&slot).is_none_or(|old| old.epoch <= record.epoch));
        }
    }

    #[test]
    fn joins_in_any_order_never_share_a_slot(granters in prop::collection::vec(0_usize..8, 1..60)) {
        let mut table = SlotTable::created_by(pool("10.42.0.0/16", 24), node(0));
        table.lease_own(node(0), None);
        let mut members = vec![node(0)];
        for (seed, granter) in granters.into_iter().enumerate() {
            let joiner = node(u8::try_from(seed).expect("60 at most") + 1);
            let granter = members[granter % members.len()];
            if table.grant(granter, joiner, None).is_ok() {
                members.push(joiner);
            }
        }
        assert_canonical(&table);
        prop_assert_eq!(as_map(&table).len(), 255);
        for member in members {
            prop_assert_eq!(table.leased_by(member).count(), 1);
        }
    }
}

//! Members that exist only as records: a cluster of a thousand members on a machine that could not run
//! them.
//!
//! The records are written to the database of a stopped agent, as if the members had joined through it.
//! When it starts again, all other agents learn them.

use std::{collections::BTreeMap, net::Ipv4Addr};

use super::Host;
use crate::{
    model::{BootId, Mac, MemberRecord, NodeId, Run, Slot, SlotRecord, SlotState, Version, Vtep},
    store::{Database, StateDir},
    transport::NodeKey,
    wire::{Key, Record},
};

/// Adds member records, each with one of the host's free slots. Returns all records of the database.
///
/// # Errors
/// Fails if the host has no database, an agent uses it, or it has too few free slots.
pub fn add_crowd(host: &Host, crowd: &[MemberRecord]) -> anyhow::Result<Vec<(Key, Record)>> {
    let state = StateDir::open(&host.dir.join("state"))?;
    let seed = state.node_key()?.ok_or_else(|| anyhow::anyhow!("no node ever ran there"))?;
    let me = NodeKey::from_seed(seed)?.id();
    let opened = Database::open(&state.database(), me)?;
    let mut members = crowd.iter();
    let mut written: BTreeMap<Key, Vec<u8>> = BTreeMap::new();
    for (key, record) in &opened.records {
        let Record::Slots(runs) = record else { continue };
        let mut leased = Vec::new();
        for run in runs {
            let free = run.record.owner == me && run.record.state == SlotState::Free;
            for slot in run.slots() {
                let member = if free { members.next() } else { None };
                leased.push(match member {
                    Some(member) => {
                        let record = Record::Member(member.clone()).encode();
                        written.insert(Key::Member(member.node), record);
                        lease(slot, member, run.record)
                    }
                    None => Run { start: slot, len: 1, record: run.record },
                });
            }
        }
        written.insert(*key, Record::Slots(leased).encode());
    }
    anyhow::ensure!(members.next().is_none(), "{} has too few free subnets", host.name);
    opened.database.write(&written)?;
    drop(opened.database);
    Ok(Database::open(&state.database(), me)?.records)
}

fn lease(slot: Slot, member: &MemberRecord, before: SlotRecord) -> Run {
    let record = SlotRecord {
        epoch: before.epoch + 1,
        owner: member.node,
        state: SlotState::Leased,
        granter: before.owner,
    };
    Run { start: slot, len: 1, record }
}

/// Returns the record of a member behind the underlay's router, at an address that no host has. Gossip
/// never reaches it.
pub fn absent_member(number: u16) -> MemberRecord {
    let mut key = [0; 32];
    key[..2].copy_from_slice(&number.to_be_bytes());
    let node = NodeId::of_public_key(&key);
    let [high, low] = number.to_be_bytes();
    let ip = Ipv4Addr::new(10, 98, high, low);
    let name = format!("crowd-{number}");
    MemberRecord {
        node,
        version: Version { starts: 1, change: 0 },
        boot: BootId::from_bytes([1; 8]),
        // The name is valid: letters, digits and a hyphen.
        name: name.parse().unwrap_or_else(|_| unreachable!("{name}")),
        address: (ip, 8473).into(),
        vtep: Vtep { mac: Mac::of_node(node), underlay: ip.into() },
        left_to: None,
    }
}

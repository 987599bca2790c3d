//! `gossamer leases`: lists the owners of subnets and of free slots.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    Client, history,
    output::{list, liveness_text, name, or_dash, query_and_print, slots_text, table},
};
use crate::{
    api::{self, AgentStatus, FreeRange, Member, SlotCounts},
    model::{Liveness, NodeId},
};

#[derive(Debug, Args)]
pub struct LeasesArgs {
    /// List only the free subnets and their owners
    #[arg(long)]
    free: bool,
    /// List every change of ownership that this host has recorded, oldest first
    #[arg(long, conflicts_with = "free")]
    history: bool,
    #[command(flatten)]
    client: Client,
}

/// What the status says about addresses.
#[derive(Serialize, Deserialize)]
struct Leases {
    /// `None` outside a cluster.
    network: Option<IpNet>,
    slots: SlotCounts,
    owners: Vec<Owner>,
}

/// The subnets and free slots of a member.
#[derive(Clone, Serialize, Deserialize)]
struct Owner {
    node: NodeId,
    name: String,
    label: String,
    liveness: Option<Liveness>,
    former_self: bool,
    subnets: Vec<IpNet>,
    free: u32,
}

pub fn run(args: &LeasesArgs) -> ExitCode {
    let client = &args.client;
    if args.history {
        return history::run(client);
    }
    let status = async { api::get_as::<AgentStatus>(&client.socket(), "/v1/status").await };
    if args.free {
        let query = async { Ok(status.await?.free_slots) };
        query_and_print(client, query, |free, wide| free_text(free, wide))
            .map_or_else(|code| code, |_| ExitCode::SUCCESS)
    } else {
        let query = async { Ok(Leases::of(status.await?)) };
        query_and_print(client, query, leases_text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
    }
}

impl Leases {
    fn of(status: AgentStatus) -> Self {
        let network = status.settings.map(|settings| settings.pool.network());
        let owners = status.members.into_iter().filter(Member::is_present).map(Owner::of);
        Self { network, slots: status.slots, owners: owners.collect() }
    }
}

impl Owner {
    fn of(member: Member) -> Self {
        let Member { node, name, label, liveness, former_self, subnets, free, .. } = member;
        Self { node, name, label, liveness, former_self, subnets, free }
    }
}

fn leases_text(leases: &Leases, wide: bool) -> String {
    if leases.owners.is_empty() {
        return "this host has not joined a cluster yet: see `gossamer status`\n".to_owned();
    }
    let row = |owner: &Owner| {
        let former = if owner.former_self { " (former self)" } else { "" };
        let state = format!("{}{former}", liveness_text(owner.liveness));
        let subnets = list(&owner.subnets, wide);
        [subnets, name(&owner.label, wide), state, owner.free.to_string()]
    };
    let mut owners = leases.owners.clone();
    // Owners without a subnet come last.
    owners.sort_by_key(|owner| (owner.subnets.is_empty(), owner.subnets.first().copied()));
    let rows: Vec<_> = owners.iter().map(row).collect();
    let mut out = table(["SUBNET", "NODE", "STATE", "FREE"], &rows);
    let _ = writeln!(out, "\n{}: {}", or_dash(leases.network), slots_text(&leases.slots));
    out
}

fn free_text(free_slots: &[FreeRange], wide: bool) -> String {
    if free_slots.is_empty() {
        return "no subnet is free\n".to_owned();
    }
    let row = |range: &FreeRange| {
        let FreeRange { first, last, count, .. } = range;
        let subnets = if first == last { first.to_string() } else { format!("{first} to {last}") };
        let state = liveness_text(range.liveness);
        [subnets, count.to_string(), name(&range.name, wide), state]
    };
    let rows: Vec<_> = free_slots.iter().map(row).collect();
    table(["SUBNETS", "COUNT", "NODE", "STATE"], &rows)
}

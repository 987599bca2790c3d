//! `gossamer leases --history`: shows which node granted which subnet to which other node.

use std::process::ExitCode;

use super::{
    Client,
    output::{or_dash, table, time},
    query_and_print,
};
use crate::{
    api,
    model::{OwnerChange, SlotState},
};

pub fn run(client: &Client) -> ExitCode {
    let socket = client.socket();
    let query = api::get_as::<Vec<OwnerChange>>(&socket, "/v1/history");
    query_and_print(client, query, |changes, wide| text(changes, wide))
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(changes: &[OwnerChange], wide: bool) -> String {
    if changes.is_empty() {
        return "no change of ownership was recorded\n".to_owned();
    }
    // Narrow: names without their ids.
    let node = |shown: &str| match shown.split_once(" (") {
        Some((name, _)) if !wide => name.to_owned(),
        _ => shown.to_owned(),
    };
    let cells = |change: &OwnerChange| {
        let OwnerChange { at, subnets, from, to, state, .. } = change;
        let state = match state {
            SlotState::Free => "free",
            SlotState::Leased => "leased",
        };
        let from = or_dash(from.as_deref().map(node));
        [time(*at), subnets.clone(), from, node(to), state.to_owned()]
    };
    if wide {
        let row = |change: &OwnerChange| {
            let [time, subnets, from, to, state] = cells(change);
            [time, subnets, from, to, state, change.by.clone()]
        };
        let rows: Vec<_> = changes.iter().map(row).collect();
        return table(["TIME", "SUBNETS", "FROM", "TO", "STATE", "BY"], &rows);
    }
    let rows: Vec<_> = changes.iter().map(cells).collect();
    table(["TIME", "SUBNETS", "FROM", "TO", "STATE"], &rows)
}

//! `gossamer routes`: compares the kernel entries that this node wants with those that exist.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;

use super::{
    Client,
    output::{bad, list, name, or_dash, query_and_print, table},
};
use crate::api::{self, EntryVerdict, KernelEntry, Routes};

#[derive(Debug, Args)]
pub struct RoutesArgs {
    /// Show only entries that differ
    #[arg(long)]
    differences: bool,
    #[command(flatten)]
    client: Client,
}

/// Returns exit code 1 if an entry differs.
pub fn run(args: &RoutesArgs) -> ExitCode {
    let query = async {
        let mut routes: Routes = api::get_as(&args.client.socket(), "/v1/routes").await?;
        if args.differences {
            routes.entries.retain(differs);
        }
        Ok(routes)
    };
    match query_and_print(&args.client, query, routes_text) {
        Ok(routes) if !routes.entries.iter().any(differs) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(code) => code,
    }
}

fn differs(entry: &KernelEntry) -> bool {
    entry.verdict != EntryVerdict::Same
}

fn routes_text(routes: &Routes, wide: bool) -> String {
    let row = |entry: &KernelEntry| {
        let KernelEntry { table, key, peer, wanted, found, verdict, .. } = entry;
        let verdict = if differs(entry) { bad(verdict) } else { verdict.to_string() };
        let peer = or_dash(peer.as_deref().map(|peer| name(peer, wide)));
        let wanted = or_dash(wanted.as_deref());
        [table.clone(), key.clone(), wanted, list(found, true), peer, verdict]
    };
    let rows: Vec<_> = routes.entries.iter().map(row).collect();
    let mut out = table(["TABLE", "KEY", "WANTED", "IN THE KERNEL", "PEER", "VERDICT"], &rows);
    if rows.is_empty() {
        // Nothing is wanted yet, or nothing differs.
        out.clear();
    }
    let _ = match routes.entries.iter().filter(|entry| differs(entry)).count() {
        0 => writeln!(out, "\nthe kernel has all entries"),
        count => writeln!(
            out,
            "\n{count} entries differ: the agent repairs them within a second, or `gossamer status` says why \
             it cannot"
        ),
    };
    out
}

//! `gossamer routes`: compares the kernel entries that this node wants with those that exist.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;
use serde_json::Value;

use super::{
    Client,
    output::{bad, elements, list, name, query_and_print, table, text},
};
use crate::api;

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
        let mut routes = api::get(&args.client.socket(), "/v1/routes").await?;
        if let (true, Some(entries)) = (args.differences, routes["entries"].as_array_mut()) {
            entries.retain(|entry| entry["verdict"] != "same");
        }
        Ok(routes)
    };
    match query_and_print(&args.client, query, routes_text) {
        Ok(routes) if elements(&routes["entries"]).all(|entry| entry["verdict"] == "same") => {
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::FAILURE,
        Err(code) => code,
    }
}

fn routes_text(routes: &Value, wide: bool) -> String {
    let row = |entry: &Value| {
        let [table, key, wanted, verdict] =
            ["table", "key", "wanted", "verdict"].map(|field| text(&entry[field]));
        let found = list(&entry["found"], true);
        let verdict = if verdict == "same" { verdict } else { bad(verdict) };
        [table, key, wanted, found, name(&entry["peer"], wide), verdict]
    };
    let rows: Vec<_> = elements(&routes["entries"]).map(row).collect();
    let mut out = table(["TABLE", "KEY", "WANTED", "IN THE KERNEL", "PEER", "VERDICT"], &rows);
    let differ = elements(&routes["entries"]).filter(|entry| entry["verdict"] != "same").count();
    if rows.is_empty() {
        // Nothing is wanted yet, or nothing differs.
        out.clear();
    }
    let _ = match differ {
        0 => writeln!(out, "\nthe kernel has all entries"),
        count => writeln!(
            out,
            "\n{count} entries differ: the agent repairs them within a second, or `gossamer status` says why \
             it cannot"
        ),
    };
    out
}

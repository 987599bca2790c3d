//! `gossamer cleanup`: takes away everything that gossamer has made on this host, and nothing else.
//!
//! For a host whose agent does not run any more. One that runs is asked to leave instead: it hands over what
//! it owns.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::{Client, Format, block_on, fail};
use crate::{
    api::{self, ClientError},
    config::{DEFAULT_STATE_DIR, DEFAULT_SUBNET_FILE},
    dataplane::{
        firewall::TABLE,
        kernel::{FirewallTable, Kernel},
    },
    store::StateDir,
    transport::NodeKey,
};

#[derive(Debug, Args)]
pub struct CleanupArgs {
    /// Only list what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Where the state is
    #[arg(long, env = "GOSSAMER_STATE_DIR", default_value = DEFAULT_STATE_DIR, value_name = "DIR")]
    state_dir: PathBuf,
    /// Where flannel's subnet.env was written
    #[arg(long, env = "GOSSAMER_SUBNET_FILE", default_value = DEFAULT_SUBNET_FILE, value_name = "FILE")]
    subnet_file: PathBuf,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &CleanupArgs) -> ExitCode {
    match block_on(api::get(&args.client.socket, "/v1/status")) {
        Ok(Err(ClientError::NoAgent { .. })) => {}
        Ok(Ok(_)) => {
            return fail(
                "an agent runs here: `gossamer leave` hands its subnet over and removes everything; or stop \
                 it first",
            );
        }
        Ok(Err(error)) => return fail(error),
        Err(error) => return fail(error),
    }
    match cleanup(args) {
        Ok(removed) => {
            print(&removed, args);
            ExitCode::SUCCESS
        }
        Err(error) => fail(error),
    }
}

/// What was found, and removed unless that was not asked for.
#[derive(Debug, Default, serde::Serialize)]
struct Removed {
    devices: Vec<String>,
    routes: Vec<String>,
    /// Of nftables.
    tables: Vec<String>,
    files: Vec<PathBuf>,
    /// The node whose key was in the state directory. It has not left its cluster.
    node: Option<String>,
}

fn cleanup(args: &CleanupArgs) -> anyhow::Result<Removed> {
    let mut kernel = Kernel::open()?;
    let leftovers = kernel.leftovers()?;
    // Without nftables in the kernel there is no table in it.
    let mut firewall = FirewallTable::open().ok();
    let ours = |name: &str| name == TABLE || name.starts_with(&format!("{TABLE}-"));
    let tables = firewall.as_mut().and_then(|firewall| firewall.tables(ours).ok());
    let mut removed = Removed {
        tables: tables.unwrap_or_default(),
        devices: leftovers.devices.clone(),
        routes: leftovers.routes.keys().map(ToString::to_string).collect(),
        ..Removed::default()
    };
    let files = [&args.subnet_file, &args.client.socket];
    removed.files.extend(files.into_iter().filter(|path| path.exists()).cloned());
    let state = match args.state_dir.exists() {
        // Refuses a directory that is somebody else's.
        true => Some(StateDir::open(&args.state_dir)?),
        false => None,
    };
    if let Some(state) = &state {
        removed.files.push(args.state_dir.clone());
        let seed = state.node_key()?;
        removed.node = seed
            .map(|seed| Ok::<_, anyhow::Error>(NodeKey::from_seed(seed)?.id().to_string()))
            .transpose()?;
    }
    if args.dry_run {
        return Ok(removed);
    }
    kernel.sweep(leftovers)?;
    if let Some(firewall) = &mut firewall {
        removed.tables.iter().try_for_each(|table| firewall.remove(table))?;
    }
    files.into_iter().try_for_each(|path| remove_file(path))?;
    if let Some(state) = state {
        state.wipe()?;
        drop(state);
        // Unless there is something of somebody else's in it.
        let _ = fs::remove_dir(&args.state_dir);
    }
    Ok(removed)
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn print(removed: &Removed, args: &CleanupArgs) {
    if args.client.output == Format::Json {
        println!("{:#}", serde_json::json!({ "dry_run": args.dry_run, "removed": removed }));
        return;
    }
    let verb = if args.dry_run { "would remove" } else { "removed" };
    let devices =
        removed.devices.iter().map(|name| format!("device {name} with all entries on it"));
    let routes = removed.routes.iter().map(|subnet| format!("route to {subnet}"));
    let tables = removed.tables.iter().map(|name| format!("nftables table inet {name}"));
    let files = removed.files.iter().map(|path| path.display().to_string());
    let all: Vec<String> = devices.chain(routes).chain(tables).chain(files).collect();
    all.iter().for_each(|what| println!("{verb} {what}"));
    if all.is_empty() {
        println!("nothing of gossamer is on this host");
    }
    if let Some(node) = &removed.node {
        println!(
            "node {node} has not left its cluster: `gossamer forget {node}` on another member gives \
             its subnet back"
        );
    }
}

//! `gossamer reset-identity`: this host becomes a new node of the same cluster.
//!
//! The cure for a state directory that was copied: on one of the two hosts. Works with and without a
//! running agent.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{Client, block_on, fail};
use crate::{
    agent::random,
    api::{self, ClientError},
    store::StateDir,
};

#[derive(Debug, Args)]
pub struct ResetArgs {
    /// Where the state is, if no agent runs
    #[arg(long, env = "GOSSAMER_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &ResetArgs) -> ExitCode {
    let asked = match block_on(api::post(&args.client.socket(), "/v1/reset-identity")) {
        Ok(asked) => asked,
        Err(error) => return fail(error),
    };
    let said = match asked {
        Ok(_) => "this host joins its cluster as a new node now",
        Err(ClientError::NoAgent { .. }) => match reset(args) {
            Ok(()) => "this host will join its cluster as a new node when its agent starts",
            Err(error) => return fail(error),
        },
        Err(error) => return fail(error),
    };
    args.client.output.print(&serde_json::json!({ "reset": true }), |_, _| format!("{said}\n"));
    ExitCode::SUCCESS
}

fn reset(args: &ResetArgs) -> anyhow::Result<()> {
    let state_dir = args.state_dir.clone().unwrap_or_else(|| args.client.instance.state_dir());
    if !state_dir.exists() {
        anyhow::bail!(
            "state_dir: {} does not exist: name it with --state-dir",
            state_dir.display()
        );
    }
    Ok(StateDir::open(&state_dir)?.new_identity(&random()?)?)
}

//! `gossamer reset-identity`: makes this host a new node of the same cluster.
//!
//! It repairs a duplicate identity after a state directory was copied: run it on one of the two hosts. It
//! works with and without a running agent.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{Client, block_on, fail};
use crate::{
    api::{self, ClientError},
    random::random,
    store::StateDir,
};

#[derive(Debug, Args)]
pub struct ResetArgs {
    /// State directory, used if no agent runs [default: /var/lib/gossamer]
    #[arg(long, env = "GOSSAMER_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &ResetArgs) -> ExitCode {
    let response = match block_on(api::post(&args.client.socket(), "/v1/reset-identity")) {
        Ok(response) => response,
        Err(error) => return fail(error),
    };
    let message = match response {
        Ok(_) => "this host is joining its cluster as a new node",
        Err(ClientError::NoAgent { .. }) => match reset(args) {
            Ok(()) => "this host will join its cluster as a new node when its agent starts",
            Err(error) => return fail(error),
        },
        Err(error) => return fail(error),
    };
    args.client.output.print(&serde_json::json!({ "reset": true }), |_, _| format!("{message}\n"));
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

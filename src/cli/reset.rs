//! `gossamer reset-identity`: makes this host a new node of the same cluster.
//!
//! It repairs a duplicate identity after a state directory was copied: run it on one of the two hosts. It
//! works with and without a running agent.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{
    Client, block_on,
    confirm::{Consent, possible_loss_of_membership},
    fail,
};
use crate::{
    api::{self, ClientError, IdentityReset, Membership},
    random::random,
    store::{StateDir, read_token},
};

#[derive(Debug, Args)]
pub struct ResetArgs {
    /// State directory, used if no agent runs [default: /var/lib/gossamer]
    #[arg(long, env = "GOSSAMER_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &ResetArgs) -> ExitCode {
    let socket = args.client.socket();
    let costs = || {
        let loss = possible_loss_of_membership(&socket);
        format!("{loss} It joins its cluster again as a new node, with another subnet.")
    };
    if let Err(code) = args.consent.obtain(costs) {
        return code;
    }
    let reset_agent = async {
        let membership: Membership = api::get_as(&socket, "/v1/status").await?;
        if membership.cluster.is_none() {
            return Ok(false);
        }
        api::post(&socket, "/v1/reset-identity").await.map(|_| true)
    };
    let response = match block_on(reset_agent) {
        Ok(response) => response,
        Err(error) => return fail(error),
    };
    let message = match response {
        Ok(true) => "this host joins its cluster as a new node",
        Ok(false) => {
            return fail("this host is in no cluster yet, so it has no identity to replace");
        }
        Err(ClientError::NoAgent { .. }) => match reset(args) {
            Ok(()) => "this host will join its cluster as a new node when its agent starts",
            Err(error) => return fail(error),
        },
        Err(error) => return fail(error),
    };
    let text = format!(
        "{message}\nIf another host has the old identity, nothing is left to do. If not, the old identity \
         keeps its subnet until you run, on any member: gossamer forget --former-selves\n"
    );
    args.client.output.print(&IdentityReset { reset: true }, |_, _| text);
    ExitCode::SUCCESS
}

fn reset(args: &ResetArgs) -> anyhow::Result<()> {
    let state_dir =
        args.state_dir.clone().unwrap_or_else(|| args.client.control.instance.state_dir());
    if !state_dir.exists() {
        anyhow::bail!(
            "state_dir: {} does not exist: name it with --state-dir",
            state_dir.display()
        );
    }
    let has_identity = StateDir::peek_node_key(&state_dir)?.is_some();
    if !has_identity || read_token(&state_dir)?.is_none() {
        anyhow::bail!(
            "state_dir: {} contains no identity of a cluster member, so there is nothing to replace",
            state_dir.display()
        );
    }
    Ok(StateDir::open(&state_dir)?.new_identity(&random()?)?)
}

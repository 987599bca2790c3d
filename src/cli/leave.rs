//! `gossamer leave`: makes this node leave its cluster for good.

use std::process::ExitCode;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    Client, cni,
    confirm::{Consent, loss_of_membership},
    fail, query_and_print,
};
use crate::api::{self, Left, Membership};

#[derive(Debug, Args)]
pub struct LeaveArgs {
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    client: Client,
}

#[derive(Serialize, Deserialize)]
struct LeaveAnswer {
    #[serde(flatten)]
    left: Left,
    /// The agent of a host that has not joined only removes its state.
    was_member: bool,
}

pub fn run(LeaveArgs { consent, client }: &LeaveArgs) -> ExitCode {
    let socket = client.socket();
    // There is nothing to ask if no agent answers.
    let costs = match consent.asks().then(|| loss_of_membership(&socket)).transpose() {
        Ok(costs) => costs.unwrap_or_default(),
        Err(error) => return fail(error),
    };
    if let Err(code) = consent.obtain(|| costs) {
        return code;
    }
    let query = async {
        let membership: Membership = api::get_as(&socket, "/v1/status").await?;
        let left = api::post_as(&socket, "/v1/leave").await?;
        Ok(LeaveAnswer { left, was_member: membership.cluster.is_some() })
    };
    query_and_print(client, query, text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(LeaveAnswer { left, was_member }: &LeaveAnswer, _: bool) -> String {
    outcome(left, *was_member) + &cni::note_of_installed()
}

/// Says who owns the subnets of a node that has left.
pub fn outcome(left: &Left, was_member: bool) -> String {
    match &left.successor {
        Some(successor) => {
            format!("left the cluster: {successor} owns all subnets of this node now\n")
        }
        None if was_member => {
            "left the cluster: this was its last member, so it no longer exists\n".to_owned()
        }
        None => "this host had not joined a cluster yet; its state was removed\n".to_owned(),
    }
}

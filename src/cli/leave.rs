//! `gossamer leave`: makes this node leave its cluster for good.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::{
    Client, cni,
    confirm::{Consent, loss_of_membership},
    query_and_print,
};
use crate::api;

#[derive(Debug, Args)]
pub struct LeaveArgs {
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    client: Client,
}

pub fn run(LeaveArgs { consent, client }: &LeaveArgs) -> ExitCode {
    let socket = client.socket();
    if let Err(code) = consent.obtain(|| loss_of_membership(&socket)) {
        return code;
    }
    let query = async {
        let status = api::get(&socket, "/v1/status").await?;
        let mut answer = api::post(&socket, "/v1/leave").await?;
        // The agent of a host that has not joined only removes its state.
        answer["was_member"] = json!(status["cluster"].is_string());
        Ok(answer)
    };
    query_and_print(client, query, text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(answer: &Value, _: bool) -> String {
    let text = match answer["successor"].as_str() {
        Some(successor) => {
            format!("left the cluster: {successor} owns all subnets of this node now\n")
        }
        None if answer["was_member"] == true => {
            "left the cluster: this was its last member, so it no longer exists\n".to_owned()
        }
        None => "this host had not joined a cluster yet; its state was removed\n".to_owned(),
    };
    text + &cni::note_of_installed()
}

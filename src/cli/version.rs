//! `gossamer version`: prints the versions of this program, of the running agent, and of the wire format.

use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use super::{Client, block_on, fail};
use crate::{
    api::{self, ClientError, Membership},
    wire::WIRE_VERSION,
};

#[derive(Serialize, Deserialize)]
struct Versions {
    program: String,
    /// `None` if no agent runs, or this user may not query it.
    agent: Option<String>,
    wire: u8,
}

/// Prints the versions. It works without an agent, and without permission to query one.
pub fn run(client: &Client) -> ExitCode {
    let mut is_permitted = true;
    let agent = match block_on(api::get_as::<Membership>(&client.socket(), "/v1/status")) {
        Ok(Ok(membership)) => Some(membership.version),
        Ok(Err(ClientError::NoAgent { .. })) => None,
        Ok(Err(ClientError::NotPermitted { .. })) => {
            is_permitted = false;
            None
        }
        Ok(Err(error)) => return fail(error),
        Err(error) => return fail(error),
    };
    let program = env!("CARGO_PKG_VERSION").to_owned();
    let versions = Versions { program, agent, wire: WIRE_VERSION };
    client.output.print(&versions, |Versions { program, agent, wire }, _| {
        let agent = match agent {
            None if !is_permitted => "agent: not permitted to ask it".to_owned(),
            None => "no agent runs".to_owned(),
            Some(agent) if agent == program => format!("agent {program}"),
            Some(agent) => format!("agent {agent}: restart it to run this version"),
        };
        format!("gossamer {program}, wire version {wire}, {agent}\n")
    });
    ExitCode::SUCCESS
}

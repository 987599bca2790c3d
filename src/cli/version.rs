//! `gossamer version`: prints the versions of this program, of the running agent, and of the wire format.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::{Client, block_on, fail, output::text};
use crate::{
    api::{self, ClientError},
    wire::WIRE_VERSION,
};

/// Prints the versions. It works without an agent, and without permission to query one.
pub fn run(client: &Client) -> ExitCode {
    let mut is_permitted = true;
    let agent = match block_on(api::get(&client.socket(), "/v1/status")) {
        Ok(Ok(status)) => status["version"].clone(),
        Ok(Err(ClientError::NoAgent { .. })) => Value::Null,
        Ok(Err(ClientError::NotPermitted { .. })) => {
            is_permitted = false;
            Value::Null
        }
        Ok(Err(error)) => return fail(error),
        Err(error) => return fail(error),
    };
    let program = env!("CARGO_PKG_VERSION");
    let answer = json!({ "program": program, "agent": agent, "wire": WIRE_VERSION });
    client.output.print(&answer, |answer, _| {
        let agent = match &answer["agent"] {
            Value::Null if !is_permitted => "agent: not permitted to ask it".to_owned(),
            Value::Null => "no agent runs".to_owned(),
            agent if *agent == program => format!("agent {program}"),
            agent => format!("agent {}: restart it to run this version", text(agent)),
        };
        format!("gossamer {program}, wire version {WIRE_VERSION}, {agent}\n")
    });
    ExitCode::SUCCESS
}

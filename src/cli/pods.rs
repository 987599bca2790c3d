//! `gossamer pods`: which container has which address.

use std::process::ExitCode;

use serde_json::Value;

use super::{Client, ask_and_print, output::table};
use crate::api;

/// Enough of a container's id to tell it from others.
const SHOWN: usize = 13;

pub fn run(client: &Client) -> ExitCode {
    ask_and_print(client, api::get(&client.socket(), "/v1/pods"), text)
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(answer: &Value, _: bool) -> String {
    let cell = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pods = answer["pods"].as_array().map(Vec::as_slice).unwrap_or_default();
    let row = |pod: &Value| {
        let addresses = pod["addresses"].as_array().into_iter().flatten().map(cell);
        [
            cell(&pod["container"]).chars().take(SHOWN).collect(),
            cell(&pod["interface"]),
            addresses.collect::<Vec<_>>().join(", "),
            cell(&pod["link"]),
            cell(&pod["owner"]),
            match (pod["orphan"] == true, pod["netns"] == "") {
                (true, _) => "orphan",
                // For a container that Docker is about to start, or by a network of Docker's.
                (_, true) => "reserved",
                _ => "connected",
            }
            .to_owned(),
        ]
    };
    let rows: Vec<[String; 6]> = pods.iter().map(row).collect();
    let mut text = table(["CONTAINER", "INTERFACE", "ADDRESSES", "LINK", "OWNER", "STATE"], &rows);
    if pods.iter().any(|pod| pod["orphan"] == true) {
        text.push_str(
            "orphans: the container is gone and nobody has given its address back; the runtime's garbage \
             collection does, or DEL\n",
        );
    }
    text
}

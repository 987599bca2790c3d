//! `gossamer pods`: lists this node's pods and their addresses.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::{Client, output::table, query_and_print};
use crate::api;

/// Characters of a container's id in the narrow form. They are enough to distinguish ids.
pub const SHORT_ID_CHARS: usize = 13;

#[derive(Debug, Args)]
pub struct PodsArgs {
    #[command(flatten)]
    client: Client,
    /// Release the addresses of pods that are gone, and list those pods
    #[arg(long)]
    release: bool,
}

pub fn run(PodsArgs { client, release }: &PodsArgs) -> ExitCode {
    let socket = client.socket();
    let printed = if *release {
        query_and_print(client, api::post(&socket, "/v1/pods/release"), released)
    } else {
        query_and_print(client, api::get(&socket, "/v1/pods"), text)
    };
    printed.map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(answer: &Value, wide: bool) -> String {
    let pods = answer["pods"].as_array().map(Vec::as_slice).unwrap_or_default();
    if pods.is_empty() {
        return "no pods made by a runtime's plugin (CNI, Docker, Podman) on this host\n"
            .to_owned();
    }
    let mut text = table_of(pods, wide);
    if pods.iter().any(|pod| pod["orphan"] == true) {
        text.push_str(
            "orphan: the container is gone, but its runtime has not released its addresses; the agent does \
             so after a while, `gossamer pods --release` does it now\n",
        );
    }
    text
}

fn released(answer: &Value, wide: bool) -> String {
    match answer["released"].as_array().map(Vec::as_slice).unwrap_or_default() {
        [] => "no pod is gone: nothing was released\n".to_owned(),
        pods => table_of(pods, wide),
    }
}

fn table_of(pods: &[Value], wide: bool) -> String {
    let shown = if wide { usize::MAX } else { SHORT_ID_CHARS };
    let cell = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let row = |pod: &Value| {
        let addresses = pod["addresses"].as_array().into_iter().flatten().map(cell);
        [
            cell(&pod["container"]).chars().take(shown).collect(),
            cell(&pod["interface"]),
            addresses.collect::<Vec<_>>().join(", "),
            cell(&pod["link"]),
            cell(&pod["owner"]),
            match (pod["orphan"] == true, pod["netns"] == "") {
                (true, _) => "orphan",
                // Reserved by Docker, for a container that is about to start, or for a network.
                (_, true) => "reserved",
                _ => "connected",
            }
            .to_owned(),
        ]
    };
    let rows: Vec<[String; 6]> = pods.iter().map(row).collect();
    table(["CONTAINER", "INTERFACE", "ADDRESSES", "LINK", "OWNER", "STATE"], &rows)
}

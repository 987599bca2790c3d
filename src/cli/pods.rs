//! `gossamer pods`: which container has which address.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::{Client, ask_and_print, output::table};
use crate::api;

/// Enough of a container's id to tell it from others; the wide form has all of it.
const SHOWN: usize = 13;

#[derive(Debug, Args)]
pub struct PodsArgs {
    #[command(flatten)]
    client: Client,
    /// Take back the addresses of pods that are gone, and list those
    #[arg(long)]
    release: bool,
}

pub fn run(PodsArgs { client, release }: &PodsArgs) -> ExitCode {
    let socket = client.socket();
    let done = if *release {
        ask_and_print(client, api::post(&socket, "/v1/pods/release"), released)
    } else {
        ask_and_print(client, api::get(&socket, "/v1/pods"), text)
    };
    done.map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(answer: &Value, wide: bool) -> String {
    let pods = answer["pods"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut text = table_of(pods, wide);
    if pods.iter().any(|pod| pod["orphan"] == true) {
        text.push_str(
            "orphans: the container is gone and its runtime has not said so; the agent takes such addresses \
             back by itself, `gossamer pods --release` at once\n",
        );
    }
    text
}

fn released(answer: &Value, wide: bool) -> String {
    match answer["released"].as_array().map(Vec::as_slice).unwrap_or_default() {
        [] => "no pod is gone: nothing was taken back\n".to_owned(),
        pods => table_of(pods, wide),
    }
}

fn table_of(pods: &[Value], wide: bool) -> String {
    let shown = if wide { usize::MAX } else { SHOWN };
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
                // For a container that Docker is about to start, or by a network of Docker's.
                (_, true) => "reserved",
                _ => "connected",
            }
            .to_owned(),
        ]
    };
    let rows: Vec<[String; 6]> = pods.iter().map(row).collect();
    table(["CONTAINER", "INTERFACE", "ADDRESSES", "LINK", "OWNER", "STATE"], &rows)
}

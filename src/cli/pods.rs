//! `gossamer pods`: lists this node's pods and their addresses.

use std::process::ExitCode;

use clap::Args;

use super::{Client, output::table, query_and_print};
use crate::api::{self, PodStatus, Pods, Released};

/// Characters of a container's id in the narrow form. They are enough to distinguish ids.
const SHORT_ID_CHARS: usize = 13;

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
        query_and_print(client, api::post_as(&socket, "/v1/pods/release"), released_text).map(drop)
    } else {
        query_and_print(client, api::get_as(&socket, "/v1/pods"), text).map(drop)
    };
    printed.map_or_else(|code| code, |()| ExitCode::SUCCESS)
}

/// Returns the part of a container's id that distinguishes it.
pub fn short_id(pod: &PodStatus) -> String {
    pod.container.chars().take(SHORT_ID_CHARS).collect()
}

fn text(Pods { pods }: &Pods, wide: bool) -> String {
    if pods.is_empty() {
        return "no pods made by a runtime's plugin (CNI, Docker, Podman) on this host\n"
            .to_owned();
    }
    let mut text = table_of(pods, wide);
    if pods.iter().any(|pod| pod.orphan) {
        text.push_str(
            "orphan: the container is gone, but its runtime has not released its addresses; the agent does \
             so after a while, `gossamer pods --release` does it now\n",
        );
    }
    text
}

fn released_text(Released { released }: &Released, wide: bool) -> String {
    match &released[..] {
        [] => "no pod is gone: nothing was released\n".to_owned(),
        pods => table_of(pods, wide),
    }
}

fn table_of(pods: &[PodStatus], wide: bool) -> String {
    let row = |pod: &PodStatus| {
        let container = if wide { pod.container.clone() } else { short_id(pod) };
        let state = match pod {
            PodStatus { orphan: true, .. } => "orphan",
            // Reserved by Docker, for a container that is about to start, or for a network.
            PodStatus { netns, .. } if netns.is_empty() => "reserved",
            _ => "connected",
        };
        let addresses = pod.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        let PodStatus { interface, link, owner, .. } = pod.clone();
        [container, interface, addresses.join(", "), link, owner, state.to_owned()]
    };
    let rows: Vec<[String; 6]> = pods.iter().map(row).collect();
    table(["CONTAINER", "INTERFACE", "ADDRESSES", "LINK", "OWNER", "STATE"], &rows)
}

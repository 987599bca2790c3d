//! Says on a terminal what a destructive command costs, and asks before it is carried out.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
};

use clap::Args;
use ipnet::IpNet;

use super::{block_on, output::first_names, pods::short_id};
use crate::{
    api::{self, Membership, PodStatus, Pods},
    model::visible_lines,
};

/// Most pods that a question names.
const MAX_NAMED_PODS: usize = 10;

/// The option of every destructive command.
#[derive(Clone, Copy, Debug, Args)]
pub struct Consent {
    /// Do not ask. Without a terminal the command proceeds without asking
    #[arg(short, long)]
    yes: bool,
}

impl Consent {
    /// Returns a consent that was given already.
    pub const fn given() -> Self {
        Self { yes: true }
    }

    /// Returns whether the command would ask.
    pub fn asks(self) -> bool {
        !self.yes && io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// Asks, and returns the exit code of the command if the operator refuses. `costs` is called only if
    /// there is a question.
    ///
    /// # Errors
    /// The exit code for "no".
    pub fn obtain(self, costs: impl FnOnce() -> String) -> Result<(), ExitCode> {
        if !self.asks() {
            return Ok(());
        }
        eprint!("{}\nContinue? [y/N] ", visible_lines(&costs()));
        let _ = io::stderr().flush();
        let mut answer = String::new();
        let read = io::stdin().read_line(&mut answer);
        if read.is_ok() && ["y", "yes"].contains(&answer.trim().to_lowercase().as_str()) {
            return Ok(());
        }
        eprintln!("nothing was done");
        Err(ExitCode::FAILURE)
    }
}

/// Describes what this host loses if it leaves its cluster or becomes a new node: pods and subnets.
///
/// # Errors
/// Fails if the agent does not say it.
pub fn loss_of_membership(socket: &Path) -> anyhow::Result<String> {
    let query = async {
        let membership: Membership = api::get_as(socket, "/v1/status").await?;
        anyhow::Ok((membership, api::get_as(socket, "/v1/pods").await?))
    };
    let (membership, Pods { pods }) = block_on(query)??;
    let subnets = membership.subnet.iter().chain(&membership.subnet6);
    let subnets: Vec<String> = subnets.map(IpNet::to_string).collect();
    let subnets = match subnets.is_empty() {
        true => "has no subnet".to_owned(),
        false => format!("gives up {}", subnets.join(" and ")),
    };
    Ok(format!("This host ({}) {subnets}, {}.", membership.name, lost_pods(&pods)))
}

/// Does the same, and says that the loss is not known if the agent does not say it.
pub fn possible_loss_of_membership(socket: &Path) -> String {
    loss_of_membership(socket).unwrap_or_else(|error| {
        format!("This host may lose its subnet and its pods' network: {error}.")
    })
}

/// Names the pods that lose their network.
fn lost_pods(pods: &[PodStatus]) -> String {
    let mut names: Vec<String> = pods.iter().filter(|pod| !pod.orphan).map(short_id).collect();
    names.sort();
    names.dedup();
    let shown = first_names(&names, MAX_NAMED_PODS);
    match names.len() {
        0 => "and has no pods made by a runtime's plugin".to_owned(),
        1 => format!("and 1 pod loses its network: {shown}"),
        count => format!("and {count} pods lose their network: {shown}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_pods_are_named_once_and_without_orphans() {
        let pod = |id: &str, orphan: bool| PodStatus {
            container: id.to_owned(),
            interface: "eth0".to_owned(),
            owner: String::new(),
            addresses: Vec::new(),
            link: String::new(),
            netns: String::new(),
            orphan,
        };
        let none = "and has no pods made by a runtime's plugin";
        assert_eq!(lost_pods(&[pod("gone", true)]), none);
        let two = [pod("web", false), pod("q", false), pod("q", false)];
        assert_eq!(lost_pods(&two), "and 2 pods lose their network: q, web");
        let many: Vec<PodStatus> = (10..22).map(|n| pod(&format!("p{n}"), false)).collect();
        let many = lost_pods(&many);
        assert!(many.ends_with("p18, p19 and 2 more"), "{many}");
    }
}

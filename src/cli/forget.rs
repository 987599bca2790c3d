//! `gossamer forget`: removes members that are gone for good and reclaims their subnets.

use std::{net::IpAddr, process::ExitCode, time::Duration};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{Client, block_on, confirm::Consent, fail, percent_encoded, query_and_print};
use crate::{
    api::{self, AgentStatus, ClientError, Forgotten, Member, MemberState, PathStatus},
    core::{CannotForget, sign_of_host},
    model::PathState,
};

#[derive(Debug, Args)]
pub struct ForgetArgs {
    /// Name, id, beginning of the id, or address of the member
    #[arg(required_unless_present = "former_selves")]
    node: Option<String>,
    /// Forget earlier identities of living hosts: members that do not answer and have the name and the
    /// address of a living member
    #[arg(long, conflicts_with_all = ["node", "force"])]
    former_selves: bool,
    /// Do not wait for the other members, and also forget a member that looks alive or whose kernel answers.
    /// Two nodes may get the
    /// same subnet if that member still runs, or has granted a subnet to a node that this node does not know
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    client: Client,
}

/// The answer to --former-selves.
#[derive(Serialize, Deserialize)]
struct ForgottenSelves {
    forgotten: Vec<Forgotten>,
}

pub fn run(args: &ForgetArgs) -> ExitCode {
    match &args.node {
        Some(node) => forget_one(args, node),
        None => forget_former_selves(args),
    }
}

fn forget_one(args: &ForgetArgs, node: &str) -> ExitCode {
    if args.consent.asks()
        && !args.force
        && let Some(refusal) = refusal(&args.client, node)
    {
        return fail(refusal);
    }
    let costs = || {
        let warning = args.force.then(|| running_host(&args.client, node)).flatten();
        format!(
            "{}{node} is removed for good, and its subnets go to this node. If that host returns, it joins \
             as a new node, and its pods lose their addresses.",
            warning.unwrap_or_default()
        )
    };
    if let Err(code) = args.consent.obtain(costs) {
        return code;
    }
    let query = forget(&args.client, node, args.force);
    query_and_print(&args.client, query, |answer, _| outcome(answer))
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

/// Returns why the agent will refuse the command, before anything is asked: no agent answers, or the member
/// is alive.
fn refusal(client: &Client, whom: &str) -> Option<String> {
    let status: AgentStatus = match block_on(api::get_as(&client.socket(), "/v1/status")) {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => return Some(error.to_string()),
        Err(error) => return Some(error.to_string()),
    };
    let meant = meant(&status, whom);
    let [member] = meant[..] else { return None };
    if member.me {
        return Some(CannotForget::Myself.to_string());
    }
    let is_active = matches!(member.state(), MemberState::Alive | MemberState::Suspect);
    is_active.then(|| CannotForget::Alive(member.label.clone()).to_string())
}

/// Returns the members that a name, label, id or address stands for.
fn meant<'a>(status: &'a AgentStatus, whom: &str) -> Vec<&'a Member> {
    let ip: Option<IpAddr> = whom.parse().ok();
    let is_meant = |member: &&Member| {
        member.name == whom
            || member.label == whom
            || member.node.to_string() == whom
            || ip == Some(member.address.ip())
    };
    status.members.iter().filter(is_meant).collect()
}

/// Warns of a member whose host runs, as its packets or the answers of its kernel show.
fn running_host(client: &Client, whom: &str) -> Option<String> {
    let status: AgentStatus = block_on(api::get_as(&client.socket(), "/v1/status")).ok()?.ok()?;
    let members = meant(&status, whom);
    let is_path = |path: &&PathStatus| members.iter().any(|member| member.node == path.node);
    let sign = status.paths.iter().filter(is_path).find_map(sign_of_path)?;
    Some(format!(
        "{whom} still runs: {sign}. If it has pods, two hosts get one subnet, and packets to its pods are \
         lost. Stop that host first.\n"
    ))
}

/// Returns what shows that a host runs.
fn sign_of_path(path: &PathStatus) -> Option<String> {
    let shows_life = path.state.shows_life();
    if !shows_life && !path.pods_answer {
        return None;
    }
    let answers = shows_life && path.state != PathState::OneWay;
    let round_trip = path.round_trip_ms.filter(|_| answers);
    Some(sign_of_host(round_trip.map(|time| Duration::from_secs_f64(time / 1_000.0))))
}

async fn forget(client: &Client, node: &str, force: bool) -> Result<Forgotten, ClientError> {
    let target = format!("/v1/forget?node={}&force={force}", percent_encoded(node));
    api::post_as(&client.socket(), &target).await
}

fn forget_former_selves(args: &ForgetArgs) -> ExitCode {
    let status: AgentStatus = match block_on(api::get_as(&args.client.socket(), "/v1/status")) {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => return fail(error),
        Err(error) => return fail(error),
    };
    let former: Vec<&Member> = status.members.iter().filter(|member| member.former_self).collect();
    let costs = || {
        let labels: Vec<&str> = former.iter().map(|member| &*member.label).collect();
        format!("These members are removed, and their subnets reclaimed: {}.", labels.join(", "))
    };
    if !former.is_empty()
        && let Err(code) = args.consent.obtain(costs)
    {
        return code;
    }
    let query = async {
        let mut forgotten = Vec::new();
        for member in &former {
            forgotten.push(forget(&args.client, &member.node.to_string(), false).await?);
        }
        Ok(ForgottenSelves { forgotten })
    };
    let text = |ForgottenSelves { forgotten }: &ForgottenSelves, _| match &forgotten[..] {
        [] => "no member is a former self of a living host\n".to_owned(),
        all => all.iter().map(outcome).collect(),
    };
    query_and_print(&args.client, query, text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn outcome(Forgotten { label: node, slots, waits_for, .. }: &Forgotten) -> String {
    let waits = waits_for.as_deref().unwrap_or_default();
    match (slots, waits) {
        (0, _) => format!("{node} is forgotten; it owned no subnets\n"),
        (_, []) => {
            let subnets = subnets_text(*slots);
            format!("{node} is forgotten. This node takes over {subnets} of {node} now\n")
        }
        _ => format!(
            "{node} is forgotten. This node takes over {} of {node} when all other members have \
             acknowledged. Asked: {}. `gossamer status` lists the members that have not acknowledged\n",
            subnets_text(*slots),
            waits.join(", ")
        ),
    }
}

fn subnets_text(count: u32) -> String {
    if count == 1 { "the subnet".to_owned() } else { format!("the {count} subnets") }
}

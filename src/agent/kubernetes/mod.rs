//! What Kubernetes says of this node: its subnets (`spec.podCIDRs`), and where the others are.
//!
//! It is read with the pod's own service account, and the subnets are kept on disk: a node that starts while
//! the API server gives no answer about it goes on with what it was given before. Nothing is written there.
//!
//! Two kinds of failure are kept apart. A node that is not registered, or that has no subnet, may have lost
//! what it had to another node. Every other failure, a denial too, says nothing about the node.

mod answer;
mod api;
mod inquiry;

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use ipnet::IpNet;

pub(super) use self::inquiry::{NodeReport, Source};
use super::{StartFailure, startup_wait::StartupWait};
use crate::{config::PodCidr, files, model::Pool, store::StateDir};

/// Pause after a failure that names no other one.
const RETRY: Duration = Duration::from_secs(2);

/// What a node has been given.
#[derive(Debug)]
pub(super) struct Given {
    pub(super) cidrs: Vec<IpNet>,
    /// First address of its subnet in the first network of the pool.
    pub(super) address: IpAddr,
    /// Addresses of other nodes, or why they are not known.
    pub(super) others: Result<Vec<IpAddr>, String>,
}

/// Why a subnet is not known.
#[derive(Debug, PartialEq, Eq)]
enum Unknown {
    /// The source speaks of this node, and gives it no usable subnet.
    Said(String),
    /// The source says nothing about this node.
    Unanswered { why: String, pause: Duration },
}

impl Unknown {
    fn unanswered(why: impl Into<String>) -> Self {
        Self::Unanswered { why: why.into(), pause: RETRY }
    }
}

/// Whether an answer may come from the API server's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Age {
    Cached,
    Newest,
}

/// Finds out what this node has been given, and waits for it if need be; none if a signal ends the agent
/// first.
///
/// # Errors
/// The state directory fails, or a subnet of the settings does not fit the network.
pub(super) async fn find(
    source: &PodCidr,
    name: &str,
    pool: &Pool,
    state: &StateDir,
    waiting: &mut StartupWait<'_>,
) -> Result<Option<Given>, StartFailure> {
    waiting.set_activity("waiting for Kubernetes: it was asked for this node's subnet");
    loop {
        let Some(asked) = waiting.run(ask(source, name, pool, Age::Newest)).await else {
            return Ok(None);
        };
        let (why, pause) = match asked {
            Ok((cidrs, address)) => {
                state.save_pod_cidrs(&cidrs)?;
                answer::warn_of_unused(&cidrs, pool);
                let Some(others) = waiting.run(others(source, name)).await else {
                    return Ok(None);
                };
                return Ok(Some(Given { cidrs, address, others }));
            }
            Err(Unknown::Said(why)) if matches!(source, PodCidr::Values(_)) => {
                return Err(StartFailure::PodCidr(why));
            }
            // What it had may have been given to another node meanwhile.
            Err(Unknown::Said(why)) => (why, RETRY),
            Err(Unknown::Unanswered { why, pause }) => {
                let cidrs = state.pod_cidrs()?;
                if let Ok(address) = answer::fit(&cidrs, pool) {
                    tracing::warn!(%why, ?cidrs, "no answer from Kubernetes: the subnet of the last run");
                    return Ok(Some(Given { cidrs, address, others: Err(why) }));
                }
                (why, pause)
            }
        };
        waiting.report_problem(format!("waiting for Kubernetes: {why}"));
        if waiting.run(tokio::time::sleep(pause)).await.is_none() {
            return Ok(None);
        }
    }
}

/// The subnets of this node, and the first address of the first one in the pool.
async fn ask(
    source: &PodCidr,
    name: &str,
    pool: &Pool,
    age: Age,
) -> Result<(Vec<IpNet>, IpAddr), Unknown> {
    let cidrs = match source {
        PodCidr::Values(cidrs) => cidrs.clone(),
        PodCidr::File(path) => read_file(path).map_err(Unknown::Said)?,
        PodCidr::Api => api::cidrs_of(name, age).await?,
    };
    let address = answer::fit(&cidrs, pool).map_err(Unknown::Said)?;
    Ok((cidrs, address))
}

async fn others(source: &PodCidr, name: &str) -> Result<Vec<IpAddr>, String> {
    match source {
        PodCidr::Values(_) | PodCidr::File(_) => Ok(Vec::new()),
        PodCidr::Api => api::addresses_of_others(name).await.inspect_err(|why| {
            tracing::warn!(%why, "Kubernetes does not list the other nodes: trying again");
        }),
    }
}

fn read_file(path: &Path) -> Result<Vec<IpNet>, String> {
    let field = format!("pod_cidr_file {}", path.display());
    let text = files::read_text(path, files::SMALL).map_err(|error| format!("{field}: {error}"))?;
    let cidrs: Option<Vec<IpNet>> = text
        .split([',', ' ', '\n'])
        .filter(|word| !word.is_empty())
        .map(|word| word.parse().ok())
        .collect();
    cidrs
        .filter(|cidrs| !cidrs.is_empty())
        .ok_or_else(|| format!("{field}: {:?} is no subnet", answer::shortened(text.trim())))
}

/// Other nodes, as names to join by.
pub(super) fn seeds(others: &[IpAddr], port: u16) -> Vec<String> {
    others.iter().map(|ip| SocketAddr::new(*ip, port).to_string()).collect()
}

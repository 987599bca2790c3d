//! What Kubernetes knows about this node: its subnets (`spec.podCIDRs`), and the addresses of the other
//! nodes.
//!
//! The API server is read with the service account of the pod. The subnets are stored on disk, so a node that
//! starts while the API server gives no answer about it uses the subnets of its last run. The agent writes
//! nothing to Kubernetes.
//!
//! Two kinds of failure are distinguished. A node that is not registered, or has no subnet, may have lost its
//! earlier subnet to another node. Every other failure, including a denial of access, says nothing about the
//! node.

mod answer;
mod api;
mod poll;

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use ipnet::IpNet;

pub(crate) use self::{
    answer::{fit, warn_of_unused},
    poll::{Change, NodeReport, PodCidrSource},
};
use crate::{config::PodCidr, files, model::Pool};

/// Pause after a failure whose answer names no other pause.
pub(crate) const RETRY: Duration = Duration::from_secs(2);

/// The subnets assigned to this node.
#[derive(Debug)]
pub(crate) struct Assignment {
    /// The subnets, as Kubernetes or the settings list them.
    pub(crate) cidrs: Vec<IpNet>,
    /// First address of the subnet in the first network of the pool.
    pub(crate) address: IpAddr,
    /// Addresses of other nodes, or why they are unknown.
    pub(crate) others: Result<Vec<IpAddr>, String>,
}

/// Why the subnet of this node is unknown.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LookupError {
    /// The source has an answer about this node, which contains no usable subnet.
    NotAssigned(String),
    /// The source has no answer about this node. The next query waits for `pause`.
    NoAnswer { why: String, pause: Duration },
}

impl LookupError {
    /// Returns a [`LookupError::NoAnswer`] with the pause [`RETRY`].
    fn no_answer(why: impl Into<String>) -> Self {
        Self::NoAnswer { why: why.into(), pause: RETRY }
    }
}

/// Whether an answer may come from the API server's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// It may.
    Cached,
    /// It must be the newest state.
    Newest,
}

/// Returns the subnets of this node, and the first address of the subnet in the first network of the pool.
pub(crate) async fn query(
    source: &PodCidr,
    name: &str,
    pool: &Pool,
    age: Freshness,
) -> Result<(Vec<IpNet>, IpAddr), LookupError> {
    let cidrs = match source {
        PodCidr::Values(cidrs) => cidrs.clone(),
        PodCidr::File(path) => read_file(path).map_err(LookupError::NotAssigned)?,
        PodCidr::Api => api::cidrs_of(name, age).await?,
    };
    let address = fit(&cidrs, pool).map_err(LookupError::NotAssigned)?;
    Ok((cidrs, address))
}

/// Returns the addresses of other nodes, which only the API server lists.
pub(crate) async fn others(source: &PodCidr, name: &str) -> Result<Vec<IpAddr>, String> {
    match source {
        PodCidr::Values(_) | PodCidr::File(_) => Ok(Vec::new()),
        PodCidr::Api => api::addresses_of_others(name).await.inspect_err(|why| {
            tracing::warn!(%why, "Kubernetes does not list the other nodes; retrying");
        }),
    }
}

/// Reads the subnets from the file of `pod_cidr_file`.
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

/// Returns the addresses of other nodes as seeds.
pub(crate) fn seeds(others: &[IpAddr], port: u16) -> Vec<String> {
    others.iter().map(|ip| SocketAddr::new(*ip, port).to_string()).collect()
}

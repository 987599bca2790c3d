//! Waiting at startup for the subnets that Kubernetes or the settings assign to this node.

use super::{StartFailure, wait::StartupWait};
use crate::{
    config::PodCidr,
    kubernetes::{self, Assignment, Freshness, LookupError, RETRY},
    model::Pool,
    store::StateDir,
};

/// Finds the subnets of this node, and waits until it has some; `None` if a signal ends the agent first.
///
/// # Errors
/// Fails when the state directory fails, or a subnet of the settings does not fit the network.
pub(super) async fn find(
    source: &PodCidr,
    name: &str,
    pool: &Pool,
    state: &StateDir,
    waiting: &mut StartupWait<'_>,
) -> Result<Option<Assignment>, StartFailure> {
    waiting.set_activity("waiting for Kubernetes: requesting this node's subnet");
    loop {
        let Some(result) =
            waiting.run(kubernetes::query(source, name, pool, Freshness::Newest)).await
        else {
            return Ok(None);
        };
        let (why, pause) = match result {
            Ok((cidrs, address)) => {
                state.save_pod_cidrs(&cidrs)?;
                kubernetes::warn_of_unused(&cidrs, pool);
                let Some(others) = waiting.run(kubernetes::others(source, name)).await else {
                    return Ok(None);
                };
                return Ok(Some(Assignment { cidrs, address, others }));
            }
            Err(LookupError::NotAssigned(why)) if matches!(source, PodCidr::Values(_)) => {
                return Err(StartFailure::PodCidr(why));
            }
            // Another node may have the earlier subnet by now.
            Err(LookupError::NotAssigned(why)) => (why, RETRY),
            Err(LookupError::NoAnswer { why, pause }) => {
                let cidrs = state.pod_cidrs()?;
                if let Ok(address) = kubernetes::fit(&cidrs, pool) {
                    tracing::warn!(
                        %why,
                        ?cidrs,
                        "no answer from Kubernetes; the subnet of the last run is used"
                    );
                    return Ok(Some(Assignment { cidrs, address, others: Err(why) }));
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

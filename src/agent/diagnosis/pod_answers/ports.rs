//! Queueing disciplines and filters that other programs have attached to the ports of pods. They cause a
//! warning, as they may drop packets that no trial sends.

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use super::{PodRoster, RosterPod};
use crate::{
    agent::diagnosis::hooks,
    model::{Problem, ProblemCode},
    netlink::Netlink,
};

/// Time between checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Limit of pods that are named, each with what was found.
const MAX_NAMED: usize = 3;

/// What the last check found, by the name of the pods' interfaces on this host.
#[derive(Default)]
pub struct Ports {
    found: BTreeMap<String, Vec<String>>,
    checked_at: Option<Instant>,
}

impl Ports {
    /// Reads the ports of the pods in the roster, if [`CHECK_INTERVAL`] has passed.
    ///
    /// # Errors
    /// Fails when the kernel does not report interfaces or queueing disciplines.
    pub fn check(&mut self, netlink: &mut Netlink, roster: &PodRoster) -> io::Result<()> {
        let now = Instant::now();
        if self.checked_at.is_some_and(|checked_at| now.duration_since(checked_at) < CHECK_INTERVAL)
        {
            return Ok(());
        }
        self.checked_at = Some(now);
        let qdiscs = netlink.all_qdiscs()?;
        let mut found = BTreeMap::new();
        for link in netlink.links()? {
            let Some(qdiscs) = qdiscs.get(&link.index) else { continue };
            if roster.pods.contains_key(&link.name) {
                let sentences = hooks::at_pod_port(netlink, &link, qdiscs);
                if !sentences.is_empty() {
                    found.insert(link.name, sentences);
                }
            }
        }
        self.found = found;
        Ok(())
    }

    /// Returns one notice for each pod that still exists, up to a limit. Silent pods are omitted: a problem
    /// reports them.
    pub fn notices<'a>(
        &self,
        roster: &PodRoster,
        silent: impl Iterator<Item = &'a str> + Clone,
    ) -> Vec<Problem> {
        let is_silent = |port: &str| silent.clone().any(|silent| silent == port);
        let pods = self.found.iter().filter(|(port, _)| !is_silent(port));
        let pods = pods.filter_map(|(port, found)| Some((roster.pods.get(port)?, found)));
        let mut notices: Vec<Problem> = pods
            .map(|(RosterPod { pod, .. }, found)| {
                let address = pod.addresses.first;
                let name = &pod.attachment;
                let what = format!("pod {name} ({address}): {}", found.join("; "));
                Problem::new(ProblemCode::PodFilter, name, what, "").notice()
            })
            .collect();
        let more = notices.len().saturating_sub(MAX_NAMED);
        notices.truncate(MAX_NAMED);
        if more > 0 {
            let what = format!(
                "{more} more pods of this host have queueing disciplines or filters of other programs on \
                 their interfaces"
            );
            notices.push(Problem::new(ProblemCode::PodFilter, "other pods", what, "").notice());
        }
        notices
    }
}

//! What other programs have hung on the ports of pods: read, and warned of, for it may drop what no trial
//! sends.

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use super::{Asked, Roster};
use crate::{agent::hooks, netlink::Netlink};

/// From one look to the next.
const LOOK: Duration = Duration::from_secs(10);
/// Pods that are named, each with what was found.
const NAMED: usize = 3;

/// What was found at the last look, by the names of the pods' interfaces on this host.
#[derive(Default)]
pub struct Ports {
    found: BTreeMap<String, Vec<String>>,
    looked: Option<Instant>,
}

impl Ports {
    /// Reads the ports of all these pods, if it is time.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn look(&mut self, netlink: &mut Netlink, roster: &Roster) -> io::Result<()> {
        let now = Instant::now();
        if self.looked.is_some_and(|looked| now.duration_since(looked) < LOOK) {
            return Ok(());
        }
        self.looked = Some(now);
        let qdiscs = netlink.all_qdiscs()?;
        let mut found = BTreeMap::new();
        for link in netlink.links()? {
            let Some(qdiscs) = qdiscs.get(&link.index) else { continue };
            if roster.pods.contains_key(&link.name) {
                let sentences = hooks::of_pod(netlink, &link, qdiscs);
                if !sentences.is_empty() {
                    found.insert(link.name, sentences);
                }
            }
        }
        self.found = found;
        Ok(())
    }

    /// Sentences about pods that are still there. What makes a pod silent is a problem, and is told as one.
    pub fn warnings<'a>(
        &self,
        roster: &Roster,
        silent: impl Iterator<Item = &'a str> + Clone,
    ) -> Vec<String> {
        let is_told = |port: &str| silent.clone().any(|silent| silent == port);
        let pods = self.found.iter().filter(|(port, _)| !is_told(port));
        let pods = pods.filter_map(|(port, found)| Some((roster.pods.get(port)?, found)));
        let mut warnings: Vec<String> = pods
            .map(|(Asked { pod, .. }, found)| {
                let address = pod.addresses.first;
                format!("pod {} ({address}): {}", pod.attachment, found.join("; "))
            })
            .collect();
        let more = warnings.len().saturating_sub(NAMED);
        warnings.truncate(NAMED);
        if more > 0 {
            warnings.push(format!(
                "{more} more pods of this host have queueing disciplines or filters of other programs on \
                 their interfaces, as those have that are named"
            ));
        }
        warnings
    }
}

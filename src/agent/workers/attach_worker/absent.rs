//! Veth pairs of pods that are missing, and veth pairs that no container uses.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
    time::Instant,
};

use super::{AttachResult, GonePods, RECHECK_INTERVAL, Suspect};
use crate::pods::{
    desired::{RepairReport, Tenants},
    wiring::{Wiring, loose_end},
};

/// Veth pairs whose loose ends Docker has fetched. Docker returns an end to this host when the container
/// has ended or left the network, and reports it to the agent if that runs.
#[derive(Default)]
pub(super) struct Fetched(pub(super) BTreeSet<String>);

impl Fetched {
    /// Returns the veth pairs that belong to no container any more: missing ones, and those whose loose
    /// end has returned.
    pub(super) fn gone(&mut self, tenants: &Tenants, seen: &RepairReport) -> BTreeSet<String> {
        let is_fetched =
            |veth: &&String| !seen.absent.contains(*veth) && !seen.loose.contains(*veth);
        self.0.extend(tenants.keys().filter(is_fetched).cloned());
        self.0.retain(|veth| tenants.contains_key(veth));
        seen.absent.iter().chain(seen.loose.intersection(&self.0)).cloned().collect()
    }
}

/// Reports missing veth pairs whenever they change, and those that have been missing for
/// [`RECHECK_INTERVAL`].
pub(super) fn report_absent(
    known: &mut BTreeMap<String, Instant>,
    absent: &BTreeSet<String>,
    now: Instant,
    report: &impl Fn(AttachResult),
) {
    let before = known.len();
    known.retain(|link, _| absent.contains(link));
    let mut is_news = known.len() != before;
    for link in absent {
        is_news |= !known.contains_key(link);
        known.entry(link.clone()).or_insert(now);
    }
    let confirmed: BTreeSet<String> = known
        .iter()
        .filter(|(_, since)| now.duration_since(**since) >= RECHECK_INTERVAL)
        .map(|(link, _)| link.clone())
        .collect();
    if is_news || !confirmed.is_empty() {
        report(AttachResult::Absent { links: absent.clone(), confirmed });
    }
}

/// Classifies pods by the kernel's veth pairs and the paths of their namespaces.
pub(super) fn look(
    pods: Vec<Suspect>,
    wiring: &mut Wiring,
    fetched: &Fetched,
) -> io::Result<GonePods> {
    let links = wiring.links()?;
    let mut looked = GonePods::default();
    for Suspect { link, netns } in pods {
        let is_back = links.contains_key(&loose_end(&link)) && fetched.0.contains(&link);
        match links.get(&link).filter(|_| !is_back) {
            None => _ = looked.gone.insert(link),
            // Another namespace may have the path by now.
            Some(namespace) if !wiring.leads_to(Path::new(&netns), *namespace) => {
                looked.going.insert(link);
            }
            Some(_) => {}
        }
    }
    Ok(looked)
}

//! Pods that lost their network when this host became a new node.
//!
//! Such a host gets another subnet, and the interfaces of its pods are removed. The pods run on without a
//! network until they are restarted, so the status names them as long as they exist.

use std::path::Path;

use crate::{
    agent::Agent,
    model::{Pod, Problem, ProblemCode, list_at_most},
    store::LostPod,
};

/// Most pods that the notice names.
const MAX_NAMED: usize = 5;

impl Agent {
    /// Returns the pods that lose their network now: those of this host, and those that lost it earlier.
    pub(in crate::agent) fn losing_pods(&self) -> Vec<LostPod> {
        let present = self.pods.table.iter().filter(|pod| self.is_present(pod));
        let mut lost: Vec<LostPod> = present.map(lost_pod).collect();
        lost.extend(self.pods.lost.iter().cloned());
        lost.sort();
        lost.dedup_by(|one, other| one.container == other.container);
        lost
    }

    /// Drops pods that were restarted or removed: nothing is at the path of their namespace any more, or
    /// they have an interface again.
    pub(in crate::agent) fn check_lost_pods(&mut self) {
        let table = &self.pods.table;
        let is_back =
            |lost: &LostPod| table.iter().any(|pod| pod.attachment.container() == lost.container);
        self.pods.lost.retain(|lost| Path::new(&lost.netns).exists() && !is_back(lost));
    }

    /// Returns a notice about pods that lost their network.
    pub(in crate::agent) fn lost_pods_notice(&self) -> Option<Problem> {
        notice(&self.pods.lost)
    }
}

fn lost_pod(pod: &Pod) -> LostPod {
    LostPod { container: pod.attachment.container().to_owned(), netns: pod.netns.clone() }
}

fn notice(lost: &[LostPod]) -> Option<Problem> {
    let mut names: Vec<&str> = lost.iter().map(|pod| pod.container.as_str()).collect();
    names.dedup();
    let (count, named) = (names.len(), list_at_most(&names, MAX_NAMED));
    let (what, fix) = match count {
        0 => return None,
        1 => (
            format!("1 pod lost its network when this host became a new node: {named}"),
            "restart it, so that it gets an address of the present subnet",
        ),
        _ => (
            format!("{count} pods lost their network when this host became a new node: {named}"),
            "restart them, so that they get addresses of the present subnet",
        ),
    };
    Some(Problem::new(ProblemCode::PodsOutside, "lost pods", what, fix).notice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_without_network_are_counted_and_the_first_named() {
        let lost = |numbers: std::ops::Range<u32>| -> Vec<LostPod> {
            let pod = |n| LostPod { container: format!("c{n}"), netns: String::new() };
            numbers.map(pod).collect()
        };
        assert_eq!(notice(&[]), None);
        let one = notice(&lost(1..2)).expect("a notice");
        assert!(one.starts_with("1 pod lost its network when this host became a new node: c1"));
        let many = notice(&lost(0..8)).expect("a notice");
        assert!(many.starts_with("8 pods lost their network") && many.contains("c4 and 3 more"));
    }
}

//! What this host's output rules drop: tunnel packets that contain packets of pods, and ICMP errors for
//! packets that are too large. The kernel traces the packets during a trial.

use std::net::IpAddr;

use super::{TrialInput, explain::Reasons};
use crate::{
    dataplane::{
        foreign::trace::Trace,
        forwarding::{Direction, TrialWay},
        remedies::{accept_size_errors, open_chain},
    },
    model::{Problem, ProblemCode, family_name, rule_family},
};

impl Reasons {
    /// Starts a kernel trace of this host's ICMP errors to the trial's pod if they do not arrive, and of
    /// tunnel packets that contain that pod's packets if they do not leave. Returns `None` if neither is
    /// needed.
    pub fn trace(&self, setting: &TrialInput, closed: &[TrialWay]) -> Option<Trace> {
        let is_lost = |ip: &IpAddr| {
            let way = TrialWay { direction: Direction::TooLarge, ipv4: ip.is_ipv4() };
            closed.contains(&way) && !self.icmp_error_droppers.contains_key(&way.ipv4)
        };
        let shape = setting.shape.as_ref()?;
        let pods: Vec<IpAddr> = shape.addresses.iter().filter(is_lost).collect();
        let is_carried = |way: &TrialWay| way.direction == Direction::Carried;
        let traces_tunnels = self.tunnel_dropper.is_none() && closed.iter().any(is_carried);
        let tunnels = traces_tunnels.then_some(setting.local);
        let is_needed = !pods.is_empty() || traces_tunnels;
        let begun = is_needed.then(|| Trace::of_trial(&setting.device_name, &pods, tunnels))?;
        begun.inspect_err(|error| tracing::debug!(%error, "trial not traced")).ok()
    }

    /// Stores the causes that the trace shows.
    pub fn note_traced(&mut self, setting: &TrialInput, trace: &mut Trace) {
        if let Err(error) = trace.read() {
            tracing::debug!(%error, "trace not read");
        }
        let pods = setting.shape.iter().flat_map(|shape| shape.addresses.iter());
        let pods: Vec<IpAddr> = pods.collect();
        for pod in &pods {
            if let Some(by) = trace.report().dropped_to(*pod) {
                self.icmp_error_droppers.insert(pod.is_ipv4(), by);
            }
        }
        let by = trace.report().dropped_to_others(&pods);
        self.tunnel_dropper = by.or_else(|| self.tunnel_dropper.take());
    }

    /// Returns the problem of packets of pods that do not leave inside tunnel packets.
    pub fn carried(&self, closed: &[TrialWay], port: u16) -> Option<Problem> {
        let ways = closed.iter().filter(|way| way.direction == Direction::Carried);
        let families = ways.map(|way| family_name(way.ipv4));
        let families = families.collect::<Vec<_>>().join(", ");
        if families.is_empty() {
            return None;
        }
        let problem = |what: String, fix: String| {
            Problem::new(ProblemCode::TunnelOutput, &families, what, fix)
        };
        if !self.diverting_rules.is_empty() {
            let what = format!(
                "tunnel packets that carry packets of pods leave this host by another interface than those \
                 of its own programs, or not at all ({families})"
            );
            return Some(problem(what, self.diverting_rules.join("; ")));
        }
        if let Some(interface) = &self.diverted_interface {
            let what = format!(
                "tunnel packets that carry packets of pods leave this host by {interface}, those of its own \
                 programs by another interface ({families})"
            );
            let fix = "no policy rule that diverts them was found; check nft list ruleset, ip rule, tc \
                       filter show dev INTERFACE egress, and bpftool net";
            return Some(problem(what, fix.to_owned()));
        }
        let why = match (&self.tunnel_dropper, self.legacy.as_slice()) {
            (Some(by), _) => format!("{by} drops them: {}", open_chain(&by.chain, &[port])),
            (None, []) => {
                "no rule of nftables that drops them was found; check iptables-legacy -S OUTPUT, tc \
                           filter show dev INTERFACE egress, and bpftool net"
                    .to_owned()
            }
            (None, legacy) => legacy.join("; "),
        };
        let what = format!(
            "packets of pods do not leave this host inside tunnel packets ({families}), though those of \
             its own programs do. A rule may let packets pass by their user (-m owner, meta skuid); \
             forwarded packets have none"
        );
        Some(problem(what, why))
    }

    /// Returns problems of pods that do not learn that their packets are too large.
    pub fn too_large(&self, closed: &[TrialWay]) -> impl Iterator<Item = Problem> {
        let ways = closed.iter().filter(|way| way.direction == Direction::TooLarge);
        ways.map(|TrialWay { ipv4, .. }| {
            let said = if *ipv4 { "fragmentation needed" } else { "packet too big" };
            let program = format!("{}tables", rule_family(*ipv4));
            let why = match self.icmp_error_droppers.get(ipv4) {
                Some(by) => {
                    let fix = accept_size_errors(&by.chain, *ipv4);
                    format!("{by} drops it: {fix}")
                }
                None => format!(
                    "no rule of nftables that drops it was found; check {program}-legacy -S OUTPUT and \
                     bpftool net"
                ),
            };
            let family = family_name(*ipv4);
            let what = format!(
                "pods do not learn that a packet is too large for the tunnel ({family}), so connections of \
                 pods with a larger MTU hang: this host's ICMP message \"{said}\" does not reach them"
            );
            Problem::new(ProblemCode::TooLargeUnreported, family, what, why)
        })
    }
}

//! Ports of other programs on the pods' bridge.

use std::collections::BTreeSet;

use crate::{
    model::{Problem, ProblemCode, list_at_most},
    pods::desired::Bridge,
};

/// Maximum number of ports in a notice.
const SHOWN: usize = 4;

/// Returns the notice about ports of other programs on the pods' bridge.
pub(super) fn notice(bridge: &Bridge, foreign_ports: &BTreeSet<String>) -> Option<Problem> {
    let first = foreign_ports.first()?;
    let held = match bridge.anti_spoofing {
        true => {
            "any address but those of pods, of the gateway and of the agent's own pod (the last one)"
        }
        false => "any address, also those of pods (anti_spoofing is off)",
    };
    let (name, subnet) = (&bridge.name, bridge.subnets.first);
    let what = format!(
        "{} on the pods' bridge {name} is not gossamer's: its packets can use {held}",
        list_at_most(foreign_ports, SHOWN)
    );
    let fix = format!(
        "if it is there intentionally (a virtual machine), give it addresses of {subnet} that no pod has \
         (gossamer pods), else detach it: ip link set {first} nomaster"
    );
    Some(Problem::new(ProblemCode::ForeignPort, name, what, fix).notice())
}

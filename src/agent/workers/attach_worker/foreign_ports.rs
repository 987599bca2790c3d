//! Ports of other programs on the pods' bridge.

use std::collections::BTreeSet;

use crate::{
    model::{Problem, ProblemCode},
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
    let names: Vec<&str> = foreign_ports.iter().take(SHOWN).map(String::as_str).collect();
    let more = match foreign_ports.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let (name, subnet) = (&bridge.name, bridge.subnets.first);
    let what = format!(
        "{}{more} on the pods' bridge {name} is not gossamer's: its packets can use {held}",
        names.join(", ")
    );
    let fix = format!(
        "if it is there intentionally (a virtual machine), give it addresses of {subnet} that no pod has \
         (gossamer pods), else detach it: ip link set {first} nomaster"
    );
    Some(Problem::new(ProblemCode::ForeignPort, name, what, fix).notice())
}

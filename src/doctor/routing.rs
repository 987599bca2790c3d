//! Checks where the kernel sends packets to peers: the agent's results, or route lookups of its own.

use ipnet::IpNet;

use super::{Examination, Finding};
use crate::{
    api::{CheckState, CheckStatus},
    dataplane::{
        desired::device_name,
        kernel::{Extent, Kernel},
    },
    netlink::{Netlink, route::Query},
    pods::gateway,
};

/// Maximum number of routes that are checked if no agent runs.
const MAX_ROUTES: usize = 64;

/// Runs the check `routing`.
pub fn examine(examination: &Examination, findings: &mut Vec<Finding>) {
    let Some(status) = examination.status() else {
        return findings.push(without_agent(&device_name(examination.numbers().vni)));
    };
    let CheckStatus { state, detail } = &status.kernel.routing;
    match state {
        _ if examination.has_report("routing") => {}
        CheckState::Ok => findings.push(Finding::ok("routing", detail)),
        CheckState::Failing => {
            let seen = format!("{detail}: see the other checks");
            findings.push(Finding::skipped("routing", seen));
        }
        _ if detail.is_empty() => {
            findings.push(Finding::skipped("routing", "not checked yet"));
        }
        _ => findings.push(Finding::skipped("routing", detail)),
    }
}

/// Checks the routes of an agent that does not run. They keep working unless a policy rule overrides
/// them.
fn without_agent(device: &str) -> Finding {
    let checked = Kernel::open().and_then(|mut kernel| {
        let mut netlink = Netlink::open()?;
        let Some(link) = netlink.link(device)? else { return Ok(None) };
        let routes = kernel.leftovers(Extent::Everything)?.routes;
        let addresses = netlink.addresses()?;
        // An address of the bridge is in this host's own subnet.
        let is_own = |subnet: &IpNet| {
            let mut own = addresses.iter().filter(|address| address.link == link.index);
            own.any(|address| subnet.contains(&address.ip))
        };
        let mut elsewhere = Vec::new();
        let mut count = 0;
        let subnets = routes.iter().map(|(subnet, _)| subnet);
        let of_peers = subnets.filter(|subnet| !is_single(subnet) && !is_own(subnet));
        for subnet in of_peers.take(MAX_ROUTES) {
            let Ok(found) = netlink.route(&Query::to(gateway(*subnet))) else { continue };
            count += 1;
            if found.link != link.index && found.table != MAIN {
                elsewhere.push(format!("{subnet} (table {})", found.table));
            }
        }
        Ok(Some((count, elsewhere)))
    });
    match checked {
        Err(error) => Finding::skipped("routing", format!("netlink: {error}")).refused_by(&error),
        Ok(None | Some((0, _))) => Finding::skipped("routing", "there are no routes to peers"),
        Ok(Some((count, elsewhere))) if elsewhere.is_empty() => {
            Finding::ok("routing", format!("{count} subnets of peers have routes"))
        }
        Ok(Some((_, elsewhere))) => Finding::problem(
            "routing",
            format!("packets leave by another table than main: {}", elsewhere.join(", ")),
            "the overlay's routes are in the main table",
            "ip rule; give the overlay precedence: ip rule add to NETWORK lookup main priority NUMBER",
        ),
    }
}

/// `RT_TABLE_MAIN` of linux/rtnetlink.h.
const MAIN: u32 = 254;

fn is_single(subnet: &IpNet) -> bool {
    subnet.prefix_len() == subnet.max_prefix_len()
}

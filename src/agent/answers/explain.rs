//! What may drop the packets of a pod that does not answer: read, and never decided by. But a pod whose own
//! end is not as it was made is not asked for more: its own administrator has changed it.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::{Asked, Roster};
use crate::{
    agent::hooks::{self, Side},
    dataplane::answers::Loss,
    netlink::{Netlink, link::Link},
    pods::wiring::{Wiring, WiringError},
};

/// What was read is read again after so long.
const READ: Duration = Duration::from_secs(10);
/// Chains that are named at once.
const NAMED: usize = 3;

/// Sentences about pods that do not answer, by the names of their interfaces on this host.
#[derive(Default)]
pub struct Explained(BTreeMap<String, (Loss, Instant, Option<String>)>);

impl Explained {
    /// A sentence about each of these, but for pods that are as they are by their own will.
    pub fn sentences(
        &mut self,
        netlink: &mut Netlink,
        wiring: &mut Wiring,
        roster: &Roster,
        silent: &[(String, Loss)],
    ) -> Vec<String> {
        self.0.retain(|port, (loss, at, _)| {
            at.elapsed() < READ && silent.iter().any(|(name, of)| name == port && of == loss)
        });
        for (port, loss) in silent {
            let Some(asked) = roster.pods.get(port) else { continue };
            let read =
                || (*loss, Instant::now(), sentence(netlink, wiring, roster, asked, port, *loss));
            self.0.entry(port.clone()).or_insert_with(read);
        }
        self.0.values().filter_map(|(.., sentence)| sentence.clone()).collect()
    }
}

fn sentence(
    netlink: &mut Netlink,
    wiring: &mut Wiring,
    roster: &Roster,
    Asked { pod, mac }: &Asked,
    port: &str,
    loss: Loss,
) -> Option<String> {
    // It may be on its way out.
    let link = netlink.link(port).ok()??;
    let bridge = netlink.link(&roster.bridge).ok()??;
    let address = pod.addresses.first;
    let checked = (loss != Loss::Question).then(|| wiring.check(pod, None, *mac));
    let causes = match (loss, checked) {
        (Loss::Pod, Some(Err(_))) => return None,
        // Under another MAC than it was given: anti-spoofing drops that.
        (_, Some(Err(WiringError::Incomplete(what)))) => what,
        _ => causes(netlink, roster, [&link, &bridge], address, loss).join("; "),
    };
    let question = if address.is_ipv4() { "ARP" } else { "neighbor discovery" };
    let interface = pod.attachment.interface();
    let place = match loss {
        Loss::Question => format!("the question does not leave this host by {port}"),
        Loss::Answer => format!("its answer comes in by {port}, and this host drops it"),
        Loss::Pod => {
            format!("the question leaves by {port}, and no answer arrives from {interface}")
        }
    };
    let name = &pod.attachment;
    Some(format!("pod {name} ({address}, {port}) does not answer {question}: {place}: {causes}"))
}

/// What is in the way at the pod's interface, and at the bridge.
fn causes(
    netlink: &mut Netlink,
    roster: &Roster,
    links: [&Link; 2],
    address: IpAddr,
    loss: Loss,
) -> Vec<String> {
    let [port, _] = links;
    let name = &port.name;
    let side = if loss == Loss::Question { Side::Egress } else { Side::Ingress };
    let mut causes: Vec<String> = match loss {
        // A question has left both. An XDP program sees answers before they can be seen.
        Loss::Pod if port.has_xdp() => hooks::at(netlink, port, side),
        Loss::Pod => Vec::new(),
        _ => links.into_iter().flat_map(|link| hooks::at(netlink, link, side)).collect(),
    };
    if loss == Loss::Pod {
        if causes.is_empty() {
            causes.push(
                "something in the pod's network namespace drops it: look there at nft list ruleset, tc qdisc \
                 show, tc filter show and bpftool net"
                    .to_owned(),
            );
        }
        return causes;
    }
    let subnet = roster.subnets.iter().find(|subnet| subnet.addr().is_ipv4() == address.is_ipv4());
    if let Some(subnet) = subnet {
        // Rules of the family arp come later.
        causes.extend(hooks::chains(subnet, &["bridge", "netdev"]).take(NAMED));
    }
    if causes.is_empty() {
        causes.push(format!(
            "{}; look at ebtables-legacy -L, nft list ruleset (families netdev and bridge) and bridge fdb \
             show (the pod's MAC at another port)",
            hooks::nothing_found(name)
        ));
    }
    causes
}

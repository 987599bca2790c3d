//! Notices about rules that may affect some packets of pods although the tested ones pass, and about
//! trials that cannot be made.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{TrialInput, explain::translating};
use crate::{
    agent::{
        diagnosis::{hooks, iptables_legacy},
        host::conntrack,
    },
    dataplane::{
        foreign::{DroppingChain, ForeignTables, OwnHook},
        forwarding::{Direction, TrialWay},
    },
    model::{Problem, ProblemCode},
    netlink::Netlink,
};

const CLOSED_TO_PODS: &str = "pods do not reach their own host: it answers no echo, no datagram \
                              and no connection of theirs, as to a DNS server or an API server there";
const CLOSED_TO_HOST: &str = "this host does not reach its own pods: its packets to them do not \
                              arrive, including a kubelet's probes and a proxy's requests";

/// Returns notices for a trial that cannot be made, including chains whose policy or last rule drops
/// packets of pods.
pub fn untried(setting: &TrialInput, why: &str) -> Vec<Problem> {
    let what = format!("it is unknown whether this host forwards packets of pods: {why}");
    let mut notices = vec![Problem::new(ProblemCode::Untested, Problem::HOST, what, "").notice()];
    notices.extend(conntrack::full_table_problem().map(Problem::notice));
    let networks: Vec<IpNet> = setting.networks.iter().collect();
    let bridge = &setting.bridge;
    notices.extend(
        networks.iter().flat_map(|network| iptables_legacy::closed_policies(*network, bridge)),
    );
    let chains = ForeignTables::open().and_then(|mut tables| tables.chains(&networks));
    let Ok(chains) = chains else { return notices };
    notices.extend(chains.guess().map(|chain| {
        let is_ipv6 = chain.chain.starts_with("ip6 ");
        let network = networks.iter().find(|network| network.addr().is_ipv6() == is_ipv6);
        let fix = network.or(networks.first()).map(|network| chain.fix(*network));
        let what = format!("{chain}, and no rule in it seems to accept packets of pods");
        let fix = fix.unwrap_or_default();
        Problem::new(ProblemCode::NotForwarding, &chain.chain, what, fix).notice()
    }));
    notices
}

/// Describes packets of other hosts' pods that arrive at pods here with another source address.
pub fn arriving(setting: &TrialInput, ipv4: bool, address: IpAddr) -> Problem {
    let what = format!(
        "packets of pods of other hosts reach pods here under the address {address} in place of the sender's \
         own, so policies and logs here name the wrong source"
    );
    let fix = translating(setting, ipv4);
    Problem::new(ProblemCode::SourceTranslated, "incoming packets", what, fix).notice()
}

/// Describes eBPF programs at the overlay's interfaces, which may drop packets that no trial sends.
pub fn programs(netlink: &mut Netlink, setting: &TrialInput) -> Vec<Problem> {
    let mut notices = Vec::new();
    for name in [&setting.device_name, &setting.bridge] {
        let link = netlink.link(name).ok().flatten();
        let found = link.map(|link| hooks::programs(netlink, &link)).unwrap_or_default();
        notices.extend(found.into_iter().map(|program| {
            let what = "eBPF programs may drop packets of pods that no test sends";
            Problem::new(ProblemCode::ForeignProgram, name, what, program).notice()
        }));
    }
    notices
}

/// Describes rules that drop packets between this host and its own pods. Returns nothing without a
/// suspect chain.
pub fn of_host(setting: &TrialInput, closed: &[TrialWay]) -> Vec<Problem> {
    let mut notices = Vec::new();
    for (hook, network) in [OwnHook::Input, OwnHook::Output]
        .into_iter()
        .flat_map(|hook| setting.networks.iter().map(move |network| (hook, network)))
    {
        let is_lost = closed.iter().any(|way| {
            let is_it = match hook {
                OwnHook::Input => way.direction == Direction::ToHost,
                OwnHook::Output => matches!(way.direction, Direction::FromHost(_)),
            };
            is_it && way.ipv4 == network.addr().is_ipv4()
        });
        if !is_lost {
            continue;
        }
        let found = ForeignTables::open().and_then(|mut tables| tables.chains_at(hook, network));
        let fix = |chain: &DroppingChain| format!("{chain}: {}", chain.fix_at(hook, network));
        let chains: Vec<String> = found.unwrap_or_default().iter().map(fix).collect();
        if chains.is_empty() {
            continue;
        }
        let family = if network.addr().is_ipv4() { 4 } else { 6 };
        let said = match hook {
            OwnHook::Input => CLOSED_TO_PODS,
            OwnHook::Output => CLOSED_TO_HOST,
        };
        let chains = chains.join("; ");
        let (subject, what) = (format!("IPv{family}"), format!("{said} (IPv{family})"));
        let fix = format!("if that is not intended, {chains}");
        notices.push(Problem::new(ProblemCode::HostAndPods, subject, what, fix).notice());
    }
    notices
}

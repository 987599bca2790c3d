//! Formats causes as problems with a remedy.

use ipnet::IpNet;

use super::{Cause, Kind, MAIN, cause::MAIN_RULE_PRIORITY, likely_program};
use crate::model::{Problem, ProblemCode, dotted, interface_forwarding_sysctl};

impl Cause {
    /// Returns the problem of this cause; `None` if another check reports it. `subnets` lists the
    /// affected subnets, `network` is the overlay's network.
    pub fn problem(
        &self,
        kind: Kind,
        subnets: &str,
        network: IpNet,
        local: LocalPriorities,
    ) -> Option<Problem> {
        let (what, fix) = self.texts(kind, subnets, (network, local))?;
        Some(Problem::new(ProblemCode::Diverted, subnets, what, fix))
    }

    /// Returns what is wrong, and the remedy.
    fn texts(
        &self,
        kind: Kind,
        subnets: &str,
        overlay: (IpNet, LocalPriorities),
    ) -> Option<(String, String)> {
        let packets = match kind {
            Kind::Out => format!("packets of pods to {subnets}"),
            Kind::In => format!("packets of pods from {subnets}"),
            Kind::Own => format!("packets of this host to {subnets}"),
            Kind::PodsToHost => {
                "packets of other nodes' pods to this host's own address".to_owned()
            }
            Kind::HostsToPods => "packets of other nodes' own addresses to pods here".to_owned(),
            Kind::Home => format!("packets to pods here, in {subnets},"),
        };
        match self {
            Self::Selected { selector, cause } => {
                let by = match selector.priority {
                    Some(priority) => format!("rule {priority}"),
                    None => "a route".to_owned(),
                };
                let packets = format!("{packets} that {by} selects ({selector})");
                cause.texts_of(&packets, kind, overlay)
            }
            cause => cause.texts_of(&packets, kind, overlay),
        }
    }

    /// Like [`Cause::texts`], with the affected packets in words.
    #[expect(clippy::too_many_lines, reason = "one text for each cause")]
    fn texts_of(
        &self,
        packets: &str,
        kind: Kind,
        overlay: (IpNet, LocalPriorities),
    ) -> Option<(String, String)> {
        Some(match self {
            Self::Table { table, priority: Some(priority), interface, ipv4 } => (
                format!(
                    "{packets} leave by {interface}: table {table} has a route for them and comes before \
                     the main table (ip{} rule {priority}){}",
                    ip6_option(*ipv4),
                    likely_program(*table, interface)
                        .map(|program| format!(", probably of {program}"))
                        .unwrap_or_default(),
                ),
                format!(
                    "give the overlay precedence: {}",
                    command_for_earlier_rule(overlay, *priority, *ipv4)
                ),
            ),
            Self::Table { table, priority: None, interface, ipv4 } => (
                format!("{packets} leave by {interface}: table {table} has a route for them"),
                format!("see ip{} rule", ip6_option(*ipv4)),
            ),
            Self::Route { destination, metric, interface, condition, .. }
                if kind.is_to_pods_here() && destination.prefix_len() > 0 =>
            {
                (
                    format!(
                        "packets to pods here leave by {interface}: a route of another program in the main \
                         table takes {destination}{condition}, a part of this node's own subnet"
                    ),
                    format!(
                        "remove it (ip{} route del {destination}{condition} dev {interface} metric \
                         {metric})",
                        ip6_option(destination.addr().is_ipv4())
                    ),
                )
            }
            Self::Route { destination, metric, interface, condition, .. }
                if !condition.is_none() =>
            {
                (
                    format!(
                        "another program's route takes the packets to {destination}{condition}, by \
                         {interface}, because its conditions are more specific"
                    ),
                    format!(
                        "remove it (ip{} route del {destination}{condition} dev {interface} metric \
                         {metric})",
                        ip6_option(destination.addr().is_ipv4())
                    ),
                )
            }
            Self::Route { destination, metric, interface, ours: Some(ours), .. } => (
                format!(
                    "another program's route takes the packets to {destination}, by {interface}: its metric \
                     is {metric}, the overlay's is {ours}"
                ),
                format!(
                    "remove it (ip{} route del {destination} metric {metric})",
                    ip6_option(destination.addr().is_ipv4())
                ),
            ),
            Self::Route { destination, interface, .. } if destination.prefix_len() == 0 => (
                format!(
                    "{packets} leave by {interface}, the default route: the overlay's own route is not found"
                ),
                format!("see ip{} route show proto 73", ip6_option(destination.addr().is_ipv4())),
            ),
            Self::Route { destination, metric, interface, ours: None, .. } => (
                format!(
                    "another program's route takes the packets to {destination}, by {interface}, because it \
                     is more specific than the overlay's"
                ),
                format!(
                    "remove it (ip{} route del {destination} metric {metric})",
                    ip6_option(destination.addr().is_ipv4())
                ),
            ),
            Self::LocalRoute { destination } => (
                format!(
                    "packets to {destination} are delivered to this host, by another program's route of \
                     type local"
                ),
                format!(
                    "remove it (ip{} route del local {destination} table local)",
                    ip6_option(is_ipv4(destination))
                ),
            ),
            Self::Vrf { interface, vrf, table } => (
                format!(
                    "{packets} are routed by table {table}, because {interface} is in VRF {vrf}, which has \
                     no routes of the overlay"
                ),
                format!("ip link set {interface} nomaster"),
            ),
            Self::Filter { interface } => (
                format!(
                    "rp_filter of {interface} drops {packets}, because their answers leave by another \
                     interface"
                ),
                format!(
                    "sysctl -w net.ipv4.conf.{}.rp_filter=2 (and a file in /etc/sysctl.d)",
                    dotted(interface)
                ),
            ),
            Self::Forwarding { interface, by_default: false } => (
                format!("{packets} are dropped, because {} is 0", forwarding_of(interface)),
                format!("sysctl -w {}=1", forwarding_of(interface)),
            ),
            Self::Forwarding { interface, by_default: true } => (
                format!(
                    "{packets} are dropped, because {} is 0, as on all new interfaces while {} is 0",
                    forwarding_of(interface),
                    forwarding_of("default")
                ),
                format!(
                    "sysctl -w {}=1 {}=1 (and the first in a file in /etc/sysctl.d)",
                    forwarding_of("default"),
                    forwarding_of(interface)
                ),
            ),
            Self::NoForwarding | Self::Address { .. } | Self::Selected { .. } => return None,
            Self::NoIpv6 { interface } => (
                format!("{packets} have no route, because IPv6 is turned off on {interface}"),
                format!("sysctl -w net.ipv6.conf.{}.disable_ipv6=0", dotted(interface)),
            ),
            Self::Refused { destination, kind, table, priority, condition } => {
                let of_rule = match priority {
                    Some(priority) if *table != MAIN => {
                        format!(
                            " of table {table} (ip{} rule {priority})",
                            ip6_option(is_ipv4(destination))
                        )
                    }
                    _ => String::new(),
                };
                let table = if *table == MAIN { String::new() } else { format!(" table {table}") };
                (
                    format!(
                        "{packets} are dropped by the {kind} route to {destination}{condition}{of_rule}"
                    ),
                    format!(
                        "remove it (ip{} route del {kind} {destination}{condition}{table})",
                        ip6_option(is_ipv4(destination))
                    ),
                )
            }
            Self::SmallerMtu { destination, metric, table, condition, mtu, carried } => {
                let of_table =
                    if *table == MAIN { String::new() } else { format!(" table {table}") };
                (
                    format!(
                        "packets of pods to {destination}{condition} are limited to {mtu} bytes: another \
                         program's route has that MTU, the overlay has {carried}"
                    ),
                    format!(
                        "remove it (ip{} route del {destination}{condition} metric {metric}{of_table})",
                        ip6_option(is_ipv4(destination))
                    ),
                )
            }
            Self::Rule { priority, ipv4 } => (
                format!("{packets} are dropped by ip{} rule {priority}", ip6_option(*ipv4)),
                format!(
                    "give the overlay precedence: {}",
                    command_for_earlier_rule(overlay, *priority, *ipv4)
                ),
            ),
            Self::NoMain { ipv4 } => (
                format!(
                    "{packets} have no route here, because no ip{} rule leads to table main, where the \
                     overlay's routes are",
                    ip6_option(*ipv4)
                ),
                command_for_earlier_rule(overlay, MAIN_RULE_PRIORITY + 1, *ipv4),
            ),
            Self::Unknown { errno } => (
                format!(
                    "{packets} have no route here: {}",
                    std::io::Error::from_raw_os_error(*errno)
                ),
                "see ip route get ADDRESS from ADDRESS iif INTERFACE".to_owned(),
            ),
        })
    }
}

/// Returns the command that adds a rule with the next lower priority number for the overlay's
/// network.
fn command_for_earlier_rule(
    (network, local): (IpNet, LocalPriorities),
    priority: u32,
    ipv4: bool,
) -> String {
    let local = if ipv4 { local.ipv4 } else { local.ipv6 };
    earlier_rule(&format!("to {network}"), priority, ipv4, local)
}

/// Returns the command that makes selected packets use the main table before the rule of this priority.
/// Where the rule of the local table comes later (as with VRFs), packets to this host's own addresses need
/// one, too.
pub fn earlier_rule(selector: &str, priority: u32, ipv4: bool, local: u32) -> String {
    let before = priority.saturating_sub(1);
    let add = |table: &str, priority: u32| {
        format!("ip{} rule add {selector} lookup {table} priority {priority}", ip6_option(ipv4))
    };
    match local > before {
        true => format!("{}; {}", add("local", before.saturating_sub(1)), add("main", before)),
        false => add("main", before),
    }
}

/// Priorities of the rules that lead packets to this host's own addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalPriorities {
    /// That for IPv4.
    pub ipv4: u32,
    /// That for IPv6.
    pub ipv6: u32,
}

/// Returns the option of `ip` for the family.
const fn ip6_option(ipv4: bool) -> &'static str {
    if ipv4 { "" } else { " -6" }
}

const fn is_ipv4(network: &IpNet) -> bool {
    matches!(network, IpNet::V4(_))
}

/// Returns the sysctl that lets this host forward what an interface receives, as `sysctl` takes it.
fn forwarding_of(interface: &str) -> String {
    dotted(&interface_forwarding_sysctl(true, interface))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_before_the_local_table_comes_with_one_for_own_addresses() {
        let rule = |local| earlier_rule("to 10.42.0.0/16", 5_270, true, local);
        assert_eq!(rule(0), "ip rule add to 10.42.0.0/16 lookup main priority 5269");
        let both = "ip rule add to 10.42.0.0/16 lookup local priority 5268; ip rule add to 10.42.0.0/16 \
                    lookup main priority 5269";
        assert_eq!(rule(32_765), both);
    }
}

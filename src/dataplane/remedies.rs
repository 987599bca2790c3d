//! Commands that make chains of nftables, iptables and ebtables accept packets of tunnels and of pods.
//!
//! A rule of nft in a table of iptables-nft or ebtables-nft can end in the loss of rules: those programs
//! show and save what they understand, and restore that alone.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{family_name, rule_family};

/// Maximum number of ports in one command; iptables accepts 15.
pub const MAX_PORTS: usize = 8;

/// Tables that iptables makes by nftables.
const IPTABLES_TABLES: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];

/// Returns the command that makes a chain accept answers for these next hops, and the queries of the
/// neighbors.
pub fn open_for_answers(chain: &str, hops: &[IpAddr]) -> String {
    if let Some(insert) = ebtables_insert(chain) {
        let open = |matched: String| format!("{insert} {matched} -j ACCEPT");
        let hops = hops.iter().take(MAX_PORTS);
        let commands: Vec<String> = match hops.clone().any(IpAddr::is_ipv6) {
            true => ["neighbour-solicitation", "neighbour-advertisement"]
                .map(|kind| open(format!("-p IPv6 --ip6-proto ipv6-icmp --ip6-icmp-type {kind}")))
                .into(),
            false => hops.map(|hop| open(format!("-p ARP --arp-ip-src {hop}"))).collect(),
        };
        return commands.join("; ");
    }
    if hops.iter().any(IpAddr::is_ipv6) {
        let kinds = ["nd-neighbor-solicit", "nd-neighbor-advert"].map(str::to_owned);
        return match chain {
            "ip6 filter INPUT" => ["neighbor-solicitation", "neighbor-advertisement"]
                .map(|kind| format!("ip6tables -I INPUT -p icmpv6 --icmpv6-type {kind} -j ACCEPT"))
                .join("; "),
            _ => insert_for_each(chain, "icmpv6 type", &kinds),
        };
    }
    let hops: Vec<String> = hops.iter().take(MAX_PORTS).map(ToString::to_string).collect();
    match chain.strip_prefix("arp filter ") {
        // iptables does not understand rules that nft adds for ARP. It makes no base chains in lower case.
        Some(chain) if !matches!(chain, "input" | "output" | "forward") => {
            let open = |hop: &String| format!("arptables -I {chain} -s {hop} -j ACCEPT");
            hops.iter().map(open).collect::<Vec<_>>().join("; ")
        }
        _ => insert_for_each(chain, "arp saddr ip", &hops),
    }
}

/// Returns the command that makes a chain accept UDP to these ports, by a rule at its beginning.
pub fn open_chain(chain: &str, ports: &[u16]) -> String {
    if let Some(insert) = ebtables_insert(chain) {
        let open = |ipv4: bool, ports: &str| {
            let (ether, field) = (family_name(ipv4), rule_family(ipv4));
            format!("{insert} -p {ether} --{field}-proto udp --{field}-dport {ports} -j ACCEPT")
        };
        let ports = match ports {
            [first, last] if first.checked_add(1) == Some(*last) => {
                vec![format!("{first}:{last}")]
            }
            _ => ports.iter().map(u16::to_string).collect(),
        };
        let families = [true, false].into_iter();
        let commands = families.flat_map(|ipv4| ports.iter().map(move |ports| open(ipv4, ports)));
        return commands.collect::<Vec<_>>().join("; ");
    }
    match iptables_insert(chain) {
        Some(insert) => format!("{insert} {} -j ACCEPT", iptables_ports(ports)),
        None => {
            let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
            insert_for_each(chain, "udp dport", &ports)
        }
    }
}

/// Returns the command of nft that makes a chain accept packets with one of these values.
///
/// iptables shows and saves a rule with a set as one without the condition, and restores it that way: the
/// chain would accept all packets. Its chains get one rule for each value.
fn insert_for_each(chain: &str, field: &str, values: &[String]) -> String {
    let insert = |value: &str| format!("nft insert rule {chain} {field} {value} accept");
    match values {
        [value] => insert(value),
        _ if may_be_of_iptables(chain) => {
            values.iter().map(|value| insert(value)).collect::<Vec<_>>().join("; ")
        }
        _ => insert(&format!("{{ {} }}", values.join(", "))),
    }
}

/// Returns whether the chain is in a table that iptables, ip6tables, arptables or ebtables may have made.
fn may_be_of_iptables(chain: &str) -> bool {
    let mut words = chain.split(' ');
    matches!(words.next(), Some("ip" | "ip6" | "arp" | "bridge"))
        && words.next().is_some_and(|table| IPTABLES_TABLES.contains(&table))
}

/// Returns the command that makes a chain accept packets from a network.
pub fn accept_from(chain: &str, network: IpNet) -> String {
    accept(chain, Some(network), None)
}

/// Returns the command that makes a chain accept packets to a network.
pub fn accept_to(chain: &str, network: IpNet) -> String {
    accept(chain, None, Some(network))
}

/// Returns the command that makes a chain accept packets within a network.
pub fn accept_within(chain: &str, network: IpNet) -> String {
    accept(chain, Some(network), Some(network))
}

/// Returns the commands that make a chain accept packets from and to a network.
pub fn accept_from_and_to(chain: &str, network: IpNet) -> String {
    format!("{}; {}", accept_from(chain, network), accept_to(chain, network))
}

fn accept(chain: &str, source: Option<IpNet>, destination: Option<IpNet>) -> String {
    let ipv4 = source.or(destination).is_none_or(|network| network.addr().is_ipv4());
    let field = rule_family(ipv4);
    let (insert, names, accepts) = match (ebtables_insert(chain), iptables_insert(chain)) {
        (Some(insert), _) => {
            let names = [format!("--{field}-src"), format!("--{field}-dst")];
            (format!("{insert} -p {}", family_name(ipv4)), names, "-j ACCEPT")
        }
        (None, Some(insert)) => (insert, ["-s", "-d"].map(str::to_owned), "-j ACCEPT"),
        (None, None) => {
            let names = [format!("{field} saddr"), format!("{field} daddr")];
            (format!("nft insert rule {chain}"), names, "accept")
        }
    };
    let networks = [source, destination].into_iter().zip(names);
    let matches = networks.filter_map(|(network, name)| Some(format!("{name} {}", network?)));
    format!("{insert} {} {accepts}", matches.collect::<Vec<_>>().join(" "))
}

/// Returns the command that makes a chain accept the ICMP error for packets that are too large.
pub fn accept_size_errors(chain: &str, ipv4: bool) -> String {
    let (protocol, ip_field, kind) = match ipv4 {
        true => ("icmp", "icmp", "destination-unreachable"),
        false => ("icmpv6", "ipv6-icmp", "packet-too-big"),
    };
    if let Some(insert) = ebtables_insert(chain) {
        let (ether, field) = (family_name(ipv4), rule_family(ipv4));
        return format!(
            "{insert} -p {ether} --{field}-proto {ip_field} --{field}-icmp-type {kind} -j ACCEPT"
        );
    }
    match iptables_insert(chain) {
        Some(insert) => format!("{insert} -p {protocol} --{protocol}-type {kind} -j ACCEPT"),
        None => format!("nft insert rule {chain} {protocol} type {kind} accept"),
    }
}

/// Returns the beginning of a command that inserts a rule into a built-in chain of iptables; `None` for
/// others. A chain of iptables-legacy has that program's name in place of a family.
fn iptables_insert(chain: &str) -> Option<String> {
    let (family, table, name) = match chain.split(' ').collect::<Vec<_>>()[..] {
        [program @ ("iptables-legacy" | "ip6tables-legacy"), table, name] => {
            return Some(format!("{program} -t {table} -I {name}"));
        }
        [family @ ("ip" | "ip6"), table @ ("filter" | "nat" | "mangle" | "raw"), name] => {
            (family, table, name)
        }
        _ => return None,
    };
    let program = if family == "ip" { "iptables" } else { "ip6tables" };
    let table = if table == "filter" { String::new() } else { format!(" -t {table}") };
    let is_built_in = name.bytes().all(|byte| byte.is_ascii_uppercase());
    is_built_in.then(|| format!("{program}{table} -I {name}"))
}

/// Returns the beginning of a command that inserts a rule into a chain that ebtables may have made; `None`
/// for others. Its base chains have names in upper case.
fn ebtables_insert(chain: &str) -> Option<String> {
    let [family, table, name] = chain.split(' ').collect::<Vec<_>>()[..] else { return None };
    let is_native = ["input", "output", "forward", "prerouting", "postrouting"].contains(&name);
    let table = match (family, table) {
        ("bridge", "filter") if !is_native => "",
        ("bridge", "nat") if !is_native => " -t nat",
        _ => return None,
    };
    Some(format!("ebtables{table} -I {name}"))
}

/// Returns the command that makes the kernel forget the connections of tunnel packets.
pub fn forget_connections(port: u16) -> String {
    format!("conntrack -D -p udp --orig-port-dst {port}")
}

/// Formats a match of UDP to these ports for iptables.
pub fn iptables_ports(ports: &[u16]) -> String {
    match ports {
        [port] => format!("-p udp --dport {port}"),
        _ => {
            let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
            format!("-p udp -m multiport --dports {}", ports.join(","))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_for_chains_that_iptables_may_have_made_use_no_set() {
        let rules = "nft insert rule ip filter ts-input udp dport 8472 accept; nft insert rule ip filter \
                     ts-input udp dport 8473 accept";
        assert_eq!(open_chain("ip filter ts-input", &[8472, 8473]), rules);
        let chains = ["ip6 raw own", "ip mangle f2b-x", "ip security s"];
        for chain in chains {
            assert!(!open_chain(chain, &[8472, 8473]).contains('{'), "{chain}");
        }
        let discovery =
            open_for_answers("ip6 filter ts-input", &[[0xfd00, 0, 0, 0, 0, 0, 0, 1].into()]);
        assert!(!discovery.contains('{'), "{discovery}");
    }

    #[test]
    fn chains_of_ebtables_are_opened_by_ebtables() {
        let rules = "ebtables -I INPUT -p IPv4 --ip-proto udp --ip-dport 8472:8473 -j ACCEPT; \
                     ebtables -I INPUT -p IPv6 --ip6-proto udp --ip6-dport 8472:8473 -j ACCEPT";
        assert_eq!(open_chain("bridge filter INPUT", &[8472, 8473]), rules);
        let apart = open_chain("bridge filter INPUT", &[9_000, 8473]);
        assert!(
            apart.contains("--ip-dport 9000 ") && apart.contains("--ip6-dport 8473 "),
            "{apart}"
        );
        let rule = "ebtables -t nat -I own -p IPv4 --ip-src 10.42.0.0/16 -j ACCEPT";
        let overlay = "10.42.0.0/16".parse().expect("a network");
        assert_eq!(accept_from("bridge nat own", overlay), rule);
        let rule = "ebtables -I INPUT -p ARP --arp-ip-src 10.99.0.1 -j ACCEPT";
        assert_eq!(open_for_answers("bridge filter INPUT", &[[10, 99, 0, 1].into()]), rule);
        let native = "nft insert rule bridge filter input udp dport 8472 accept";
        assert_eq!(open_chain("bridge filter input", &[8472]), native);
    }

    #[test]
    fn packets_of_pods_are_accepted_by_the_program_that_made_the_chain() {
        let overlay: IpNet = "10.42.0.0/16".parse().expect("a network");
        let overlay6: IpNet = "fd42::/48".parse().expect("a network");
        for (command, expected) in [
            (
                accept_from_and_to("ip mangle FORWARD", overlay),
                "iptables -t mangle -I FORWARD -s 10.42.0.0/16 -j ACCEPT; \
                 iptables -t mangle -I FORWARD -d 10.42.0.0/16 -j ACCEPT",
            ),
            (
                accept_from_and_to("bridge filter FORWARD", overlay),
                "ebtables -I FORWARD -p IPv4 --ip-src 10.42.0.0/16 -j ACCEPT; \
                 ebtables -I FORWARD -p IPv4 --ip-dst 10.42.0.0/16 -j ACCEPT",
            ),
            (
                accept_within("ip6 nat POSTROUTING", overlay6),
                "ip6tables -t nat -I POSTROUTING -s fd42::/48 -d fd42::/48 -j ACCEPT",
            ),
            (
                accept_to("inet fw out", overlay6),
                "nft insert rule inet fw out ip6 daddr fd42::/48 accept",
            ),
            (
                accept_size_errors("ip filter OUTPUT", true),
                "iptables -I OUTPUT -p icmp --icmp-type destination-unreachable -j ACCEPT",
            ),
            (
                accept_size_errors("ip6 raw OUTPUT", false),
                "ip6tables -t raw -I OUTPUT -p icmpv6 --icmpv6-type packet-too-big -j ACCEPT",
            ),
            (
                accept_size_errors("inet fw out", false),
                "nft insert rule inet fw out icmpv6 type packet-too-big accept",
            ),
        ] {
            assert_eq!(command, expected);
        }
    }

    #[test]
    fn user_chain_of_arptables_is_opened_by_arptables() {
        let hops = [[10, 99, 0, 1].into(), [10, 99, 0, 2].into()];
        let rules =
            "arptables -I own -s 10.99.0.1 -j ACCEPT; arptables -I own -s 10.99.0.2 -j ACCEPT";
        assert_eq!(open_for_answers("arp filter own", &hops), rules);
        let native = "nft insert rule arp filter input arp saddr ip 10.99.0.1 accept; nft insert rule arp \
                      filter input arp saddr ip 10.99.0.2 accept";
        assert_eq!(open_for_answers("arp filter input", &hops), native);
    }

    #[test]
    fn rule_for_other_chain_uses_a_set() {
        let rule = "nft insert rule inet fw in udp dport { 8472, 8473 } accept";
        assert_eq!(open_chain("inet fw in", &[8472, 8473]), rule);
        assert_eq!(
            open_chain("ip ban in", &[8472]),
            "nft insert rule ip ban in udp dport 8472 accept"
        );
    }
}

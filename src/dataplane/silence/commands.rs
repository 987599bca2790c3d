//! Commands that make chains of nftables, iptables and ebtables accept gossamer's packets.
//!
//! A rule of nft in a table of iptables-nft or ebtables-nft can end in the loss of rules: those programs
//! show and save what they understand, and restore that alone.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{family_name, rule_family};

/// Maximum number of ports in one command; iptables accepts 15.
pub(super) const MAX_PORTS: usize = 8;

/// Tables that iptables makes by nftables.
const IPTABLES_TABLES: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];

/// Returns the command that makes a chain accept answers for these next hops, and the queries of the
/// neighbors.
pub(super) fn open_for_answers(chain: &str, hops: &[IpAddr]) -> String {
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

/// Returns the command that makes a chain accept packets of pods.
pub(super) fn open_for_pods(chain: &str, overlay: IpNet) -> String {
    let is_ipv4 = overlay.addr().is_ipv4();
    let family = rule_family(is_ipv4);
    if let Some(insert) = ebtables_insert_ip(chain, is_ipv4) {
        return format!("{insert} --{family}-src {overlay} -j ACCEPT");
    }
    match iptables_insert(chain) {
        Some(insert) => format!("{insert} -s {overlay} -j ACCEPT"),
        None => format!("nft insert rule {chain} {family} saddr {overlay} accept"),
    }
}

/// Returns the beginning of a command that inserts a rule into a built-in chain of iptables; `None` for
/// others. A chain of iptables-legacy has that program's name in place of a family.
pub fn iptables_insert(chain: &str) -> Option<String> {
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

/// Returns the same for a rule about packets of an IP version.
pub fn ebtables_insert_ip(chain: &str, ipv4: bool) -> Option<String> {
    Some(format!("{} -p {}", ebtables_insert(chain)?, family_name(ipv4)))
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
        assert_eq!(open_for_pods("bridge nat own", overlay), rule);
        let rule = "ebtables -I INPUT -p ARP --arp-ip-src 10.99.0.1 -j ACCEPT";
        assert_eq!(open_for_answers("bridge filter INPUT", &[[10, 99, 0, 1].into()]), rule);
        let native = "nft insert rule bridge filter input udp dport 8472 accept";
        assert_eq!(open_chain("bridge filter input", &[8472]), native);
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

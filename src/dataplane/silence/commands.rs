//! Commands that make chains of nftables and iptables accept gossamer's packets.

use std::net::IpAddr;

use ipnet::IpNet;

/// Maximum number of ports in one command; iptables accepts 15.
pub(super) const MAX_PORTS: usize = 8;

/// Returns the command that makes a chain accept answers for these next hops, and the queries of the
/// neighbors.
pub(super) fn open_for_answers(chain: &str, hops: &[IpAddr]) -> String {
    if hops.iter().any(IpAddr::is_ipv6) {
        let types = "{ nd-neighbor-solicit, nd-neighbor-advert }";
        return match chain {
            "ip6 filter INPUT" => ["neighbor-solicitation", "neighbor-advertisement"]
                .map(|kind| format!("ip6tables -I INPUT -p icmpv6 --icmpv6-type {kind} -j ACCEPT"))
                .join("; "),
            _ => format!("nft insert rule {chain} icmpv6 type {types} accept"),
        };
    }
    let hops: Vec<String> = hops.iter().take(MAX_PORTS).map(ToString::to_string).collect();
    match (chain, hops.as_slice()) {
        ("arp filter INPUT", _) => {
            let open = |hop: &String| format!("arptables -I INPUT -s {hop} -j ACCEPT");
            hops.iter().map(open).collect::<Vec<_>>().join("; ")
        }
        (_, [hop]) => format!("nft insert rule {chain} arp saddr ip {hop} accept"),
        _ => format!("nft insert rule {chain} arp saddr ip {{ {} }} accept", hops.join(", ")),
    }
}

/// Returns the command that makes a chain accept UDP to these ports, by a rule at its beginning.
pub fn open_chain(chain: &str, ports: &[u16]) -> String {
    match (iptables_insert(chain), ports) {
        (Some(insert), _) => format!("{insert} {} -j ACCEPT", iptables_ports(ports)),
        (None, [port]) => format!("nft insert rule {chain} udp dport {port} accept"),
        _ => format!("nft insert rule {chain} udp dport {{ {} }} accept", list(ports, ", ")),
    }
}

/// Returns the command that makes a chain accept packets of pods.
pub(super) fn open_for_pods(chain: &str, overlay: IpNet) -> String {
    let family = if overlay.addr().is_ipv4() { "ip" } else { "ip6" };
    match iptables_insert(chain) {
        Some(insert) => format!("{insert} -s {overlay} -j ACCEPT"),
        None => format!("nft insert rule {chain} {family} saddr {overlay} accept"),
    }
}

/// Returns the beginning of a command that inserts a rule into a built-in chain of iptables; `None` for
/// others.
fn iptables_insert(chain: &str) -> Option<String> {
    let [family @ ("ip" | "ip6"), table @ ("filter" | "nat" | "mangle" | "raw"), name] =
        chain.split(' ').collect::<Vec<_>>()[..]
    else {
        return None;
    };
    let program = if family == "ip" { "iptables" } else { "ip6tables" };
    let table = if table == "filter" { String::new() } else { format!(" -t {table}") };
    let is_built_in = name.bytes().all(|byte| byte.is_ascii_uppercase());
    is_built_in.then(|| format!("{program}{table} -I {name}"))
}

/// Formats a match of UDP to these ports for iptables.
pub fn iptables_ports(ports: &[u16]) -> String {
    match ports {
        [port] => format!("-p udp --dport {port}"),
        _ => format!("-p udp -m multiport --dports {}", list(ports, ",")),
    }
}

fn list(ports: &[u16], between: &str) -> String {
    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(between)
}

//! Guesses which program made a routing table or an interface, by well-known numbers and names.

/// Numbers of routing tables.
const TABLES: [(u32, &str); 3] =
    [(52, "Tailscale"), (51_820, "WireGuard (wg-quick)"), (220, "strongSwan")];
/// Prefixes of interface names.
const INTERFACES: [(&str, &str); 14] = [
    ("tailscale", "Tailscale"),
    ("nordlynx", "NordVPN"),
    ("nebula", "Nebula"),
    ("proton", "Proton VPN"),
    ("CloudflareWARP", "Cloudflare WARP"),
    ("cscotun", "Cisco AnyConnect"),
    ("gpd", "GlobalProtect"),
    ("wt", "NetBird"),
    ("zt", "ZeroTier"),
    ("wg", "WireGuard"),
    ("tun", "OpenVPN or another VPN"),
    ("tap", "OpenVPN or another VPN"),
    ("ipsec", "IPsec"),
    ("ppp", "pppd"),
];

/// Returns the program that probably made the routing table or else the interface, or `None` if
/// neither is known. Except for ZeroTier and WireGuard, only digits and `-` may follow the prefix
/// of an interface name.
pub fn likely_program(table: u32, interface: &str) -> Option<&'static str> {
    let of_table = TABLES.iter().find(|(number, _)| *number == table).map(|(_, name)| *name);
    let is_of = |prefix: &str| {
        let rest = interface.strip_prefix(prefix);
        let is_network = ["zt", "wg"].contains(&prefix);
        rest.is_some_and(|rest| {
            rest.bytes().all(|byte| byte.is_ascii_digit() || is_network || byte == b'-')
        })
    };
    let of_interface =
        || INTERFACES.iter().find(|(prefix, _)| is_of(prefix)).map(|(_, name)| *name);
    of_table.or_else(of_interface)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_follows_from_the_table_or_else_from_the_interface() {
        assert_eq!(likely_program(52, "d0"), Some("Tailscale"));
        assert_eq!(likely_program(254, "tailscale0"), Some("Tailscale"));
        assert_eq!(likely_program(254, "wg-home"), Some("WireGuard"));
        assert_eq!(likely_program(7, "ztabcdef12"), Some("ZeroTier"));
        assert_eq!(likely_program(254, "tun0"), Some("OpenVPN or another VPN"));
        for other in ["eth0", "tunnel", "wlan0", "tapestry"] {
            assert_eq!(likely_program(254, other), None, "{other}");
        }
    }
}

//! Problems of an underlay whose MTU is too small. The failures themselves do not show the cause.

use std::net::IpAddr;

use super::ChosenUnderlay;
use crate::{
    dataplane::desired::{IPV6_MTU_MIN, overhead},
    model::{Pool, Problem, ProblemCode, Subnets},
};

/// Size in bytes of UDP datagrams that QUIC must be able to send (RFC 9000, section 14).
const QUIC_DATAGRAM: u32 = 1_200;

impl ChosenUnderlay {
    /// Returns the subnets that pods of this host can use: IPv6 needs a larger MTU than IPv4.
    pub(crate) fn subnets_of_pods(&self, subnets: Subnets) -> Subnets {
        let carried = |subnet: &ipnet::IpNet| subnet.addr().is_ipv4() || self.mtu >= IPV6_MTU_MIN;
        Subnets { first: subnets.first, second: subnets.second.filter(carried) }
    }
}

/// Returns the problems of an underlay whose MTU is too small.
pub(crate) fn limits(chosen: &ChosenUnderlay, pool: Option<&Pool>) -> Vec<Problem> {
    let ChosenUnderlay { name, local, carried, .. } = chosen;
    let mut limits = Vec::new();
    if !chosen.is_present() {
        return limits;
    }
    let needed = QUIC_DATAGRAM + headers_of_udp(*local);
    if *carried < needed {
        limits.push(Problem::new(
            ProblemCode::GossipMtu,
            name,
            format!(
                "interface {name} has MTU {carried}, and gossip (QUIC) needs at least {needed} (RFC 9000), \
                 so this host reaches no member"
            ),
            format!(
                "raise it on all hosts: ip link set {name} mtu {}",
                IPV6_MTU_MIN + overhead(*local)
            ),
        ));
    }
    let networks = pool.map(|pool| pool.networks().iter());
    let ipv6 = networks.and_then(|mut all| all.find(|network| network.addr().is_ipv6()));
    if let Some(ipv6) = ipv6.filter(|_| chosen.tunnel_mtu < IPV6_MTU_MIN) {
        let left = chosen.tunnel_mtu;
        let enough = IPV6_MTU_MIN + overhead(*local);
        let (why, fix) = match *carried < enough {
            true => (
                format!("interface {name} with MTU {carried} leaves {left} (IPv4 continues)"),
                format!("ip link set {name} mtu {enough}"),
            ),
            false => (
                format!("`mtu` of this host's settings is {left} (IPv4 continues)"),
                "raise it, or leave it out".to_owned(),
            ),
        };
        limits.push(Problem::new(
            ProblemCode::Ipv6LeftOut,
            name,
            format!(
                "IPv6 ({ipv6}) is left out on this host: it needs an MTU of {IPV6_MTU_MIN} in the overlay, \
                 and {why}"
            ),
            fix,
        ));
    }
    limits
}

/// Returns the length of the IP and UDP headers in bytes.
const fn headers_of_udp(underlay: IpAddr) -> u32 {
    match underlay {
        IpAddr::V4(_) => 28,
        IpAddr::V6(_) => 48,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PoolSpec;

    fn chosen(local: &str, carried: u32) -> ChosenUnderlay {
        let local: IpAddr = local.parse().expect("an address");
        let mtu = carried - overhead(local);
        let remembered = ChosenUnderlay::remembered(local, Some(mtu));
        ChosenUnderlay { name: "eth0".to_owned(), ..remembered }
    }

    #[test]
    fn mtu_below_quic_minimum_is_reported_with_interface_and_minimum() {
        for (local, minimum) in [("192.0.2.1", 1_228), ("2001:db8::1", 1_248)] {
            assert!(limits(&chosen(local, minimum), None).is_empty());
            let said = limits(&chosen(local, minimum - 1), None)[0].to_string();
            let words = ["eth0".to_owned(), format!("MTU {}", minimum - 1), minimum.to_string()];
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
        assert!(
            limits(&ChosenUnderlay::remembered([192, 0, 2, 1].into(), Some(900)), None).is_empty()
        );
    }

    #[test]
    fn mtu_below_ipv6_minimum_is_reported_if_cluster_has_ipv6() {
        let ipv4 = PoolSpec::of("10.42.0.0/16".parse().expect("a network"));
        let pool = Pool::new(&PoolSpec { network6: "fd42::/48".parse().ok(), ..ipv4 });
        let pool = pool.expect("a pool");
        assert!(limits(&chosen("192.0.2.1", 1_330), Some(&pool)).is_empty());
        assert!(limits(&chosen("192.0.2.1", 1_329), None).is_empty());
        let said = limits(&chosen("192.0.2.1", 1_329), Some(&pool))[0].to_string();
        assert!(said.contains("leaves 1279") && said.contains("mtu 1330"), "{said}");
        let set = ChosenUnderlay { tunnel_mtu: 1_200, ..chosen("192.0.2.1", 1_500) };
        let said = limits(&set, Some(&pool))[0].to_string();
        assert!(said.contains("settings is 1200") && !said.contains("ip link"), "{said}");
    }
}

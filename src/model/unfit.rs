//! Checks whether a member record is usable by any node.
//!
//! Only conditions on which all nodes agree are checked: a record that only some nodes accept would keep
//! the nodes' states different. Whether this host can send to a usable address is checked by the data plane.

use std::net::IpAddr;

use super::{Mac, MemberRecord, Pool};

/// Why every node refuses a member record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableRecord {
    /// The VTEP's MAC does not follow from the node id.
    #[error("its tunnel has the MAC {said} instead of {own}, which follows from its key")]
    Mac {
        /// The published MAC.
        said: Mac,
        /// The MAC that follows from the node id.
        own: Mac,
    },
    /// The port is 0.
    #[error("its port is 0")]
    Port,
    /// An address is that of no host.
    #[error("its {what} {address} is {why}")]
    Address {
        /// Which address of the record.
        what: &'static str,
        /// The address.
        address: IpAddr,
        /// The reason.
        why: &'static str,
    },
}

impl MemberRecord {
    /// Returns why no node can use this record, or `None` if it is usable.
    pub fn why_unusable(&self, pool: &Pool) -> Option<UnusableRecord> {
        let own = Mac::of_node(self.node);
        if self.vtep.mac != own {
            return Some(UnusableRecord::Mac { said: self.vtep.mac, own });
        }
        if self.address.port() == 0 {
            return Some(UnusableRecord::Port);
        }
        let check = |what, address| {
            let why = no_host(address).or_else(|| inside(pool, address))?;
            Some(UnusableRecord::Address { what, address, why })
        };
        check("underlay address", self.vtep.underlay)
            .or_else(|| check("address", self.address.ip()))
    }
}

/// Returns why other hosts cannot reach an address, whatever the network.
fn no_host(address: IpAddr) -> Option<&'static str> {
    let kinds = [
        (address != address.to_canonical(), "an IPv4-mapped IPv6 address"),
        (address.is_unspecified(), "unspecified"),
        (address.is_loopback(), "a loopback address"),
        (address.is_multicast(), "a multicast address"),
        (is_link_local(address), "link-local"),
        (matches!(address, IpAddr::V4(ip) if ip.is_broadcast()), "the broadcast address"),
        (matches!(address, IpAddr::V4(ip) if ip.octets()[0] == 0), "in 0.0.0.0/8"),
    ];
    kinds.into_iter().find_map(|(applies, why)| applies.then_some(why))
}

/// Returns whether an address is valid only on one link.
pub const fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Returns a reason if the address is inside the pool.
fn inside(pool: &Pool, address: IpAddr) -> Option<&'static str> {
    let is_inside = pool.networks().iter().any(|network| network.contains(&address));
    is_inside.then_some("inside the overlay's own network")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BootId, NodeId, PoolSpec, Version, Vtep};

    fn record(underlay: &str) -> MemberRecord {
        let node = NodeId::of_public_key(&[1; 32]);
        let underlay: IpAddr = underlay.parse().expect("an address");
        MemberRecord {
            node,
            version: Version { starts: 1, change: 0 },
            boot: BootId::from_bytes([1; 8]),
            name: "n1".parse().expect("a name"),
            address: (underlay, 8473).into(),
            vtep: Vtep { mac: Mac::of_node(node), underlay },
            left_to: None,
        }
    }

    fn pool() -> Pool {
        let spec = PoolSpec {
            network6: "fd42::/48".parse().ok(),
            ..PoolSpec::of("10.42.0.0/16".parse().expect("a network"))
        };
        Pool::new(&spec).expect("a pool")
    }

    #[test]
    fn record_with_an_unreachable_address_is_unusable() {
        for bad in [
            "fe80::1",
            "169.254.7.1",
            "224.0.0.5",
            "ff02::1",
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "255.255.255.255",
            "::ffff:192.0.2.1",
            "10.42.7.1",
            "fd42::7:1",
        ] {
            assert!(record(bad).why_unusable(&pool()).is_some(), "{bad}");
            let elsewhere = MemberRecord { address: record(bad).address, ..record("192.0.2.1") };
            assert!(
                elsewhere.why_unusable(&pool()).is_some(),
                "{bad} as the address of the endpoint"
            );
        }
        for good in ["192.0.2.1", "10.43.0.1", "2001:db8::1", "fd43::1", "100.64.0.1", "240.0.0.1"]
        {
            assert_eq!(record(good).why_unusable(&pool()), None, "{good}");
        }
    }

    #[test]
    fn record_with_another_mac_or_without_a_port_is_unusable() {
        let mut other = record("192.0.2.1");
        other.vtep.mac = Mac::of_node(NodeId::of_public_key(&[2; 32]));
        assert!(matches!(other.why_unusable(&pool()), Some(UnusableRecord::Mac { .. })));
        let mut no_port = record("192.0.2.1");
        no_port.address.set_port(0);
        assert_eq!(no_port.why_unusable(&pool()), Some(UnusableRecord::Port));
    }
}

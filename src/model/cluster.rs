//! What all nodes of a cluster share: its id, its pool and its VXLAN settings.

use std::{fmt, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::{ClusterId, Pool};

/// Made once by the first node, adopted by every joiner, never changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    pub id: ClusterId,
    pub settings: ClusterSettings,
}

/// Settings on which all nodes must agree for a packet to arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterSettings {
    pub pool: Pool,
    /// VXLAN network identifier, 1 to 2^24 - 1.
    pub vni: u32,
    /// UDP port of the VXLAN devices (8472 is the kernel's own default, 4789 IANA's).
    pub vxlan_port: u16,
}

/// What a joiner's operator wrote down; fields left out accept whatever the cluster has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsWish {
    pub network: Option<Ipv4Net>,
    pub subnet_len: Option<u8>,
    pub subnet_min: Option<Ipv4Addr>,
    pub subnet_max: Option<Ipv4Addr>,
    pub vni: Option<u32>,
    pub vxlan_port: Option<u16>,
}

impl SettingsWish {
    /// The first field in which the wish contradicts the cluster.
    pub fn difference(&self, cluster: &ClusterSettings) -> Option<Difference> {
        let pool = &cluster.pool;
        let bound = |slot: u32| pool.subnet(super::Slot(slot)).network();
        differs("network", self.network, pool.network())
            .or_else(|| differs("subnet_len", self.subnet_len, pool.subnet_len()))
            .or_else(|| differs("subnet_min", self.subnet_min, bound(*pool.slots().start())))
            .or_else(|| differs("subnet_max", self.subnet_max, bound(*pool.slots().end())))
            .or_else(|| differs("vni", self.vni, cluster.vni))
            .or_else(|| differs("vxlan_port", self.vxlan_port, cluster.vxlan_port))
    }
}

/// One setting that a joiner and the cluster see differently.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    pub field: String,
    pub joiner: String,
    pub cluster: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, joiner, cluster } = self;
        write!(f, "{field} is {joiner} here and {cluster} in the cluster")
    }
}

fn differs<T: PartialEq + fmt::Display>(
    field: &str,
    wish: Option<T>,
    cluster: T,
) -> Option<Difference> {
    wish.filter(|wish| *wish != cluster).map(|wish| Difference {
        field: field.to_owned(),
        joiner: wish.to_string(),
        cluster: cluster.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::PoolSpec, *};

    #[test]
    fn a_wish_differs_only_in_what_it_says() {
        let pool = Pool::new(&PoolSpec {
            network: "10.42.0.0/16".parse().expect("network"),
            subnet_len: None,
            subnet_min: None,
            subnet_max: None,
        })
        .expect("pool");
        let cluster = ClusterSettings { pool, vni: 1, vxlan_port: 8472 };
        assert_eq!(SettingsWish::default().difference(&cluster), None);
        let same = SettingsWish {
            vni: Some(1),
            subnet_min: Some(Ipv4Addr::new(10, 42, 1, 0)),
            ..SettingsWish::default()
        };
        assert_eq!(same.difference(&cluster), None);
        let other = SettingsWish { vni: Some(7), ..SettingsWish::default() };
        let said = other.difference(&cluster).expect("differs").to_string();
        assert_eq!(said, "vni is 7 here and 1 in the cluster");
    }
}

//! What all nodes of a cluster share: its id, its pool and its VXLAN settings.

use std::{fmt, net::IpAddr};

use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::{ClusterId, Pool, Text};

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
    #[serde(deserialize_with = "vni")]
    pub vni: u32,
    /// UDP port of the VXLAN devices (8472 is the kernel's own default, 4789 IANA's).
    #[serde(deserialize_with = "port")]
    pub vxlan_port: u16,
}

fn vni<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let vni = u32::deserialize(deserializer)?;
    let why = || D::Error::custom(format!("vni {vni} is not between 1 and 2^24 - 1"));
    (1..1 << 24).contains(&vni).then_some(vni).ok_or_else(why)
}

fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let port = u16::deserialize(deserializer)?;
    if port == 0 { Err(D::Error::custom("vxlan_port is 0")) } else { Ok(port) }
}

/// What a joiner's operator wrote down; fields left out accept whatever the cluster has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsWish {
    pub network: Option<IpNet>,
    pub subnet_len: Option<u8>,
    pub subnet_min: Option<IpAddr>,
    pub subnet_max: Option<IpAddr>,
    pub network6: Option<Ipv6Net>,
    pub subnet_len6: Option<u8>,
    pub vni: Option<u32>,
    pub vxlan_port: Option<u16>,
}

impl SettingsWish {
    /// The first field in which the wish contradicts the cluster.
    pub fn difference(&self, cluster: &ClusterSettings) -> Option<Difference> {
        let pool = &cluster.pool;
        let bound = |slot: u32| pool.subnet(super::Slot(slot)).network();
        let (network6, len6) = pool.second().unzip();
        differs("network", self.network, pool.network())
            .or_else(|| differs("subnet_len", self.subnet_len, pool.subnet_len()))
            .or_else(|| differs("subnet_min", self.subnet_min, bound(*pool.slots().start())))
            .or_else(|| differs("subnet_max", self.subnet_max, bound(*pool.slots().end())))
            .or_else(|| differs_if_any("network6", self.network6.map(IpNet::from), network6))
            .or_else(|| differs_if_any("subnet_len6", self.subnet_len6, len6))
            .or_else(|| differs("vni", self.vni, cluster.vni))
            .or_else(|| differs("vxlan_port", self.vxlan_port, cluster.vxlan_port))
    }
}

/// One setting that a joiner and the cluster see differently.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    pub field: Text,
    pub joiner: Text,
    pub cluster: Text,
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
        field: field.into(),
        joiner: wish.to_string().into(),
        cluster: cluster.to_string().into(),
    })
}

/// The same for a setting that the cluster may not have at all.
fn differs_if_any<T: PartialEq + fmt::Display>(
    field: &str,
    wish: Option<T>,
    cluster: Option<T>,
) -> Option<Difference> {
    match cluster {
        Some(cluster) => differs(field, wish, cluster),
        None => wish.map(|wish| Difference {
            field: field.into(),
            joiner: wish.to_string().into(),
            cluster: "none".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::PoolSpec, *};

    #[test]
    fn a_wish_differs_only_in_what_it_says() {
        let pool =
            Pool::new(&PoolSpec::of("10.42.0.0/16".parse().expect("network"))).expect("pool");
        let cluster = ClusterSettings { pool, vni: 1, vxlan_port: 8472 };
        assert_eq!(SettingsWish::default().difference(&cluster), None);
        let same = SettingsWish {
            vni: Some(1),
            subnet_min: "10.42.1.0".parse().ok(),
            ..SettingsWish::default()
        };
        assert_eq!(same.difference(&cluster), None);
        let dual = SettingsWish { network6: "fd42::/48".parse().ok(), ..SettingsWish::default() };
        let said = dual.difference(&cluster).expect("differs").to_string();
        assert_eq!(said, "network6 is fd42::/48 here and none in the cluster");
        let other = SettingsWish { vni: Some(7), ..SettingsWish::default() };
        let said = other.difference(&cluster).expect("differs").to_string();
        assert_eq!(said, "vni is 7 here and 1 in the cluster");
    }
}

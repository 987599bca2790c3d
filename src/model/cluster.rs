//! What all nodes of a cluster share: its id, its pool and its VXLAN settings.

use std::{fmt, net::IpAddr};

use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::{ClusterId, Pool, Text};

/// The cluster's record. The creator writes it once, each joiner copies it, and it never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// The cluster id.
    pub id: ClusterId,
    /// The cluster's settings.
    pub settings: ClusterSettings,
}

/// Settings that must be equal on all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(all(test, feature = "agent"), derive(schemars::JsonSchema))]
pub struct ClusterSettings {
    /// The address pool.
    pub pool: Pool,
    /// VXLAN network identifier, from 1 to 2^24 - 1.
    #[serde(deserialize_with = "vni")]
    pub vni: u32,
    /// UDP port of the VXLAN devices. The kernel's default is 8472, IANA's number is 4789.
    #[serde(deserialize_with = "port")]
    pub vxlan_port: u16,
}

/// Deserializes a valid VNI.
fn vni<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let vni = u32::deserialize(deserializer)?;
    let why = || D::Error::custom(format!("vni {vni} is not between 1 and 2^24 - 1"));
    (1..1 << 24).contains(&vni).then_some(vni).ok_or_else(why)
}

/// Deserializes a nonzero port.
fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let port = u16::deserialize(deserializer)?;
    if port == 0 { Err(D::Error::custom("vxlan_port is 0")) } else { Ok(port) }
}

/// Cluster settings from a joiner's configuration. `None` accepts the cluster's value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsWish {
    /// Network of the pool.
    pub network: Option<IpNet>,
    /// Prefix length of subnets in `network`.
    pub subnet_len: Option<u8>,
    /// First address of the first subnet that may be leased.
    pub subnet_min: Option<IpAddr>,
    /// First address of the last subnet that may be leased.
    pub subnet_max: Option<IpAddr>,
    /// IPv6 network of a dual-stack pool.
    pub network6: Option<Ipv6Net>,
    /// Prefix length of subnets in `network6`.
    pub subnet_len6: Option<u8>,
    /// VXLAN network identifier.
    pub vni: Option<u32>,
    /// UDP port of the VXLAN devices.
    pub vxlan_port: Option<u16>,
}

impl SettingsWish {
    /// Returns the first field that contradicts the cluster's settings.
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

/// A setting with different values at a joiner and in the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Name of the setting.
    pub field: Text,
    /// The joiner's value.
    pub joiner: Text,
    /// The cluster's value.
    pub cluster: Text,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, joiner, cluster } = self;
        write!(f, "{field} is {joiner} here and {cluster} in the cluster")
    }
}

/// Returns the difference between a configured value and the cluster's.
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

/// Returns the difference between a configured value and the cluster's, which may be absent.
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
    fn wish_differs_only_in_fields_that_are_set() {
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
        let text = dual.difference(&cluster).expect("differs").to_string();
        assert_eq!(text, "network6 is fd42::/48 here and none in the cluster");
        let other = SettingsWish { vni: Some(7), ..SettingsWish::default() };
        let text = other.difference(&cluster).expect("differs").to_string();
        assert_eq!(text, "vni is 7 here and 1 in the cluster");
    }
}

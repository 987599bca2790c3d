//! The address pool of a cluster and its division into slots of equal size.
//!
//! A slot is a number; its subnets follow from the pool: one, or in a dual-stack overlay one of each family.
//! All arithmetic of addresses lives here, and a [`Pool`] cannot be built from settings that do not fit
//! together.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::{Range, RangeInclusive},
};

use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};

/// More slots than this are refused (IPv4) or left unused (IPv6): 10.0.0.0/8 in /24s is the largest pool in
/// practice, and the bound keeps every table and every frame that lists slots finite.
pub const MAX_SLOTS: u32 = 1 << 16;

/// The n-th subnet of the pool, counted from the network address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot(pub u32);

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

/// What a slot stands for: a subnet, and in a dual-stack overlay an IPv6 subnet beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subnets {
    pub first: IpNet,
    pub second: Option<IpNet>,
}

impl Subnets {
    pub fn iter(self) -> impl Iterator<Item = IpNet> {
        [Some(self.first), self.second].into_iter().flatten()
    }
}

/// What an operator says about the pool; anything left out has flannel's default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// IPv4, or IPv6 where the overlay is to have no IPv4.
    pub network: IpNet,
    /// Prefix length of one node's subnet. Default: 24 (IPv6: 64), or network + 2 where the network is
    /// narrower than /22 (/62).
    pub subnet_len: Option<u8>,
    /// First subnet that may be leased. Default: the second of the network.
    pub subnet_min: Option<IpAddr>,
    /// Last subnet that may be leased. Default: the last of the network.
    pub subnet_max: Option<IpAddr>,
    /// The IPv6 network of a dual-stack overlay.
    pub network6: Option<Ipv6Net>,
    pub subnet_len6: Option<u8>,
}

impl PoolSpec {
    /// A network with everything else left to the defaults.
    pub const fn of(network: IpNet) -> Self {
        Self {
            network,
            subnet_len: None,
            subnet_min: None,
            subnet_max: None,
            network6: None,
            subnet_len6: None,
        }
    }
}

/// The cluster's addresses: a network cut into subnets, of which a range may be leased, and in a dual-stack
/// overlay a second one cut into as many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawPool", into = "RawPool")]
pub struct Pool {
    main: Division,
    second: Option<Division>,
    first: Slot,
    last: Slot,
}

impl Pool {
    /// Checks and completes a specification.
    pub fn new(spec: &PoolSpec) -> Result<Self, PoolError> {
        let main = Division::new(["network", "subnet_len"], spec.network, spec.subnet_len)?;
        let IpNet::V4(_) = spec.network else {
            return match spec.network6 {
                Some(network6) => {
                    Err(PoolError::TwoOfIpv6 { network: spec.network, network6: network6.into() })
                }
                None => Self::bounded(main, None, spec),
            };
        };
        if main.subnets() > u64::from(MAX_SLOTS) {
            return Err(PoolError::TooManySlots {
                network: main.network,
                subnet_len: main.subnet_len,
                slots: main.subnets(),
            });
        }
        let names = ["network6", "subnet_len6"];
        let second = spec
            .network6
            .map(|net| Division::new(names, net.into(), spec.subnet_len6))
            .transpose()?;
        if let Some(second) = second.filter(|second| second.subnets() < main.subnets()) {
            return Err(PoolError::TooFewBeside {
                network6: second.network,
                subnet_len6: second.subnet_len,
                slots6: second.subnets(),
                network: main.network,
                slots: main.subnets(),
            });
        }
        Self::bounded(main, second, spec)
    }

    fn bounded(
        main: Division,
        second: Option<Division>,
        spec: &PoolSpec,
    ) -> Result<Self, PoolError> {
        let slots = main.subnets().min(u64::from(MAX_SLOTS));
        let whole = Self { main, second, first: Slot(0), last: Slot(slots as u32 - 1) };
        let bound = |field, address| {
            whole.slot_at(address).ok_or(PoolError::Bound {
                field,
                address,
                network: main.network,
                subnet_len: main.subnet_len,
            })
        };
        let first = spec.subnet_min.map(|address| bound("subnet_min", address));
        let last = spec.subnet_max.map(|address| bound("subnet_max", address));
        let (first, last) =
            (first.transpose()?.unwrap_or(Slot(1)), last.transpose()?.unwrap_or(whole.last));
        if first > last {
            return Err(PoolError::EmptyRange {
                min: whole.subnet(first).network(),
                max: whole.subnet(last).network(),
            });
        }
        Ok(Self { first, last, ..whole })
    }

    /// The network, or in a dual-stack overlay the IPv4 one.
    pub const fn network(&self) -> IpNet {
        self.main.network
    }

    /// Length of the subnets in [`Pool::network`].
    pub const fn subnet_len(&self) -> u8 {
        self.main.subnet_len
    }

    /// The IPv6 network of a dual-stack overlay, and the length of its subnets.
    pub fn second(&self) -> Option<(IpNet, u8)> {
        self.second.map(|second| (second.network, second.subnet_len))
    }

    /// All networks of the overlay: one, or one of each family.
    pub fn networks(&self) -> Subnets {
        Subnets { first: self.main.network, second: self.second.map(|second| second.network) }
    }

    /// The slots that may be leased.
    pub const fn slots(&self) -> RangeInclusive<u32> {
        self.first.0..=self.last.0
    }

    /// How many slots may be leased; at least one.
    pub const fn slot_count(&self) -> u32 {
        self.last.0 - self.first.0 + 1
    }

    pub const fn contains(&self, slot: Slot) -> bool {
        self.first.0 <= slot.0 && slot.0 <= self.last.0
    }

    /// The subnet of a slot in [`Pool::network`], by which the slot is called.
    ///
    /// # Panics
    /// If the slot is outside the network, which [`Pool::contains`] rules out.
    pub fn subnet(&self, slot: Slot) -> IpNet {
        self.main.subnet(slot)
    }

    /// All subnets of a slot.
    ///
    /// # Panics
    /// As [`Pool::subnet`].
    pub fn subnets(&self, slot: Slot) -> Subnets {
        let second = self.second.map(|second| second.subnet(slot));
        Subnets { first: self.subnet(slot), second }
    }

    /// The slot with a subnet that begins at `address`, if it may be leased.
    pub fn slot_at(&self, address: IpAddr) -> Option<Slot> {
        let slot = self.slot_of(address)?;
        self.subnets(slot).iter().any(|subnet| subnet.network() == address).then_some(slot)
    }

    /// The slots with a subnet that has addresses of `network`.
    pub fn slots_in(&self, network: &IpNet) -> Range<u32> {
        let divisions = std::iter::once(&self.main).chain(&self.second);
        let (first, last) = (self.first.0, self.last.0);
        for division in divisions {
            if network.contains(&division.network) {
                return first..last + 1;
            }
            let ends = [network.network(), network.broadcast()].map(|end| division.position(end));
            if let [Some(from), Some(to)] = ends {
                return from.0.max(first)..(to.0 + 1).min(last + 1);
            }
        }
        0..0
    }

    /// The slot with a subnet that holds `address`, if it may be leased.
    pub fn slot_of(&self, address: IpAddr) -> Option<Slot> {
        let position = |division: &Division| division.position(address);
        let slot = position(&self.main).or_else(|| self.second.as_ref().and_then(position))?;
        Some(slot).filter(|slot| self.contains(*slot))
    }
}

/// A network cut into subnets of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Division {
    network: IpNet,
    subnet_len: u8,
}

impl Division {
    fn new(
        [field, len_field]: [&'static str; 2],
        network: IpNet,
        subnet_len: Option<u8>,
    ) -> Result<Self, PoolError> {
        if network.trunc() != network {
            return Err(PoolError::HostBits { field, network, fixed: network.trunc() });
        }
        let (prefix, longest) = (network.prefix_len(), network.max_prefix_len() - 2);
        if prefix + 2 > longest {
            return Err(PoolError::TooNarrow { field, network, widest: longest - 2 });
        }
        let usual = if network.addr().is_ipv4() { 24 } else { 64 };
        let subnet_len = subnet_len.unwrap_or(if prefix + 2 <= usual { usual } else { prefix + 2 });
        if !(prefix + 2..=longest).contains(&subnet_len) {
            let shortest = prefix + 2;
            return Err(PoolError::SubnetLen { len_field, subnet_len, network, shortest, longest });
        }
        Ok(Self { network, subnet_len })
    }

    /// How many subnets there are; 2^63 stands for more as well.
    fn subnets(&self) -> u64 {
        1 << (self.subnet_len - self.network.prefix_len()).min(63)
    }

    fn subnet(&self, slot: Slot) -> IpNet {
        let len = self.subnet_len;
        let host_bits = self.network.max_prefix_len() - len;
        let subnet = match self.network {
            IpNet::V4(network) => {
                let base = u32::from(network.network());
                IpNet::new(Ipv4Addr::from(base + (slot.0 << host_bits)).into(), len)
            }
            IpNet::V6(network) => {
                let base = u128::from(network.network());
                IpNet::new(Ipv6Addr::from(base + (u128::from(slot.0) << host_bits)).into(), len)
            }
        };
        let subnet = subnet.unwrap_or(self.network);
        assert!(self.network.contains(&subnet), "{slot:?} is outside {}", self.network);
        subnet
    }

    /// Which subnet holds an address.
    fn position(&self, address: IpAddr) -> Option<Slot> {
        if !self.network.contains(&address) {
            return None;
        }
        let bits = |ip| match ip {
            IpAddr::V4(ip) => u128::from(u32::from(ip)),
            IpAddr::V6(ip) => u128::from(ip),
        };
        let host_bits = self.network.max_prefix_len() - self.subnet_len;
        let offset = (bits(address) - bits(self.network.network())) >> host_bits;
        u32::try_from(offset).ok().map(Slot)
    }
}

/// Settings of a pool that do not fit together. Each names the field, its value and the way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error("{field} {network} has host bits set: write {fixed}")]
    HostBits { field: &'static str, network: IpNet, fixed: IpNet },
    #[error("{field} {network} is too small: it must be /{widest} or wider to hold four subnets")]
    TooNarrow { field: &'static str, network: IpNet, widest: u8 },
    #[error(
        "{len_field} {subnet_len} does not fit network {network}: \
         use {shortest} to {longest}, so that the network holds at least four subnets"
    )]
    SubnetLen { len_field: &'static str, subnet_len: u8, network: IpNet, shortest: u8, longest: u8 },
    #[error(
        "network {network} holds {slots} subnets of /{subnet_len}, more than {MAX_SLOTS}: \
         use a shorter subnet_len or a smaller network"
    )]
    TooManySlots { network: IpNet, subnet_len: u8, slots: u64 },
    #[error(
        "network6 {network6} holds {slots6} subnets of /{subnet_len6}, fewer than the {slots} of network \
         {network}: use a wider network6 or a longer subnet_len6"
    )]
    TooFewBeside { network6: IpNet, subnet_len6: u8, slots6: u64, network: IpNet, slots: u64 },
    #[error("network {network} and network6 {network6} are both IPv6: leave network6 out")]
    TwoOfIpv6 { network: IpNet, network6: IpNet },
    #[error("{field} {address} is not the first address of a /{subnet_len} subnet of {network}")]
    Bound { field: &'static str, address: IpAddr, network: IpNet, subnet_len: u8 },
    #[error("subnet_min {min} is above subnet_max {max}: swap them")]
    EmptyRange { min: IpAddr, max: IpAddr },
}

/// The serialised form; reading it back goes through the same checks as an operator's settings.
#[derive(Serialize, Deserialize)]
struct RawPool {
    network: IpNet,
    subnet_len: u8,
    network6: Option<Ipv6Net>,
    subnet_len6: Option<u8>,
    first: Slot,
    last: Slot,
}

impl From<Pool> for RawPool {
    fn from(Pool { main, second, first, last }: Pool) -> Self {
        let network6 = second.and_then(|second| match second.network {
            IpNet::V6(network) => Some(network),
            IpNet::V4(_) => None,
        });
        let subnet_len6 = second.map(|second| second.subnet_len);
        let Division { network, subnet_len } = main;
        Self { network, subnet_len, network6, subnet_len6, first, last }
    }
}

impl TryFrom<RawPool> for Pool {
    type Error = String;

    fn try_from(raw: RawPool) -> Result<Self, String> {
        let spec = PoolSpec {
            subnet_len: Some(raw.subnet_len),
            network6: raw.network6,
            subnet_len6: raw.subnet_len6,
            ..PoolSpec::of(raw.network)
        };
        let pool = Self::new(&spec).map_err(|e| e.to_string())?;
        if raw.first > raw.last || raw.last > pool.last {
            return Err(format!("{:?} to {:?} is no range of this pool", raw.first, raw.last));
        }
        Ok(Self { first: raw.first, last: raw.last, ..pool })
    }
}

#[cfg(test)]
mod tests {
    use ipnet::Ipv4Net;
    use proptest::prelude::*;

    use super::*;

    fn spec(network: &str) -> PoolSpec {
        PoolSpec::of(network.parse().expect("network"))
    }

    #[test]
    fn defaults_are_flannels() {
        let pool = Pool::new(&spec("10.42.0.0/16")).expect("pool");
        assert_eq!((pool.subnet_len(), pool.slot_count()), (24, 255));
        assert_eq!(pool.subnet(Slot(1)).to_string(), "10.42.1.0/24");
        assert_eq!(pool.subnet(Slot(255)).to_string(), "10.42.255.0/24");
        assert_eq!(Pool::new(&spec("10.42.0.0/23")).expect("pool").subnet_len(), 25);
    }

    #[test]
    fn a_slot_of_a_dual_stack_pool_is_one_subnet_of_each_family() {
        let dual = PoolSpec { network6: "fd42::/48".parse().ok(), ..spec("10.42.0.0/16") };
        let pool = Pool::new(&dual).expect("pool");
        let subnets: Vec<String> =
            pool.subnets(Slot(7)).iter().map(|net| net.to_string()).collect();
        assert_eq!(subnets, ["10.42.7.0/24", "fd42:0:0:7::/64"]);
        for address in ["10.42.7.9", "fd42:0:0:7::9"] {
            assert_eq!(pool.slot_of(address.parse().expect("address")), Some(Slot(7)));
        }
        assert_eq!(pool.slot_at("fd42:0:0:7::".parse().expect("address")), Some(Slot(7)));
        let json = serde_json::to_string(&pool).expect("serialised");
        assert_eq!(serde_json::from_str::<Pool>(&json).expect("read back"), pool);
    }

    #[test]
    fn a_pool_of_ipv6_alone_uses_as_many_slots_as_a_table_holds() {
        let pool = Pool::new(&spec("fd42::/40")).expect("pool");
        assert_eq!((pool.subnet_len(), pool.slot_count()), (64, MAX_SLOTS - 1));
        assert_eq!(pool.subnet(Slot(1)).to_string(), "fd42:0:0:1::/64");
        assert_eq!(pool.slot_of("fd42:0:1::".parse().expect("address")), None);
        let bounds = PoolSpec {
            subnet_min: "fd42:0:0:10::".parse().ok(),
            subnet_max: "fd42:0:0:1f::".parse().ok(),
            ..spec("fd42::/48")
        };
        assert_eq!(Pool::new(&bounds).expect("pool").slots(), 16..=31);
    }

    #[test]
    fn each_impossible_pool_is_refused_with_its_reason() {
        let with = |network, len, min: Option<&str>, max: Option<&str>| {
            let parse = |text: &str| text.parse().expect("address");
            Pool::new(&PoolSpec {
                subnet_len: len,
                subnet_min: min.map(parse),
                subnet_max: max.map(parse),
                ..spec(network)
            })
            .expect_err("must be refused")
            .to_string()
        };
        for (error, words) in [
            (with("10.42.1.0/16", None, None, None), "write 10.42.0.0/16"),
            (with("10.42.0.0/29", None, None, None), "/28 or wider"),
            (with("10.42.0.0/16", Some(17), None, None), "use 18 to 30"),
            (with("10.42.0.0/16", Some(31), None, None), "use 18 to 30"),
            (with("10.0.0.0/8", Some(26), None, None), "262144 subnets"),
            (with("10.42.0.0/16", None, Some("10.43.0.0"), None), "subnet_min 10.43.0.0"),
            (with("10.42.0.0/16", None, Some("10.42.0.9"), None), "first address"),
            (with("10.42.0.0/16", None, None, Some("10.41.0.0")), "subnet_max 10.41.0.0"),
            (with("10.42.0.0/16", None, Some("10.42.9.0"), Some("10.42.8.0")), "swap them"),
        ] {
            assert!(error.contains(words), "{error:?} should say {words:?}");
        }
        let beside = |network, network6: &str, len| {
            let network6 = network6.parse().ok();
            let spec = PoolSpec { network6, subnet_len6: len, ..spec(network) };
            Pool::new(&spec).expect_err("must be refused").to_string()
        };
        for (error, words) in [
            (
                beside("10.42.0.0/16", "fd42::/58", None),
                "holds 64 subnets of /64, fewer than the 256",
            ),
            (beside("10.42.0.0/16", "fd42::1/48", None), "network6 fd42::1/48 has host bits"),
            (beside("10.42.0.0/16", "fd42::/48", Some(127)), "subnet_len6 127"),
            (beside("fd42::/48", "fd43::/48", None), "both IPv6"),
        ] {
            assert!(error.contains(words), "{error:?} should say {words:?}");
        }
    }

    proptest! {
        #[test]
        fn slots_and_subnets_are_one_to_one_and_disjoint(
            address in any::<u32>(), prefix in 8_u8..=28, extra in 2_u8..=8,
        ) {
            let subnet_len = prefix + extra;
            prop_assume!(subnet_len <= 30);
            let network = Ipv4Net::new(Ipv4Addr::from(address), prefix).expect("prefix").trunc();
            let spec = PoolSpec { subnet_len: Some(subnet_len), ..PoolSpec::of(network.into()) };
            let pool = Pool::new(&spec).expect("pool");
            let mut previous: Option<Ipv4Net> = None;
            for slot in pool.slots().map(Slot) {
                let IpNet::V4(subnet) = pool.subnet(slot) else { panic!("of IPv4") };
                prop_assert!(network.contains(&subnet));
                prop_assert_eq!(pool.slot_at(subnet.network().into()), Some(slot));
                prop_assert_eq!(pool.slot_of(subnet.broadcast().into()), Some(slot));
                if let Some(previous) = previous {
                    prop_assert_eq!(
                        u32::from(previous.broadcast()) + 1, u32::from(subnet.network()));
                }
                previous = Some(subnet);
            }
        }
    }
}

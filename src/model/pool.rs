//! The address pool of a cluster and its division into slots of equal size.
//!
//! A slot is a number; its subnet follows from the pool. All arithmetic of addresses lives here, and a
//! [`Pool`] cannot be built from settings that do not fit together.

use std::{fmt, net::Ipv4Addr, ops::RangeInclusive};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// More slots than this are refused: 10.0.0.0/8 in /24s is the largest pool in practice, and the bound
/// keeps every table and every frame that lists slots finite.
pub const MAX_SLOTS: u32 = 1 << 16;

/// The n-th subnet of the pool, counted from the network address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot(pub u32);

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

/// What an operator says about the pool; anything left out has flannel's default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    pub network: Ipv4Net,
    /// Prefix length of one node's subnet. Default: 24, or network + 2 where the network is
    /// narrower than /22.
    pub subnet_len: Option<u8>,
    /// First subnet that may be leased. Default: the second of the network.
    pub subnet_min: Option<Ipv4Addr>,
    /// Last subnet that may be leased. Default: the last of the network.
    pub subnet_max: Option<Ipv4Addr>,
}

/// The cluster's addresses: a network cut into subnets, of which a range may be leased.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawPool", into = "RawPool")]
pub struct Pool {
    network: Ipv4Net,
    subnet_len: u8,
    first: Slot,
    last: Slot,
}

impl Pool {
    /// Checks and completes a specification.
    pub fn new(spec: &PoolSpec) -> Result<Self, PoolError> {
        let network = spec.network;
        if network.trunc() != network {
            return Err(PoolError::HostBits { network, fixed: network.trunc() });
        }
        let prefix = network.prefix_len();
        if prefix > 28 {
            return Err(PoolError::TooNarrow { network });
        }
        let subnet_len = spec.subnet_len.unwrap_or(if prefix <= 22 { 24 } else { prefix + 2 });
        if !(prefix + 2..=30).contains(&subnet_len) {
            return Err(PoolError::SubnetLen { network, subnet_len, shortest: prefix + 2 });
        }
        let slots = 1_u64 << (subnet_len - prefix);
        if slots > u64::from(MAX_SLOTS) {
            return Err(PoolError::TooManySlots { network, subnet_len, slots });
        }
        let whole = Self { network, subnet_len, first: Slot(0), last: Slot(slots as u32 - 1) };
        let first = match spec.subnet_min {
            Some(address) => whole.bound("subnet_min", address)?,
            None => Slot(1),
        };
        let last = match spec.subnet_max {
            Some(address) => whole.bound("subnet_max", address)?,
            None => whole.last,
        };
        if first > last {
            return Err(PoolError::EmptyRange {
                min: whole.subnet(first).network(),
                max: whole.subnet(last).network(),
            });
        }
        Ok(Self { first, last, ..whole })
    }

    pub const fn network(&self) -> Ipv4Net {
        self.network
    }

    pub const fn subnet_len(&self) -> u8 {
        self.subnet_len
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

    /// The subnet of a slot.
    ///
    /// # Panics
    /// If the slot is outside the network, which [`Pool::contains`] rules out.
    pub fn subnet(&self, slot: Slot) -> Ipv4Net {
        let base = u32::from(self.network.network());
        let address = Ipv4Addr::from(base + (slot.0 << (32 - self.subnet_len)));
        let subnet = Ipv4Net::new(address, self.subnet_len).unwrap_or(self.network);
        assert!(self.network.contains(&subnet), "{slot:?} is outside {}", self.network);
        subnet
    }

    /// The slot whose subnet begins at `address`, if it may be leased.
    pub fn slot_at(&self, address: Ipv4Addr) -> Option<Slot> {
        let slot = self.slot_containing(address)?;
        (self.subnet(slot).network() == address).then_some(slot)
    }

    fn slot_containing(&self, address: Ipv4Addr) -> Option<Slot> {
        let offset = u32::from(address).checked_sub(u32::from(self.network.network()))?;
        let slot = Slot(offset >> (32 - self.subnet_len));
        (self.network.contains(&address) && self.contains(slot)).then_some(slot)
    }

    fn bound(&self, field: &'static str, address: Ipv4Addr) -> Result<Slot, PoolError> {
        self.slot_at(address).ok_or(PoolError::Bound {
            field,
            address,
            network: self.network,
            subnet_len: self.subnet_len,
        })
    }
}

/// Settings of a pool that do not fit together. Each names the field, its value and the way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error("network {network} has host bits set: write {fixed}")]
    HostBits { network: Ipv4Net, fixed: Ipv4Net },
    #[error("network {network} is too small: it must be /28 or wider to hold four subnets")]
    TooNarrow { network: Ipv4Net },
    #[error(
        "subnet_len {subnet_len} does not fit network {network}: \
         use {shortest} to 30, so that the network holds at least four subnets"
    )]
    SubnetLen { network: Ipv4Net, subnet_len: u8, shortest: u8 },
    #[error(
        "network {network} holds {slots} subnets of /{subnet_len}, more than {MAX_SLOTS}: \
         use a shorter subnet_len or a smaller network"
    )]
    TooManySlots { network: Ipv4Net, subnet_len: u8, slots: u64 },
    #[error("{field} {address} is not the first address of a /{subnet_len} subnet of {network}")]
    Bound { field: &'static str, address: Ipv4Addr, network: Ipv4Net, subnet_len: u8 },
    #[error("subnet_min {min} is above subnet_max {max}: swap them")]
    EmptyRange { min: Ipv4Addr, max: Ipv4Addr },
}

/// The serialised form; reading it back goes through the same checks as an operator's settings.
#[derive(Serialize, Deserialize)]
struct RawPool {
    network: Ipv4Net,
    subnet_len: u8,
    first: Slot,
    last: Slot,
}

impl From<Pool> for RawPool {
    fn from(Pool { network, subnet_len, first, last }: Pool) -> Self {
        Self { network, subnet_len, first, last }
    }
}

impl TryFrom<RawPool> for Pool {
    type Error = String;

    fn try_from(raw: RawPool) -> Result<Self, String> {
        let spec = PoolSpec {
            network: raw.network,
            subnet_len: Some(raw.subnet_len),
            subnet_min: None,
            subnet_max: None,
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
    use proptest::prelude::*;

    use super::*;

    fn spec(network: &str) -> PoolSpec {
        PoolSpec {
            network: network.parse().expect("network"),
            subnet_len: None,
            subnet_min: None,
            subnet_max: None,
        }
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
    }

    proptest! {
        #[test]
        fn slots_and_subnets_are_one_to_one_and_disjoint(
            address in any::<u32>(), prefix in 8_u8..=28, extra in 2_u8..=8,
        ) {
            let subnet_len = prefix + extra;
            prop_assume!(subnet_len <= 30);
            let network = Ipv4Net::new(Ipv4Addr::from(address), prefix).expect("prefix").trunc();
            let pool = Pool::new(&PoolSpec {
                network, subnet_len: Some(subnet_len), subnet_min: None, subnet_max: None,
            }).expect("pool");
            let mut previous: Option<Ipv4Net> = None;
            for slot in pool.slots().map(Slot) {
                let subnet = pool.subnet(slot);
                prop_assert!(network.contains(&subnet));
                prop_assert_eq!(pool.slot_at(subnet.network()), Some(slot));
                if let Some(previous) = previous {
                    prop_assert_eq!(
                        u32::from(previous.broadcast()) + 1, u32::from(subnet.network()));
                }
                previous = Some(subnet);
            }
        }
    }
}

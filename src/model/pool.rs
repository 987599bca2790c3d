//! The address pool of a cluster and its division into slots of equal size.
//!
//! A slot is a number; the pool determines its subnets: one, or one of each family in dual stack. All address
//! arithmetic is in this module. A [`Pool`] always has consistent settings.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::{Range, RangeInclusive},
};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Net, Ipv6Subnets};
use serde::{Deserialize, Serialize};

/// Greatest number of slots. An IPv4 pool with more is refused; an IPv6 pool leaves the others unused.
/// 10.0.0.0/8 in /24 subnets is the largest pool in practice, and the limit bounds every table and message.
pub const MAX_SLOTS: u32 = 1 << 16;

/// The n-th subnet of the pool, counted from the network address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot(pub u32);

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

/// The subnets of a slot: one, or one of each family in dual stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subnets {
    /// The only subnet, or the IPv4 one.
    pub first: IpNet,
    /// The IPv6 subnet in dual stack.
    pub second: Option<IpNet>,
}

impl Subnets {
    /// Iterates over the subnets.
    pub fn iter(self) -> impl Iterator<Item = IpNet> {
        [Some(self.first), self.second].into_iter().flatten()
    }
}

/// Settings of a pool. Omitted ones have flannel's defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// The network: IPv4, or IPv6 for an overlay without IPv4.
    pub network: IpNet,
    /// Prefix length of one node's subnet. Default: 24 (IPv6: 64), or the network's length plus 2 if the
    /// network is narrower than /22 (/62).
    pub subnet_len: Option<u8>,
    /// First address of the first subnet that may be leased. Default: the second subnet of the network.
    pub subnet_min: Option<IpAddr>,
    /// First address of the last subnet that may be leased. Default: the last subnet of the network.
    pub subnet_max: Option<IpAddr>,
    /// The IPv6 network of a dual-stack overlay.
    pub network6: Option<Ipv6Net>,
    /// Prefix length of one node's subnet in `network6`. Default: as for `subnet_len`.
    pub subnet_len6: Option<u8>,
}

impl PoolSpec {
    /// Returns the settings with this network and defaults.
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

/// The cluster's addresses: a network divided into subnets, of which a range may be leased. A dual-stack pool
/// has a second network with at least as many subnets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawPool", into = "RawPool")]
pub struct Pool {
    /// The only network, or the IPv4 one.
    main: Division,
    /// The IPv6 network in dual stack.
    second: Option<Division>,
    /// First slot that may be leased.
    first: Slot,
    /// Last slot that may be leased.
    last: Slot,
}

impl Pool {
    /// Checks settings and completes them with defaults.
    ///
    /// # Errors
    /// If the settings are inconsistent.
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

    /// Restricts the pool to the range of slots from `subnet_min` to `subnet_max`.
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

    /// Returns the only network, or the IPv4 one in dual stack.
    pub const fn network(&self) -> IpNet {
        self.main.network
    }

    /// Returns the prefix length of subnets in [`Pool::network`].
    pub const fn subnet_len(&self) -> u8 {
        self.main.subnet_len
    }

    /// Returns the IPv6 network in dual stack, with the prefix length of its subnets.
    pub fn second(&self) -> Option<(IpNet, u8)> {
        self.second.map(|second| (second.network, second.subnet_len))
    }

    /// Returns all networks: one, or one of each family.
    pub fn networks(&self) -> Subnets {
        Subnets { first: self.main.network, second: self.second.map(|second| second.network) }
    }

    /// Returns the slots that may be leased.
    pub const fn slots(&self) -> RangeInclusive<u32> {
        self.first.0..=self.last.0
    }

    /// Returns the number of slots that may be leased; at least one.
    pub const fn slot_count(&self) -> u32 {
        self.last.0 - self.first.0 + 1
    }

    /// Whether the slot may be leased.
    pub const fn contains(&self, slot: Slot) -> bool {
        self.first.0 <= slot.0 && slot.0 <= self.last.0
    }

    /// Returns the slot's subnet in [`Pool::network`], which names the slot in messages and commands.
    ///
    /// # Panics
    /// If the slot is outside the network. Slots in [`Pool::contains`] are inside.
    pub fn subnet(&self, slot: Slot) -> IpNet {
        self.main.subnet(slot)
    }

    /// Returns all subnets of a slot.
    ///
    /// # Panics
    /// As [`Pool::subnet`].
    pub fn subnets(&self, slot: Slot) -> Subnets {
        let second = self.second.map(|second| second.subnet(slot));
        Subnets { first: self.subnet(slot), second }
    }

    /// Returns the parts of the networks that may be leased, as the fewest networks.
    ///
    /// # Panics
    /// As [`Pool::subnet`].
    pub fn leasable_networks(&self) -> Vec<IpNet> {
        let (first, last) = (self.subnets(self.first), self.subnets(self.last));
        let mut networks = Vec::new();
        for (first, last) in first.iter().zip(last.iter()) {
            match (first, last) {
                (IpNet::V4(first), IpNet::V4(last)) => {
                    let parts = Ipv4Subnets::new(first.network(), last.broadcast(), 0);
                    networks.extend(parts.map(IpNet::V4));
                }
                (IpNet::V6(first), IpNet::V6(last)) => {
                    let parts = Ipv6Subnets::new(first.network(), last.broadcast(), 0);
                    networks.extend(parts.map(IpNet::V6));
                }
                // A division has one family.
                _ => {}
            }
        }
        networks
    }

    /// Returns the slot with a subnet whose network address is `address`, if it may be leased.
    pub fn slot_at(&self, address: IpAddr) -> Option<Slot> {
        let slot = self.slot_of(address)?;
        self.subnets(slot).iter().any(|subnet| subnet.network() == address).then_some(slot)
    }

    /// Returns the slots that may be leased and whose subnets overlap `network`.
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

    /// Returns the slot with a subnet that contains `address`, if it may be leased.
    pub fn slot_of(&self, address: IpAddr) -> Option<Slot> {
        let position = |division: &Division| division.position(address);
        let slot = position(&self.main).or_else(|| self.second.as_ref().and_then(position))?;
        Some(slot).filter(|slot| self.contains(*slot))
    }
}

/// A network divided into subnets of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Division {
    network: IpNet,
    subnet_len: u8,
}

impl Division {
    /// Checks a network and a prefix length; `field` and `len_field` name them in errors.
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

    /// Returns the number of subnets, at most 2^63.
    fn subnets(&self) -> u64 {
        1 << (self.subnet_len - self.network.prefix_len()).min(63)
    }

    /// Returns the n-th subnet.
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

    /// Returns the number of the subnet that contains an address.
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

/// Inconsistent settings of a pool. Each text names the setting, its value and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The network address has host bits.
    #[error("{field} {network} has host bits set: write {fixed}")]
    HostBits {
        /// Name of the setting.
        field: &'static str,
        /// Its value.
        network: IpNet,
        /// The network without host bits.
        fixed: IpNet,
    },
    /// The network cannot hold four subnets.
    #[error("{field} {network} is too small: it must be /{widest} or wider to hold four subnets")]
    TooNarrow {
        /// Name of the setting.
        field: &'static str,
        /// Its value.
        network: IpNet,
        /// Greatest prefix length of a network.
        widest: u8,
    },
    /// The prefix length does not fit the network.
    #[error(
        "{len_field} {subnet_len} does not fit network {network}: \
         use {shortest} to {longest}, so that the network holds at least four subnets"
    )]
    SubnetLen {
        /// Name of the setting.
        len_field: &'static str,
        /// Its value.
        subnet_len: u8,
        /// The network to divide.
        network: IpNet,
        /// Least prefix length.
        shortest: u8,
        /// Greatest prefix length.
        longest: u8,
    },
    /// The IPv4 network has more than [`MAX_SLOTS`] subnets.
    #[error(
        "network {network} holds {slots} subnets of /{subnet_len}, more than {MAX_SLOTS}: \
         use a shorter subnet_len or a smaller network"
    )]
    TooManySlots {
        /// The network.
        network: IpNet,
        /// Prefix length of its subnets.
        subnet_len: u8,
        /// Number of its subnets.
        slots: u64,
    },
    /// The IPv6 network has fewer subnets than the IPv4 network.
    #[error(
        "network6 {network6} holds {slots6} subnets of /{subnet_len6}, fewer than the {slots} of network \
         {network}: use a wider network6 or a longer subnet_len6"
    )]
    TooFewBeside {
        /// The IPv6 network.
        network6: IpNet,
        /// Prefix length of its subnets.
        subnet_len6: u8,
        /// Number of its subnets.
        slots6: u64,
        /// The IPv4 network.
        network: IpNet,
        /// Number of its subnets.
        slots: u64,
    },
    /// Both networks are IPv6.
    #[error("network {network} and network6 {network6} are both IPv6: leave network6 out")]
    TwoOfIpv6 {
        /// The network.
        network: IpNet,
        /// The second network.
        network6: IpNet,
    },
    /// A bound of the range is not the first address of a subnet.
    #[error("{field} {address} is not the first address of a /{subnet_len} subnet of {network}")]
    Bound {
        /// Name of the setting.
        field: &'static str,
        /// Its value.
        address: IpAddr,
        /// The network.
        network: IpNet,
        /// Prefix length of its subnets.
        subnet_len: u8,
    },
    /// The range is empty.
    #[error("subnet_min {min} is above subnet_max {max}: swap them")]
    EmptyRange {
        /// `subnet_min`.
        min: IpAddr,
        /// `subnet_max`.
        max: IpAddr,
    },
}

/// The serialized form. Deserialization applies the same checks as [`Pool::new`].
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
            return Err(format!("{:?} to {:?} is not a range of this pool", raw.first, raw.last));
        }
        Ok(Self { first: raw.first, last: raw.last, ..pool })
    }
}

#[cfg(test)]
mod tests;

//! The allocation of this node's addresses to pods.
//!
//! [`Pods`] is a table without a clock, a disk or a kernel; the caller stores changes and carries them out. A
//! pod has the same place (offset) in each subnet of its node, so one number stands for both of its
//! addresses. The first place is the gateway's. The last one is reserved for the agent's own pod, unless it
//! is the only one for pods. A released address is not allocated again for a while, because peers may still
//! send to its previous owner. The caller supplies the node's subnets.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use ipnet::IpNet;

use crate::model::{Addresses, Attachment, Mac, Pod, Subnets, Time, family_name};

#[cfg(feature = "agent")]
pub mod agent_pod;
#[cfg(feature = "agent")]
mod alias;
#[cfg(feature = "agent")]
mod announce;
#[cfg(feature = "agent")]
pub mod bridge;
#[cfg(feature = "agent")]
pub mod desired;
#[cfg(feature = "agent")]
pub mod furnish;
#[cfg(feature = "agent")]
pub mod link_updates;
#[cfg(feature = "agent")]
pub mod names;
#[cfg(feature = "agent")]
mod neighbors;
#[cfg(feature = "agent")]
pub mod obstacle;
#[cfg(feature = "agent")]
pub mod port;
#[cfg(feature = "agent")]
mod renamed;
#[cfg(feature = "agent")]
mod requests;
#[cfg(test)]
mod tests;
#[cfg(feature = "agent")]
pub mod wiring;

/// Time before a released address is allocated again, if another one is free.
const RELEASE_COOLDOWN: Duration = Duration::from_secs(120);
/// Maximum number of places in a subnet: as many as an IPv4 /16 has. IPv6 subnets are larger.
const MAX_PLACES: u32 = 1 << 16;
/// Place of the gateway, which is this host.
const GATEWAY_PLACE: u32 = 1;
/// First two bytes of MACs that follow from addresses.
const ADDRESS_MAC: [u8; 2] = [0x0a, 0x58];

/// Why a pod gets no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    /// The attachment already has an address.
    #[error("{attachment} has an address already: {address}")]
    Attached {
        /// Container and interface.
        attachment: Attachment,
        /// Its first address.
        address: IpAddr,
    },
    /// The requested address is not in a subnet of this node, or not one for pods.
    #[error("address {address}: not a pod address of this node's subnet {subnet}")]
    Outside {
        /// The requested address.
        address: IpAddr,
        /// This node's subnet of the same family, if it has one.
        subnet: IpNet,
    },
    /// The requested address is the gateway's.
    #[error(
        "address {address}: it is the gateway of the pods in {subnet}, which is this node itself"
    )]
    Gateway {
        /// The requested address.
        address: IpAddr,
        /// The subnet of that gateway.
        subnet: IpNet,
    },
    /// The requested address is that of the agent's own pod.
    #[error(
        "address {address}: the last one of {subnet} is reserved for the agent's own pod, which tests \
         forwarding: request another one"
    )]
    Reserved {
        /// The requested address.
        address: IpAddr,
        /// The subnet with that address.
        subnet: IpNet,
    },
    /// Another pod has the requested address.
    #[error("address {address}: {holder} has it")]
    Taken {
        /// The requested address.
        address: IpAddr,
        /// The pod that has it.
        holder: Attachment,
    },
    /// The requested addresses have different places in the two subnets.
    #[error(
        "addresses {first} and {second}: a pod has the same offset in both subnets, and these differ"
    )]
    TwoPlaces {
        /// The first requested address.
        first: IpAddr,
        /// The address at another place.
        second: IpAddr,
    },
    /// Two addresses of the same family are requested.
    #[error(
        "addresses {first} and {second}: a pod has one {} address: request one of them",
        family_name(.first.is_ipv4())
    )]
    TwoOfOneFamily {
        /// The first requested address.
        first: IpAddr,
        /// Another one of its family.
        second: IpAddr,
    },
    /// The requested MAC is a group's or zero.
    #[error("MAC {0}: must be unicast and not zero")]
    GroupMac(Mac),
    /// The requested MAC follows from an address that is not requested.
    #[error(
        "MAC {0}: those that begin with 0a:58 follow from addresses: request that address too, or \
         another MAC"
    )]
    AddressMac(Mac),
    /// This host has the requested MAC.
    #[error("MAC {0}: this host has it: request another one")]
    MacOfHost(Mac),
    /// Another pod has the requested MAC.
    #[error("MAC {mac}: {holder} has it")]
    MacTaken {
        /// The requested MAC.
        mac: Mac,
        /// The pod that has it.
        holder: Attachment,
    },
    /// No address is free. Has the number of addresses for pods.
    #[error("all {0} addresses of this node's subnet are in use: see `gossamer pods`")]
    Exhausted(usize),
}

impl NoAddress {
    /// Returns whether another pod holds what is requested. That pod may be gone by now.
    pub const fn is_pod_conflict(&self) -> bool {
        matches!(
            self,
            Self::Attached { .. } | Self::Taken { .. } | Self::MacTaken { .. } | Self::Exhausted(_)
        )
    }
}

/// A request for a pod's addresses.
#[derive(Clone, Debug)]
pub struct PodRequest {
    /// Container and interface.
    pub attachment: Attachment,
    /// The program or network that connects the pod, such as `docker` or `cni/net`.
    pub owner: String,
    /// Path of the network namespace.
    pub netns: String,
    /// The addresses that the pod must get. If empty, any free ones.
    pub addresses: Vec<IpAddr>,
    /// The MAC that the pod must have. `None`: any.
    pub mac: Option<Mac>,
}

/// The pods of this node and their addresses.
#[derive(Debug, Default)]
pub struct Pods {
    pods: BTreeMap<Attachment, Pod>,
    holders: BTreeMap<IpAddr, Attachment>,
    /// Release time of released addresses, by the first address of each pod.
    released: BTreeMap<IpAddr, Time>,
}

impl Pods {
    /// Returns a table with the pods of an earlier run.
    pub fn new(pods: impl IntoIterator<Item = Pod>) -> Self {
        let mut all = Self::default();
        pods.into_iter().for_each(|pod| all.insert(pod));
        all
    }

    /// Allocates addresses in the current subnets of this node: the requested ones, or the lowest free ones
    /// that were not released recently. Pods with addresses of earlier subnets keep them.
    ///
    /// # Errors
    /// If the attachment already has an address, a requested address is not available, or no address is free.
    /// Nothing has changed then.
    pub fn attach(
        &mut self,
        now: Time,
        subnets: Subnets,
        PodRequest { attachment, owner, netns, addresses: requested, mac }: PodRequest,
    ) -> Result<&Pod, NoAddress> {
        if let Some(pod) = self.pods.get(&attachment) {
            let address = pod.addresses.first;
            return Err(NoAddress::Attached { attachment, address });
        }
        let place = match requested.as_slice() {
            [] => self.free_place(now, subnets)?,
            [first, ..] => self.requested_place(subnets, *first, &requested)?,
        };
        let addresses = addresses_at(subnets, place);
        let pod = Pod { attachment: attachment.clone(), owner, addresses, netns, mac };
        self.released.remove(&addresses.first);
        self.insert(pod);
        Ok(&self.pods[&attachment])
    }

    /// Releases the addresses of a pod. Returns the pod, if it had any.
    pub fn detach(&mut self, now: Time, attachment: &Attachment) -> Option<Pod> {
        let pod = self.pods.remove(attachment)?;
        for address in pod.addresses.iter() {
            self.holders.remove(&address);
        }
        self.released.retain(|_, since| now.since(*since) < RELEASE_COOLDOWN);
        self.released.insert(pod.addresses.first, now);
        Some(pod)
    }

    /// Returns whether there are no pods.
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    /// Gives a pod another name and namespace. Returns it, if it exists.
    pub fn rename(&mut self, from: &Attachment, to: Attachment, netns: String) -> Option<&Pod> {
        let pod = self.pods.remove(from)?;
        self.insert(Pod { attachment: to.clone(), netns, ..pod });
        self.pods.get(&to)
    }

    /// Adds MACs to pods whose records were written by a version without MACs.
    pub fn learn_macs(&mut self, macs: &BTreeMap<Attachment, Mac>) {
        for pod in self.pods.values_mut() {
            pod.mac = pod.mac.or_else(|| macs.get(&pod.attachment).copied());
        }
    }

    /// Releases the second address of a pod that does not use it.
    pub fn drop_second(&mut self, attachment: &Attachment) {
        let second = self.pods.get_mut(attachment).and_then(|pod| pod.addresses.second.take());
        if let Some(address) = second {
            self.holders.remove(&address);
        }
    }

    /// Returns the pod that has an address.
    pub fn holder(&self, address: IpAddr) -> Option<&Pod> {
        self.pods.get(self.holders.get(&address)?)
    }

    /// Returns the pods whose addresses are in none of this node's subnets. Other pods cannot reach them.
    pub fn outside(&self, subnets: Option<Subnets>) -> impl Iterator<Item = &Pod> {
        let is_inside = move |address: IpAddr| {
            subnets.is_some_and(|subnets| subnets.iter().any(|subnet| subnet.contains(&address)))
        };
        self.iter().filter(move |pod| !is_inside(pod.addresses.first))
    }

    /// Returns a pod by its attachment.
    pub fn get(&self, attachment: &Attachment) -> Option<&Pod> {
        self.pods.get(attachment)
    }

    /// Returns all pods, ordered by attachment.
    pub fn iter(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    fn insert(&mut self, pod: Pod) {
        for address in pod.addresses.iter() {
            self.holders.insert(address, pod.attachment.clone());
        }
        self.pods.insert(pod.attachment.clone(), pod);
    }

    /// Returns the lowest free place that was not released recently; otherwise the one released first.
    fn free_place(&self, now: Time, subnets: Subnets) -> Result<u32, NoAddress> {
        let last = last_pod_place(subnets);
        let mut oldest: Option<(Time, u32)> = None;
        for place in GATEWAY_PLACE + 1..=last {
            let addresses = addresses_at(subnets, place);
            if addresses.iter().any(|address| self.holders.contains_key(&address)) {
                continue;
            }
            match self.released.get(&addresses.first) {
                Some(since) if now.since(*since) < RELEASE_COOLDOWN => {
                    oldest = Some(oldest.map_or((*since, place), |best| best.min((*since, place))));
                }
                _ => return Ok(place),
            }
        }
        let exhausted = NoAddress::Exhausted((last - GATEWAY_PLACE) as usize);
        oldest.map(|(_, place)| place).ok_or(exhausted)
    }

    /// Returns the common place of all requested addresses. `first` is one of them.
    fn requested_place(
        &self,
        subnets: Subnets,
        first: IpAddr,
        requested: &[IpAddr],
    ) -> Result<u32, NoAddress> {
        let place = place_of(subnets, first)?;
        let is_same_family =
            |other: &&IpAddr| **other != first && other.is_ipv4() == first.is_ipv4();
        if let Some(&second) = requested.iter().find(is_same_family) {
            return Err(NoAddress::TwoOfOneFamily { first, second });
        }
        for &second in requested {
            let second_place = place_of(subnets, second)?;
            self.require_free(second)?;
            if second_place != place {
                return Err(NoAddress::TwoPlaces { first, second });
            }
        }
        addresses_at(subnets, place).iter().try_for_each(|address| self.require_free(address))?;
        Ok(place)
    }

    fn require_free(&self, address: IpAddr) -> Result<(), NoAddress> {
        match self.holders.get(&address) {
            Some(holder) => Err(NoAddress::Taken { address, holder: holder.clone() }),
            None => Ok(()),
        }
    }
}

/// Returns the gateway's address in a subnet of this host: the one after the network address, as in flannel.
pub fn gateway(subnet: IpNet) -> IpAddr {
    address_at(subnet, GATEWAY_PLACE)
}

/// Returns the last address of a subnet before the broadcast address: that of the agent's own pod.
pub fn last_address(subnet: IpNet) -> IpAddr {
    last_addresses(Subnets { first: subnet, second: None }).first
}

/// Returns the addresses of the agent's own pod, the last ones of the subnets. They are allocated to other
/// pods only if the subnets have no others.
pub fn last_addresses(subnets: Subnets) -> Addresses {
    addresses_at(subnets, last_place(subnets))
}

/// Returns the addresses before the last ones; `None` if the subnets have only one place for a pod.
pub fn last_but_one(subnets: Subnets) -> Option<Addresses> {
    let place = last_place(subnets).checked_sub(1).filter(|place| *place > GATEWAY_PLACE)?;
    Some(addresses_at(subnets, place))
}

/// Returns an address with the prefix length of its subnet.
pub fn with_length(ip: IpAddr, subnet: IpNet) -> IpNet {
    IpNet::new_assert(ip, subnet.prefix_len())
}

/// Returns the MAC that follows from the address of a gateway or pod. Since it follows from the address,
/// neighbors that remember an earlier owner of the address are right.
pub fn mac_at(ip: IpAddr) -> Mac {
    let [.., a, b, c, d] = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    let [first, second] = ADDRESS_MAC;
    Mac::from_bytes([first, second, a, b, c, d])
}

/// Returns whether a MAC follows from an address.
pub fn is_address_mac(mac: Mac) -> bool {
    mac.as_bytes().starts_with(&ADDRESS_MAC)
}

fn addresses_at(subnets: Subnets, place: u32) -> Addresses {
    let second = subnets.second.map(|subnet| address_at(subnet, place));
    Addresses { first: address_at(subnets.first, place), second }
}

fn address_at(subnet: IpNet, place: u32) -> IpAddr {
    match subnet.network() {
        IpAddr::V4(network) => IpAddr::V4((u32::from(network) + place).into()),
        IpAddr::V6(network) => IpAddr::V6((u128::from(network) + u128::from(place)).into()),
    }
}

/// Returns the last place. In IPv4 the address after it is the broadcast address.
fn last_place(subnets: Subnets) -> u32 {
    let last = |subnet: IpNet| {
        let bits = u32::from(subnet.max_prefix_len() - subnet.prefix_len());
        let places = 1_u64.checked_shl(bits).unwrap_or(u64::MAX).min(MAX_PLACES.into()) as u32;
        places - if subnet.addr().is_ipv4() { 2 } else { 1 }
    };
    subnets.iter().map(last).min().unwrap_or(0)
}

/// Returns the last place that is allocated: all but the last one, unless that is the only one.
fn last_pod_place(subnets: Subnets) -> u32 {
    let last = last_place(subnets);
    if last > GATEWAY_PLACE + 1 { last - 1 } else { last }
}

/// Returns the place of a pod address in the subnet of its family.
fn place_of(subnets: Subnets, address: IpAddr) -> Result<u32, NoAddress> {
    let is_same_family = |subnet: &IpNet| subnet.addr().is_ipv4() == address.is_ipv4();
    let subnet = subnets.iter().find(is_same_family).unwrap_or(subnets.first);
    let place = match (address, subnet.network()) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            u32::from(address).checked_sub(network.into())
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => {
            let place = u128::from(address).checked_sub(network.into());
            place.and_then(|place| place.try_into().ok())
        }
        _ => None,
    };
    if place == Some(GATEWAY_PLACE) {
        return Err(NoAddress::Gateway { address, subnet });
    }
    let last = last_place(subnets);
    if place == Some(last) && last > last_pod_place(subnets) {
        return Err(NoAddress::Reserved { address, subnet });
    }
    place
        .filter(|place| (GATEWAY_PLACE + 1..=last).contains(place))
        .ok_or(NoAddress::Outside { address, subnet })
}

//! Who has which of this node's addresses, and which is given next.
//!
//! A table without a clock, a disk or a kernel: what was given and taken back is told to whoever keeps it.
//! A pod has the same place in each subnet of its node, so one number stands for both of its addresses; the
//! first place is the gateway's. What was given back rests for a while before it is given again, for others
//! may still hold on to whom they knew there. Which subnets this node has is not decided here.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use ipnet::IpNet;

use crate::model::{Addresses, Attachment, Mac, Pod, Subnets, Time};

#[cfg(feature = "agent")]
mod alias;
#[cfg(feature = "agent")]
mod announce;
#[cfg(feature = "agent")]
pub mod bridge;
#[cfg(feature = "agent")]
pub mod furnish;
#[cfg(feature = "agent")]
pub mod link_updates;
#[cfg(feature = "agent")]
mod names;
#[cfg(feature = "agent")]
mod neighbors;
#[cfg(feature = "agent")]
pub mod obstacle;
#[cfg(feature = "agent")]
pub mod port;
#[cfg(feature = "agent")]
mod renamed;
#[cfg(feature = "agent")]
pub mod standin;
#[cfg(test)]
mod tests;
#[cfg(feature = "agent")]
pub mod wiring;

/// An address that was given back rests for so long, unless there is no other.
const REST: Duration = Duration::from_secs(120);
/// Places in one subnet: as many as an IPv4 /16 has. IPv6 subnets are never used up.
const PLACES: u32 = 1 << 16;
/// Of the gateway, which is this host.
const GATEWAY: u32 = 1;

/// Why there is no address for a pod.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    #[error("{attachment} has an address already: {address}")]
    Attached { attachment: Attachment, address: IpAddr },
    #[error("address {address}: it is not one for pods of this node's subnet {subnet}")]
    Outside { address: IpAddr, subnet: IpNet },
    #[error(
        "address {address}: it is the gateway of the pods in {subnet}, which is this node itself"
    )]
    Gateway { address: IpAddr, subnet: IpNet },
    #[error("address {address}: {holder} has it")]
    Taken { address: IpAddr, holder: Attachment },
    #[error(
        "addresses {first} and {second}: a pod has the same place in both subnets, and these are two places"
    )]
    TwoPlaces { first: IpAddr, second: IpAddr },
    #[error(
        "addresses {first} and {second}: a pod has one {} address: ask for one of them",
        family(*.first)
    )]
    TwoOfOne { first: IpAddr, second: IpAddr },
    #[error("MAC {0}: it is not that of one interface")]
    GroupMac(Mac),
    #[error(
        "MAC {0}: those that begin with 0a:58 follow from addresses: ask for that address too, or for \
         another MAC"
    )]
    AddressMac(Mac),
    #[error("MAC {0}: this host has it itself: ask for another one")]
    MacOfHost(Mac),
    #[error("MAC {mac}: {holder} has it")]
    MacTaken { mac: Mac, holder: Attachment },
    #[error("all {0} addresses of this node's subnet are in use: see `gossamer pods`")]
    Exhausted(usize),
}

impl NoAddress {
    /// Whether other pods are in the way, which may be gone by now.
    pub const fn is_of_pods(&self) -> bool {
        matches!(
            self,
            Self::Attached { .. } | Self::Taken { .. } | Self::MacTaken { .. } | Self::Exhausted(_)
        )
    }
}

/// What somebody asks for.
#[derive(Clone, Debug)]
pub struct Wish {
    pub attachment: Attachment,
    /// On whose behalf.
    pub owner: String,
    /// Path of the network namespace.
    pub netns: String,
    /// Those that it must have; any, if empty.
    pub addresses: Vec<IpAddr>,
    /// The MAC that it must have; any, if none.
    pub mac: Option<Mac>,
}

/// All pods of this node.
#[derive(Debug, Default)]
pub struct Pods {
    pods: BTreeMap<Attachment, Pod>,
    holders: BTreeMap<IpAddr, Attachment>,
    /// When addresses were given back, by the first of each pod.
    resting: BTreeMap<IpAddr, Time>,
}

impl Pods {
    /// Pods of an earlier run.
    pub fn new(pods: impl IntoIterator<Item = Pod>) -> Self {
        let mut all = Self::default();
        pods.into_iter().for_each(|pod| all.insert(pod));
        all
    }

    /// Gives a pod its addresses in the subnets that this node has now: those it wishes for, or the lowest
    /// ones that have rested. Pods with addresses of earlier subnets keep them.
    ///
    /// # Errors
    /// Why not; nothing has changed then.
    pub fn attach(
        &mut self,
        now: Time,
        subnets: Subnets,
        Wish { attachment, owner, netns, addresses: wishes, mac }: Wish,
    ) -> Result<&Pod, NoAddress> {
        if let Some(pod) = self.pods.get(&attachment) {
            let address = pod.addresses.first;
            return Err(NoAddress::Attached { attachment, address });
        }
        let place = match wishes.as_slice() {
            [] => self.free_place(now, subnets)?,
            [first, ..] => self.wished_place(subnets, *first, &wishes)?,
        };
        let addresses = addresses_at(subnets, place);
        let pod = Pod { attachment: attachment.clone(), owner, addresses, netns, mac };
        self.resting.remove(&addresses.first);
        self.insert(pod);
        Ok(&self.pods[&attachment])
    }

    /// Takes the addresses of a pod back, if it has any.
    pub fn detach(&mut self, now: Time, attachment: &Attachment) -> Option<Pod> {
        let pod = self.pods.remove(attachment)?;
        for address in pod.addresses.iter() {
            self.holders.remove(&address);
        }
        self.resting.retain(|_, since| now.since(*since) < REST);
        self.resting.insert(pod.addresses.first, now);
        Some(pod)
    }

    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    /// Calls a pod by another name, and says where it is.
    pub fn rename(&mut self, from: &Attachment, to: Attachment, netns: String) -> Option<&Pod> {
        let pod = self.pods.remove(from)?;
        self.insert(Pod { attachment: to.clone(), netns, ..pod });
        self.pods.get(&to)
    }

    /// Takes in MACs that the records of an earlier program do not have.
    pub fn learn_macs(&mut self, macs: &BTreeMap<Attachment, Mac>) {
        for pod in self.pods.values_mut() {
            pod.mac = pod.mac.or_else(|| macs.get(&pod.attachment).copied());
        }
    }

    /// Takes back the second address of a pod that uses none.
    pub fn drop_second(&mut self, attachment: &Attachment) {
        let second = self.pods.get_mut(attachment).and_then(|pod| pod.addresses.second.take());
        if let Some(address) = second {
            self.holders.remove(&address);
        }
    }

    /// Who has an address.
    pub fn holder(&self, address: IpAddr) -> Option<&Pod> {
        self.pods.get(self.holders.get(&address)?)
    }

    /// Pods that others cannot reach any more, for their addresses are none of this node's.
    pub fn outside(&self, subnets: Option<Subnets>) -> impl Iterator<Item = &Pod> {
        let is_inside = move |address: IpAddr| {
            subnets.is_some_and(|subnets| subnets.iter().any(|subnet| subnet.contains(&address)))
        };
        self.iter().filter(move |pod| !is_inside(pod.addresses.first))
    }

    pub fn get(&self, attachment: &Attachment) -> Option<&Pod> {
        self.pods.get(attachment)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    fn insert(&mut self, pod: Pod) {
        for address in pod.addresses.iter() {
            self.holders.insert(address, pod.attachment.clone());
        }
        self.pods.insert(pod.attachment.clone(), pod);
    }

    /// The lowest free place that was not given back lately, or the one that has rested for longest.
    fn free_place(&self, now: Time, subnets: Subnets) -> Result<u32, NoAddress> {
        let last = last_place(subnets);
        let mut longest: Option<(Time, u32)> = None;
        for place in GATEWAY + 1..=last {
            let addresses = addresses_at(subnets, place);
            if addresses.iter().any(|address| self.holders.contains_key(&address)) {
                continue;
            }
            match self.resting.get(&addresses.first) {
                Some(since) if now.since(*since) < REST => {
                    longest =
                        Some(longest.map_or((*since, place), |best| best.min((*since, place))));
                }
                _ => return Ok(place),
            }
        }
        let exhausted = NoAddress::Exhausted((last - GATEWAY) as usize);
        longest.map(|(_, place)| place).ok_or(exhausted)
    }

    /// The one place of all wishes, of which `first` is one.
    fn wished_place(
        &self,
        subnets: Subnets,
        first: IpAddr,
        wishes: &[IpAddr],
    ) -> Result<u32, NoAddress> {
        let place = place_of(subnets, first)?;
        let same = |other: &&IpAddr| **other != first && other.is_ipv4() == first.is_ipv4();
        if let Some(&second) = wishes.iter().find(same) {
            return Err(NoAddress::TwoOfOne { first, second });
        }
        for &second in wishes {
            let its = place_of(subnets, second)?;
            self.expect_free(second)?;
            if its != place {
                return Err(NoAddress::TwoPlaces { first, second });
            }
        }
        addresses_at(subnets, place).iter().try_for_each(|address| self.expect_free(address))?;
        Ok(place)
    }

    fn expect_free(&self, address: IpAddr) -> Result<(), NoAddress> {
        match self.holders.get(&address) {
            Some(holder) => Err(NoAddress::Taken { address, holder: holder.clone() }),
            None => Ok(()),
        }
    }
}

/// The address of this host in a subnet of its own: the one after the network address, as flannel has it.
pub fn gateway(subnet: IpNet) -> IpAddr {
    address_at(subnet, GATEWAY)
}

/// The last address of a subnet that a pod can have.
pub fn last_address(subnet: IpNet) -> IpAddr {
    last_addresses(Subnets { first: subnet, second: None }).first
}

/// The last addresses that a pod can have: they are given when there are no others.
pub fn last_addresses(subnets: Subnets) -> Addresses {
    addresses_at(subnets, last_place(subnets))
}

/// Those before them; none where the subnets have no more than one place for a pod.
pub fn last_but_one(subnets: Subnets) -> Option<Addresses> {
    let place = last_place(subnets).checked_sub(1).filter(|place| *place > GATEWAY)?;
    Some(addresses_at(subnets, place))
}

/// An address as an interface in this subnet has it.
pub fn with_length(ip: IpAddr, subnet: IpNet) -> IpNet {
    IpNet::new_assert(ip, subnet.prefix_len())
}

const fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
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

/// The last one for pods; in IPv4 the very last is for broadcasts.
fn last_place(subnets: Subnets) -> u32 {
    let last = |subnet: IpNet| {
        let bits = u32::from(subnet.max_prefix_len() - subnet.prefix_len());
        let places = 1_u64.checked_shl(bits).unwrap_or(u64::MAX).min(PLACES.into()) as u32;
        places - if subnet.addr().is_ipv4() { 2 } else { 1 }
    };
    subnets.iter().map(last).min().unwrap_or(0)
}

fn place_of(subnets: Subnets, address: IpAddr) -> Result<u32, NoAddress> {
    let same = |subnet: &IpNet| subnet.addr().is_ipv4() == address.is_ipv4();
    let subnet = subnets.iter().find(same).unwrap_or(subnets.first);
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
    if place == Some(GATEWAY) {
        return Err(NoAddress::Gateway { address, subnet });
    }
    place
        .filter(|place| (GATEWAY + 1..=last_place(subnets)).contains(place))
        .ok_or(NoAddress::Outside { address, subnet })
}

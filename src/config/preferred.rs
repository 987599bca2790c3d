//! The check of `prefer_subnet`: an address that begins no subnet of the pool would silently be ignored.

use std::net::IpAddr;

use super::{ConfigError, bad};
use crate::model::{Pool, Slot};

/// Checks the preferred subnet against the pool. Without a pool, a host that joins learns it from the
/// cluster.
///
/// # Errors
/// Fails if the address is outside the pool's networks, or begins no subnet that may be leased.
pub(super) fn check(address: IpAddr, pool: Option<&Pool>) -> Result<(), ConfigError> {
    let refuse = |problem: String| Err(bad("prefer_subnet", problem));
    let Some(pool) = pool else {
        // No subnet is smaller than four addresses.
        let begins_subnet = match address {
            IpAddr::V4(ip) => u32::from(ip) & 3 == 0,
            IpAddr::V6(ip) => u128::from(ip) & 3 == 0,
        };
        return match begins_subnet {
            true => Ok(()),
            false => refuse(format!(
                "{address} is the first address of no subnet: use one as in 10.42.7.0"
            )),
        };
    };
    if pool.slot_at(address).is_some() {
        return Ok(());
    }
    let networks = pool.networks();
    if !networks.iter().any(|network| network.contains(&address)) {
        let networks: Vec<String> = networks.iter().map(|network| network.to_string()).collect();
        let networks = networks.join(" and ");
        return refuse(format!(
            "{address} is outside the network {networks}: use an address in it, or leave it out"
        ));
    }
    if let Some(slot) = pool.slot_of(address) {
        let subnets = pool.subnets(slot);
        let subnet = subnets.iter().find(|subnet| subnet.contains(&address));
        let first = subnet.unwrap_or(subnets.first).network();
        return refuse(format!("{address} is not the first address of a subnet: use {first}"));
    }
    let (first, last) = pool.slots().into_inner();
    let [first, last] = [first, last].map(|slot| {
        let subnets = pool.subnets(Slot(slot));
        let same = subnets.iter().find(|subnet| subnet.addr().is_ipv4() == address.is_ipv4());
        same.unwrap_or(subnets.first).network()
    });
    refuse(format!(
        "{address} is in no subnet that may be leased: use {first} to {last}, or change subnet_min and \
         subnet_max"
    ))
}

//! Assignment of addresses to pods that are connected, and the reasons to refuse one.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    agent::Agent,
    api::{AttachRequest, PodError, PodErrorKind},
    docker::{self, mac_of},
    model::{Attachment, Mac, Pod},
    pods::{
        NoAddress, PodRequest, agent_pod::second_pod_mac, desired::Bridge, is_address_mac,
        last_addresses, mac_at, wiring::WiringError,
    },
};

/// Prefix of the names of reservations for a network; the address follows.
pub(in crate::agent) const NETWORK_PREFIX: &str = "address-";

impl Agent {
    /// Assigns addresses to the pod of a request, and returns its bridge and record.
    ///
    /// # Errors
    /// Fails when the request is invalid, this node is not ready, or the addresses or the MAC are not
    /// available.
    pub(in crate::agent) fn assign_address(
        &mut self,
        request: &AttachRequest,
    ) -> Result<(Bridge, Pod), AddressError> {
        let attachment =
            Attachment::new(&request.container, &request.interface).map_err(PodError::invalid)?;
        let netns = request.netns()?.display().to_string();
        let owner = request.owner()?.to_owned();
        let bridge = self.ready_bridge()?;
        if let Some(mac) = request.mac {
            self.check_mac_is_free(mac, &attachment)?;
            let is_derived = |ip: &IpAddr| bridge.subnets.first.contains(ip) && mac_at(*ip) == mac;
            if is_address_mac(mac) && !request.addresses.iter().any(is_derived) {
                return Err(NoAddress::AddressMac(mac).into());
            }
        }
        let addresses = request.addresses.clone();
        let wish = PodRequest { attachment, owner, netns, addresses, mac: request.mac };
        let pod = self.pods.table.attach(self.clock.now(), bridge.subnets, wish)?.clone();
        Ok((bridge, pod))
    }

    /// Checks that a MAC is usable and no other pod of this node has it.
    ///
    /// # Errors
    /// Fails when it is a group address, or in use by another pod or by the trial of forwarding.
    pub(in crate::agent) fn check_mac_is_free(
        &self,
        mac: Mac,
        attachment: &Attachment,
    ) -> Result<(), NoAddress> {
        if !mac.is_assignable() {
            return Err(NoAddress::GroupMac(mac));
        }
        // The trial of forwarding uses the MAC of the address that pods are assigned last.
        let view = self.kernel.wanted.view.as_ref();
        if view.is_some_and(|view| second_pod_mac(last_addresses(view.own.subnets)) == mac) {
            return Err(NoAddress::MacOfHost(mac));
        }
        let others = self.pods.table.iter().filter(|pod| pod.attachment != *attachment);
        if let Some(pod) = others.into_iter().find(|pod| mac_of(pod) == Some(mac)) {
            return Err(NoAddress::MacTaken { mac, holder: pod.attachment.clone() });
        }
        Ok(())
    }

    /// Checks the same for a container of Docker, whose MAC Docker may have drawn. One of 16,384 drawn MACs
    /// looks like one derived from an address, so only those derived from an address of this node's subnet
    /// are refused.
    ///
    /// # Errors
    /// Fails as [`Agent::check_mac_is_free`] does, or when the MAC belongs to another address of this node.
    pub(in crate::agent) fn check_docker_mac_is_free(
        &self,
        mac: Mac,
        attachment: &Attachment,
        address: Option<IpAddr>,
        subnet: IpNet,
    ) -> Result<(), NoAddress> {
        self.check_mac_is_free(mac, attachment)?;
        let is_of_another = address.is_none_or(|ip| mac_at(ip) != mac);
        match is_of_another && is_derived_in(mac, subnet) {
            true => Err(NoAddress::AddressMac(mac)),
            false => Ok(()),
        }
    }
}

/// Whether this MAC is the default one of an address of the subnet.
fn is_derived_in(mac: Mac, subnet: IpNet) -> bool {
    let [_, _, last @ ..] = *mac.as_bytes();
    let address = match subnet.network() {
        IpAddr::V4(_) => IpAddr::from(last),
        IpAddr::V6(network) => {
            let mut octets = network.octets();
            octets[12..].copy_from_slice(&last);
            octets.into()
        }
    };
    is_address_mac(mac) && subnet.contains(&address)
}

/// Why a pod gets no address.
pub(in crate::agent) enum AddressError {
    /// The addresses or the MAC are not available; another pod may have them.
    Address(NoAddress),
    /// Any other reason.
    Other(PodError),
}

impl From<NoAddress> for AddressError {
    fn from(error: NoAddress) -> Self {
        Self::Address(error)
    }
}

impl From<PodError> for AddressError {
    fn from(error: PodError) -> Self {
        Self::Other(error)
    }
}

impl From<AddressError> for PodError {
    fn from(error: AddressError) -> Self {
        match error {
            AddressError::Address(error) => error.into(),
            AddressError::Other(error) => error,
        }
    }
}

impl From<NoAddress> for PodError {
    fn from(error: NoAddress) -> Self {
        let kind = match error {
            NoAddress::Attached { .. } => PodErrorKind::Invalid,
            NoAddress::Exhausted(_) => PodErrorKind::Exhausted,
            NoAddress::Outside { .. }
            | NoAddress::Gateway { .. }
            | NoAddress::Reserved { .. }
            | NoAddress::Taken { .. }
            | NoAddress::GroupMac(_)
            | NoAddress::AddressMac(_)
            | NoAddress::MacOfHost(_)
            | NoAddress::MacTaken { .. }
            | NoAddress::TwoOfOneFamily { .. }
            | NoAddress::TwoPlaces { .. } => PodErrorKind::Address,
        };
        Self::new(kind, error)
    }
}

impl From<WiringError> for PodError {
    fn from(error: WiringError) -> Self {
        let kind = match error {
            WiringError::Kernel { .. } | WiringError::Incomplete(_) => PodErrorKind::Failed,
            _ => PodErrorKind::Invalid,
        };
        Self::new(kind, error)
    }
}

/// Whether the address is reserved for as long as a network of Docker exists.
pub(super) fn is_network_reservation(pod: &Pod) -> bool {
    pod.owner == docker::OWNER && pod.attachment.container().starts_with(NETWORK_PREFIX)
}

//! What a pod is given when it is connected, and why it is not.

use super::Agent;
use crate::{
    api::{AttachRequest, PodError, PodErrorKind},
    model::{Attachment, Mac, Pod},
    pods::{
        NoAddress, Wish,
        bridge::{Bridge, is_address_mac, mac_at},
        wiring::WiringError,
    },
};

impl Agent {
    pub(super) fn give_address(
        &mut self,
        request: &AttachRequest,
    ) -> Result<(Bridge, Pod), NotGiven> {
        let attachment =
            Attachment::new(&request.container, &request.interface).map_err(PodError::invalid)?;
        let netns = request.netns()?.display().to_string();
        let owner = request.owner()?.to_owned();
        let bridge = self.ready_bridge()?;
        if let Some(mac) = request.mac {
            self.expect_free_mac(mac, &attachment, request)?;
        }
        let addresses = request.addresses.clone();
        let wish = Wish { attachment: attachment.clone(), owner, netns, addresses };
        let pod = self.pods.table.attach(self.clock.now(), bridge.subnets, wish)?.clone();
        if let Some(mac) = request.mac {
            self.pods.macs.insert(attachment, mac);
        }
        Ok((bridge, pod))
    }

    /// Two pods on one bridge must not have the same.
    fn expect_free_mac(
        &self,
        mac: Mac,
        attachment: &Attachment,
        request: &AttachRequest,
    ) -> Result<(), PodError> {
        let taken = |why: String| PodError::new(PodErrorKind::Address, format!("MAC {mac}: {why}"));
        if !mac.is_of_one_interface() {
            return Err(taken("it is not that of one interface".to_owned()));
        }
        let others = self.pods.table.iter().filter(|pod| pod.attachment != *attachment);
        if let Some(pod) = others.into_iter().find(|pod| self.pods.mac(pod) == Some(mac)) {
            return Err(taken(format!("{} has it", pod.attachment)));
        }
        let is_its = request.addresses.first().is_some_and(|ip| mac_at(*ip) == mac);
        if is_address_mac(mac) && !is_its {
            return Err(taken("those that begin with 0a:58 follow from addresses".to_owned()));
        }
        Ok(())
    }
}

/// Why a pod has no address.
pub(super) enum NotGiven {
    Address(NoAddress),
    Other(PodError),
}

impl From<NoAddress> for NotGiven {
    fn from(error: NoAddress) -> Self {
        Self::Address(error)
    }
}

impl From<PodError> for NotGiven {
    fn from(error: PodError) -> Self {
        Self::Other(error)
    }
}

impl From<NotGiven> for PodError {
    fn from(error: NotGiven) -> Self {
        match error {
            NotGiven::Address(error) => error.into(),
            NotGiven::Other(error) => error,
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
            | NoAddress::Taken { .. }
            | NoAddress::TwoOfOne { .. }
            | NoAddress::TwoPlaces { .. } => PodErrorKind::Address,
        };
        Self::new(kind, error)
    }
}

impl From<WiringError> for PodError {
    fn from(error: WiringError) -> Self {
        let kind = match error {
            WiringError::Kernel { .. } | WiringError::Lacks(_) => PodErrorKind::Failed,
            _ => PodErrorKind::Invalid,
        };
        Self::new(kind, error)
    }
}

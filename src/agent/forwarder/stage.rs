//! What trials take place on: the pod that is the agent's own, a second one where packets between pods are
//! tried, and the sockets in both.

use std::io;

use super::{gateway::Gateway, home::Home, trial::Sockets};
use crate::{
    netlink::Netlink,
    pods::standin::{Room, Shape, StandIn},
};

pub struct Stage {
    standin: StandIn,
    mate: Option<StandIn>,
    pub sockets: Sockets,
    pub gateway: Gateway,
    pub home: Home,
}

impl Stage {
    /// None where there is no bridge for pods.
    pub fn set(netlink: &mut Netlink, shape: &Shape, with_mate: bool) -> io::Result<Option<Self>> {
        let Some(standin) = StandIn::make(netlink, shape)? else { return Ok(None) };
        let mate = if with_mate && shape.mate.is_some() {
            standin.make_mate(netlink).map(Some)
        } else {
            Ok(None)
        };
        let opened = mate.and_then(|mate| match open(&standin, mate.as_ref(), shape) {
            Ok(opened) => Ok((mate, opened)),
            Err(error) => {
                mate.into_iter().for_each(|mate| mate.remove(netlink));
                Err(error)
            }
        });
        match opened {
            Ok((mate, (sockets, gateway))) => {
                let home = Home::open(&standin, shape);
                Ok(Some(Self { standin, mate, sockets, gateway, home }))
            }
            Err(error) => {
                standin.remove(netlink);
                Err(error)
            }
        }
    }

    /// Whether all is still there as it should be.
    pub fn is(&self, netlink: &mut Netlink, shape: &Shape, with_mate: bool) -> io::Result<bool> {
        let has_mate = match &self.mate {
            Some(mate) => with_mate && mate.matches(netlink, shape)?,
            None => !with_mate || shape.mate.is_none(),
        };
        Ok(has_mate && self.standin.matches(netlink, shape)?)
    }

    /// The inside of the first one.
    pub fn room(&self) -> Room {
        self.standin.room()
    }

    /// Index of the first one's port.
    pub const fn port(&self) -> u32 {
        self.standin.port()
    }

    pub fn remove(self, netlink: &mut Netlink) {
        self.mate.into_iter().chain([self.standin]).for_each(|pod| pod.remove(netlink));
    }
}

fn open(
    standin: &StandIn,
    mate: Option<&StandIn>,
    shape: &Shape,
) -> io::Result<(Sockets, Gateway)> {
    Ok((Sockets::open(standin, mate, shape)?, Gateway::open(standin, shape)?))
}

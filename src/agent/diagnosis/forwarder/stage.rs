//! What a trial needs in the kernel: the agent's own pod, a second one if packets between pods are
//! tested, and the sockets in both.

use std::io;

use super::{
    ForwarderEvent, TrialRunner,
    gateway::Gateway,
    no_trial::{NoTrial, no_bridge},
    own_host::HostTrial,
    trial::Sockets,
};
use crate::{
    netlink::Netlink,
    pods::standin::{Room, Shape, StandIn},
};

/// The pods and sockets of trials.
pub struct Stage {
    standin: StandIn,
    mate: Option<StandIn>,
    /// Sockets for packets to other hosts and between pods.
    pub sockets: Sockets,
    /// Sockets that resolve the gateway.
    pub gateway: Gateway,
    /// Sockets for packets between the pod and this host.
    pub own_host: HostTrial,
}

impl Stage {
    /// Creates the pods and sockets. Returns `None` if there is no bridge for pods.
    ///
    /// # Errors
    /// Fails if a pod or socket cannot be made. Nothing is left behind then.
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
                let own_host = HostTrial::open(&standin, shape);
                Ok(Some(Self { standin, mate, sockets, gateway, own_host }))
            }
            Err(error) => {
                standin.remove(netlink);
                Err(error)
            }
        }
    }

    /// Returns whether the pods still have this shape.
    ///
    /// # Errors
    /// Fails if the kernel cannot be queried.
    pub fn is(&self, netlink: &mut Netlink, shape: &Shape, with_mate: bool) -> io::Result<bool> {
        let has_mate = match &self.mate {
            Some(mate) => with_mate && mate.matches(netlink, shape)?,
            None => !with_mate || shape.mate.is_none(),
        };
        Ok(has_mate && self.standin.matches(netlink, shape)?)
    }

    /// Returns the network namespace of the first pod.
    pub fn room(&self) -> Room {
        self.standin.room()
    }

    /// Returns the interface index of the first pod's bridge port.
    pub const fn port(&self) -> u32 {
        self.standin.port()
    }

    /// Removes the pods.
    pub fn remove(self, netlink: &mut Netlink) {
        self.mate.into_iter().chain([self.standin]).for_each(|pod| pod.remove(netlink));
    }
}

/// Opens the sockets in both pods.
fn open(
    standin: &StandIn,
    mate: Option<&StandIn>,
    shape: &Shape,
) -> io::Result<(Sockets, Gateway)> {
    Ok((Sockets::open(standin, mate, shape)?, Gateway::open(standin, shape)?))
}

impl<F: Fn(ForwarderEvent)> TrialRunner<F> {
    /// Takes the stage, and sets it up again if the kernel no longer has it.
    pub(super) fn take_stage(
        &mut self,
        shape: &Shape,
        with_mate: bool,
        foreign: Option<&str>,
    ) -> Result<Stage, NoTrial> {
        let is_right = match &self.stage {
            Some(stage) => stage.is(&mut self.netlink, shape, with_mate)?,
            None => false,
        };
        if !is_right {
            self.remove_stage();
            let set = Stage::set(&mut self.netlink, shape, with_mate)?;
            if let Some(stage) = &set {
                (self.tell)(ForwarderEvent::Room(Some(stage.room())));
            }
            self.stage = set;
        }
        self.stage.take().ok_or_else(|| no_bridge(foreign))
    }
}

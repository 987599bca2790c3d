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
    pods::agent_pod::{AgentPod, PodNamespace, Shape},
};

/// The pods and sockets of trials.
pub struct TestPods {
    agent_pod: AgentPod,
    second_pod: Option<AgentPod>,
    /// Sockets for packets to other hosts and between pods.
    pub sockets: Sockets,
    /// Sockets that resolve the gateway.
    pub gateway: Gateway,
    /// Sockets for packets between the pod and this host.
    pub own_host: HostTrial,
}

impl TestPods {
    /// Creates the pods and sockets. Returns `None` if there is no bridge for pods.
    ///
    /// # Errors
    /// Fails if a pod or socket cannot be made. Nothing is left behind then.
    pub fn set(
        netlink: &mut Netlink,
        shape: &Shape,
        with_second_pod: bool,
    ) -> io::Result<Option<Self>> {
        let Some(agent_pod) = AgentPod::make(netlink, shape)? else { return Ok(None) };
        let second = if with_second_pod && shape.second_pod.is_some() {
            agent_pod.make_second_pod(netlink).map(Some)
        } else {
            Ok(None)
        };
        let opened = second.and_then(|second| match open(&agent_pod, second.as_ref(), shape) {
            Ok(opened) => Ok((second, opened)),
            Err(error) => {
                second.into_iter().for_each(|second| second.remove(netlink));
                Err(error)
            }
        });
        match opened {
            Ok((second_pod, (sockets, gateway))) => {
                let own_host = HostTrial::open(&agent_pod, shape);
                Ok(Some(Self { agent_pod, second_pod, sockets, gateway, own_host }))
            }
            Err(error) => {
                agent_pod.remove(netlink);
                Err(error)
            }
        }
    }

    /// Returns whether the pods still have this shape.
    ///
    /// # Errors
    /// Fails if the kernel cannot be queried.
    pub fn matches(
        &self,
        netlink: &mut Netlink,
        shape: &Shape,
        with_second_pod: bool,
    ) -> io::Result<bool> {
        let has_second_pod = match &self.second_pod {
            Some(second_pod) => with_second_pod && second_pod.matches(netlink, shape)?,
            None => !with_second_pod || shape.second_pod.is_none(),
        };
        Ok(has_second_pod && self.agent_pod.matches(netlink, shape)?)
    }

    /// Returns the network namespace of the first pod.
    pub fn namespace(&self) -> PodNamespace {
        self.agent_pod.namespace()
    }

    /// Returns the interface index of the first pod's bridge port.
    pub const fn port(&self) -> u32 {
        self.agent_pod.port()
    }

    /// Removes the pods.
    pub fn remove(self, netlink: &mut Netlink) {
        self.second_pod.into_iter().chain([self.agent_pod]).for_each(|pod| pod.remove(netlink));
    }
}

/// Opens the sockets in both pods.
fn open(
    agent_pod: &AgentPod,
    second_pod: Option<&AgentPod>,
    shape: &Shape,
) -> io::Result<(Sockets, Gateway)> {
    Ok((Sockets::open(agent_pod, second_pod, shape)?, Gateway::open(agent_pod, shape)?))
}

impl<F: Fn(ForwarderEvent)> TrialRunner<F> {
    /// Takes the test pods, and sets them up again if the kernel no longer has them.
    pub(super) fn take_test_pods(
        &mut self,
        shape: &Shape,
        with_second_pod: bool,
        foreign: Option<&str>,
    ) -> Result<TestPods, NoTrial> {
        let is_right = match &self.test_pods {
            Some(test_pods) => test_pods.matches(&mut self.netlink, shape, with_second_pod)?,
            None => false,
        };
        if !is_right {
            self.remove_test_pods();
            let set = TestPods::set(&mut self.netlink, shape, with_second_pod)?;
            if let Some(test_pods) = &set {
                (self.report)(ForwarderEvent::PodNamespace(Some(test_pods.namespace())));
            }
            self.test_pods = set;
        }
        self.test_pods.take().ok_or_else(|| no_bridge(foreign))
    }
}

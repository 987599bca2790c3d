//! The event loop's knowledge of the kernel.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::underlay::LostUnderlay;
use crate::{
    agent::{
        counted_line::CountedLine,
        diagnosis::{
            auditor::Routing, forwarder::Forwarding, pod_answers::PodAnswers,
            remote_pods::RemotePodsState, ways::ProvenWays,
        },
        workers::{host_checks::HostState, kernel_event::DemandState},
    },
    core::View,
    model::{NodeId, Problem, Slot},
};

/// The event loop's knowledge of the kernel.
#[derive(Default)]
pub(in crate::agent) struct KernelState {
    /// What the kernel must hold.
    pub(in crate::agent) wanted: Wanted,
    /// How far the kernel thread is with it.
    pub(in crate::agent) progress: Progress,
    /// The VXLAN device.
    pub(in crate::agent) device: Device,
    /// What keeps the kernel from holding it.
    pub(in crate::agent) problems: KernelProblems,
    /// What the diagnoses found about packets.
    pub(in crate::agent) diagnoses: Diagnoses,
    /// Kernel requests for missing entries, and the peers in use.
    pub(in crate::agent) demand: DemandState,
    /// Firewall and sysctls.
    pub(in crate::agent) host: HostState,
    /// What was done and repaired.
    pub(in crate::agent) counts: Counts,
}

/// What the kernel must hold.
#[derive(Default)]
pub(in crate::agent) struct Wanted {
    /// The view to program.
    pub(in crate::agent) view: Option<View>,
    /// Whether the kernel must hold nothing of gossamer's.
    pub(in crate::agent) withdrawn: bool,
    /// Peers with `unreachable` routes, because neither gossip nor their kernels have answered for a
    /// long time.
    pub(in crate::agent) withdrawn_peers: BTreeSet<NodeId>,
    /// MTU of packets to each peer whose path carries less than the overlay device, in bytes.
    pub(in crate::agent) narrow: BTreeMap<NodeId, u32>,
}

/// How far the kernel thread is with the desired states.
#[derive(Default)]
pub(in crate::agent) struct Progress {
    /// Number of the last desired state passed to the thread.
    pub(in crate::agent) requested: u64,
    /// Number of the last desired state that the thread has handled.
    pub(in crate::agent) answered: u64,
    /// Whether the kernel has equaled the desired state at least once.
    pub(in crate::agent) programmed_once: bool,
    /// The slots that the core was last told to have entries of no known member.
    pub(in crate::agent) retained: Option<BTreeSet<Slot>>,
    /// The subnet that the core was last told to be in use by the kernel.
    pub(in crate::agent) in_use: Option<Option<IpNet>>,
}

/// The VXLAN device.
#[derive(Default)]
pub(in crate::agent) struct Device {
    /// Its index while it exists.
    pub(in crate::agent) index: Option<u32>,
    /// Whether it leaves checksums to the network card, if known.
    pub(in crate::agent) checksum_offload: Option<bool>,
}

/// What keeps the kernel from holding the desired state.
#[derive(Default)]
pub(in crate::agent) struct KernelProblems {
    /// Why the kernel cannot be programmed.
    pub(in crate::agent) programming: Option<Problem>,
    /// Problems of single peers whose entries the kernel refused.
    pub(in crate::agent) of_peers: Vec<Problem>,
    /// Why the underlay is unusable.
    pub(in crate::agent) underlay: Option<LostUnderlay>,
    /// The problem that the carrier of the underlay interface flaps.
    pub(in crate::agent) flapping: Option<Problem>,
    /// Problems about addresses of this host inside the overlay's networks.
    pub(in crate::agent) overlaps: Vec<Problem>,
}

/// What the diagnoses found about packets.
#[derive(Default)]
pub(in crate::agent) struct Diagnoses {
    /// Where the kernel sends packets.
    pub(in crate::agent) routing: Routing,
    /// Ways of tunnel packets other than by the underlay interface that are known to reach their hosts.
    pub(in crate::agent) ways: ProvenWays,
    /// Whether packets of pods are forwarded.
    pub(in crate::agent) forwarding: Forwarding,
    /// Whether packets of pods reach pods of other hosts, and answers return.
    pub(in crate::agent) remote_pods: RemotePodsState,
    /// Whether pods of this host answer.
    pub(in crate::agent) answers: PodAnswers,
}

/// What was done and repaired since the start.
#[derive(Default)]
pub(in crate::agent) struct Counts {
    /// Number of kernel operations.
    pub(in crate::agent) operations: u64,
    /// Number of repaired changes of other programs, by kind.
    pub(in crate::agent) repairs: BTreeMap<String, u64>,
    /// The log lines about repairs of each kind.
    pub(in crate::agent) logged: BTreeMap<&'static str, CountedLine>,
}

impl KernelState {
    /// Returns the view that the kernel holds, or held before the last changes; `None` before it held one.
    pub(in crate::agent) fn programmed_view(&self) -> Option<&View> {
        self.wanted.view.as_ref().filter(|_| self.progress.programmed_once)
    }
}

impl Progress {
    /// Returns whether the thread has handled all desired states.
    pub(in crate::agent) const fn is_complete(&self) -> bool {
        self.answered == self.requested
    }
}

//! Events that the kernel thread (`programmer`) sends to the event loop.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::{
    agent::{diagnosis::auditor::Routing, workers::host_checks::HostState},
    dataplane::kernel::{KernelError, Report},
    model::{Mac, Problem},
    underlay::{ChosenUnderlay, UnderlayError},
};

/// An event of the kernel thread.
#[derive(Debug)]
pub enum KernelEvent {
    /// The result of programming a view.
    Outcome(Outcome),
    /// The interface that carries the tunnels has changed, or its address or MTU has; or no interface is
    /// suitable.
    Underlay(Result<ChosenUnderlay, UnderlayError>),
    /// The carrier of that interface flaps, as a sentence; `None` once it no longer does.
    Flapping(Option<Problem>),
    /// The difference between where the kernel sends packets and where it should has changed.
    Routing(Routing),
    /// Addresses of this host inside the overlay's networks, as sentences.
    Overlaps(Vec<Problem>),
    /// Counters of the kernel's requests for missing entries, and the peers in use.
    Demand(DemandState),
    /// The host checks (firewall, sysctls) have changed.
    Host(HostState),
    /// The number of tunnel packets from each member's underlay address, where the kernel counts them.
    Counted(BTreeMap<IpAddr, u64>),
    /// The kernel has forgotten the path MTU that a router reported, or why it has not.
    PathForgotten {
        /// The underlay address at the end of the path.
        host: IpAddr,
        /// The reported MTU in bytes.
        told: u32,
        /// The outcome.
        result: Result<(), String>,
    },
}

/// Kernel requests for missing entries since the start, and the peers in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DemandState {
    /// Requests for peers, answered from the view.
    pub answered: u64,
    /// Requests for addresses and MACs that belong to no peer.
    pub unknown: u64,
    /// MACs of the peers whose entries are in the kernel; `None` if all peers have entries.
    pub in_use: Option<BTreeSet<Mac>>,
}

/// The result of bringing the kernel to the desired state of one view.
#[derive(Debug)]
pub struct Outcome {
    /// The number of the view, counted from the start of the agent.
    pub number: u64,
    /// Whether the kernel had reached this desired state before and has changed since.
    pub repair: bool,
    /// The operations that were applied, or why they failed.
    pub result: Result<Report, KernelError>,
}

//! What the kernel's thread (`programmer`) tells the loop.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{
    auditor::Routing,
    surroundings::HostState,
    underlay::{Chosen, UnderlayError},
};
use crate::{
    dataplane::kernel::{KernelError, Report},
    model::Mac,
};

/// What the thread has to say.
#[derive(Debug)]
pub enum Told {
    Outcome(Outcome),
    /// The interface that carries the tunnels is another one, or has another address or MTU; or there is
    /// none that would do.
    Underlay(Result<Chosen, UnderlayError>),
    /// The carrier of that interface comes and goes, as a sentence; or does not any more.
    Flapping(Option<String>),
    /// Where the kernel sends packets is not where they should go, or is again.
    Routing(Routing),
    /// Addresses of this host inside the overlay's networks, as sentences.
    Overlaps(Vec<String>),
    /// What the kernel has asked for, and who is in use.
    Demand(DemandState),
    /// Firewall and sysctls are not as they were when last told.
    Host(HostState),
    /// How many tunnel packets have come from each member's underlay address, where the kernel counts them.
    Counted(BTreeMap<IpAddr, u64>),
}

/// Misses since the start, and what follows from them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DemandState {
    /// About peers: answered from the view.
    pub answered: u64,
    /// About addresses and MACs of nobody.
    pub unknown: u64,
    /// Peers whose entries are in the kernel, by their MACs; none, if that is all of them.
    pub in_use: Option<BTreeSet<Mac>>,
}

/// How a goal was reached, or not.
#[derive(Debug)]
pub struct Outcome {
    pub number: u64,
    /// The goal had been reached before, and something has changed since.
    pub repair: bool,
    pub result: Result<Report, KernelError>,
}

//! Simulator: runs many nodes in one thread under virtual time, in a modelled environment.
//!
//! The nodes are the unmodified production core. The defects that matter occur where gossip, ownership, disks
//! and kernels interact; one clock and one seed for all four make such interactions frequent and
//! reproducible. QUIC is modelled, not run. No module reads a real clock, and all randomness derives from the
//! seed.
//!
//! - [`world`]: the event queue; `effects`: executes the outputs of nodes; [`host`]: a machine; [`network`],
//!   [`disk`]: the environment of a node (its kernel is [`crate::dataplane::fake`])
//! - [`oracle`]: checks the safety rules at every event
//! - [`faults`]: the faults of a run, drawn from the seed; `operator`: what operators do; `liar`: the
//!   Byzantine member
//! - [`rest`]: what must hold after the faults
//! - [`run`]: one run from seed to result; [`campaign`]: many runs; [`figures`]: convergence times
//! - [`mutations`]: deliberate defects that the oracle must detect

pub mod campaign;
mod contact;
pub mod disk;
mod effects;
pub mod faults;
pub mod figures;
pub mod host;
mod liar;
pub mod mutations;
pub mod network;
mod operator;
pub mod oracle;
pub mod rest;
pub mod run;
#[cfg(test)]
mod tests;
pub mod world;

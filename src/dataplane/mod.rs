//! The kernel's forwarding state: what it must hold, what it holds, and the operations in between.
//!
//! - [`desired`]: view -> device and entries (pure)
//! - [`plan`]: desired and actual state -> ordered operations (pure)
//! - [`compare`]: desired and actual entries side by side, for display (pure)
//! - [`answers`]: whether pods of this host answer ARP or neighbor discovery (pure)
//! - [`audit`]: where the kernel sends packets, and why not where they should go (pure)
//! - [`demand`]: the kernel's reports of missing entries, and the entries that answer them (pure)
//! - [`fight`]: whether another program keeps undoing gossamer's repairs (pure)
//! - [`firewall`]: view -> gossamer's nftables table (pure)
//! - [`forwarding`]: whether this host forwards the packets of pods (pure)
//! - [`offload`]: whether the network card computes checksums of tunnel packets correctly (pure)
//! - [`overlap`]: networks of the host that overlap with the overlay's (pure)
//! - [`path_mtu_reports`]: which path MTUs reported by routers are correct (pure)
//! - [`paths`]: whether packets reach each peer (pure)
//! - [`silence`]: why no packets arrive from a peer (pure)
//! - [`toggled`]: forwarding sysctls that another program keeps turning off (pure)
//! - `kernel`: dumps and changes the kernel's tables by netlink
//! - `fake`: an in-memory kernel for property tests and the simulator
//!
//! Only this module changes the kernel's tables. It does not decide who is a peer.

#[warn(clippy::disallowed_methods)]
pub mod answers;
#[warn(clippy::disallowed_methods)]
pub mod audit;
#[warn(clippy::disallowed_methods)]
pub mod compare;
pub mod demand;
#[warn(clippy::disallowed_methods)]
pub mod desired;
#[cfg(any(test, feature = "sim"))]
pub mod fake;
#[warn(clippy::disallowed_methods)]
pub mod fight;
#[warn(clippy::disallowed_methods)]
pub mod firewall;
#[warn(clippy::disallowed_methods)]
pub mod forwarding;
#[cfg(feature = "agent")]
pub mod kernel;
#[warn(clippy::disallowed_methods)]
pub mod offload;
#[warn(clippy::disallowed_methods)]
pub mod overlap;
#[warn(clippy::disallowed_methods)]
pub mod path_mtu_reports;
#[warn(clippy::disallowed_methods)]
pub mod paths;
#[warn(clippy::disallowed_methods)]
pub mod plan;
#[warn(clippy::disallowed_methods)]
pub mod silence;
#[warn(clippy::disallowed_methods)]
pub mod toggled;

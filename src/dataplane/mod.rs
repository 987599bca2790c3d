//! The kernel's forwarding state: what it must hold, what it holds, and the operations in between.
//!
//! - [`desired`]: view -> device and entries
//! - [`plan`]: desired and actual state -> ordered operations
//! - [`captured`]: a packet captured at an interface
//! - [`compare`]: desired and actual entries side by side, for display
//! - [`answers`]: whether pods of this host answer ARP or neighbor discovery
//! - [`audit`]: where the kernel sends packets, and why not where they should go
//! - [`demand`]: the kernel's reports of missing entries, and the entries that answer them
//! - [`dropping_chain`]: the rule or policy that drops a packet, as the kernel's trace shows it
//! - [`repair_conflict`]: whether another program keeps undoing gossamer's repairs
//! - [`firewall`]: view -> gossamer's nftables table
//! - [`forwarding`]: whether this host forwards the packets of pods
//! - [`offload`]: whether the network card computes checksums of tunnel packets correctly
//! - [`overlap`]: networks of the host that overlap with the overlay's
//! - [`path_mtu_reports`]: which path MTUs reported by routers are correct
//! - [`paths`]: whether packets reach each peer
//! - [`remedies`]: commands that make chains of other programs accept packets
//! - [`silence`]: why no packets arrive from a peer
//! - [`toggled`]: forwarding sysctls that another program keeps turning off
//! - `fake`: an in-memory kernel for property tests and the simulator
//! - `kernel`: dumps and changes the kernel's tables by netlink
//! - `foreign`: reads the rules of other programs, to explain losses
//!
//! All but `kernel` and `foreign` belong to the pure ring: they neither do IO nor read a clock, and are built
//! without the feature `agent`.
//!
//! Only this module changes the overlay's device, its entries and gossamer's tables; `pods` changes bridges,
//! veth pairs and their entries. This module does not decide who is a peer.

pub mod answers;
pub mod audit;
pub mod captured;
pub mod compare;
pub mod demand;
pub mod desired;
pub mod dropping_chain;
#[cfg(any(test, feature = "sim"))]
pub mod fake;
pub mod firewall;
#[allow(clippy::disallowed_methods)]
#[cfg(feature = "agent")]
pub mod foreign;
pub mod forwarding;
#[allow(clippy::disallowed_methods)]
#[cfg(feature = "agent")]
pub mod kernel;
pub mod offload;
mod op;
pub mod overlap;
pub mod path_mtu_reports;
pub mod paths;
pub mod plan;
pub mod remedies;
pub mod repair_conflict;
pub mod silence;
pub mod toggled;

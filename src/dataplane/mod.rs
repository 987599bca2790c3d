//! From the view to the kernel: what should be there, what is, and the operations between.
//!
//! - [`desired`]: view -> device and entries (pure)
//! - [`plan`]: desired and actual -> ordered operations (pure)
//! - [`answers`]: whether pods of this host answer ARP (pure)
//! - [`audit`]: where the kernel sends packets, and why not where they should go (pure)
//! - [`demand`]: what the kernel misses, and what it is told (pure)
//! - [`fight`]: whether another program undoes our repairs (pure)
//! - [`firewall`]: view -> our table in nftables (pure)
//! - [`forwarding`]: whether this host forwards what pods send and receive (pure)
//! - [`offload`]: whether checksums can be left to the device (pure)
//! - [`overlap`]: networks of the host that are also the overlay's (pure)
//! - [`paths`]: whether packets get through to each peer (pure)
//! - [`silence`]: why nothing comes from a peer (pure)
//! - [`toggled`]: forwarding that another program turns off again and again (pure)
//! - [`told`]: which path MTUs that routers have told are to be believed (pure)
//! - `kernel`: dump and apply, by netlink
//! - `fake`: a kernel in memory, for property tests and the simulator
//!
//! Nobody else touches the kernel's tables, and nothing here decides who is a peer.

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

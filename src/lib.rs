//! gossamer: a VXLAN overlay without etcd. Hosts find each other by gossip and agree which host owns which
//! subnet. Each host programs its own kernel, so that pods on different hosts can reach each other.
//!
//! # Structure
//!
//! Three rings. An arrow points from a module to one that it imports.
//!
//! ```text
//!  main -> cli -> agent -> core -> wire -> model                              the pure ring
//!           |      |        dataplane -> pods, wire, model; pods -> model
//!           |      +-> dataplane::kernel, pods::wiring, netlink, store, transport, api     the adapters
//!           +-> doctor, lab                                                     no agent imports these
//! ```
//!
//! - **The pure ring** makes the decisions. It reads no clock, draws no randomness of its own, opens no file
//!   and no socket. It is exactly what the build without default features contains: [`model`], [`wire`],
//!   [`core`], [`rpc`], [`dataplane`] without `kernel` and `foreign`, [`pods`] without its submodules,
//!   `checksum`, and the numbers of `frames`.
//!   [`model`] holds the data types, [`wire`] parses messages of peers and database records, [`core`] is one
//!   node as a state machine, [`rpc`] carries inquiries between agents beside it, [`dataplane`] computes what
//!   the kernel must hold and judges what it does, and [`pods`] records which pod has which of the node's
//!   addresses.
//! - **Adapters** each serve one external interface: [`dataplane::kernel`] and [`netlink`] the kernel,
//!   [`dataplane::foreign`] the rules of other programs,
//!   [`store`] the disk, [`transport`] QUIC, [`api`] the control socket over [`http`], `underlay` the
//!   interfaces of the host, `sysctl` its settings, `kubernetes` the API server, and [`pods::wiring`]
//!   connects pods. Container runtimes call [`cni`] and [`netavark`], Docker calls [`docker`].
//! - **The shell**, [`agent`], is one loop that feeds inputs to the core and executes its outputs. `sim`
//!   (feature `sim`) runs many cores in a simulated world. [`config`] and [`cli`] read settings and commands,
//!   [`doctor`] checks a host for problems, and [`lab`] builds clusters in network namespaces for the demo,
//!   the tests and the benchmarks. No module imports [`agent`] or [`lab`] but [`cli`], and no modules import
//!   each other in a cycle; a test checks both.
//!
//! # Where to start reading
//!
//! [`core`] (the state machine), `core/slots.rs` (ownership), [`dataplane::desired`], [`dataplane::plan`],
//! [`agent`] (the loop). Together with this file they explain the product.

// The documentation is for readers of the source, so links to private items are allowed.
#![allow(rustdoc::private_intra_doc_links)]

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "agent")]
pub mod api;
mod checksum;
#[cfg(feature = "agent")]
pub mod cli;
#[cfg(feature = "agent")]
pub mod cni;
#[cfg(feature = "agent")]
pub mod config;
#[warn(clippy::disallowed_methods)]
pub mod core;
#[cfg(feature = "agent")]
pub mod datagram;
#[warn(clippy::disallowed_methods)]
pub mod dataplane;
#[cfg(feature = "agent")]
pub mod docker;
#[cfg(feature = "agent")]
pub mod doctor;
#[cfg(feature = "agent")]
mod files;
mod frames;
#[cfg(all(feature = "agent", any(test, feature = "sim")))]
pub mod fuzz;
#[cfg(feature = "agent")]
pub mod http;
#[cfg(feature = "agent")]
pub mod icmp;
#[cfg(feature = "agent")]
mod json;
#[cfg(feature = "agent")]
mod kubernetes;
#[cfg(feature = "agent")]
pub mod lab;
#[cfg(feature = "agent")]
mod log;
#[warn(clippy::disallowed_methods)]
pub mod model;
#[cfg(feature = "agent")]
pub mod netavark;
#[cfg(feature = "agent")]
pub mod netlink;
#[warn(clippy::disallowed_methods)]
pub mod pods;
#[cfg(feature = "agent")]
pub mod probe_packet;
#[cfg(feature = "agent")]
mod random;
#[warn(clippy::disallowed_methods)]
pub mod rpc;
#[cfg(feature = "agent")]
pub mod runtime;
#[cfg(any(test, feature = "sim"))]
#[warn(clippy::disallowed_methods)]
pub mod sim;
#[cfg(feature = "agent")]
pub mod store;
#[cfg(feature = "agent")]
mod sysctl;
#[cfg(feature = "agent")]
pub mod transport;
#[cfg(feature = "agent")]
mod underlay;
#[warn(clippy::disallowed_methods)]
pub mod wire;
#[cfg(feature = "agent")]
mod worker;

//! gossamer: a VXLAN overlay without etcd. Hosts find each other by gossip, agree which host owns which
//! subnet, and each programs its own kernel so that the pods of all hosts reach each other.
//!
//! # The map
//!
//! Three rings; arrows say who may import whom.
//!
//! ```text
//!  main -> cli -> agent -> core -> wire -> model         the pure ring: core, wire, model,
//!                   |        ^                           dataplane::{desired, plan}
//!                   +-> dataplane::kernel, pods::wiring, netlink, store, transport, api     the adapters
//! ```
//!
//! - **The pure ring** decides. It reads no clock, draws no randomness of its own, opens no file and no
//!   socket, and compiles without the feature `agent`.
//!   [`model`] is the vocabulary, [`wire`] the only parser of foreign bytes, [`core`] one node as a state
//!   machine, [`dataplane::desired`] what the kernel should hold, [`dataplane::plan`] how it gets there.
//! - **Adapters** each know one outside thing: [`dataplane::kernel`] and [`netlink`] the kernel,
//!   [`store`] the disk, [`transport`] QUIC, [`api`] the control socket. [`pods`] knows who has which of this
//!   node's addresses, [`pods::wiring`] plugs containers in; [`cni`] and [`netavark`] are what
//!   runtimes call, [`docker`] what Docker does.
//! - **The shell**, [`agent`], is one loop that feeds the core and carries out what it asks for.
//!   `sim` (feature `sim`) runs many cores in a simulated world.
//!   [`config`] and [`cli`] are its front, [`doctor`] looks for what is wrong with a host. [`lab`] builds
//!   clusters in namespaces for the demo, the tests and the benchmarks.
//!
//! # Where to start reading
//!
//! [`core`] (the machine), `core/slots.rs` (who owns what), [`dataplane::desired`],
//! [`dataplane::plan`], [`agent`] (the loop). Together with this file they explain the product.

// The documentation is for readers of the source: it may point at private rooms.
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
pub mod dataplane;
#[cfg(feature = "agent")]
pub mod docker;
#[cfg(feature = "agent")]
pub mod doctor;
#[cfg(feature = "agent")]
mod files;
#[cfg(feature = "agent")]
mod frames;
#[cfg(all(feature = "agent", any(test, feature = "sim")))]
pub mod fuzz;
#[cfg(feature = "agent")]
pub mod icmp;
#[cfg(feature = "agent")]
mod json;
#[cfg(feature = "agent")]
pub mod lab;
#[warn(clippy::disallowed_methods)]
pub mod model;
#[cfg(feature = "agent")]
pub mod netavark;
#[cfg(feature = "agent")]
pub mod netlink;
#[warn(clippy::disallowed_methods)]
pub mod pods;
#[cfg(any(test, feature = "sim"))]
#[warn(clippy::disallowed_methods)]
pub mod sim;
#[cfg(feature = "agent")]
pub mod store;
#[cfg(feature = "agent")]
pub mod transport;
#[warn(clippy::disallowed_methods)]
pub mod wire;
#[cfg(feature = "agent")]
mod worker;

//! A cluster on one machine: hosts as network namespaces on a bridge, each with a real agent and a pod.
//!
//! For the demo, the tests and the benchmarks. Everything is made inside private namespaces, entered by
//! [`enter()`], so it works without root and nothing of it can outlive or disturb anything else. Nothing
//! of the product may use this module.

mod agent;
mod cost;
mod crowd;
mod enter;
mod figures;
mod flood;
mod host;
mod netns;
mod ping;
mod plugin;
mod replay;
mod show;
mod silence;

pub use agent::Agent;
pub use cost::{cpu_seconds, memory_mib};
pub use crowd::{absent_member, add_crowd};
pub use enter::{EnterError, enter, rerun_inside};
pub use figures::{median, spread};
pub use flood::{Flood, Source};
pub use host::{Host, Lab, Pod};
pub use netns::NetNs;
pub use ping::Pinger;
pub use plugin::{Called, PLUGINS, call_plugin};
pub use replay::Replay;
pub use show::tables;
pub use silence::Silence;

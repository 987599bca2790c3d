//! A cluster on one machine: hosts as network namespaces on a bridge, each with a real agent and a pod.
//!
//! Only the commands `demo` and `lab`, the tests and the benchmarks import it. Everything exists in private
//! namespaces, entered by [`enter()`], so it needs no root, disturbs nothing, and leaves nothing behind.

mod agent;
mod attack;
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
pub use plugin::{PLUGINS, PluginResult, call_plugin};
pub use replay::Replay;
pub use show::tables;
pub use silence::StalledHandshakes;

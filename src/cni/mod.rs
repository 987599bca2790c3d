//! The CNI plugin: what a container runtime calls to connect a container (CNI SPEC.md 1.1.0).
//!
//! The program itself, called with `CNI_COMMAND` in its environment. It reads the request, asks the agent
//! over its control socket and prints the answer in the runtime's version of the format; the agent does the
//! work. Nothing here touches the kernel or keeps anything.

mod error;
mod plugin;
mod request;
mod result;

pub use plugin::{COMMAND, run};

//! The threads that do blocking work for the event loop (kernel, pods, small files), and the events by
//! which they report results. No worker reads the agent's state.

pub(super) mod archive;
pub(super) mod attach_worker;
pub(super) mod host_checks;
pub(super) mod kernel_event;
mod overruns;
pub(super) mod programmer;
pub(super) mod subnet_env;

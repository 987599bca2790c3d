//! Whether packets arrive, and what drops them if they do not. Results are read by operators; they change
//! no route and no membership.

pub(super) mod auditor;
mod chains;
pub(super) mod forwarder;
pub(super) mod gossip;
mod hooks;
mod iptables_legacy;
pub(super) mod isolation;
mod join_log;
mod packet_filter;
pub(super) mod pod_answers;
mod raw_tcp;
pub(super) mod remote_pods;
pub(super) mod silence;
mod tap;
pub(super) mod ways;

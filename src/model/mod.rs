//! The data types of the program and their arithmetic.
//!
//! All other modules use these types, so each concept has one name. This module does no IO, knows no
//! protocol, and makes no decisions about other nodes.

/// Deserializers that bound the length of lists.
pub mod bounded;
mod call;
mod cluster;
mod family;
mod forget;
mod id;
mod liveness;
mod member;
mod own_seed;
mod owner_change;
mod path;
mod pod;
mod pool;
mod problem;
mod quorum;
mod selector;
mod slot;
mod text;
mod time;
mod unfit;
mod view;
mod vtep;

pub use call::{CallError, CallId, InquiryId, ReplyId, WriteSeq, seed_failure};
pub use cluster::{ClusterRecord, ClusterSettings, Difference, SettingsWish};
pub use family::{
    dotted, family_name, forwarding_sysctl, interface_forwarding_sysctl, ip_command,
    resolution_name, rule_family, unspecified,
};
pub use forget::Forget;
pub use id::{BootId, ClusterId, IdError, NodeId};
pub use liveness::Liveness;
pub use member::{
    Identity, Incarnation, MemberRecord, NodeName, NodeNameError, Suspicion, Version,
};
pub use own_seed::own_address_problem;
pub use owner_change::OwnerChange;
pub use path::PathState;
pub use pod::{Addresses, Attachment, AttachmentError, CONTAINER_MAX, Pod, check_interface_name};
pub use pool::{MAX_SLOTS, Pool, PoolError, PoolSpec, Slot, Subnets};
pub use problem::{Problem, ProblemCode, ProblemKey, Severity};
pub use quorum::{Quorum, QuorumError};
pub use selector::{Condition, PacketSelector, Ports, Selector};
pub use slot::{Run, SlotRecord, SlotState};
pub use text::{Text, escaped_lines, list_at_most, visible, visible_lines};
pub use time::Time;
pub use unfit::{UnusableRecord, is_link_local};
pub use view::{Own, Peer, View};
pub use vtep::{Mac, ROUTE_PROTOCOL, Vtep};

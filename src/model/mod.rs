//! The vocabulary: plain data and its own arithmetic, nothing else.
//!
//! Every other module speaks in these types, so one idea has one name in the whole program.
//! Nothing here may do IO, know a protocol, or decide anything about other nodes.

pub mod bounded;
mod cluster;
mod forget;
mod id;
mod member;
mod path;
mod pod;
mod pool;
mod quorum;
mod selector;
mod slot;
mod text;
mod time;
mod unfit;
mod vtep;

pub use cluster::{ClusterRecord, ClusterSettings, Difference, SettingsWish};
pub use forget::Forget;
pub use id::{BootId, ClusterId, IdError, NodeId};
pub use member::{
    Identity, Incarnation, MemberRecord, NodeName, NodeNameError, Suspicion, Version,
};
pub use path::PathState;
pub use pod::{Addresses, Attachment, AttachmentError, CONTAINER_MAX, Pod, check_interface_name};
pub use pool::{MAX_SLOTS, Pool, PoolError, PoolSpec, Slot, Subnets};
pub use quorum::{Quorum, QuorumError};
pub use selector::{Condition, Ports, Selector, Transport};
pub use slot::{Run, SlotRecord, SlotState};
pub use text::{Text, escaped_lines, visible, visible_lines};
pub use time::Time;
pub use unfit::Unfit;
pub use vtep::{Mac, Vtep};

//! What a node remembers: its key, its token, and the records of its database.
//!
//! The state directory (mode 0700) holds
//!
//! - `node.key`: the node's Ed25519 seed, outside the database so that a lost database is no new node
//! - `token`: cluster id, secret and addresses of members, for restarts without flags and for the day on
//!   which the database is lost
//! - `boot`: which start of the host the pods are of
//! - `pod-cidr`: the subnet that Kubernetes gave to this node, for the day on which it cannot be asked
//! - `history`: changes of ownership, for people
//! - `lock`: held while a process runs here
//! - `db/`: sled, the records of [`crate::wire::Record`]
//! - `essentials`: a second copy of the records without which this node would be another one
//!
//! Nothing here changes what a record means. A database that cannot be read is moved aside and named once.

mod database;
mod directory;
mod essentials;
mod history;
pub mod holder;
mod replace;
mod writer;

pub use database::{Database, Opened, StoreError};
pub use directory::{StateDir, node_key, read_token};
pub use essentials::{Copied, Essentials, EssentialsCopy};
pub use history::History;
pub use replace::{PRIVATE, PUBLIC, replace};
pub use writer::{Writer, Written};

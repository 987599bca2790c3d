//! The node's persistent state: its key, its token, and the records of its database.
//!
//! The state directory (mode 0700) holds
//!
//! - `node.key`: the node's Ed25519 seed. It is outside the database, so that a node without its database
//!   keeps its identity.
//! - `token`: cluster id, secret and addresses of members, for restarts without flags and for a lost database
//! - `secrets`: the secrets that the node accepts, if there was ever another one than the token's
//! - `boot`: id of the host's boot to which the stored pods belong
//! - `pod-cidr`: the subnet that Kubernetes assigned to this node, for starts without the API server
//! - `underlay`: the last known underlay address and MTU
//! - `lost-pods`: pods that lost their network when this host became a new node
//! - `history`: changes of ownership, for people
//! - `lock`: locked while a process uses the directory
//! - `db/`: sled, with the records of [`crate::wire::Record`]
//! - `essentials`: a second copy of the records that make up the node's identity and ownership
//!
//! This module does not interpret records. It moves a database that cannot be read aside and reports it once.

mod database;
mod directory;
mod essentials;
mod history;
mod writer;

pub use database::{Database, LoadedDatabase, StoreError};
pub use directory::{LostPod, StateDir, node_key, read_keyring, read_token, require_state_dir};
pub use essentials::{Essentials, EssentialsContent, EssentialsCopy};
pub use history::History;
pub use writer::{WriteEvent, Writer};

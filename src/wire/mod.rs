//! Encoding and decoding: messages between nodes, database records, join tokens, and keyrings.
//!
//! Decoders bound the input, check its version, and never panic. This module makes no decisions.

mod codec;
mod frame;
mod keyring;
mod message;
mod record;
mod refusal;
mod report;
mod swim;
mod token;

pub use codec::{STREAM_MAX, WireError};
pub use frame::{DATAGRAM_MAX, Frame, WIRE_VERSION};
pub use keyring::Keyring;
pub use message::{
    Buckets, Facts, GrantWish, Hello, Push, Request, Response, Roots, Vote, Welcome,
};
pub use record::{Key, Record, RecordError};
pub use refusal::Refusal;
pub use report::{Arrivals, Inquiry, InquiryAnswer, PathReport, Report, SecretOrder};
pub use swim::{Gossip, ROOTS_LEN, SwimCodec, SwimPacket};
pub use token::{MIN_SECRET_LEN, Secret, SecretId, Token, TokenError};

pub use crate::model::visible;

//! Messages of the kernel that the packet crate cannot parse.
//!
//! Most are about objects of other programs and are skipped. One about an object of gossamer must be
//! reported: otherwise the object would look missing and be added again and again.

use std::io;

use rtnetlink::packet_core::DecodeError;

/// `RTM_NEWLINK` (linux/rtnetlink.h).
const NEW_LINK: u16 = 16;
/// `RTM_NEWADDR`.
const NEW_ADDRESS: u16 = 20;
/// `RTM_NEWROUTE`.
const NEW_ROUTE: u16 = 24;
/// `RTM_NEWNEIGH`.
const NEW_NEIGHBOR: u16 = 28;
/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Offset of the interface index in messages about links, addresses and neighbors.
const INTERFACE: usize = HEADER + 4;
/// Offset of the protocol in messages about routes.
const PROTOCOL: usize = HEADER + 5;

/// Maximum number of unreadable messages that are kept.
pub(super) const MAX_UNREADABLE: usize = 64;

/// The subject of an unreadable message, from its fixed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageSubject {
    /// A link, an address or a neighbor of this interface.
    Interface(u32),
    /// A route.
    Route {
        /// Protocol number of the program that added it.
        protocol: u8,
    },
    /// Another object, or unknown.
    Other,
}

/// A message that cannot be parsed.
#[derive(Clone, Debug)]
pub struct Unreadable {
    pub(super) sequence: u32,
    /// The subject of the message.
    pub about: MessageSubject,
    error: String,
}

impl Unreadable {
    /// Describes a message that the packet crate refuses with this error.
    pub(super) fn new(message: &[u8], error: &DecodeError) -> Self {
        let number = |at: usize| {
            let bytes = message.get(at..)?.first_chunk::<4>()?;
            Some(u32::from_ne_bytes(*bytes))
        };
        let kind = message.get(4..).and_then(|rest| rest.first_chunk::<2>());
        let about = match kind.map(|bytes| u16::from_ne_bytes(*bytes)) {
            Some(NEW_LINK | NEW_ADDRESS | NEW_NEIGHBOR) => {
                number(INTERFACE).map(MessageSubject::Interface)
            }
            Some(NEW_ROUTE) => {
                message.get(PROTOCOL).map(|protocol| MessageSubject::Route { protocol: *protocol })
            }
            _ => None,
        };
        let sequence = number(8).unwrap_or_default();
        Self { sequence, about: about.unwrap_or(MessageSubject::Other), error: error.to_string() }
    }

    /// Returns an error of the kind `InvalidData`.
    pub fn to_io(&self) -> io::Error {
        let why =
            format!("a message of the kernel cannot be read ({:?}): {}", self.about, self.error);
        io::Error::new(io::ErrorKind::InvalidData, why)
    }
}

//! Messages of the kernel that the packet crate cannot read.
//!
//! Most are about objects of other programs, and are left out. One about an object of this program must not
//! be: what seems to be missing would be added again and again.

use std::io;

use rtnetlink::packet_core::DecodeError;

/// Types of messages and where their headers say what they are about (linux/rtnetlink.h, linux/if_link.h,
/// linux/if_addr.h, linux/neighbour.h).
const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const NEW_NEIGHBOR: u16 = 28;
const HEADER: usize = 16;
/// In the headers of links, addresses and neighbors.
const INTERFACE: usize = HEADER + 4;
/// In the header of routes.
const PROTOCOL: usize = HEADER + 5;

/// So many are remembered.
pub(super) const MAX_UNREADABLE: usize = 64;

/// What an unreadable message is about, by its fixed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// A link, an address or a neighbor of this interface.
    Interface(u32),
    /// A route that a program with this protocol number has made.
    Route {
        protocol: u8,
    },
    Other,
}

/// A message that cannot be read.
#[derive(Clone, Debug)]
pub struct Unreadable {
    pub(super) sequence: u32,
    pub about: About,
    error: String,
}

impl Unreadable {
    pub(super) fn new(message: &[u8], error: &DecodeError) -> Self {
        let number = |at: usize| {
            let bytes = message.get(at..)?.first_chunk::<4>()?;
            Some(u32::from_ne_bytes(*bytes))
        };
        let kind = message.get(4..).and_then(|rest| rest.first_chunk::<2>());
        let about = match kind.map(|bytes| u16::from_ne_bytes(*bytes)) {
            Some(NEW_LINK | NEW_ADDRESS | NEW_NEIGHBOR) => number(INTERFACE).map(About::Interface),
            Some(NEW_ROUTE) => {
                message.get(PROTOCOL).map(|protocol| About::Route { protocol: *protocol })
            }
            _ => None,
        };
        let sequence = number(8).unwrap_or_default();
        Self { sequence, about: about.unwrap_or(About::Other), error: error.to_string() }
    }

    pub fn to_io(&self) -> io::Error {
        let why =
            format!("a message of the kernel cannot be read ({:?}): {}", self.about, self.error);
        io::Error::new(io::ErrorKind::InvalidData, why)
    }
}

//! Ethernet frames of ARP and neighbor discovery.

#[cfg(feature = "agent")]
mod packet;

#[cfg(feature = "agent")]
pub use packet::{
    advertisement, arp, arp_answer, packet_error, packet_socket, sender_at, solicitation,
};

/// EtherType of ARP (IANA).
pub const ARP: u16 = 0x0806;
/// EtherType of IPv6 (IANA).
pub const IPV6: u16 = 0x86dd;
/// IP protocol number of `ICMPv6` (IANA).
pub const ICMPV6: u8 = 58;
/// `ICMPv6` type of a neighbor solicitation (RFC 4861).
pub const SOLICITATION: u8 = 135;
/// `ICMPv6` type of a neighbor advertisement (RFC 4861).
pub const ADVERTISEMENT: u8 = 136;

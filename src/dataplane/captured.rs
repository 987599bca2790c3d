//! A packet captured at an interface of this host.

/// `sll_pkttype` of a packet to this host (`linux/if_packet.h`).
pub const PACKET_HOST: u8 = 0;
/// `sll_pkttype` of a packet that leaves by the interface (`linux/if_packet.h`).
pub const PACKET_OUTGOING: u8 = 4;

/// A captured packet, from the network header on.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Index of the interface.
    pub link: u32,
    /// `sll_pkttype` of the packet.
    pub kind: u8,
    /// EtherType.
    pub protocol: u16,
    /// The packet's bytes, possibly truncated.
    pub bytes: &'a [u8],
}

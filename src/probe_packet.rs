//! The datagram that tests a path: a QUIC packet of a version that does not exist. The connection ids contain
//! the datagram's number; the agent's answer and the kernel's error return it.

/// Least size of a datagram, in bytes. Servers ignore shorter ones (RFC 9000, 5.2.2).
pub const SIZE: usize = 1_200;
/// A reserved version that forces version negotiation (RFC 9000, 15).
const NO_VERSION: [u8; 4] = [0x6a; 4];
/// First byte of a long header, with the fixed bit of QUIC versions 1 and 2.
const LONG_HEADER: u8 = 0xc0;
/// Offset of the first connection id, behind its length. The probe contains the receiver's id there, the
/// answer the sender's; both are equal.
pub const ID: usize = 6;
/// Length of a connection id, in bytes.
const ID_LENGTH: u8 = 4;

/// Builds the datagram with this number. It has `size` bytes, but at least [`SIZE`].
pub fn probe_packet(identifier: u16, number: u16, size: usize) -> Vec<u8> {
    let [a, b, c, d] = (u32::from(identifier) << 16 | u32::from(number)).to_be_bytes();
    let mut packet = vec![LONG_HEADER];
    packet.extend(NO_VERSION);
    for _ in 0..2 {
        packet.extend([ID_LENGTH, a, b, c, d]);
    }
    packet.resize(size.max(SIZE), 0);
    packet
}

/// Returns the number of an own datagram from the part of it that an ICMP error quotes.
pub fn probe_number(identifier: u16, packet: &[u8]) -> Option<u16> {
    number(identifier, NO_VERSION, packet)
}

/// Returns the number from an agent's answer, which lists versions.
pub fn answer_number(identifier: u16, packet: &[u8]) -> Option<u16> {
    number(identifier, [0; 4], packet)
}

/// Returns the number from a packet with this identifier and version.
fn number(identifier: u16, version: [u8; 4], packet: &[u8]) -> Option<u16> {
    let is_long = packet.first()? & 0x80 != 0;
    let has_version = packet.get(1..5)? == version && *packet.get(5)? == ID_LENGTH;
    let is_own = packet.get(ID..ID + 2)? == identifier.to_be_bytes();
    let number = packet.get(ID + 2..ID + 4)?.try_into().ok()?;
    (is_long && has_version && is_own).then_some(u16::from_be_bytes(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_prefix_of_a_datagram_yields_its_number() {
        let packet = probe_packet(7, 0x1234, SIZE);
        assert_eq!(probe_number(7, &packet[..20]), Some(0x1234));
        assert_eq!(probe_number(8, &packet), None, "of another agent");
        (0..10).for_each(|len| assert_eq!(probe_number(7, &packet[..len]), None));
    }
}

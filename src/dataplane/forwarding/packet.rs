//! Test packets: a UDP datagram (RFC 768) with an unpredictable nonce, and the first segment of a TCP
//! connection (RFC 9293); both also inside a tunnel packet (RFC 7348).

use std::net::IpAddr;

use super::TrialProtocol;
use crate::{checksum::checksum, model::Mac};

/// First bytes of a datagram's payload, by which the kernel's packet filter recognizes it.
pub const MAGIC: [u8; 4] = *b"gsmP";
/// Length in bytes of the nonce that follows.
pub const NONCE_LEN: usize = 12;
const PAYLOAD_LEN: usize = MAGIC.len() + NONCE_LEN;
/// Destination port of segments that come out of the tunnel, and source port of such datagrams. No program
/// listens there, and no common firewall rule matches it: the port is above Linux's ephemeral ports and not
/// among those of traceroute, which firewalls often drop.
pub const UNUSED: u16 = 61_474;
/// Destination port of outgoing packets, distinct so that they are not taken for answers to incoming ones. It
/// differs from [`UNUSED`] only in the lowest bit, so the kernel's packet filter matches both by one
/// comparison.
pub const UNUSED_OUT: u16 = 61_475;

const UDP: u8 = 17;
const TCP: u8 = 6;
/// IP protocol numbers of ICMP for IPv4 and IPv6.
const ICMP: [u8; 2] = [1, 58];
const UDP_HEADER: usize = 8;
/// Offset in bytes of the nonce in a datagram or echo, from the UDP or ICMP header on.
pub const IN_DATAGRAM: u32 = (UDP_HEADER + MAGIC.len()) as u32;
/// Offset in bytes of the nonce in a first segment, from the TCP header on.
pub const IN_SEGMENT: u32 = 4;
/// Offset in bytes of the nonce plus one in the answer to a first segment, from the TCP header on.
pub const IN_ANSWER: u32 = 8;
const TCP_HEADER: usize = 20;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// Length in bytes of the TCP options of a first segment: those that Linux sends, in its order.
const OPTIONS_LEN: usize = 20;
/// TCP options with the maximum segment size (RFC 9293) and the permission of selective acknowledgments
/// (RFC 2018), and the beginning of the one with timestamps (RFC 7323).
const FIRST_OPTIONS: [u8; 8] = [2, 4, 4, 196, 4, 2, 8, 10];
/// No operation, and the TCP option with the window scale (RFC 7323).
const LAST_OPTIONS: [u8; 4] = [1, 3, 3, 7];
const WINDOW: u16 = 64_240;
const HOP_LIMIT: u8 = 64;
/// VXLAN flags: the VNI is valid.
const VXLAN_FLAGS: u8 = 8;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
/// Length in bytes of the VXLAN and Ethernet headers.
const ENCAPSULATION_LEN: usize = 8 + 14;

/// Returns the first four bytes of the nonce, which packet filters compare.
pub const fn number(nonce: [u8; NONCE_LEN]) -> u32 {
    let [a, b, c, d, ..] = nonce;
    u32::from_be_bytes([a, b, c, d])
}

/// A value at an offset in bytes from the UDP or TCP header, for packet filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// A 16-bit value: offset, value.
    Half(u32, u16),
    /// A 32-bit value: offset, value.
    Word(u32, u32),
}

/// A test packet.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// The transport protocol.
    pub transport: TrialProtocol,
    /// Source address.
    pub from: IpAddr,
    /// Destination address.
    pub to: IpAddr,
    /// Source and destination port.
    pub ports: [u16; 2],
    /// Unpredictable bytes that identify the packet.
    pub nonce: [u8; NONCE_LEN],
}

impl Probe {
    /// Returns the payload of a datagram.
    pub fn payload(nonce: [u8; NONCE_LEN]) -> [u8; PAYLOAD_LEN] {
        std::array::from_fn(|i| MAGIC.get(i).copied().unwrap_or_else(|| nonce[i - MAGIC.len()]))
    }

    /// Builds the transport header with all that follows.
    pub fn segment(&self) -> Vec<u8> {
        let mut segment = Vec::new();
        self.ports.iter().for_each(|port| segment.extend(port.to_be_bytes()));
        let checksum_offset = match self.transport {
            TrialProtocol::Udp => {
                segment.extend(((UDP_HEADER + PAYLOAD_LEN) as u16).to_be_bytes());
                segment.extend([0; 2]);
                segment.extend(Self::payload(self.nonce));
                6
            }
            TrialProtocol::Tcp => {
                segment.extend(self.sequence());
                let words = (TCP_HEADER + OPTIONS_LEN) / 4;
                segment.extend([0, 0, 0, 0, (words as u8) << 4, SYN]);
                segment.extend(WINDOW.to_be_bytes());
                segment.extend([0; 4]);
                segment.extend(self.options());
                16
            }
        };
        // The checksum covers addresses, protocol and length as well (RFC 9293, 3.1; RFC 8200, 8.1).
        let mut pseudo_packet = [octets(self.from), octets(self.to)].concat();
        pseudo_packet.extend([0, protocol(self.transport)]);
        pseudo_packet.extend((segment.len() as u16).to_be_bytes());
        pseudo_packet.extend(&segment);
        // In UDP, a checksum of 0 means that there is none.
        let sum = Some(checksum(&pseudo_packet)).filter(|sum| *sum != 0).unwrap_or(u16::MAX);
        segment[checksum_offset..checksum_offset + 2].copy_from_slice(&sum.to_be_bytes());
        segment
    }

    /// Returns whether a segment is this packet. The source is not compared, because it may have been
    /// translated.
    pub fn is(&self, segment: &[u8]) -> bool {
        let has_destination = segment.get(2..4) == Some(&self.ports[1].to_be_bytes());
        has_destination
            && match self.transport {
                TrialProtocol::Udp => {
                    let payload = segment.get(UDP_HEADER..).unwrap_or_default();
                    payload.starts_with(&Self::payload(self.nonce))
                }
                TrialProtocol::Tcp => {
                    let is_first = segment.get(13).is_some_and(|flags| flags & (SYN | ACK) == SYN);
                    is_first && segment.get(4..8) == Some(&self.sequence())
                }
            }
    }

    /// Returns whether a segment accepts the connection that this packet requests. The host may accept it in
    /// place of the destination.
    pub fn is_accepted_by(&self, segment: &[u8]) -> bool {
        let accepts = segment.get(13).is_some_and(|flags| flags & (SYN | ACK) == SYN | ACK);
        let number = number(self.nonce).wrapping_add(1).to_be_bytes();
        self.transport == TrialProtocol::Tcp
            && accepts
            && segment.get(..2) == Some(&self.ports[1].to_be_bytes())
            && segment.get(IN_ANSWER as usize..12) == Some(&number)
    }

    /// Returns two fields for the kernel's packet filter. A packet that matches one of them has this nonce,
    /// or is the answer to a first segment with it.
    pub const fn fields(transport: TrialProtocol, nonce: [u8; NONCE_LEN]) -> [Field; 2] {
        match transport {
            TrialProtocol::Udp => [Field::Word(IN_DATAGRAM, number(nonce)); 2],
            TrialProtocol::Tcp => [Field::Word(IN_SEGMENT, number(nonce)), Self::answer(nonce)],
        }
    }

    /// Returns the field of answers to a first segment: the acknowledgment number (RFC 9293, 3.10.7.1).
    pub const fn answer(nonce: [u8; NONCE_LEN]) -> Field {
        Field::Word(IN_ANSWER, number(nonce).wrapping_add(1))
    }

    /// Returns the TCP options. Rules may match each of them, so a test packet has all that connections have.
    fn options(&self) -> [u8; OPTIONS_LEN] {
        let [.., timestamp3, timestamp2, timestamp1, timestamp0] = self.nonce;
        let timestamps = [timestamp3, timestamp2, timestamp1, timestamp0, 0, 0, 0, 0];
        let mut options = FIRST_OPTIONS.into_iter().chain(timestamps).chain(LAST_OPTIONS);
        std::array::from_fn(|_| options.next().unwrap_or_default())
    }

    fn sequence(&self) -> [u8; 4] {
        let [a, b, c, d, ..] = self.nonce;
        [a, b, c, d]
    }
}

/// A test packet from a peer's VTEP to an address of this host, inside a tunnel packet.
#[derive(Clone, Copy, Debug)]
pub struct TunneledProbe {
    /// VXLAN network identifier.
    pub vni: u32,
    /// MACs of the peer's and of this host's VXLAN device.
    pub macs: [Mac; 2],
    /// The inner packet.
    pub probe: Probe,
}

impl TunneledProbe {
    /// Builds the payload of a UDP datagram to the tunnel's port: VXLAN header and inner frame.
    pub fn bytes(&self) -> Vec<u8> {
        let [_, a, b, c] = self.vni.to_be_bytes();
        let mut bytes = vec![VXLAN_FLAGS, 0, 0, 0, a, b, c, 0];
        let [peer, ours] = self.macs;
        bytes.extend(ours.as_bytes());
        bytes.extend(peer.as_bytes());
        let segment = self.probe.segment();
        let protocol = protocol(self.probe.transport);
        match (self.probe.from, self.probe.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                bytes.extend([0x08, 0x00]);
                let [high, low] = ((IPV4_HEADER + segment.len()) as u16).to_be_bytes();
                let mut header = vec![0x45, 0, high, low, 0, 0, 0, 0, HOP_LIMIT, protocol, 0, 0];
                header.extend(from.octets());
                header.extend(to.octets());
                let sum = checksum(&header);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                bytes.extend(header);
            }
            (from, to) => {
                bytes.extend([0x86, 0xdd]);
                let [high, low] = (segment.len() as u16).to_be_bytes();
                bytes.extend([0x60, 0, 0, 0, high, low, protocol, HOP_LIMIT]);
                bytes.extend(octets(from));
                bytes.extend(octets(to));
            }
        }
        bytes.extend(segment);
        bytes
    }
}

/// The parsed header of an IP packet, and its payload.
struct IpPacket<'a> {
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    segment: &'a [u8],
}

impl<'a> IpPacket<'a> {
    fn read(packet: &'a [u8]) -> Option<Self> {
        let (from, to, protocol, header): (IpAddr, IpAddr, u8, usize) = match packet.first()? >> 4 {
            4 => {
                let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
                let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
                let header = usize::from(packet.first()? & 0x0f) * 4;
                (from.into(), to.into(), *packet.get(9)?, header)
            }
            6 => {
                let from: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
                let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
                (from.into(), to.into(), *packet.get(6)?, IPV6_HEADER)
            }
            _ => return None,
        };
        Some(Self { from, to, protocol, segment: packet.get(header..)? })
    }
}

/// Parses an IP packet with UDP or TCP: source address, transport and segment. `None` for other protocols.
pub fn parse(packet: &[u8]) -> Option<(IpAddr, TrialProtocol, &[u8])> {
    let IpPacket { from, protocol, segment, .. } = IpPacket::read(packet)?;
    let transport = match protocol {
        UDP => TrialProtocol::Udp,
        TCP => TrialProtocol::Tcp,
        _ => return None,
    };
    Some((from, transport, segment))
}

/// Returns the destination address of an IP packet.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    IpPacket::read(packet).map(|packet| packet.to)
}

/// Returns the identifier of an IP packet with an ICMP echo or its answer.
pub fn echo(packet: &[u8]) -> Option<u16> {
    let IpPacket { protocol, segment, .. } = IpPacket::read(packet)?;
    let identifier = segment.get(4..)?.first_chunk()?;
    ICMP.contains(&protocol).then(|| u16::from_be_bytes(*identifier))
}

/// Returns the IP packet inside a tunnel packet.
pub fn inner(packet: &[u8]) -> Option<&[u8]> {
    let IpPacket { protocol, segment, .. } = IpPacket::read(packet)?;
    segment.get(UDP_HEADER + ENCAPSULATION_LEN..).filter(|_| protocol == UDP)
}

const fn protocol(transport: TrialProtocol) -> u8 {
    match transport {
        TrialProtocol::Udp => UDP,
        TrialProtocol::Tcp => TCP,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_trials_are_not_ephemeral() {
        let ports =
            [UNUSED, UNUSED_OUT, crate::dataplane::forwarding::remote::message::REMOTE_PORT];

        assert!(ports.iter().all(|port| *port > 60_999), "{ports:?}");
        assert_eq!(UNUSED ^ UNUSED_OUT, 1);
    }

    fn tunneled(transport: TrialProtocol, from: &str, to: &str) -> TunneledProbe {
        let address = |text: &str| text.parse().expect("an address");
        TunneledProbe {
            vni: 0x0a_0b_0c,
            macs: [Mac::from_bytes([2; 6]), Mac::from_bytes([3; 6])],
            probe: Probe {
                transport,
                from: address(from),
                to: address(to),
                ports: [UNUSED, 40_000],
                nonce: [7; NONCE_LEN],
            },
        }
    }

    const ENDS: [(&str, &str, usize); 2] = [
        ("10.42.2.0", "10.42.1.254", IPV4_HEADER),
        ("fd42:0:0:2::", "fd42:0:0:1::fe", IPV6_HEADER),
    ];

    #[test]
    fn lengths_and_checksums_are_correct_in_both_families() {
        for (transport, length) in
            [(TrialProtocol::Udp, UDP_HEADER + PAYLOAD_LEN), (TrialProtocol::Tcp, 40)]
        {
            for (from, to, header) in ENDS {
                let packet = tunneled(transport, from, to);
                let bytes = packet.bytes();
                assert_eq!(bytes.len(), 8 + 14 + header + length);
                assert_eq!(bytes[4..8], [0x0a, 0x0b, 0x0c, 0]);
                let ip = &bytes[22..];
                if packet.probe.to.is_ipv4() {
                    assert_eq!(checksum(&ip[..IPV4_HEADER]), 0);
                    assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
                }
                let Probe { from, to, .. } = packet.probe;
                let mut pseudo_packet = [octets(from), octets(to)].concat();
                pseudo_packet.extend([0, protocol(transport)]);
                pseudo_packet.extend((length as u16).to_be_bytes());
                pseudo_packet.extend(&ip[header..]);
                assert_eq!(checksum(&pseudo_packet), 0);
            }
        }
    }

    #[test]
    fn first_segment_has_the_options_of_linux() {
        let segment = tunneled(TrialProtocol::Tcp, ENDS[0].0, ENDS[0].1).probe.segment();
        assert_eq!(usize::from(segment[12] >> 4) * 4, segment.len(), "the header's length");
        let (mut kinds, mut at) = (Vec::new(), TCP_HEADER);
        while at < segment.len() {
            kinds.push(segment[at]);
            at += if segment[at] == 1 { 1 } else { usize::from(segment[at + 1]) };
        }
        assert_eq!((kinds, at), (vec![2, 4, 8, 1, 3], segment.len()));
    }

    #[test]
    fn packet_is_recognized_with_any_source() {
        for transport in TrialProtocol::ALL {
            for (from, to, _) in ENDS {
                let TunneledProbe { probe, .. } = tunneled(transport, from, to);
                let bytes = tunneled(transport, from, to).bytes();
                let ip = &bytes[22..];
                let (source, found, segment) = parse(ip).expect("a packet");
                assert_eq!((source, found), (probe.from, transport));
                assert!(probe.is(segment));
                let translated = Probe { from: probe.to, ports: [9, 40_000], ..probe };
                assert!(translated.is(segment));
                for other in [
                    Probe { ports: [UNUSED, 40_001], ..probe },
                    Probe { nonce: [8; NONCE_LEN], ..probe },
                ] {
                    assert!(!other.is(segment), "{other:?}");
                }
                (0..ip.len()).for_each(|length| {
                    let cut = parse(&ip[..length]).filter(|(.., segment)| probe.is(segment));
                    assert!(cut.is_none() || transport == TrialProtocol::Tcp, "{length} bytes");
                });
            }
        }
    }

    #[test]
    fn packet_inside_tunnel_packet_is_found_behind_either_ip_header() {
        for (from, to, _) in ENDS {
            let packet = tunneled(TrialProtocol::Udp, from, to);
            let udp = [&[0; UDP_HEADER][..], &packet.bytes()].concat();
            let mut ipv4 = vec![0x45; IPV4_HEADER];
            let mut ipv6 = vec![0x60; IPV6_HEADER];
            (ipv4[9], ipv6[6]) = (UDP, UDP);
            for header in [ipv4, ipv6] {
                let whole = [header, udp.clone()].concat();
                let found = inner(&whole).expect("a packet");
                assert_eq!(
                    (found, destination(found)),
                    (&packet.bytes()[22..], Some(packet.probe.to))
                );
                assert_eq!(echo(found), None);
                (0..whole.len())
                    .for_each(|length| _ = inner(&whole[..length]).and_then(destination));
            }
        }
        let echo_of_7 =
            [&[0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1][..], &[0; 10], &[8, 0, 0, 0, 0, 7, 0, 0]];
        assert_eq!(echo(&echo_of_7.concat()), Some(7));
    }

    #[test]
    fn answer_to_first_segment_is_not_taken_for_the_segment() {
        let TunneledProbe { probe, .. } = tunneled(TrialProtocol::Tcp, ENDS[0].0, ENDS[0].1);
        let mut segment = probe.segment();
        segment[13] |= ACK;
        assert!(!probe.is(&segment));
        // The answer as the other end builds it.
        let mut answer = probe.segment();
        answer[..2].copy_from_slice(&probe.ports[1].to_be_bytes());
        answer[2..4].copy_from_slice(&probe.ports[0].to_be_bytes());
        answer[8..12].copy_from_slice(&number(probe.nonce).wrapping_add(1).to_be_bytes());
        for (flags, accepts) in [(SYN | ACK, true), (SYN, false), (ACK, false), (0b1_0100, false)] {
            answer[13] = flags;
            assert_eq!(probe.is_accepted_by(&answer), accepts, "{flags:#b}");
        }
        answer[13] = SYN | ACK;
        for other in [
            Probe { ports: [probe.ports[0], 9], ..probe },
            Probe { nonce: [8; NONCE_LEN], ..probe },
            Probe { transport: TrialProtocol::Udp, ..probe },
        ] {
            assert!(!other.is_accepted_by(&answer), "{other:?}");
        }
        (0..14).for_each(|length| assert!(!probe.is_accepted_by(&answer[..length])));
    }
}

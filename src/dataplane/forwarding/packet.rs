//! Packets of a trial: a UDP datagram (RFC 768) with a number that cannot be guessed, and the first segment
//! of a TCP connection (RFC 9293); both also as they come through the tunnel (RFC 7348).

use std::net::IpAddr;

use super::Transport;
use crate::{checksum::checksum, model::Mac};

/// How the payload of a datagram begins, by which the kernel's packet filter finds it.
pub const MAGIC: [u8; 4] = *b"gsmP";
/// Bytes of the number that follows.
pub const NONCE_LEN: usize = 12;
const PAYLOAD: usize = MAGIC.len() + NONCE_LEN;
/// Destination of segments that come out of the tunnel, and source of such datagrams. Nothing listens there,
/// and no rule is known to be about these ports: they are above the ephemeral ones of Linux, and not among
/// those of traceroute, which firewalls often drop.
pub const UNUSED: u16 = 61_474;
/// Destination of what goes out, which must not pass for an answer to what comes in. It differs from
/// [`UNUSED`] in the lowest bit alone, by which the kernel's packet filter finds both.
pub const UNUSED_OUT: u16 = 61_475;

const UDP: u8 = 17;
const TCP: u8 = 6;
/// Of IPv4 and of IPv6.
const ICMP: [u8; 2] = [1, 58];
const UDP_HEADER: usize = 8;
/// Where the kernel's packet filter finds the beginning of the number: in a datagram or an echo, in a first
/// segment, and one more than that in the answer to one, counted from its header on.
pub const IN_DATAGRAM: u32 = (UDP_HEADER + MAGIC.len()) as u32;
pub const IN_SEGMENT: u32 = 4;
pub const IN_ANSWER: u32 = 8;
const TCP_HEADER: usize = 20;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// Maximum segment size, which every real first segment tells.
const SEGMENT_SIZE: [u8; 4] = [2, 4, 4, 196];
const WINDOW: u16 = 64_240;
const HOPS: u8 = 64;
/// "The VNI is valid."
const FLAGS: u8 = 8;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
/// Headers of VXLAN and of Ethernet.
const ENCAPSULATION: usize = 8 + 14;

/// What packet filters compare of it.
pub const fn number(nonce: [u8; NONCE_LEN]) -> u32 {
    let [a, b, c, d, ..] = nonce;
    u32::from_be_bytes([a, b, c, d])
}

/// A number at a place, counted from the header of UDP or TCP on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    Half(u32, u16),
    Word(u32, u32),
}

/// What is sent from one address to another.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    pub transport: Transport,
    pub from: IpAddr,
    pub to: IpAddr,
    /// Source and destination.
    pub ports: [u16; 2],
    pub nonce: [u8; NONCE_LEN],
}

impl Probe {
    /// What a datagram carries.
    pub fn payload(nonce: [u8; NONCE_LEN]) -> [u8; PAYLOAD] {
        std::array::from_fn(|i| MAGIC.get(i).copied().unwrap_or_else(|| nonce[i - MAGIC.len()]))
    }

    /// The header of UDP or TCP and what follows it.
    pub fn segment(&self) -> Vec<u8> {
        let mut segment = Vec::new();
        self.ports.iter().for_each(|port| segment.extend(port.to_be_bytes()));
        let sum_at = match self.transport {
            Transport::Udp => {
                segment.extend(((UDP_HEADER + PAYLOAD) as u16).to_be_bytes());
                segment.extend([0; 2]);
                segment.extend(Self::payload(self.nonce));
                6
            }
            Transport::Tcp => {
                segment.extend(self.sequence());
                let words = (TCP_HEADER + SEGMENT_SIZE.len()) / 4;
                segment.extend([0, 0, 0, 0, (words as u8) << 4, SYN]);
                segment.extend(WINDOW.to_be_bytes());
                segment.extend([0; 4]);
                segment.extend(SEGMENT_SIZE);
                16
            }
        };
        // Over addresses, protocol and length as well (RFC 9293, 3.1; RFC 8200, 8.1).
        let mut summed = [octets(self.from), octets(self.to)].concat();
        summed.extend([0, protocol(self.transport)]);
        summed.extend((segment.len() as u16).to_be_bytes());
        summed.extend(&segment);
        // Zero would mean to UDP that there is none.
        let sum = Some(checksum(&summed)).filter(|sum| *sum != 0).unwrap_or(u16::MAX);
        segment[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
        segment
    }

    /// Whether a segment is this one. Its source may have been translated.
    pub fn is(&self, segment: &[u8]) -> bool {
        let goes_there = segment.get(2..4) == Some(&self.ports[1].to_be_bytes());
        goes_there
            && match self.transport {
                Transport::Udp => {
                    let payload = segment.get(UDP_HEADER..).unwrap_or_default();
                    payload.starts_with(&Self::payload(self.nonce))
                }
                Transport::Tcp => {
                    let is_first = segment.get(13).is_some_and(|flags| flags & (SYN | ACK) == SYN);
                    is_first && segment.get(4..8) == Some(&self.sequence())
                }
            }
    }

    /// Whether a segment accepts the connection of which this is the first one. What a host does in place of
    /// the destination is the same.
    pub fn is_accepted_by(&self, segment: &[u8]) -> bool {
        let accepts = segment.get(13).is_some_and(|flags| flags & (SYN | ACK) == SYN | ACK);
        let number = number(self.nonce).wrapping_add(1).to_be_bytes();
        self.transport == Transport::Tcp
            && accepts
            && segment.get(..2) == Some(&self.ports[1].to_be_bytes())
            && segment.get(IN_ANSWER as usize..12) == Some(&number)
    }

    /// By one of which the kernel's packet filter finds packets with this number, and refusals of such first
    /// segments, among those of others.
    pub const fn fields(transport: Transport, nonce: [u8; NONCE_LEN]) -> [Field; 2] {
        match transport {
            Transport::Udp => [Field::Word(IN_DATAGRAM, number(nonce)); 2],
            Transport::Tcp => [Field::Word(IN_SEGMENT, number(nonce)), Self::answer(nonce)],
        }
    }

    /// The same of answers to a first segment: the acknowledgement (RFC 9293, 3.10.7.1).
    pub const fn answer(nonce: [u8; NONCE_LEN]) -> Field {
        Field::Word(IN_ANSWER, number(nonce).wrapping_add(1))
    }

    fn sequence(&self) -> [u8; 4] {
        let [a, b, c, d, ..] = self.nonce;
        [a, b, c, d]
    }
}

/// From a peer's VTEP to an address here, inside a tunnel packet.
#[derive(Clone, Copy, Debug)]
pub struct Tunnelled {
    pub vni: u32,
    /// Of the peer's device, and of ours.
    pub macs: [Mac; 2],
    pub probe: Probe,
}

impl Tunnelled {
    /// From the VXLAN header on: what goes into a UDP datagram to the tunnel's port.
    pub fn bytes(&self) -> Vec<u8> {
        let [_, a, b, c] = self.vni.to_be_bytes();
        let mut bytes = vec![FLAGS, 0, 0, 0, a, b, c, 0];
        let [peer, ours] = self.macs;
        bytes.extend(ours.as_bytes());
        bytes.extend(peer.as_bytes());
        let segment = self.probe.segment();
        let protocol = protocol(self.probe.transport);
        match (self.probe.from, self.probe.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                bytes.extend([0x08, 0x00]);
                let [high, low] = ((IPV4_HEADER + segment.len()) as u16).to_be_bytes();
                let mut header = vec![0x45, 0, high, low, 0, 0, 0, 0, HOPS, protocol, 0, 0];
                header.extend(from.octets());
                header.extend(to.octets());
                let sum = checksum(&header);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                bytes.extend(header);
            }
            (from, to) => {
                bytes.extend([0x86, 0xdd]);
                let [high, low] = (segment.len() as u16).to_be_bytes();
                bytes.extend([0x60, 0, 0, 0, high, low, protocol, HOPS]);
                bytes.extend(octets(from));
                bytes.extend(octets(to));
            }
        }
        bytes.extend(segment);
        bytes
    }
}

/// An IP packet, as far as it is of interest.
struct Headed<'a> {
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    segment: &'a [u8],
}

impl<'a> Headed<'a> {
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

/// The source of an IP packet, and the segment in it; none, if it is neither UDP nor TCP.
pub fn parse(packet: &[u8]) -> Option<(IpAddr, Transport, &[u8])> {
    let Headed { from, protocol, segment, .. } = Headed::read(packet)?;
    let transport = match protocol {
        UDP => Transport::Udp,
        TCP => Transport::Tcp,
        _ => return None,
    };
    Some((from, transport, segment))
}

/// The destination of an IP packet.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    Headed::read(packet).map(|packet| packet.to)
}

/// The identifier of an IP packet that is an echo, or its answer.
pub fn echo(packet: &[u8]) -> Option<u16> {
    let Headed { protocol, segment, .. } = Headed::read(packet)?;
    let identifier = segment.get(4..)?.first_chunk()?;
    ICMP.contains(&protocol).then(|| u16::from_be_bytes(*identifier))
}

/// The IP packet inside a tunnel packet.
pub fn inner(packet: &[u8]) -> Option<&[u8]> {
    let Headed { protocol, segment, .. } = Headed::read(packet)?;
    segment.get(UDP_HEADER + ENCAPSULATION..).filter(|_| protocol == UDP)
}

const fn protocol(transport: Transport) -> u8 {
    match transport {
        Transport::Udp => UDP,
        Transport::Tcp => TCP,
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
    fn ports_of_trials_are_neither_ephemeral_nor_those_of_traceroute() {
        let ports = [UNUSED, UNUSED_OUT, crate::dataplane::forwarding::FAR_PORT];

        assert!(ports.iter().all(|port| *port > 60_999), "{ports:?}");
        assert_eq!(UNUSED ^ UNUSED_OUT, 1);
    }

    fn tunnelled(transport: Transport, from: &str, to: &str) -> Tunnelled {
        let address = |text: &str| text.parse().expect("an address");
        Tunnelled {
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
    fn lengths_and_checksums_are_right_in_both_families() {
        for (transport, length) in [(Transport::Udp, UDP_HEADER + PAYLOAD), (Transport::Tcp, 24)] {
            for (from, to, header) in ENDS {
                let packet = tunnelled(transport, from, to);
                let bytes = packet.bytes();
                assert_eq!(bytes.len(), 8 + 14 + header + length);
                assert_eq!(bytes[4..8], [0x0a, 0x0b, 0x0c, 0]);
                let ip = &bytes[22..];
                if packet.probe.to.is_ipv4() {
                    assert_eq!(checksum(&ip[..IPV4_HEADER]), 0);
                    assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
                }
                let Probe { from, to, .. } = packet.probe;
                let mut summed = [octets(from), octets(to)].concat();
                summed.extend([0, protocol(transport)]);
                summed.extend((length as u16).to_be_bytes());
                summed.extend(&ip[header..]);
                assert_eq!(checksum(&summed), 0);
            }
        }
    }

    #[test]
    fn a_packet_is_recognised_by_all_but_its_source() {
        for transport in Transport::ALL {
            for (from, to, _) in ENDS {
                let Tunnelled { probe, .. } = tunnelled(transport, from, to);
                let bytes = tunnelled(transport, from, to).bytes();
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
                    assert!(cut.is_none() || transport == Transport::Tcp, "{length} bytes");
                });
            }
        }
    }

    #[test]
    fn the_packet_inside_a_tunnel_packet_is_found_behind_either_header() {
        for (from, to, _) in ENDS {
            let packet = tunnelled(Transport::Udp, from, to);
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
    fn the_answer_to_a_segment_is_not_taken_for_it() {
        let Tunnelled { probe, .. } = tunnelled(Transport::Tcp, ENDS[0].0, ENDS[0].1);
        let mut segment = probe.segment();
        segment[13] |= ACK;
        assert!(!probe.is(&segment));
        // As the other end makes it.
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
            Probe { transport: Transport::Udp, ..probe },
        ] {
            assert!(!other.is_accepted_by(&answer), "{other:?}");
        }
        (0..14).for_each(|length| assert!(!probe.is_accepted_by(&answer[..length])));
    }
}

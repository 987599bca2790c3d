//! Messages between the agents' own pods of two hosts: a datagram or a stream, and the same returned.
//!
//! An answer is as large as its question and is never answered itself, so two pods cannot be made to answer
//! each other forever, and no host sends more than it received. Of several datagrams in one packet, the first
//! is the question and the others are filler.

use std::net::IpAddr;

use super::super::{Field, TrialProtocol};

/// UDP and TCP port of questions. Not used by other programs, and next to the ports of the other trials.
pub const REMOTE_PORT: u16 = 61_476;
/// TCP port of connections that carry a question. Separate from [`REMOTE_PORT`], where only the first segment
/// counts.
pub const REMOTE_DATA_PORT: u16 = 61_477;
/// First bytes of questions and answers. Differs from those of the trials that concern only this host.
const MAGIC: [u8; 4] = *b"gsmF";
const QUESTION: u8 = b'?';
const ANSWER: u8 = b'!';
/// Length of the header in bytes: magic, type, kind, length (of streams), round.
const HEADER_LEN: usize = 12;
/// Offset of a stream's total length in bytes.
const STREAM_LEN_OFFSET: usize = 6;
const UDP_HEADER: u32 = 8;
/// Offset of the round's number in the payload.
const ROUND_OFFSET: u32 = 8;
/// Fills large messages. A rule that takes the start of a later fragment for a UDP header finds neither a
/// known port nor a checksum of 0.
const FILLER: u8 = b'.';
/// Payload size in bytes of a small message.
pub const SMALL: usize = 32;
/// In the bit set of a report ([`Sort::bit`]): the sender would have noticed data of connections. Agents of
/// earlier versions do not set it.
pub const SEES_DATA: u16 = 1 << 15;
/// Number of datagrams in one aggregate.
const AGGREGATE_DATAGRAMS: usize = 2;
/// A fragmented message is larger than a packet by the packet size divided by this.
const EXCESS_DIVISOR: u32 = 4;
/// Maximum size of a message in bytes.
const MAX_PAYLOAD: usize = 60_000;

/// The kinds of packets that are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The first segment of a TCP connection; the receiving kernel accepts it.
    Segment,
    /// A small datagram.
    Small,
    /// A datagram of the largest size that fits into one packet.
    Large,
    /// A datagram that must be sent in fragments.
    Fragmented,
    /// Several full-size datagrams in one packet, which is split when it leaves the host (GSO), like the bulk
    /// data of connections.
    Aggregate,
    /// A small datagram for the measurement of random loss.
    Sample,
    /// Data in an established connection: a small segment and full-size ones.
    Data,
}

/// A kind of packet in one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sort {
    /// The address family is IPv4, not IPv6.
    pub ipv4: bool,
    /// The kind of packet.
    pub kind: Kind,
}

/// The type of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageType {
    /// A message to be answered.
    Question,
    /// The answer to a question.
    Answer,
}

impl Kind {
    /// The kinds that must each pass; samples are only counted.
    pub const ALL: [Self; 6] =
        [Self::Segment, Self::Small, Self::Large, Self::Fragmented, Self::Aggregate, Self::Data];

    /// Returns the transport protocol of the kind.
    pub const fn transport(self) -> TrialProtocol {
        match self {
            Self::Segment | Self::Data => TrialProtocol::Tcp,
            Self::Small | Self::Large | Self::Fragmented | Self::Aggregate | Self::Sample => {
                TrialProtocol::Udp
            }
        }
    }

    /// Returns whether packets of the kind have the maximum size, or more.
    pub const fn is_large(self) -> bool {
        matches!(self, Self::Large | Self::Fragmented | Self::Aggregate)
    }

    /// Returns the number of datagrams in one packet.
    pub const fn segments(self) -> usize {
        match self {
            Self::Aggregate => AGGREGATE_DATAGRAMS,
            _ => 1,
        }
    }

    /// Returns the payload size in bytes of a datagram or connection, if packets have at most `carried`
    /// bytes. `None` if the kind has no payload or cannot be sent at this size.
    pub fn size(self, to: IpAddr, carried: u32) -> Option<usize> {
        let whole = carried.checked_sub(if to.is_ipv4() { 28 } else { 48 })?;
        let size = match self {
            Self::Segment => return None,
            Self::Small | Self::Sample => return Some(SMALL),
            Self::Large | Self::Aggregate => whole,
            Self::Fragmented => whole + carried / EXCESS_DIVISOR,
            Self::Data => {
                return Some((carried + carried / EXCESS_DIVISOR) as usize)
                    .map(|size| size.min(MAX_PAYLOAD));
            }
        };
        Some(size as usize).filter(|size| size * self.segments() <= MAX_PAYLOAD)
    }

    /// Returns the number that stands for the kind in messages and bit sets.
    const fn number(self) -> u8 {
        self as u8
    }
}

impl Sort {
    /// Returns the bit of the sort in the bit set of a report.
    pub const fn bit(self) -> u16 {
        1 << (self.kind.number() * 2 + self.ipv4 as u8)
    }
}

/// Matches the first bytes of questions and answers, for the kernel's packet filter.
pub const IS_MESSAGE: Field = Field::Word(UDP_HEADER, u32::from_be_bytes(MAGIC));

/// Matches datagrams of one round, for the kernel's packet filter.
pub const fn is_of_round(number: u32) -> Field {
    Field::Word(UDP_HEADER + ROUND_OFFSET, number)
}

/// Matches answers to first segments of one round, for the kernel's packet filter.
pub const fn answers_segment(number: u32) -> Field {
    Field::Word(8, number.wrapping_add(1))
}

/// Builds a question of the round with this number, of at least `size` bytes.
pub fn question(kind: Kind, number: u32, size: usize) -> Vec<u8> {
    let mut payload = MAGIC.to_vec();
    payload.extend([QUESTION, kind.number(), 0, 0]);
    payload.extend(number.to_be_bytes());
    payload.resize(size.max(HEADER_LEN), FILLER);
    payload
}

/// Turns a question into its answer.
pub fn answer(question: &mut [u8]) {
    if let Some(message_type) = question.get_mut(MAGIC.len()) {
        *message_type = ANSWER;
    }
}

/// Parses a question or an answer: its type, kind and round. `None` if it is neither.
pub fn read(payload: &[u8]) -> Option<(MessageType, Kind, u32)> {
    let rest = payload.strip_prefix(&MAGIC)?;
    let message_type = match *rest.first()? {
        QUESTION => MessageType::Question,
        ANSWER => MessageType::Answer,
        _ => return None,
    };
    let number = *rest.get(1)?;
    let kind = Kind::ALL.into_iter().chain([Kind::Sample]).find(|kind| kind.number() == number)?;
    let number = rest.get(4..)?.first_chunk()?;
    let is_datagram = kind.transport() == TrialProtocol::Udp;
    is_datagram.then_some((message_type, kind, u32::from_be_bytes(*number)))
}

/// Builds the question that a connection carries: `size` bytes, within limits.
pub fn stream_question(number: u32, size: usize) -> Vec<u8> {
    let size = size.clamp(SMALL, MAX_PAYLOAD);
    let mut stream = question(Kind::Data, number, size);
    stream[STREAM_LEN_OFFSET..][..2].copy_from_slice(&(size as u16).to_be_bytes());
    stream
}

/// Parses the data that a connection has carried so far: type, round, and total length in bytes. `None` if
/// there is too little data yet.
///
/// # Errors
/// The data does not belong to a trial.
pub fn read_stream(carried: &[u8]) -> Result<Option<(MessageType, u32, usize)>, Malformed> {
    let head = carried.get(..HEADER_LEN).ok_or(());
    let Ok(head) = head else { return Ok(None) };
    let message_type = match head[MAGIC.len()] {
        QUESTION => MessageType::Question,
        ANSWER => MessageType::Answer,
        _ => return Err(Malformed),
    };
    let is_expected = head.starts_with(&MAGIC) && head[MAGIC.len() + 1] == Kind::Data.number();
    let size =
        usize::from(u16::from_be_bytes([head[STREAM_LEN_OFFSET], head[STREAM_LEN_OFFSET + 1]]));
    let number = u32::from_be_bytes([head[8], head[9], head[10], head[11]]);
    if is_expected && (SMALL..=MAX_PAYLOAD).contains(&size) && carried.len() <= size {
        Ok(Some((message_type, number, size)))
    } else {
        Err(Malformed)
    }
}

/// Data of a connection that does not belong to a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// A TCP segment that belongs to a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// The first segment of a connection, of the round with this number.
    Question(u32),
    /// The kernel's answer to a first segment of the round with this number: it accepts or refuses the
    /// connection.
    Answer(u32),
}

/// Parses a segment that begins with its TCP header.
pub fn segment(bytes: &[u8]) -> Option<Segment> {
    const FIN_TO_ACK: u8 = 0b1_0111;
    const SYN: u8 = 0b0_0010;
    const ACCEPTED: u8 = 0b1_0010;
    const REFUSED: u8 = 0b1_0100;
    let port = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let word = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let flags = *bytes.get(13)? & FIN_TO_ACK;
    if port(2)? == REMOTE_PORT && flags == SYN {
        return Some(Segment::Question(word(4)?));
    }
    let answers = port(0)? == REMOTE_PORT && matches!(flags, ACCEPTED | REFUSED);
    answers.then_some(Segment::Answer(word(8)?.wrapping_sub(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::forwarding::{NONCE_LEN, Probe};

    #[test]
    fn answer_has_the_size_of_its_question_and_is_parsed_as_answer() {
        for kind in [Kind::Small, Kind::Large, Kind::Fragmented, Kind::Aggregate, Kind::Sample] {
            let size = kind.size([10, 42, 1, 254].into(), 1450).expect("a size");
            let mut payload = question(kind, 0x0102_0304, size);
            assert_eq!(read(&payload), Some((MessageType::Question, kind, 0x0102_0304)));
            answer(&mut payload);
            assert_eq!(read(&payload), Some((MessageType::Answer, kind, 0x0102_0304)));
            assert_eq!(payload.len(), size);
        }
    }

    #[test]
    fn stream_messages_are_parsed_from_any_prefix() {
        let size = Kind::Data.size([10, 42, 1, 254].into(), 1450).expect("a size");
        let mut stream = stream_question(0x0102_0304, size);
        assert_eq!(stream.len(), size);
        for message_type in [MessageType::Question, MessageType::Answer] {
            for length in 0..=size {
                let read = read_stream(&stream[..length]).expect("of a trial");
                let expected = (length >= HEADER_LEN).then_some((message_type, 0x0102_0304, size));
                assert_eq!(read, expected, "{length} bytes");
            }
            answer(&mut stream);
        }
        for (at, byte) in [(0, b'G'), (4, b'.'), (5, 0), (6, 0xff), (7, 0)] {
            let mut other = stream.clone();
            other[at] = byte;
            assert_eq!(read_stream(&other), Err(Malformed), "{byte} at {at}");
        }
        assert_eq!(read_stream(&[stream, vec![0]].concat()), Err(Malformed));
        let small = stream_question(7, 0);
        assert_eq!((small.len(), read(&small)), (SMALL, None), "data is never a datagram");
    }

    #[test]
    fn truncated_and_foreign_messages_are_rejected() {
        let payload = question(Kind::Small, 7, SMALL);
        (0..HEADER_LEN).for_each(|length| assert_eq!(read(&payload[..length]), None));
        for (at, byte) in [(0, b'G'), (4, b'.'), (5, 0), (5, 6), (5, 7)] {
            let mut other = payload.clone();
            other[at] = byte;
            assert_eq!(read(&other), None, "{byte} at {at}");
        }
    }

    #[test]
    fn large_message_fills_one_packet_and_fragmented_message_two() {
        let (ipv4, ipv6) = ([10, 42, 1, 254].into(), "fd42::fe".parse().expect("an address"));
        assert_eq!(Kind::Large.size(ipv4, 1450), Some(1450 - 28));
        assert_eq!(Kind::Large.size(ipv6, 1450), Some(1450 - 48));
        let fragmented = Kind::Fragmented.size(ipv4, 1450).expect("a size");
        assert!((1450..2 * 1450 - 100).contains(&fragmented));
        assert_eq!(Kind::Fragmented.size(ipv4, 65_485), None);
        assert_eq!(Kind::Segment.size(ipv4, 1450), None);
        let segment = Kind::Aggregate.size(ipv4, 1450).expect("a size");
        assert!(segment <= 1450 - 28 && segment * Kind::Aggregate.segments() > 1500 + 28);
        assert_eq!(Kind::Aggregate.size(ipv4, 32_000), None);
    }

    #[test]
    fn later_fragment_has_no_zero_at_the_checksum_offset() {
        let size = Kind::Fragmented.size([10, 42, 1, 254].into(), 1450).expect("a size");
        let payload = question(Kind::Fragmented, 7, size);
        assert!(payload[HEADER_LEN..].iter().all(|byte| *byte != 0));
    }

    #[test]
    fn each_sort_has_a_distinct_bit() {
        let bits: Vec<u16> = Kind::ALL
            .iter()
            .flat_map(|kind| [true, false].map(|ipv4| Sort { ipv4, kind: *kind }.bit()))
            .collect();
        let all = bits.iter().fold(0, |all, bit| all | bit);
        assert_eq!((all.count_ones() as usize, all & SEES_DATA), (bits.len(), 0));
    }

    #[test]
    fn first_segment_and_its_answer_carry_the_round_number() {
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&0xffff_ffff_u32.to_be_bytes());
        let probe = Probe {
            transport: TrialProtocol::Tcp,
            from: [10, 42, 1, 254].into(),
            to: [10, 42, 2, 254].into(),
            ports: [40_000, REMOTE_PORT],
            nonce,
        };
        let first = probe.segment();
        assert_eq!(segment(&first), Some(Segment::Question(u32::MAX)));
        for (flags, is_answer) in [(0b1_0100, true), (0b1_0010, true), (0b1_0000, false)] {
            let mut reply = vec![0; 20];
            reply[..2].copy_from_slice(&REMOTE_PORT.to_be_bytes());
            reply[13] = flags;
            let expected = is_answer.then_some(Segment::Answer(u32::MAX));
            assert_eq!(segment(&reply), expected, "{flags:#b}");
        }
        (0..14).for_each(|length| assert_eq!(segment(&first[..length]), None));
    }
}

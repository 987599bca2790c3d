//! What the agent's own pods of two hosts say to each other: a datagram, and the same back.
//!
//! An answer is as large as its question, and is never answered itself, so that two pods cannot be set on
//! each other, and no host is asked for more than it was sent. The first of several datagrams in one packet
//! is the question, and the others fill it up.

use std::net::IpAddr;

use super::{Field, Transport};

/// Where questions go. Nothing else listens there: next to those of the other trials.
pub const FAR_PORT: u16 = 61_476;
/// Where connections go that carry a question: apart from those of which only the first segment counts.
pub const FAR_DATA_PORT: u16 = 61_477;
/// How questions and answers begin. Other than what trials of this host alone begin with.
const MAGIC: [u8; 4] = *b"gsmF";
const QUESTION: u8 = b'?';
const ANSWER: u8 = b'!';
const LENGTH: usize = 12;
/// Where what a connection carries tells how long it is.
const LENGTH_AT: usize = 6;
const UDP_HEADER: u32 = 8;
/// Where the number of the round is.
const NUMBER: u32 = 8;
/// What makes a question large. A rule that takes the beginning of a later fragment for a header of UDP finds
/// neither a port nor a checksum of 0 there.
const FILLER: u8 = b'.';
/// Payload of a small one, and of the first segment of data.
pub const SMALL: usize = 32;
/// In the byte that tells which have arrived: data of connections would have been seen. Agents of earlier
/// versions do not know of it.
pub const SEES_DATA: u16 = 1 << 15;
/// Segments in one packet of several.
const SEGMENTS: usize = 2;
/// What is sent in fragments is larger than a packet by one part in so many.
const EXCESS: u32 = 4;
/// Larger ones are not sent.
const LARGEST: usize = 60_000;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The first segment of a connection, which the kernel accepts.
    Segment,
    /// A small datagram.
    Small,
    /// A datagram as large as a packet to that pod can be.
    Large,
    /// A datagram that has to be sent in fragments.
    Fragmented,
    /// Several full-size datagrams in one packet, which is cut into them where it leaves the host at last
    /// (GSO): as the kernel hands down what a connection sends in bulk.
    Aggregate,
    /// A small datagram of many that are counted.
    Sample,
    /// What a connection carries once it is made: a small segment, and full-size ones.
    Data,
}

/// A kind of packet of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sort {
    pub ipv4: bool,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    Question,
    Answer,
}

impl Kind {
    /// Those that each have to get through.
    pub const ALL: [Self; 6] =
        [Self::Segment, Self::Small, Self::Large, Self::Fragmented, Self::Aggregate, Self::Data];

    pub const fn transport(self) -> Transport {
        match self {
            Self::Segment | Self::Data => Transport::Tcp,
            Self::Small | Self::Large | Self::Fragmented | Self::Aggregate | Self::Sample => {
                Transport::Udp
            }
        }
    }

    /// Whether it is as large as a packet can be, or larger.
    pub const fn is_large(self) -> bool {
        matches!(self, Self::Large | Self::Fragmented | Self::Aggregate)
    }

    /// Datagrams in one packet.
    pub const fn segments(self) -> usize {
        match self {
            Self::Aggregate => SEGMENTS,
            _ => 1,
        }
    }

    /// Bytes of payload of a datagram, or of a connection, where packets have at most `carried`; none where
    /// it cannot be sent as one.
    pub fn size(self, to: IpAddr, carried: u32) -> Option<usize> {
        let whole = carried.checked_sub(if to.is_ipv4() { 28 } else { 48 })?;
        let size = match self {
            Self::Segment => return None,
            Self::Small | Self::Sample => return Some(SMALL),
            Self::Large | Self::Aggregate => whole,
            Self::Fragmented => whole + carried / EXCESS,
            Self::Data => {
                return Some((carried + carried / EXCESS) as usize).map(|size| size.min(LARGEST));
            }
        };
        Some(size as usize).filter(|size| size * self.segments() <= LARGEST)
    }

    /// By which a set of them is told in a byte.
    const fn number(self) -> u8 {
        self as u8
    }
}

impl Sort {
    /// In the byte that tells which have arrived.
    pub const fn bit(self) -> u16 {
        1 << (self.kind.number() * 2 + self.ipv4 as u8)
    }
}

/// What questions and answers begin with, for the kernel's packet filter.
pub const IS_SAID: Field = Field::Word(UDP_HEADER, u32::from_be_bytes(MAGIC));

/// In datagrams of one round.
pub const fn is_of_round(number: u32) -> Field {
    Field::Word(UDP_HEADER + NUMBER, number)
}

/// In answers to first segments of one round.
pub const fn answers_segment(number: u32) -> Field {
    Field::Word(8, number.wrapping_add(1))
}

/// A question of a round of trials, which has this number.
pub fn question(kind: Kind, number: u32, size: usize) -> Vec<u8> {
    let mut payload = MAGIC.to_vec();
    payload.extend([QUESTION, kind.number(), 0, 0]);
    payload.extend(number.to_be_bytes());
    payload.resize(size.max(LENGTH), FILLER);
    payload
}

/// Makes an answer of a question.
pub fn answer(question: &mut [u8]) {
    if let Some(said) = question.get_mut(MAGIC.len()) {
        *said = ANSWER;
    }
}

/// Reads either.
pub fn read(payload: &[u8]) -> Option<(Said, Kind, u32)> {
    let rest = payload.strip_prefix(&MAGIC)?;
    let said = match *rest.first()? {
        QUESTION => Said::Question,
        ANSWER => Said::Answer,
        _ => return None,
    };
    let number = *rest.get(1)?;
    let kind = Kind::ALL.into_iter().chain([Kind::Sample]).find(|kind| kind.number() == number)?;
    let number = rest.get(4..)?.first_chunk()?;
    let is_datagram = kind.transport() == Transport::Udp;
    is_datagram.then_some((said, kind, u32::from_be_bytes(*number)))
}

/// What a connection carries to ask in a round, `size` bytes of it.
pub fn stream_question(number: u32, size: usize) -> Vec<u8> {
    let size = size.clamp(SMALL, LARGEST);
    let mut stream = question(Kind::Data, number, size);
    stream[LENGTH_AT..][..2].copy_from_slice(&(size as u16).to_be_bytes());
    stream
}

/// Reads what a connection has carried so far: what it says, of which round, and with how many bytes in all.
///
/// # Errors
/// It is of another kind. None, if that cannot be told yet.
pub fn read_stream(carried: &[u8]) -> Result<Option<(Said, u32, usize)>, Malformed> {
    let head = carried.get(..LENGTH).ok_or(());
    let Ok(head) = head else { return Ok(None) };
    let said = match head[MAGIC.len()] {
        QUESTION => Said::Question,
        ANSWER => Said::Answer,
        _ => return Err(Malformed),
    };
    let is_it = head.starts_with(&MAGIC) && head[MAGIC.len() + 1] == Kind::Data.number();
    let size = usize::from(u16::from_be_bytes([head[LENGTH_AT], head[LENGTH_AT + 1]]));
    let number = u32::from_be_bytes([head[8], head[9], head[10], head[11]]);
    if is_it && (SMALL..=LARGEST).contains(&size) && carried.len() <= size {
        Ok(Some((said, number, size)))
    } else {
        Err(Malformed)
    }
}

/// What a connection carries that is of no trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// What a segment of TCP is, if it belongs to a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// The first one of a connection, of the round with this number.
    Question(u32),
    /// The kernel's answer to one: it accepts the connection, or refuses it.
    Answer(u32),
}

/// Reads a segment from its TCP header on.
pub fn segment(bytes: &[u8]) -> Option<Segment> {
    const FIN_TO_ACK: u8 = 0b1_0111;
    const SYN: u8 = 0b0_0010;
    const ACCEPTED: u8 = 0b1_0010;
    const REFUSED: u8 = 0b1_0100;
    let port = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let word = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let flags = *bytes.get(13)? & FIN_TO_ACK;
    if port(2)? == FAR_PORT && flags == SYN {
        return Some(Segment::Question(word(4)?));
    }
    let answers = port(0)? == FAR_PORT && matches!(flags, ACCEPTED | REFUSED);
    answers.then_some(Segment::Answer(word(8)?.wrapping_sub(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::forwarding::{NONCE_LEN, Probe};

    #[test]
    fn an_answer_is_as_large_as_its_question_and_is_read_as_an_answer() {
        for kind in [Kind::Small, Kind::Large, Kind::Fragmented, Kind::Aggregate, Kind::Sample] {
            let size = kind.size([10, 42, 1, 254].into(), 1450).expect("a size");
            let mut payload = question(kind, 0x0102_0304, size);
            assert_eq!(read(&payload), Some((Said::Question, kind, 0x0102_0304)));
            answer(&mut payload);
            assert_eq!(read(&payload), Some((Said::Answer, kind, 0x0102_0304)));
            assert_eq!(payload.len(), size);
        }
    }

    #[test]
    fn a_connection_carries_its_question_and_the_answer_in_any_number_of_parts() {
        let size = Kind::Data.size([10, 42, 1, 254].into(), 1450).expect("a size");
        let mut stream = stream_question(0x0102_0304, size);
        assert_eq!(stream.len(), size);
        for said in [Said::Question, Said::Answer] {
            for length in 0..=size {
                let read = read_stream(&stream[..length]).expect("of a trial");
                let expected = (length >= LENGTH).then_some((said, 0x0102_0304, size));
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
        assert_eq!((small.len(), read(&small)), (SMALL, None), "it is no datagram");
    }

    #[test]
    fn what_is_cut_off_or_of_others_is_not_read() {
        let payload = question(Kind::Small, 7, SMALL);
        (0..LENGTH).for_each(|length| assert_eq!(read(&payload[..length]), None));
        for (at, byte) in [(0, b'G'), (4, b'.'), (5, 0), (5, 6), (5, 7)] {
            let mut other = payload.clone();
            other[at] = byte;
            assert_eq!(read(&other), None, "{byte} at {at}");
        }
    }

    #[test]
    fn a_large_one_fills_a_packet_and_one_in_fragments_takes_two() {
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
    fn later_fragment_has_no_zero_where_a_header_would_have_a_checksum() {
        let size = Kind::Fragmented.size([10, 42, 1, 254].into(), 1450).expect("a size");
        let payload = question(Kind::Fragmented, 7, size);
        assert!(payload[LENGTH..].iter().all(|byte| *byte != 0));
    }

    #[test]
    fn each_sort_has_a_bit_of_its_own() {
        let bits: Vec<u16> = Kind::ALL
            .iter()
            .flat_map(|kind| [true, false].map(|ipv4| Sort { ipv4, kind: *kind }.bit()))
            .collect();
        let all = bits.iter().fold(0, |all, bit| all | bit);
        assert_eq!((all.count_ones() as usize, all & SEES_DATA), (bits.len(), 0));
    }

    #[test]
    fn a_first_segment_and_its_answer_carry_the_number() {
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&0xffff_ffff_u32.to_be_bytes());
        let probe = Probe {
            transport: Transport::Tcp,
            from: [10, 42, 1, 254].into(),
            to: [10, 42, 2, 254].into(),
            ports: [40_000, FAR_PORT],
            nonce,
        };
        let first = probe.segment();
        assert_eq!(segment(&first), Some(Segment::Question(u32::MAX)));
        for (flags, is_answer) in [(0b1_0100, true), (0b1_0010, true), (0b1_0000, false)] {
            let mut reply = vec![0; 20];
            reply[..2].copy_from_slice(&FAR_PORT.to_be_bytes());
            reply[13] = flags;
            let expected = is_answer.then_some(Segment::Answer(u32::MAX));
            assert_eq!(segment(&reply), expected, "{flags:#b}");
        }
        (0..14).for_each(|length| assert_eq!(segment(&first[..length]), None));
    }
}

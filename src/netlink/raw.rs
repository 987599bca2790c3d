//! Encodes and decodes messages of protocols that the packet crates do not support: `struct nlmsghdr`, a
//! protocol header of four bytes (`struct nfgenmsg`, `struct genlmsghdr`), and attributes.

use rtnetlink::packet_core::NLM_F_DUMP_INTR;

use super::attributes::Attributes;

/// `NLMSG_ERROR`.
const NLMSG_ERROR: u16 = 2;
/// `NLMSG_DONE`.
const NLMSG_DONE: u16 = 3;
/// Bytes of `struct nlmsghdr` and the protocol header.
const HEADERS: usize = 20;

/// A message of the kernel.
pub struct Answer {
    /// Sequence number of the request that it answers.
    pub sequence: u32,
    /// Port id of the socket whose request it answers or whose change it reports; 0 for the kernel itself.
    pub port: u32,
    /// Error number; 0 is an acknowledgement. `None` if the message is not an error.
    pub error: Option<i32>,
    /// Whether it ends a dump.
    pub done: bool,
    /// Whether the tables changed during the dump.
    pub interrupted: bool,
    /// The protocol header.
    pub own: [u8; 4],
    /// The encoded attributes.
    pub attributes: Vec<u8>,
}

/// Appends a request. The caller's buffer must end at a multiple of four bytes, as it does after other
/// requests.
pub fn append(
    kind: u16,
    flags: u16,
    sequence: u32,
    own: [u8; 4],
    attributes: &Attributes,
    bytes: &mut Vec<u8>,
) {
    let attributes = attributes.as_bytes();
    bytes.extend(((HEADERS + attributes.len()) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(own);
    bytes.extend(attributes);
}

/// Iterates over the messages of one datagram, up to the first truncated one.
pub fn answers(bytes: &[u8]) -> impl Iterator<Item = Answer> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let message = rest.get(..length).filter(|_| length >= HEADERS)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
        let flags = u16::from_ne_bytes(*message.get(6..)?.first_chunk()?);
        let own = *message.get(16..)?.first_chunk()?;
        Some(Answer {
            sequence: u32::from_ne_bytes(*message.get(8..)?.first_chunk()?),
            port: u32::from_ne_bytes(*message.get(12..)?.first_chunk()?),
            error: (kind == NLMSG_ERROR).then(|| i32::from_ne_bytes(own).wrapping_neg()),
            done: kind == NLMSG_DONE,
            interrupted: flags & NLM_F_DUMP_INTR != 0,
            own,
            attributes: message[HEADERS..].to_vec(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_messages_are_read_and_truncated_ones_are_not() {
        let attributes = Attributes::new().text(1, "abcd");
        let mut bytes = Vec::new();
        append(7, 0, 1, [2, 0, 0, 0], &attributes, &mut bytes);
        append(NLMSG_ERROR, 0, 2, (-17_i32).to_ne_bytes(), &Attributes::new(), &mut bytes);
        let read: Vec<Answer> = answers(&bytes).collect();
        assert_eq!((read.len(), read[0].sequence, read[0].own[0]), (2, 1, 2));
        assert_eq!((read[0].error, read[1].error), (None, Some(17)));
        assert_eq!(read[0].attributes, attributes.as_bytes());
        assert_eq!(answers(&bytes[..bytes.len() - 1]).count(), 1);
    }

    #[test]
    fn protocol_header_may_have_any_value() {
        let mut bytes = Vec::new();
        // A notification of nftables can have this protocol header. No kernel sends it as an error.
        append(7, 0, 0, i32::MIN.to_ne_bytes(), &Attributes::new(), &mut bytes);
        append(NLMSG_ERROR, 0, 0, i32::MIN.to_ne_bytes(), &Attributes::new(), &mut bytes);
        let errors: Vec<Option<i32>> = answers(&bytes).map(|answer| answer.error).collect();
        assert_eq!(errors, [None, Some(i32::MIN)]);
    }
}

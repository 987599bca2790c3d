//! Netlink attributes as bytes (`struct nlattr`, linux/netlink.h), for protocols that the packet crates do
//! not support.

use std::net::IpAddr;

/// `NLA_F_NESTED`: the attribute contains attributes.
const NESTED: u16 = 0x8000;
/// `NLA_TYPE_MASK`.
const KIND: u16 = 0x3fff;
/// Bytes of `struct nlattr`.
const HEADER: usize = 4;

/// Encoded attributes, in the order in which they were added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// Returns an empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an attribute.
    ///
    /// # Panics
    /// If the payload exceeds the 65,531 bytes that an attribute can hold.
    pub fn put(mut self, kind: u16, payload: &[u8]) -> Self {
        let length = u16::try_from(HEADER + payload.len());
        assert!(length.is_ok(), "attribute {kind} with {} bytes", payload.len());
        self.0.extend(length.unwrap_or_default().to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(payload);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Appends a string with its terminating zero byte.
    pub fn text(self, kind: u16, text: &str) -> Self {
        let bytes = [text.as_bytes(), &[0]].concat();
        self.put(kind, &bytes)
    }

    /// Appends a number in network byte order.
    pub fn be32(self, kind: u16, number: u32) -> Self {
        self.put(kind, &number.to_be_bytes())
    }

    /// Appends an attribute that contains attributes.
    pub fn nest(self, kind: u16, inner: &Self) -> Self {
        self.put(kind | NESTED, &inner.0)
    }

    /// Returns the encoded attributes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Iterates over kind and payload of the attributes, up to the first truncated one.
pub fn read(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & KIND;
        let payload = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// Returns the payload of the first attribute of a kind.
pub fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    read(bytes).find(|(kind, _)| *kind == wanted).map(|(_, payload)| payload)
}

/// Returns the 4 or 16 bytes of an IP address, in network byte order.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Returns the IP address of 4 or 16 bytes in network byte order; `None` for another length.
pub fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

/// Returns a payload as text, up to its first zero byte. Empty if it is not UTF-8.
pub fn text(payload: &[u8]) -> &str {
    let end = payload.iter().position(|byte| *byte == 0).unwrap_or(payload.len());
    std::str::from_utf8(&payload[..end]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_back_and_truncated_ones_are_not() {
        let inner = Attributes::new().be32(1, 7);
        let written = Attributes::new().text(1, "abc").nest(2, &inner).put(3, &[9]);
        let bytes = written.as_bytes();
        assert_eq!(text(find(bytes, 1).expect("a text")), "abc");
        assert_eq!(find(find(bytes, 2).expect("a nest"), 1), Some(&[0, 0, 0, 7][..]));
        assert_eq!(find(bytes, 3), Some(&[9][..]));
        assert_eq!(read(&bytes[..bytes.len() - 4]).count(), 2);
        assert_eq!(read(&[3, 0, 1, 0]).count(), 0, "shorter than its header");
    }
}

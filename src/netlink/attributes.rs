//! Netlink attributes as bytes (`struct nlattr`, linux/netlink.h), for protocols that the packet crates do
//! not speak.

use std::net::IpAddr;

/// Marks an attribute that holds attributes.
const NESTED: u16 = 0x8000;
const KIND: u16 = 0x3fff;
const HEADER: usize = 4;

/// Attributes in the order in which they were put.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    pub fn new() -> Self {
        Self::default()
    }

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

    /// A string with the zero byte that ends it in C.
    pub fn text(self, kind: u16, text: &str) -> Self {
        let bytes = [text.as_bytes(), &[0]].concat();
        self.put(kind, &bytes)
    }

    /// A number in network byte order.
    pub fn be32(self, kind: u16, number: u32) -> Self {
        self.put(kind, &number.to_be_bytes())
    }

    pub fn nest(self, kind: u16, inner: &Self) -> Self {
        self.put(kind | NESTED, &inner.0)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The attributes in these bytes, up to the first that is cut off: kind and payload.
pub fn read(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & KIND;
        let payload = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The payload of the first attribute of this kind.
pub fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    read(bytes).find(|(kind, _)| *kind == wanted).map(|(_, payload)| payload)
}

/// An IP address as bytes in network order: 4 or 16.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The same back; none, if there are neither 4 nor 16 bytes.
pub fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

/// A payload as text, without the zero byte that ends it.
pub fn text(payload: &[u8]) -> &str {
    let end = payload.iter().position(|byte| *byte == 0).unwrap_or(payload.len());
    std::str::from_utf8(&payload[..end]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_read_back_and_what_is_cut_off_is_not() {
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

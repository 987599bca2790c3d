//! VXLAN tunnel endpoints (RFC 7348): MAC and underlay address of a node's tunnel device.
//!
//! The overlay address of a VTEP is not stored: it is the first address of the node's subnet.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest, Sha256};

use super::NodeId;

/// `rtm_protocol` of all routes that gossamer creates; it identifies them without any stored state.
pub const ROUTE_PROTOCOL: u8 = 73;

/// A 48-bit Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// Returns the MAC with these bytes.
    pub const fn from_bytes(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// Whether an interface can have this MAC: it is neither a group address (IEEE 802, bit 0) nor zero.
    pub fn is_assignable(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// Returns the bytes of the MAC.
    pub const fn as_bytes(&self) -> &[u8; 6] {
        &self.0
    }

    /// Returns the MAC of a node's VTEP. It depends only on the node id, so a re-created device is the same
    /// VTEP to all peers. The MAC is locally administered and unicast (IEEE 802, bits 1 and 0).
    pub fn of_node(node: NodeId) -> Self {
        let hash = Sha256::new()
            .chain_update(b"gossamer vtep mac")
            .chain_update(node.as_bytes())
            .finalize();
        let mut mac = [0; 6];
        mac.copy_from_slice(&hash[..6]);
        mac[0] = (mac[0] | 0b10) & !0b01;
        Self(mac)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Mac {
    /// Returns the MAC as twelve hexadecimal digits without separators.
    pub fn digits(self) -> String {
        self.0.map(|byte| format!("{byte:02x}")).concat()
    }

    /// Parses twelve hexadecimal digits without separators.
    pub fn from_digits(digits: &str) -> Option<Self> {
        let is_whole = digits.len() == 12 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u64::from_str_radix(digits, 16).ok().filter(|_| is_whole)?;
        let [_, _, bytes @ ..] = number.to_be_bytes();
        Some(Self(bytes))
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Option<Vec<u8>> =
            text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
        parts
            .and_then(|parts| parts.try_into().ok())
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not a MAC address: expected aa:bb:cc:dd:ee:ff"))
    }
}

/// Text with colons in text formats (JSON, TOML), raw bytes on the wire and on disk.
impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
        } else {
            <[u8; 6]>::deserialize(deserializer).map(Self)
        }
    }
}

/// A node's tunnel endpoint. Together with the node's subnet it is all that a peer needs to reach the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Vtep {
    /// MAC of the VXLAN device.
    pub mac: Mac,
    /// Underlay address of the host, which peers put into their FDB.
    pub underlay: IpAddr,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_of_a_node_is_stable_unicast_and_locally_administered() {
        for seed in 0..64 {
            let node = NodeId::of_public_key(&[seed; 32]);
            let mac = Mac::of_node(node);
            assert_eq!(mac, Mac::of_node(node));
            assert_eq!(mac.as_bytes()[0] & 0b11, 0b10, "{mac}");
        }
    }

    #[test]
    fn group_and_zero_macs_are_not_assignable() {
        let is_assignable = |text: &str| text.parse::<Mac>().expect("a MAC").is_assignable();
        assert!(is_assignable("02:42:00:00:00:01") && is_assignable("00:00:00:00:00:01"));
        for none in
            ["01:00:5e:00:00:01", "33:33:00:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"]
        {
            assert!(!is_assignable(none), "{none}");
        }
    }

    #[test]
    fn mac_round_trips_through_its_text() {
        let mac = Mac::from_bytes([2, 0, 0xab, 9, 8, 255]);
        assert_eq!(mac.to_string(), "02:00:ab:09:08:ff");
        assert_eq!(mac.to_string().parse(), Ok(mac));
        assert!("02:00:ab".parse::<Mac>().is_err());
    }
}

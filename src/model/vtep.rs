//! VXLAN tunnel endpoints (RFC 7348): the MAC and the underlay address of a node's tunnel device.
//!
//! The overlay address of a VTEP is not stored: it is the first address of the node's subnet.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest, Sha256};

use super::NodeId;

/// A 48-bit Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    pub const fn from_bytes(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// Whether an interface can have it: it is neither that of a group (IEEE 802, bit 0) nor none.
    pub fn is_of_one_interface(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    pub const fn as_bytes(&self) -> &[u8; 6] {
        &self.0
    }

    /// The MAC of a node's VTEP, a pure function of its identity: a device that was deleted and made
    /// anew is the same VTEP to all peers. Locally administered and unicast (IEEE 802, bits 1 and 0).
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
    /// Without colons.
    pub fn digits(self) -> String {
        self.0.map(|byte| format!("{byte:02x}")).concat()
    }

    /// Reads one without colons.
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

/// Text where people read (JSON, TOML), raw bytes on the wire and on disk.
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

/// Where a node's tunnel ends: what a peer needs, with the subnet, to reach its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Vtep {
    pub mac: Mac,
    /// The address that peers put into their FDB.
    pub underlay: IpAddr,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_mac_is_stable_unicast_and_locally_administered() {
        for seed in 0..64 {
            let node = NodeId::of_public_key(&[seed; 32]);
            let mac = Mac::of_node(node);
            assert_eq!(mac, Mac::of_node(node));
            assert_eq!(mac.as_bytes()[0] & 0b11, 0b10, "{mac}");
        }
    }

    #[test]
    fn macs_of_groups_and_the_empty_one_are_of_no_interface() {
        let is = |text: &str| text.parse::<Mac>().expect("a MAC").is_of_one_interface();
        assert!(is("02:42:00:00:00:01") && is("00:00:00:00:00:01"));
        for none in
            ["01:00:5e:00:00:01", "33:33:00:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"]
        {
            assert!(!is(none), "{none}");
        }
    }

    #[test]
    fn text_form_round_trips() {
        let mac = Mac::from_bytes([2, 0, 0xab, 9, 8, 255]);
        assert_eq!(mac.to_string(), "02:00:ab:09:08:ff");
        assert_eq!(mac.to_string().parse(), Ok(mac));
        assert!("02:00:ab".parse::<Mac>().is_err());
    }
}

//! A packet as it comes through the tunnel (RFC 7348): VXLAN, Ethernet, IP and UDP headers, and a number that
//! cannot be guessed.

use std::net::IpAddr;

use crate::{checksum::checksum, model::Mac};

/// How the payload begins, by which the kernel's packet filter finds it.
pub const MAGIC: [u8; 4] = *b"gsmP";
/// Bytes of the number that follows.
pub const NONCE_LEN: usize = 12;
const PAYLOAD: usize = MAGIC.len() + NONCE_LEN;

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const HOPS: u8 = 64;
/// "The VNI is valid."
const FLAGS: u8 = 8;

/// A datagram from a peer's VTEP to an address here, inside a tunnel packet.
#[derive(Clone, Copy, Debug)]
pub struct Tunnelled {
    pub vni: u32,
    /// Of the peer's device, and of ours.
    pub macs: [Mac; 2],
    pub from: IpAddr,
    pub to: IpAddr,
    /// Source and destination.
    pub ports: [u16; 2],
    pub nonce: [u8; NONCE_LEN],
}

impl Tunnelled {
    /// What both the datagram and the one that a pod sends out carry.
    pub fn payload(nonce: [u8; NONCE_LEN]) -> [u8; PAYLOAD] {
        std::array::from_fn(|i| MAGIC.get(i).copied().unwrap_or_else(|| nonce[i - MAGIC.len()]))
    }

    /// From the VXLAN header on: what goes into a UDP datagram to the tunnel's port.
    pub fn bytes(&self) -> Vec<u8> {
        let [_, a, b, c] = self.vni.to_be_bytes();
        let mut bytes = vec![FLAGS, 0, 0, 0, a, b, c, 0];
        let [peer, ours] = self.macs;
        bytes.extend(ours.as_bytes());
        bytes.extend(peer.as_bytes());
        let datagram = self.datagram();
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                bytes.extend([0x08, 0x00]);
                let length = (20 + datagram.len()) as u16;
                let [high, low] = length.to_be_bytes();
                let mut header = vec![0x45, 0, high, low, 0, 0, 0, 0, HOPS, UDP, 0, 0];
                header.extend(from.octets());
                header.extend(to.octets());
                let sum = checksum(&header);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                bytes.extend(header);
            }
            (from, to) => {
                bytes.extend([0x86, 0xdd]);
                let [high, low] = (datagram.len() as u16).to_be_bytes();
                bytes.extend([0x60, 0, 0, 0, high, low, UDP, HOPS]);
                bytes.extend(octets(from));
                bytes.extend(octets(to));
            }
        }
        bytes.extend(datagram);
        bytes
    }

    fn datagram(&self) -> Vec<u8> {
        let length = (UDP_HEADER + PAYLOAD) as u16;
        let [from, to] = self.ports;
        let mut datagram = Vec::new();
        for number in [from, to, length, 0] {
            datagram.extend(number.to_be_bytes());
        }
        datagram.extend(Self::payload(self.nonce));
        // Over addresses, protocol and length as well (RFC 768; RFC 8200, 8.1).
        let mut summed = [octets(self.from), octets(self.to)].concat();
        summed.extend([0, UDP]);
        summed.extend(length.to_be_bytes());
        summed.extend(&datagram);
        // Zero would mean that there is none.
        let sum = Some(checksum(&summed)).filter(|sum| *sum != 0).unwrap_or(u16::MAX);
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        datagram
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
    fn lengths_and_checksums_are_right_in_both_families() {
        for (from, to, header) in
            [("10.42.2.0", "10.42.1.254", 20), ("fd42:0:0:2::", "fd42:0:0:1::fe", 40)]
        {
            let (from, to): (IpAddr, IpAddr) =
                (from.parse().expect("an address"), to.parse().expect("an address"));
            let packet = Tunnelled {
                vni: 0x0a_0b_0c,
                macs: [Mac::from_bytes([2; 6]), Mac::from_bytes([3; 6])],
                from,
                to,
                ports: [33_434, 40_000],
                nonce: [7; NONCE_LEN],
            };
            let bytes = packet.bytes();
            assert_eq!(bytes.len(), 8 + 14 + header + UDP_HEADER + PAYLOAD);
            assert_eq!(bytes[4..8], [0x0a, 0x0b, 0x0c, 0]);
            let ip = &bytes[22..];
            if to.is_ipv4() {
                assert_eq!(checksum(&ip[..20]), 0);
                assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
            }
            let udp = &ip[header..];
            assert_eq!(udp[UDP_HEADER..], Tunnelled::payload([7; NONCE_LEN]));
            let mut summed = [octets(from), octets(to)].concat();
            summed.extend([0, UDP, udp[4], udp[5]]);
            summed.extend(udp);
            assert_eq!(checksum(&summed), 0);
        }
    }
}

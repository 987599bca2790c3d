//! Ethernet frames of ARP and neighbor discovery, and packet sockets to send them.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd as _,
};

use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    sys::socket::{LinkAddr, bind},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{ADVERTISEMENT, ARP, ICMPV6, IPV6, SOLICITATION};
use crate::{checksum::checksum, model::Mac};

/// `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;
/// The broadcast MAC.
const BROADCAST: Mac = Mac::from_bytes([0xff; 6]);
/// The group of all nodes of a link (RFC 4291, 2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Prefix of solicited-node groups; the last three bytes are those of the address (RFC 4291, 2.7.1).
const SOLICITED: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0);
/// Neighbor discovery option with the sender's hardware address (RFC 4861, 4.6.1).
const SOURCE_LINK: u8 = 1;
/// Neighbor discovery option with the target's hardware address (RFC 4861, 4.6.1).
const TARGET_LINK: u8 = 2;
/// Flag of an advertisement: receivers replace their cached entry (RFC 4861, 4.4).
const OVERRIDE: u8 = 0x20;

/// Builds an ARP request for the MAC of `target` (RFC 826), to one station or to all.
///
/// With `sender` equal to `target` it is a gratuitous ARP: it announces that the address has the MAC `mac`
/// (RFC 5944, 4.6).
pub fn arp(mac: Mac, to: Option<Mac>, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = to.unwrap_or(BROADCAST).as_bytes().to_vec();
    frame.extend(mac.as_bytes());
    frame.extend(ARP.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac.as_bytes());
    frame.extend(sender.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

/// Builds the ARP reply to the station that requested the MAC of `ip` (RFC 826).
pub fn arp_answer((mac, ip): (Mac, Ipv4Addr), (to, requester): (Mac, Ipv4Addr)) -> Vec<u8> {
    const OPERATION: usize = 14 + 6;
    const TARGET: usize = 14 + 18;
    let mut frame = arp(mac, Some(to), ip, requester);
    frame[OPERATION + 1] = 2;
    frame[TARGET..TARGET + 6].copy_from_slice(to.as_bytes());
    frame
}

/// Builds a neighbor solicitation for `target` (RFC 4861, 4.3), to one station or to the solicited-node
/// group.
pub fn solicitation(mac: Mac, station: Option<Mac>, sender: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let [.., a, b, c] = target.octets();
    let mut to = SOLICITED.octets();
    to[13..].copy_from_slice(&[a, b, c]);
    discovery(mac, station, sender, to.into(), [SOLICITATION, 0, SOURCE_LINK], target)
}

/// Builds an unsolicited neighbor advertisement to all nodes: `address` has the MAC `mac` (RFC 4861, 7.2.6).
pub fn advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    discovery(mac, None, address, ALL_NODES, [ADVERTISEMENT, OVERRIDE, TARGET_LINK], address)
}

/// Builds a neighbor discovery message with IPv6 and Ethernet headers. `station` replaces the MAC of the
/// group `to`.
fn discovery(
    mac: Mac,
    station: Option<Mac>,
    sender: Ipv6Addr,
    to: Ipv6Addr,
    [kind, flags, option]: [u8; 3],
    target: Ipv6Addr,
) -> Vec<u8> {
    let [.., a, b, c, d] = to.octets();
    let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    // The option's length is 1, in units of eight bytes.
    message.extend([option, 1]);
    message.extend(mac.as_bytes());
    let length = message.len() as u8;
    let ends = [sender.octets(), to.octets()].concat();
    let sum = checksum(&[&ends[..], &[0, 0, 0, length, 0, 0, 0, ICMPV6], &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let group = Mac::from_bytes([0x33, 0x33, a, b, c, d]);
    let mut frame = station.unwrap_or(group).as_bytes().to_vec();
    frame.extend(mac.as_bytes());
    frame.extend(IPV6.to_be_bytes());
    frame.extend([0x60, 0, 0, 0, 0, length, ICMPV6, 255]);
    frame.extend(ends);
    frame.extend(message);
    frame
}

/// Opens a nonblocking packet socket for one EtherType. Requires `CAP_NET_RAW`.
///
/// # Errors
/// If the kernel refuses the socket.
pub fn packet_socket(kind: Type, protocol: u16) -> io::Result<Socket> {
    let protocol = Protocol::from(i32::from(protocol.to_be()));
    let socket = Socket::new(Domain::PACKET, kind, Some(protocol)).map_err(packet_error)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Adds to the kernel's error for a packet socket which setting forbids the address family.
pub fn packet_error(error: io::Error) -> io::Error {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EAFNOSUPPORT) => io::Error::other(format!(
            "sockets of AF_PACKET are forbidden ({error}): add AF_PACKET to RestrictAddressFamilies in the \
             agent's systemd unit, or load the module af_packet"
        )),
        _ => error,
    }
}

/// Opens a socket that sends whole frames on one Ethernet interface and receives none. Also returns the
/// interface's MAC.
///
/// # Errors
/// `Unsupported` if the interface does not exist or is not Ethernet; otherwise the kernel's error.
pub fn sender_at(interface: &str) -> io::Result<(Socket, Mac)> {
    let entries = getifaddrs()?.filter(|address| address.interface_name == interface);
    let address = entries
        .filter_map(|address| address.address?.as_link_addr().copied())
        .find(|address: &LinkAddr| address.hatype() == ETHERNET)
        .ok_or(io::ErrorKind::Unsupported)?;
    let mac = Mac::from_bytes(address.addr().ok_or(io::ErrorKind::Unsupported)?);
    let socket = packet_socket(Type::RAW, 0)?;
    bind(socket.as_raw_fd(), &address)?;
    Ok((socket, mac))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_whole(frame: &[u8]) -> bool {
        let (ip, message) = frame[14..].split_at(40);
        let pseudo = [&ip[8..], &[0, 0, 0, 32, 0, 0, 0, 58], message].concat();
        (message.len(), checksum(&pseudo)) == (32, 0)
    }

    #[test]
    fn solicitation_goes_to_the_solicited_node_group_with_a_valid_checksum() {
        let [sender, target] =
            ["fd99::1", "fd99::12:3456"].map(|text| text.parse().expect("an address"));
        let frame = solicitation(Mac::from_bytes([2, 0, 0, 0, 0, 1]), None, sender, target);
        assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
        let to = "ff02::1:ff12:3456".parse::<Ipv6Addr>().expect("address").octets();
        assert!(frame[38..54] == to && is_whole(&frame));
    }

    #[test]
    fn arp_answer_is_addressed_to_the_requester_and_names_both_stations() {
        let [mac, to] = [1, 2].map(|number| Mac::from_bytes([2, 0, 0, 0, 0, number]));
        let frame = arp_answer((mac, [10, 42, 1, 9].into()), (to, [10, 42, 1, 8].into()));
        assert_eq!(frame[..12], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
        assert_eq!(frame[20..22], [0, 2]);
        assert_eq!(frame[22..32], [2, 0, 0, 0, 0, 1, 10, 42, 1, 9]);
        assert_eq!(frame[32..], [2, 0, 0, 0, 0, 2, 10, 42, 1, 8]);
    }

    #[test]
    fn advertisement_goes_to_all_nodes_with_the_override_flag() {
        let mac = Mac::from_bytes([2, 0, 0, 0, 0, 1]);
        let address: Ipv6Addr = "fd42::7".parse().expect("an address");
        let frame = advertisement(mac, address);
        assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(frame[22..38], address.octets());
        assert_eq!(frame[54..62], [ADVERTISEMENT, 0, frame[56], frame[57], OVERRIDE, 0, 0, 0]);
        assert_eq!(frame[62..78], address.octets());
        assert_eq!(frame[78..], [2, 1, 2, 0, 0, 0, 0, 1]);
        assert!(is_whole(&frame));
    }

    #[test]
    fn forbidden_packet_socket_error_names_the_family_and_the_setting() {
        let error = packet_error(Errno::EAFNOSUPPORT.into()).to_string();
        assert!(error.contains("RestrictAddressFamilies"), "{error}");
        let other = packet_error(Errno::EPERM.into());
        assert_eq!(other.raw_os_error(), Some(Errno::EPERM as i32));
    }
}

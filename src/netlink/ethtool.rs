//! Offload features of a device (generic netlink, `linux/ethtool_netlink.h)`: reads and sets one feature.
//!
//! Implemented here because the crate for this protocol only reads features.

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST},
    sys::{Socket, protocols::NETLINK_GENERIC},
};

use super::{
    RECEIVE_BUFFER_BYTES, attributes,
    attributes::Attributes,
    open_socket,
    raw::{Answer, answers, append},
    receive, send_all,
};

/// The feature by which the device, not the kernel, computes checksums of sent packets.
pub const TX_CHECKSUM: &str = "tx-checksum-ip-generic";

/// `GENL_ID_CTRL`.
const CONTROL: u16 = 0x10;
/// `CTRL_CMD_GETFAMILY`.
const GET_FAMILY: u8 = 3;
/// `CTRL_ATTR_FAMILY_ID`.
const FAMILY_ID: u16 = 1;
/// `CTRL_ATTR_FAMILY_NAME`.
const FAMILY_NAME: u16 = 2;
/// `ETHTOOL_MSG_FEATURES_GET`.
const GET: u8 = 11;
/// `ETHTOOL_MSG_FEATURES_SET`.
const SET: u8 = 12;
/// `ETHTOOL_A_FEATURES_HEADER`.
const HEADER: u16 = 1;
/// `ETHTOOL_A_FEATURES_WANTED`.
const WANTED: u16 = 3;
/// `ETHTOOL_A_FEATURES_ACTIVE`.
const ACTIVE: u16 = 4;
/// `ETHTOOL_A_HEADER_DEV_INDEX`.
const DEVICE: u16 = 1;
/// `ETHTOOL_A_BITSET_BITS`.
const BITS: u16 = 3;
/// `ETHTOOL_A_BITSET_BITS_BIT`.
const BIT: u16 = 1;
/// `ETHTOOL_A_BITSET_BIT_NAME`.
const NAME: u16 = 2;
/// `ETHTOOL_A_BITSET_BIT_VALUE`.
const VALUE: u16 = 3;

/// A socket for ethtool messages, in the network namespace of the thread that opened it.
pub struct Ethtool {
    socket: Socket,
    family: u16,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Ethtool {
    /// Opens a socket.
    ///
    /// # Errors
    /// If the kernel refuses; `NotFound` if it is older than 5.6 and lacks the protocol.
    pub fn open() -> io::Result<Self> {
        let socket = open_socket(NETLINK_GENERIC)?;
        let buffer = Vec::with_capacity(RECEIVE_BUFFER_BYTES);
        let mut ethtool = Self { socket, family: CONTROL, sequence: 0, buffer };
        let name = Attributes::new().text(FAMILY_NAME, "ethtool");
        let answer = ethtool.request(GET_FAMILY, &name)?;
        let id = attributes::find(&answer.attributes, FAMILY_ID).and_then(<[u8]>::first_chunk);
        ethtool.family = id.map(|id| u16::from_ne_bytes(*id)).ok_or(io::ErrorKind::InvalidData)?;
        Ok(ethtool)
    }

    /// Returns whether a feature is on for the device with this index.
    ///
    /// # Errors
    /// If the kernel refuses or does not answer.
    pub fn is_on(&mut self, device: u32, feature: &str) -> io::Result<bool> {
        let answer = self.request(GET, &of_device(device))?;
        // A bitset without a mask lists only the features that are on.
        let active = attributes::find(&answer.attributes, ACTIVE).unwrap_or_default();
        let bits = attributes::find(active, BITS).unwrap_or_default();
        let mut names = attributes::read(bits).filter_map(|(_, bit)| attributes::find(bit, NAME));
        Ok(names.any(|name| attributes::text(name) == feature))
    }

    /// Turns a feature of a device on or off.
    ///
    /// # Errors
    /// If the kernel refuses or does not answer.
    pub fn set(&mut self, device: u32, feature: &str, on: bool) -> io::Result<()> {
        let bit = Attributes::new().text(NAME, feature);
        let bit = if on { bit.put(VALUE, &[]) } else { bit };
        let bits = Attributes::new().nest(BIT, &bit);
        let wanted = Attributes::new().nest(BITS, &bits);
        self.request(SET, &of_device(device).nest(WANTED, &wanted)).map(drop)
    }

    /// Sends a request. Returns the first answer, which may be an acknowledgement.
    fn request(&mut self, command: u8, attributes: &Attributes) -> io::Result<Answer> {
        self.sequence = self.sequence.wrapping_add(1);
        let ack = if command == SET { NLM_F_ACK } else { 0 };
        let (flags, own) = (NLM_F_REQUEST | ack, [command, 1, 0, 0]);
        let mut bytes = Vec::new();
        append(self.family, flags, self.sequence, own, attributes, &mut bytes);
        send_all(&self.socket, &bytes)?;
        loop {
            receive(&self.socket, &mut self.buffer)?;
            let ours = |answer: &Answer| answer.sequence == self.sequence;
            match answers(&self.buffer).find(ours) {
                Some(Answer { error: Some(errno), .. }) if errno != 0 => {
                    return Err(io::Error::from_raw_os_error(errno));
                }
                Some(answer) => return Ok(answer),
                None => {}
            }
        }
    }
}

fn of_device(index: u32) -> Attributes {
    Attributes::new().nest(HEADER, &Attributes::new().put(DEVICE, &index.to_ne_bytes()))
}

//! What a device leaves to hardware (generic netlink, linux/ethtool_netlink.h): one feature read, or set.
//!
//! By hand, because the crate for it only reads features.

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST},
    sys::{Socket, protocols::NETLINK_GENERIC},
};

use super::{
    RECEIVE_BUFFER, attributes,
    attributes::Attributes,
    open_socket,
    raw::{Answer, answers, append},
    receive, send_all,
};

/// That the device, not the kernel, fills in checksums of what is sent.
pub const TX_CHECKSUM: &str = "tx-checksum-ip-generic";

/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, `CTRL_ATTR_FAMILY_ID`, `CTRL_ATTR_FAMILY_NAME`.
const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `ETHTOOL_MSG_FEATURES_GET` and `_SET`.
const GET: u8 = 11;
const SET: u8 = 12;
/// `ETHTOOL_A_FEATURES_*`.
const HEADER: u16 = 1;
const WANTED: u16 = 3;
const ACTIVE: u16 = 4;
/// `ETHTOOL_A_HEADER_DEV_INDEX`.
const DEVICE: u16 = 1;
/// `ETHTOOL_A_BITSET_BITS`, `_BITS_BIT`, `_BIT_NAME` and `_BIT_VALUE`.
const BITS: u16 = 3;
const BIT: u16 = 1;
const NAME: u16 = 2;
const VALUE: u16 = 3;

/// A socket in the network namespace of the thread that opened it.
pub struct Ethtool {
    socket: Socket,
    family: u16,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Ethtool {
    /// # Errors
    /// `NotFound` where the kernel is older than 5.6.
    pub fn open() -> io::Result<Self> {
        let socket = open_socket(NETLINK_GENERIC)?;
        let buffer = Vec::with_capacity(RECEIVE_BUFFER);
        let mut ethtool = Self { socket, family: CONTROL, sequence: 0, buffer };
        let name = Attributes::new().text(FAMILY_NAME, "ethtool");
        let answer = ethtool.ask(GET_FAMILY, &name)?;
        let id = attributes::find(&answer.attributes, FAMILY_ID).and_then(<[u8]>::first_chunk);
        ethtool.family = id.map(|id| u16::from_ne_bytes(*id)).ok_or(io::ErrorKind::InvalidData)?;
        Ok(ethtool)
    }

    /// Whether a feature is on for the device with this index.
    pub fn is_on(&mut self, device: u32, feature: &str) -> io::Result<bool> {
        let answer = self.ask(GET, &of_device(device))?;
        // Without a mask the list holds what is on.
        let active = attributes::find(&answer.attributes, ACTIVE).unwrap_or_default();
        let bits = attributes::find(active, BITS).unwrap_or_default();
        let mut names = attributes::read(bits).filter_map(|(_, bit)| attributes::find(bit, NAME));
        Ok(names.any(|name| attributes::text(name) == feature))
    }

    pub fn set(&mut self, device: u32, feature: &str, on: bool) -> io::Result<()> {
        let bit = Attributes::new().text(NAME, feature);
        let bit = if on { bit.put(VALUE, &[]) } else { bit };
        let bits = Attributes::new().nest(BIT, &bit);
        let wanted = Attributes::new().nest(BITS, &bits);
        self.ask(SET, &of_device(device).nest(WANTED, &wanted)).map(drop)
    }

    /// Sends a request; gives the first answer, be it an acknowledgement.
    fn ask(&mut self, command: u8, attributes: &Attributes) -> io::Result<Answer> {
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

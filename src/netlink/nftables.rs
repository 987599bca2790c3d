//! `nf_tables` by netlink (`linux/netfilter/nf_tables.h)`: transactions, dumps, and the expressions that
//! gossamer's rules use.
//!
//! Implemented here because other libraries need a C library or the `nft` program, or are under the GPL. This
//! module only encodes; `dataplane::kernel::firewall` defines the content of the tables.

mod dump;
mod events;
pub mod nfta;
mod rule;
pub mod sets;
pub mod steps;

use std::io;

use nix::libc::{EINVAL, EOPNOTSUPP, EPROTONOSUPPORT};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST},
    sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER},
};

use super::{
    RECEIVE_BUFFER_BYTES,
    attributes::{self, Attributes},
    open_socket,
    raw::{Answer, answers, append},
    receive, send_all,
};

pub use self::{
    events::{Changes, Traces},
    rule::{Base, Field, Rule, Side, limit},
};

/// `NFPROTO_INET`: tables for IPv4 and IPv6.
pub const INET: u8 = 1;
/// `NFPROTO_IPV4`: tables for IPv4.
pub const IP: u8 = 2;
/// `NFPROTO_IPV6`: tables for IPv6.
pub const IP6: u8 = 10;
/// `NFPROTO_ARP`: tables for ARP.
pub const ARP: u8 = 3;
/// `NFPROTO_BRIDGE`: tables for packets that pass a bridge.
pub const BRIDGE: u8 = 7;
/// `NFPROTO_NETDEV`: tables for packets of single interfaces.
pub const NETDEV: u8 = 5;
/// `NFPROTO_UNSPEC`: all families, in a request.
pub const ANY: u8 = 0;

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN`.
const BATCH_BEGIN: u16 = 0x10;
/// `NFNL_MSG_BATCH_END`.
const BATCH_END: u16 = 0x11;
/// Send buffer in bytes, if the system's limit allows.
const SEND_BUFFER_BYTES: usize = 1 << 20;
/// Bytes of an interface's name, including the terminating zero.
pub const IFNAMSIZ: usize = 16;

/// The type of a message (`NFT_MSG_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `NFT_MSG_NEWTABLE`.
    NewTable = 0,
    /// `NFT_MSG_GETTABLE`.
    GetTable = 1,
    /// `NFT_MSG_DELTABLE`.
    DelTable = 2,
    /// `NFT_MSG_NEWCHAIN`.
    NewChain = 3,
    /// `NFT_MSG_GETCHAIN`.
    GetChain = 4,
    /// `NFT_MSG_NEWRULE`.
    NewRule = 6,
    /// `NFT_MSG_GETRULE`.
    GetRule = 7,
    /// `NFT_MSG_NEWSET`.
    NewSet = 9,
    /// `NFT_MSG_NEWSETELEM`.
    NewElements = 12,
    /// `NFT_MSG_GETSETELEM`.
    GetElements = 13,
    /// `NFT_MSG_DELSETELEM`.
    DelElements = 14,
}

/// One step of a transaction.
#[derive(Clone, Debug)]
pub struct Step {
    /// Type of the message.
    pub kind: Kind,
    /// `NLM_F_*` flags in addition to `NLM_F_REQUEST` and `NLM_F_ACK`.
    pub flags: u16,
    /// Attributes of the message.
    pub attributes: Attributes,
}

/// An object as the kernel lists it.
#[derive(Clone, Debug)]
pub struct Object {
    /// Family of its table (`NFPROTO_*`).
    pub family: u8,
    /// Its encoded attributes.
    pub attributes: Vec<u8>,
}

/// An `nf_tables` socket in the network namespace of the thread that opened it.
pub struct Nftables {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Nftables {
    /// Opens a socket.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open() -> io::Result<Self> {
        let socket = open_socket(NETLINK_NETFILTER)?;
        socket2::SockRef::from(&socket).set_send_buffer_size(SEND_BUFFER_BYTES)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BUFFER_BYTES) })
    }

    /// Applies all steps on `inet` tables atomically.
    ///
    /// # Errors
    /// The error of the first step that fails; nothing has changed then.
    pub fn transaction(&mut self, steps: &[Step]) -> io::Result<()> {
        self.transaction_in(INET, steps)
    }

    /// Like [`Self::transaction`], on tables of a family.
    ///
    /// # Errors
    /// As for [`Self::transaction`].
    pub fn transaction_in(&mut self, family: u8, steps: &[Step]) -> io::Result<()> {
        self.transaction_of(steps.iter().map(|step| (family, step)))
    }

    /// Like [`Self::transaction`], on tables of several families. Each step comes with its table's family.
    ///
    /// # Errors
    /// As for [`Self::transaction`].
    pub fn transaction_of<'a>(
        &mut self,
        steps: impl ExactSizeIterator<Item = (u8, &'a Step)>,
    ) -> io::Result<()> {
        let count = steps.len();
        let mut bytes = Vec::new();
        let subsystem = nfgenmsg(ANY, SUBSYSTEM);
        self.append(BATCH_BEGIN, NLM_F_REQUEST, subsystem, &Attributes::new(), &mut bytes);
        // The kernel reports errors of the whole subsystem with the sequence number of BATCH_BEGIN.
        let begin = self.sequence;
        for (i, (family, step)) in steps.enumerate() {
            // The kernel always reports errors, so one acknowledgement, of the last step, is enough.
            let ack = if i + 1 == count { NLM_F_ACK } else { 0 };
            let kind = SUBSYSTEM << 8 | step.kind as u16;
            let flags = NLM_F_REQUEST | ack | step.flags;
            self.append(kind, flags, nfgenmsg(family, 0), &step.attributes, &mut bytes);
        }
        let last = self.sequence;
        self.append(BATCH_END, NLM_F_REQUEST, subsystem, &Attributes::new(), &mut bytes);
        send_all(&self.socket, &bytes)?;
        loop {
            for message in self.receive()? {
                let of_ours = message.sequence.wrapping_sub(begin) <= count as u32 + 1;
                match message.error.filter(|_| of_ours) {
                    Some(0) if message.sequence == last => return Ok(()),
                    Some(0) | None => {}
                    Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }

    /// Returns the socket's netlink port id, by which notifications name the socket that made a change.
    ///
    /// # Errors
    /// If the address of the socket cannot be read.
    pub fn port(&self) -> io::Result<u32> {
        let mut address = SocketAddr::new(0, 0);
        self.socket.get_address(&mut address)?;
        Ok(address.port_number())
    }

    fn append(
        &mut self,
        kind: u16,
        flags: u16,
        own: [u8; 4],
        attributes: &Attributes,
        bytes: &mut Vec<u8>,
    ) {
        self.sequence = self.sequence.wrapping_add(1);
        append(kind, flags, self.sequence, own, attributes, bytes);
    }

    fn receive(&mut self) -> io::Result<Vec<Answer>> {
        receive(&self.socket, &mut self.buffer)?;
        Ok(answers(&self.buffer).collect())
    }
}

/// Returns a `struct nfgenmsg`: family, version, and, for a batch, the subsystem in network byte order.
const fn nfgenmsg(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// Returns the name of a family as `nft` calls it.
pub const fn family_name(family: u8) -> &'static str {
    match family {
        INET => "inet",
        IP => "ip",
        ARP => "arp",
        NETDEV => "netdev",
        BRIDGE => "bridge",
        IP6 => "ip6",
        _ => "?",
    }
}

/// Returns an attribute of an object as text.
pub fn name_of(object: &Object, kind: u16) -> &str {
    attributes::find(&object.attributes, kind).map(attributes::text).unwrap_or_default()
}

/// Returns whether the error means that the kernel has no nftables.
pub fn is_missing(error: &io::Error) -> bool {
    // A kernel that cannot load the subsystem reports EINVAL.
    matches!(error.raw_os_error(), Some(EINVAL | EPROTONOSUPPORT | EOPNOTSUPP))
}

/// Returns an interface's name as the kernel compares it, padded with zeros.
pub fn name_bytes(name: &str) -> [u8; IFNAMSIZ] {
    let mut bytes = [0; IFNAMSIZ];
    bytes.iter_mut().zip(name.bytes()).for_each(|(place, byte)| *place = byte);
    bytes
}

/// Returns an expression that counts packets and bytes.
pub fn counter() -> Attributes {
    let zero = 0_u64.to_be_bytes();
    let counts =
        Attributes::new().put(nfta::COUNTER_BYTES, &zero).put(nfta::COUNTER_PACKETS, &zero);
    Attributes::new().text(nfta::EXPR_NAME, "counter").nest(nfta::EXPR_DATA, &counts)
}

/// Returns the packets of a counter expression.
pub fn counter_packets(counter: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*attributes::find(counter, nfta::COUNTER_PACKETS)?.first_chunk()?))
}

/// Returns a base chain with the policy `accept`.
pub fn base_chain(table: &str, name: &str, kind: &str, hook: u32, priority: i32) -> Attributes {
    let hook = Attributes::new()
        .be32(nfta::HOOK_HOOKNUM, hook)
        .be32(nfta::HOOK_PRIORITY, priority.cast_unsigned());
    Attributes::new()
        .text(nfta::CHAIN_TABLE, table)
        .text(nfta::CHAIN_NAME, name)
        .nest(nfta::CHAIN_HOOK, &hook)
        .be32(nfta::CHAIN_POLICY, rule::ACCEPT)
        .text(nfta::CHAIN_TYPE, kind)
}

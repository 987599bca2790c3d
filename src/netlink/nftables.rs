//! nf_tables by netlink (linux/netfilter/nf_tables.h): transactions, dumps, and the few expressions that
//! gossamer's rules are made of.
//!
//! By hand, because no library does it without a C library or the `nft` program (the one that does is under
//! the GPL). Shapes only: what the tables hold is said in `dataplane::kernel::firewall`.

mod dump;
mod events;
mod rule;

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST},
    sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER},
};

use super::{
    RECEIVE_BUFFER,
    attributes::Attributes,
    open_socket,
    raw::{Answer, answers, append},
    receive, send_all,
};

pub use self::{
    events::{Changes, Traces},
    rule::{Base, Field, Rule, Side, limit},
};

/// `NFPROTO_INET`: tables for both families.
pub const INET: u8 = 1;
/// `NFPROTO_BRIDGE`: tables for what passes bridges.
pub const BRIDGE: u8 = 7;
/// `NFPROTO_NETDEV`: tables for what passes single interfaces.
pub const NETDEV: u8 = 5;
/// Every family, in a request.
pub const ANY: u8 = 0;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// As far as the system's limit allows.
const SEND_BUFFER: usize = 1 << 20;
/// Bytes of an interface's name.
pub const IFNAMSIZ: usize = 16;
/// `NFTA_SET_EXPR`: what each element of a set does when it is found (Linux 5.7; older ones pass over it).
pub const SET_EXPRESSION: u16 = 17;
const EINVAL: i32 = 22;
const EPROTONOSUPPORT: i32 = 93;
const EOPNOTSUPP: i32 = 95;

/// `NFT_MSG_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    NewTable = 0,
    GetTable = 1,
    DelTable = 2,
    NewChain = 3,
    GetChain = 4,
    NewRule = 6,
    GetRule = 7,
    NewSet = 9,
    NewElements = 12,
    GetElements = 13,
    DelElements = 14,
}

/// One step of a transaction.
#[derive(Clone, Debug)]
pub struct Step {
    pub kind: Kind,
    /// `NLM_F_*` beside request and acknowledgement.
    pub flags: u16,
    pub attributes: Attributes,
}

/// An object as the kernel lists it.
#[derive(Clone, Debug)]
pub struct Object {
    pub family: u8,
    pub attributes: Vec<u8>,
}

/// A socket in the network namespace of the thread that opened it.
pub struct Nftables {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Nftables {
    pub fn open() -> io::Result<Self> {
        let socket = open_socket(NETLINK_NETFILTER)?;
        socket2::SockRef::from(&socket).set_send_buffer_size(SEND_BUFFER)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// Carries out all steps on tables of both families, or none; the error is that of the first that failed.
    pub fn transaction(&mut self, steps: &[Step]) -> io::Result<()> {
        self.transaction_in(INET, steps)
    }

    /// The same on tables of a family.
    pub fn transaction_in(&mut self, family: u8, steps: &[Step]) -> io::Result<()> {
        self.transaction_of(steps.iter().map(|step| (family, step)))
    }

    /// The same on tables of several families: steps with the families of their tables.
    pub fn transaction_of<'a>(
        &mut self,
        steps: impl ExactSizeIterator<Item = (u8, &'a Step)>,
    ) -> io::Result<()> {
        let count = steps.len();
        let mut bytes = Vec::new();
        let subsystem = nfgenmsg(ANY, SUBSYSTEM);
        self.append(BATCH_BEGIN, NLM_F_REQUEST, subsystem, &Attributes::new(), &mut bytes);
        // What is wrong with the subsystem as a whole comes back under the number of the beginning.
        let begin = self.sequence;
        for (i, (family, step)) in steps.enumerate() {
            // Failures come back in any case; the last acknowledgement tells that all is done.
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

    /// By what the kernel tells changes of this socket from those of others.
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

/// `struct nfgenmsg`: family, version and, in network order, which subsystem a batch is for.
const fn nfgenmsg(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// Whether the error says that the kernel has no nftables.
pub fn is_missing(error: &io::Error) -> bool {
    // EINVAL is what a kernel says that cannot load the subsystem.
    matches!(error.raw_os_error(), Some(EINVAL | EPROTONOSUPPORT | EOPNOTSUPP))
}

/// The name of an interface as the kernel compares it.
pub fn name_bytes(name: &str) -> [u8; IFNAMSIZ] {
    let mut bytes = [0; IFNAMSIZ];
    bytes.iter_mut().zip(name.bytes()).for_each(|(place, byte)| *place = byte);
    bytes
}

/// An expression that counts packets and bytes.
pub fn counter() -> Attributes {
    let zero = 0_u64.to_be_bytes();
    Attributes::new().text(1, "counter").nest(2, &Attributes::new().put(1, &zero).put(2, &zero))
}

/// A base chain that accepts what no rule decides.
pub fn base_chain(table: &str, name: &str, kind: &str, hook: u32, priority: i32) -> Attributes {
    let hook = Attributes::new().be32(1, hook).be32(2, priority.cast_unsigned());
    Attributes::new()
        .text(1, table)
        .text(3, name)
        .nest(4, &hook)
        .be32(5, rule::ACCEPT)
        .text(7, kind)
}

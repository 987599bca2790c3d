//! nf_tables by netlink (linux/netfilter/nf_tables.h): transactions, dumps, and the few expressions that
//! gossamer's rules are made of.
//!
//! By hand, because no library does it without a C library or the `nft` program (the one that does is under
//! the GPL). Shapes only: what the tables hold is said in `dataplane::kernel::firewall`.

mod dump;
mod events;

use std::{io, net::IpAddr};

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST},
    sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER},
};

use super::{
    RECEIVE_BUFFER, attributes,
    attributes::Attributes,
    open_socket,
    raw::{Answer, answers, append},
    receive, send_all,
};

pub use self::events::{Changes, Traces};

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

/// Expressions of a rule, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule(Attributes);

/// Where in a packet something is read.
#[derive(Clone, Copy, Debug)]
pub enum Base {
    Link = 0,
    Network = 1,
    Transport = 2,
}

/// What is compared with, in a packet's address.
#[derive(Clone, Copy, Debug)]
pub enum Field {
    Source,
    Destination,
}

const REGISTER: u32 = 1;
/// The first of the registers of 32 bits (`NFT_REG32_00`); the first four are `REGISTER`.
const WORDS: u32 = 8;
const META_PROTOCOL: u32 = 1;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
/// `NFT_LOOKUP_F_INV`
const NOT_FOUND: u32 = 1;
const EQUAL: u32 = 0;
const UNEQUAL: u32 = 1;
const META_MARK: u32 = 3;
const META_IIF: u32 = 4;
const META_NFTRACE: u32 = 12;
const LIMIT_BURST: u32 = 5;
/// Of every network namespace's `lo`.
const LOOPBACK: u32 = 1;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const META_PKTTYPE: u32 = 19;
/// `PACKET_HOST` of linux/if_packet.h: to this host alone.
const PACKET_HOST: u8 = 0;
/// `NFT_REJECT_ICMPX_UNREACH`, `NFT_REJECT_ICMPX_HOST_UNREACH`
const BY_ICMP: u32 = 2;
const HOST_UNREACHABLE: u8 = 2;
const ACCEPT: u32 = 1;
const DROP: u32 = 0;
const RETURN: i32 = -5;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`
const RANDOM_FULLY: u32 = 1 << 4;

impl Rule {
    pub fn new() -> Self {
        Self::default()
    }

    /// Packets of the family of this address.
    pub fn family_of(self, address: IpAddr) -> Self {
        let number = if address.is_ipv4() { 2 } else { 10 };
        self.meta(META_NFPROTO).compare(EQUAL, &[number])
    }

    pub fn udp(self) -> Self {
        self.meta(META_L4PROTO).compare(EQUAL, &[17])
    }

    /// These bytes stand at this place.
    pub fn holds(self, base: Base, offset: u32, bytes: &[u8]) -> Self {
        self.load(base, offset, bytes.len() as u32).compare(EQUAL, bytes)
    }

    /// Others stand there; a packet that ends before does not match.
    pub fn lacks(self, base: Base, offset: u32, bytes: &[u8]) -> Self {
        self.load(base, offset, bytes.len() as u32).compare(UNEQUAL, bytes)
    }

    /// The address is in the network, or is not.
    pub fn address(self, field: Field, network: ipnet::IpNet, inside: bool) -> Self {
        let value = attributes::octets(network.network());
        let mask = attributes::octets(network.netmask());
        let loaded = self.load_address(field, network.addr());
        loaded.mask(&mask).compare(if inside { EQUAL } else { UNEQUAL }, &value)
    }

    /// The source address is in this set, which holds addresses of the family of `like`.
    pub fn source_inside(self, set: &str, like: IpAddr) -> Self {
        let lookup = Attributes::new().text(1, set).be32(2, REGISTER);
        self.load_address(Field::Source, like).expression("lookup", &lookup)
    }

    /// What stands at this place is in the set.
    pub fn inside(self, set: &str, (base, offset, length): (Base, u32, u32)) -> Self {
        let lookup = Attributes::new().text(1, set).be32(2, REGISTER);
        self.load(base, offset, length).expression("lookup", &lookup)
    }

    /// By its number in the Ethernet header (IANA, IEEE 802).
    pub fn ether_type(self, number: u16) -> Self {
        self.meta(META_PROTOCOL).compare(EQUAL, &number.to_be_bytes())
    }

    /// By the number of what follows the headers of IPv6.
    pub fn transport(self, number: u8) -> Self {
        self.meta(META_L4PROTO).compare(EQUAL, &[number])
    }

    /// What stands there under this mask is, or is not, this.
    pub fn masked(self, base: Base, offset: u32, mask: &[u8], value: &[u8], same: bool) -> Self {
        let loaded = self.load(base, offset, mask.len() as u32).mask(mask);
        loaded.compare(if same { EQUAL } else { UNEQUAL }, value)
    }

    /// The name of the input interface, with what stands at these places one after another, is in the set, or
    /// is not. Each takes a multiple of four bytes there.
    pub fn input_with(self, set: &str, places: &[(Base, u32, u32)], found: bool) -> Self {
        let name = Attributes::new().be32(1, REGISTER).be32(2, META_IIFNAME);
        let (mut rule, mut word) = (self.expression("meta", &name), IFNAMSIZ as u32 / 4);
        for &(base, offset, length) in places {
            let place = Attributes::new().be32(1, WORDS + word).be32(2, base as u32);
            rule = rule.expression("payload", &place.be32(3, offset).be32(4, length));
            word += length.div_ceil(4);
        }
        let lookup = Attributes::new().text(1, set).be32(2, REGISTER);
        let lookup = if found { lookup } else { lookup.be32(5, NOT_FOUND) };
        rule.expression("lookup", &lookup)
    }

    /// The destination is not in this set, which holds addresses of the family of `like`.
    pub fn destination_outside(self, set: &str, like: IpAddr) -> Self {
        let lookup = Attributes::new().text(1, set).be32(2, REGISTER).be32(5, NOT_FOUND);
        self.load_address(Field::Destination, like).expression("lookup", &lookup)
    }

    /// The network of the destination, with a prefix of this length, is not in this set.
    pub fn destination_network_outside(self, set: &str, length: u8, like: IpAddr) -> Self {
        let lookup = Attributes::new().text(1, set).be32(2, REGISTER).be32(5, NOT_FOUND);
        let mask = ipnet::IpNet::new_assert(like, length).netmask();
        let network = self.load_address(Field::Destination, like).mask(&attributes::octets(mask));
        network.expression("lookup", &lookup)
    }

    /// What comes in by the interface of this name.
    pub fn from_interface(self, name: &str) -> Self {
        self.meta(META_IIFNAME).compare(EQUAL, &name_bytes(name))
    }

    /// What goes out by the interface of this name.
    pub fn to_interface(self, name: &str) -> Self {
        self.meta(META_OIFNAME).compare(EQUAL, &name_bytes(name))
    }

    /// What comes in by interfaces whose names begin like this and have at least so many bytes.
    pub fn from_interfaces(self, prefix: &str, bytes: usize) -> Self {
        let mut last = [0; IFNAMSIZ];
        last[bytes - 1] = 0xff;
        let named = self.meta(META_IIFNAME).compare(EQUAL, prefix.as_bytes());
        named.meta(META_IIFNAME).mask(&last).compare(UNEQUAL, &[0; IFNAMSIZ])
    }

    /// Packets that the link brought to others as well: by broadcast or multicast.
    pub fn to_others(self) -> Self {
        self.meta(META_PKTTYPE).compare(UNEQUAL, &[PACKET_HOST])
    }

    /// Packets of this host to itself.
    pub fn from_loopback(self) -> Self {
        self.meta(META_IIF).compare(EQUAL, &LOOPBACK.to_ne_bytes())
    }

    /// Packets with this mark, which only those with privileges can give them.
    pub fn marked(self, mark: u32) -> Self {
        self.meta(META_MARK).compare(EQUAL, &mark.to_ne_bytes())
    }

    /// So many packets a second.
    pub fn limit(self, packets: u64) -> Self {
        let (rate, second) = (packets.to_be_bytes(), 1_u64.to_be_bytes());
        let limit = Attributes::new().put(1, &rate).put(2, &second).be32(3, LIMIT_BURST);
        self.expression("limit", &limit)
    }

    /// The kernel tells what all rules that follow do with the packet.
    pub fn trace(self) -> Self {
        let one = Attributes::new().put(1, &[1]);
        let loaded = Attributes::new().be32(1, REGISTER).nest(2, &one);
        let set = Attributes::new().be32(2, META_NFTRACE).be32(3, REGISTER);
        self.expression("immediate", &loaded).expression("meta", &set)
    }

    /// Takes the mark away.
    pub fn unmark(self) -> Self {
        let zero = Attributes::new().put(1, &0_u32.to_ne_bytes());
        let loaded = Attributes::new().be32(1, REGISTER).nest(2, &zero);
        let set = Attributes::new().be32(2, META_MARK).be32(3, REGISTER);
        self.expression("immediate", &loaded).expression("meta", &set)
    }

    pub fn count(self) -> Self {
        Self(self.0.nest(1, &counter()))
    }

    pub fn drop(self) -> Self {
        self.verdict(DROP)
    }

    /// Drops it, and tells the sender that the host is unreachable.
    pub fn refuse(self) -> Self {
        let how = Attributes::new().be32(1, BY_ICMP).put(2, &[HOST_UNREACHABLE]);
        self.expression("reject", &how)
    }

    pub fn accept(self) -> Self {
        self.verdict(ACCEPT)
    }

    pub fn leave_chain(self) -> Self {
        self.verdict(RETURN.cast_unsigned())
    }

    /// To the address of the interface by which the packet leaves, with a random port.
    pub fn masquerade(self) -> Self {
        self.expression("masq", &Attributes::new().be32(1, RANDOM_FULLY))
    }

    pub const fn expressions(&self) -> &Attributes {
        &self.0
    }

    fn meta(self, key: u32) -> Self {
        self.expression("meta", &Attributes::new().be32(1, REGISTER).be32(2, key))
    }

    fn load(self, base: Base, offset: u32, length: u32) -> Self {
        let place = Attributes::new().be32(1, REGISTER).be32(2, base as u32);
        self.expression("payload", &place.be32(3, offset).be32(4, length))
    }

    fn load_address(self, field: Field, like: IpAddr) -> Self {
        let (offset, length) = match (like, field) {
            (IpAddr::V4(_), Field::Source) => (12, 4),
            (IpAddr::V4(_), Field::Destination) => (16, 4),
            (IpAddr::V6(_), Field::Source) => (8, 16),
            (IpAddr::V6(_), Field::Destination) => (24, 16),
        };
        self.load(Base::Network, offset, length)
    }

    fn mask(self, mask: &[u8]) -> Self {
        let value = |bytes: &[u8]| Attributes::new().put(1, bytes);
        let registers = Attributes::new().be32(1, REGISTER).be32(2, REGISTER);
        let length = registers.be32(3, mask.len() as u32);
        let zero = vec![0; mask.len()];
        self.expression("bitwise", &length.nest(4, &value(mask)).nest(5, &value(&zero)))
    }

    fn compare(self, operator: u32, value: &[u8]) -> Self {
        let value = Attributes::new().put(1, value);
        self.expression(
            "cmp",
            &Attributes::new().be32(1, REGISTER).be32(2, operator).nest(3, &value),
        )
    }

    fn verdict(self, code: u32) -> Self {
        let verdict = Attributes::new().nest(2, &Attributes::new().be32(1, code));
        self.expression("immediate", &Attributes::new().be32(1, 0).nest(2, &verdict))
    }

    fn expression(self, name: &str, data: &Attributes) -> Self {
        Self(self.0.nest(1, &Attributes::new().text(1, name).nest(2, data)))
    }
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
    Attributes::new().text(1, table).text(3, name).nest(4, &hook).be32(5, ACCEPT).text(7, kind)
}

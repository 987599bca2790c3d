//! What rules are made of: expressions that compare, look up, change and decide.

use std::net::IpAddr;

use super::{IFNAMSIZ, counter, name_bytes};
use crate::netlink::attributes::{self, Attributes};

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

/// Interfaces between which a packet is; their names as `NFT_META_IIFNAME` and `NFT_META_OIFNAME`.
#[derive(Clone, Copy, Debug)]
pub enum Side {
    Input = 6,
    Output = 7,
}

const REGISTER: u32 = 1;
/// The first of the registers of 32 bits (`NFT_REG32_00`); the first four are `REGISTER`.
const WORDS: u32 = 8;
const META_PROTOCOL: u32 = 1;
const META_IIFNAME: u32 = Side::Input as u32;
const META_OIFNAME: u32 = Side::Output as u32;
/// `NFT_LOOKUP_F_INV`
const NOT_FOUND: u32 = 1;
const EQUAL: u32 = 0;
const UNEQUAL: u32 = 1;
const META_PRIORITY: u32 = 2;
const META_MARK: u32 = 3;
const META_IIF: u32 = 4;
const META_SKUID: u32 = 10;
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
pub(super) const ACCEPT: u32 = 1;
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
        self.named_with(set, &[Side::Input], places, found)
    }

    /// The same with the names of the interfaces on these sides, one after another.
    pub fn named_with(
        mut self,
        set: &str,
        sides: &[Side],
        places: &[(Base, u32, u32)],
        found: bool,
    ) -> Self {
        let mut word = 0;
        for side in sides {
            let name = Attributes::new().be32(1, WORDS + word).be32(2, *side as u32);
            self = self.expression("meta", &name);
            word += IFNAMSIZ as u32 / 4;
        }
        for &(base, offset, length) in places {
            let place = Attributes::new().be32(1, WORDS + word).be32(2, base as u32);
            self = self.expression("payload", &place.be32(3, offset).be32(4, length));
            word += length.div_ceil(4);
        }
        let lookup = Attributes::new().text(1, set).be32(2, REGISTER);
        let lookup = if found { lookup } else { lookup.be32(5, NOT_FOUND) };
        self.expression("lookup", &lookup)
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
        Self(self.0.nest(1, &limit(packets, LIMIT_BURST)))
    }

    /// Matches what a socket of this network namespace sends that a user other than root has opened.
    pub fn of_user(self) -> Self {
        self.meta(META_SKUID).compare(UNEQUAL, &0_u32.to_ne_bytes())
    }

    /// Whose priority is this under the mask.
    pub fn prioritized(self, mask: u32, value: u32) -> Self {
        let masked = self.meta(META_PRIORITY).mask(&mask.to_ne_bytes());
        masked.compare(EQUAL, &value.to_ne_bytes())
    }

    /// Sets these bits of the priority, or clears them.
    pub fn prioritize(self, bits: u32, on: bool) -> Self {
        let set = if on { bits } else { 0 };
        let changed = self.meta(META_PRIORITY).bitwise(&(!bits).to_ne_bytes(), &set.to_ne_bytes());
        changed.expression("meta", &Attributes::new().be32(2, META_PRIORITY).be32(3, REGISTER))
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
        self.bitwise(mask, &vec![0; mask.len()])
    }

    /// Keeps the bits of the mask, and flips those of the other.
    fn bitwise(self, mask: &[u8], flip: &[u8]) -> Self {
        let value = |bytes: &[u8]| Attributes::new().put(1, bytes);
        let registers = Attributes::new().be32(1, REGISTER).be32(2, REGISTER);
        let length = registers.be32(3, mask.len() as u32);
        self.expression("bitwise", &length.nest(4, &value(mask)).nest(5, &value(flip)))
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

/// An expression that lets so many packets a second pass, and so many at once.
pub fn limit(packets: u64, burst: u32) -> Attributes {
    let (rate, second) = (packets.to_be_bytes(), 1_u64.to_be_bytes());
    let data = Attributes::new().put(1, &rate).put(2, &second).be32(3, burst);
    Attributes::new().text(1, "limit").nest(2, &data)
}

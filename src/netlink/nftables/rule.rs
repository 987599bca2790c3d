//! Builds rules from expressions.

use std::net::IpAddr;

use super::{IFNAMSIZ, counter, name_bytes, nfta};
use crate::netlink::attributes::{self, Attributes};

/// The expressions of a rule, in order. Matching methods limit the rule to some packets; all must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule(Attributes);

/// The header to which an offset in a packet is relative (`NFT_PAYLOAD_*_HEADER`).
#[derive(Clone, Copy, Debug)]
pub enum Base {
    /// The link-layer header.
    Link = 0,
    /// The IP header.
    Network = 1,
    /// The transport header.
    Transport = 2,
}

/// An address field of a packet.
#[derive(Clone, Copy, Debug)]
pub enum Field {
    /// The source address.
    Source,
    /// The destination address.
    Destination,
}

/// The side of an interface, as the key of its name (`NFT_META_IIFNAME`, `NFT_META_OIFNAME`).
#[derive(Clone, Copy, Debug)]
pub enum Side {
    /// The interface through which the packet came in.
    Input = 6,
    /// The interface through which the packet leaves.
    Output = 7,
}

/// `NFT_REG_1` (16 bytes).
const REGISTER: u32 = 1;
/// `NFT_REG32_00`, the first of the 32-bit registers. The first four of them overlap [`REGISTER`].
const WORDS: u32 = 8;
/// `NFT_META_PROTOCOL`.
const META_PROTOCOL: u32 = 1;
const META_IIFNAME: u32 = Side::Input as u32;
const META_OIFNAME: u32 = Side::Output as u32;
/// `NFT_LOOKUP_F_INV`.
const NOT_FOUND: u32 = 1;
/// `NFT_CMP_EQ`.
const EQUAL: u32 = 0;
/// `NFT_CMP_NEQ`.
const UNEQUAL: u32 = 1;
/// `NFT_META_PRIORITY`.
const META_PRIORITY: u32 = 2;
/// `NFT_META_MARK`.
const META_MARK: u32 = 3;
/// `NFT_META_IIF`.
const META_IIF: u32 = 4;
/// `NFT_META_SKUID`.
const META_SKUID: u32 = 10;
/// `NFT_META_NFTRACE`.
const META_NFTRACE: u32 = 12;
/// `NFT_REG_VERDICT`.
const VERDICT_REGISTER: u32 = 0;
/// Burst of [`Rule::limit`], in packets.
const LIMIT_BURST: u32 = 5;
/// Index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;
/// `NFT_META_NFPROTO`.
const META_NFPROTO: u32 = 15;
/// `NFT_META_L4PROTO`.
const META_L4PROTO: u32 = 16;
/// `NFT_META_PKTTYPE`.
const META_PKTTYPE: u32 = 19;
/// `PACKET_HOST` (`linux/if_packet.h)`: sent to this host only.
const PACKET_HOST: u8 = 0;
/// `NFT_REJECT_ICMPX_UNREACH`.
const BY_ICMP: u32 = 2;
/// `NFT_REJECT_ICMPX_HOST_UNREACH`.
const HOST_UNREACHABLE: u8 = 2;
/// `NF_ACCEPT`.
pub(super) const ACCEPT: u32 = 1;
/// `NF_DROP`.
const DROP: u32 = 0;
/// `NFT_RETURN`.
const RETURN: i32 = -5;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
const RANDOM_FULLY: u32 = 1 << 4;

impl Rule {
    /// Returns a rule without expressions, which matches every packet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Matches packets of the family of this address.
    pub fn family_of(self, address: IpAddr) -> Self {
        let number = if address.is_ipv4() { 2 } else { 10 };
        self.meta(META_NFPROTO).compare(EQUAL, &[number])
    }

    /// Matches UDP packets.
    pub fn udp(self) -> Self {
        self.meta(META_L4PROTO).compare(EQUAL, &[17])
    }

    /// Matches packets with these bytes at this offset.
    pub fn holds(self, base: Base, offset: u32, bytes: &[u8]) -> Self {
        self.load(base, offset, bytes.len() as u32).compare(EQUAL, bytes)
    }

    /// Matches packets with other bytes at this offset. A packet that is too short does not match.
    pub fn lacks(self, base: Base, offset: u32, bytes: &[u8]) -> Self {
        self.load(base, offset, bytes.len() as u32).compare(UNEQUAL, bytes)
    }

    /// Matches packets whose address is in the network, or is not.
    pub fn address(self, field: Field, network: ipnet::IpNet, inside: bool) -> Self {
        let value = attributes::octets(network.network());
        let mask = attributes::octets(network.netmask());
        let loaded = self.load_address(field, network.addr());
        loaded.mask(&mask).compare(if inside { EQUAL } else { UNEQUAL }, &value)
    }

    /// Matches packets whose source address is in a set of addresses of the family of `like`.
    pub fn source_inside(self, set: &str, like: IpAddr) -> Self {
        let lookup = lookup(set);
        self.load_address(Field::Source, like).expression("lookup", &lookup)
    }

    /// Matches packets whose bytes at this place are in the set. A place has base, offset and length in
    /// bytes.
    pub fn inside(self, set: &str, (base, offset, length): (Base, u32, u32)) -> Self {
        let lookup = lookup(set);
        self.load(base, offset, length).expression("lookup", &lookup)
    }

    /// Matches packets with this EtherType (IEEE 802).
    pub fn ether_type(self, number: u16) -> Self {
        self.meta(META_PROTOCOL).compare(EQUAL, &number.to_be_bytes())
    }

    /// Matches packets with this transport protocol, after any extension headers of IPv6.
    pub fn transport(self, number: u8) -> Self {
        self.meta(META_L4PROTO).compare(EQUAL, &[number])
    }

    /// Matches packets whose bytes at this offset, under the mask, equal the value, or differ from it.
    pub fn masked(self, base: Base, offset: u32, mask: &[u8], value: &[u8], same: bool) -> Self {
        let loaded = self.load(base, offset, mask.len() as u32).mask(mask);
        loaded.compare(if same { EQUAL } else { UNEQUAL }, value)
    }

    /// Matches packets for which the name of the input interface, concatenated with the bytes at these
    /// places, is in the set, or is not. Each part is padded to a multiple of four bytes.
    pub fn input_with(self, set: &str, places: &[(Base, u32, u32)], found: bool) -> Self {
        self.named_with(set, &[Side::Input], places, found)
    }

    /// Like [`Self::input_with`], with the names of the interfaces on several sides.
    pub fn named_with(
        mut self,
        set: &str,
        sides: &[Side],
        places: &[(Base, u32, u32)],
        found: bool,
    ) -> Self {
        let mut word = 0;
        for side in sides {
            let name = Attributes::new()
                .be32(nfta::META_DREG, WORDS + word)
                .be32(nfta::META_KEY, *side as u32);
            self = self.expression("meta", &name);
            word += IFNAMSIZ as u32 / 4;
        }
        for &(base, offset, length) in places {
            self = self.expression("payload", &payload(WORDS + word, base, offset, length));
            word += length.div_ceil(4);
        }
        let lookup = lookup(set);
        let lookup = if found { lookup } else { lookup.be32(nfta::LOOKUP_FLAGS, NOT_FOUND) };
        self.expression("lookup", &lookup)
    }

    /// Matches packets whose destination is not in a set of addresses of the family of `like`.
    pub fn destination_outside(self, set: &str, like: IpAddr) -> Self {
        let lookup = lookup(set).be32(nfta::LOOKUP_FLAGS, NOT_FOUND);
        self.load_address(Field::Destination, like).expression("lookup", &lookup)
    }

    /// Matches packets for which the destination's network, of this prefix length, is not in the set.
    pub fn destination_network_outside(self, set: &str, length: u8, like: IpAddr) -> Self {
        let lookup = lookup(set).be32(nfta::LOOKUP_FLAGS, NOT_FOUND);
        let mask = ipnet::IpNet::new_assert(like, length).netmask();
        let network = self.load_address(Field::Destination, like).mask(&attributes::octets(mask));
        network.expression("lookup", &lookup)
    }

    /// Matches packets that come in through this interface.
    pub fn from_interface(self, name: &str) -> Self {
        self.meta(META_IIFNAME).compare(EQUAL, &name_bytes(name))
    }

    /// Matches packets that leave through this interface.
    pub fn to_interface(self, name: &str) -> Self {
        self.meta(META_OIFNAME).compare(EQUAL, &name_bytes(name))
    }

    /// Matches packets that come in through an interface whose name starts with the prefix and has at least
    /// this many bytes.
    pub fn from_interfaces(self, prefix: &str, bytes: usize) -> Self {
        let mut last = [0; IFNAMSIZ];
        last[bytes - 1] = 0xff;
        let named = self.meta(META_IIFNAME).compare(EQUAL, prefix.as_bytes());
        named.meta(META_IIFNAME).mask(&last).compare(UNEQUAL, &[0; IFNAMSIZ])
    }

    /// Matches packets that the link delivers to other hosts, too: broadcast and multicast.
    pub fn to_others(self) -> Self {
        self.meta(META_PKTTYPE).compare(UNEQUAL, &[PACKET_HOST])
    }

    /// Matches packets that come in through `lo`: those of this host to itself.
    pub fn from_loopback(self) -> Self {
        self.meta(META_IIF).compare(EQUAL, &LOOPBACK.to_ne_bytes())
    }

    /// Matches packets with this mark. Only privileged processes can set a mark.
    pub fn marked(self, mark: u32) -> Self {
        self.meta(META_MARK).compare(EQUAL, &mark.to_ne_bytes())
    }

    /// Matches this many packets per second.
    pub fn limit(self, packets: u64) -> Self {
        Self(self.0.nest(nfta::LIST_ELEM, &limit(packets, LIMIT_BURST)))
    }

    /// Matches packets of this network namespace's sockets that a user other than root has opened.
    pub fn of_user(self) -> Self {
        self.meta(META_SKUID).compare(UNEQUAL, &0_u32.to_ne_bytes())
    }

    /// Matches packets whose priority, under a mask, has this value.
    pub fn prioritized(self, mask: u32, value: u32) -> Self {
        let masked = self.meta(META_PRIORITY).mask(&mask.to_ne_bytes());
        masked.compare(EQUAL, &value.to_ne_bytes())
    }

    /// Sets or clears these bits of the packet's priority.
    pub fn prioritize(self, bits: u32, on: bool) -> Self {
        let set = if on { bits } else { 0 };
        let changed = self.meta(META_PRIORITY).bitwise(&(!bits).to_ne_bytes(), &set.to_ne_bytes());
        changed.expression("meta", &set_meta(META_PRIORITY))
    }

    /// Turns on tracing for the packet: the kernel reports what all following rules do with it.
    pub fn trace(self) -> Self {
        self.expression("immediate", &immediate(&[1])).expression("meta", &set_meta(META_NFTRACE))
    }

    /// Clears the packet's mark.
    pub fn unmark(self) -> Self {
        let zero = immediate(&0_u32.to_ne_bytes());
        self.expression("immediate", &zero).expression("meta", &set_meta(META_MARK))
    }

    /// Counts packets and bytes.
    pub fn count(self) -> Self {
        Self(self.0.nest(nfta::LIST_ELEM, &counter()))
    }

    /// Drops the packet.
    pub fn drop(self) -> Self {
        self.verdict(DROP)
    }

    /// Drops the packet and sends an ICMP "host unreachable" to its source.
    pub fn refuse(self) -> Self {
        let how = Attributes::new()
            .be32(nfta::REJECT_TYPE, BY_ICMP)
            .put(nfta::REJECT_ICMP_CODE, &[HOST_UNREACHABLE]);
        self.expression("reject", &how)
    }

    /// Accepts the packet in this base chain.
    pub fn accept(self) -> Self {
        self.verdict(ACCEPT)
    }

    /// Ends the processing of the packet in this chain.
    pub fn leave_chain(self) -> Self {
        self.verdict(RETURN.cast_unsigned())
    }

    /// Replaces the source address by that of the output interface, with a random port.
    pub fn masquerade(self) -> Self {
        self.expression("masq", &Attributes::new().be32(nfta::MASQ_FLAGS, RANDOM_FULLY))
    }

    /// Returns the encoded expressions.
    pub const fn expressions(&self) -> &Attributes {
        &self.0
    }

    /// Loads a property of the packet into [`REGISTER`].
    fn meta(self, key: u32) -> Self {
        self.expression(
            "meta",
            &Attributes::new().be32(nfta::META_DREG, REGISTER).be32(nfta::META_KEY, key),
        )
    }

    /// Loads bytes of the packet into [`REGISTER`].
    fn load(self, base: Base, offset: u32, length: u32) -> Self {
        self.expression("payload", &payload(REGISTER, base, offset, length))
    }

    /// Loads an address of the packet, of the family of `like`, into [`REGISTER`].
    fn load_address(self, field: Field, like: IpAddr) -> Self {
        let (offset, length) = match (like, field) {
            (IpAddr::V4(_), Field::Source) => (12, 4),
            (IpAddr::V4(_), Field::Destination) => (16, 4),
            (IpAddr::V6(_), Field::Source) => (8, 16),
            (IpAddr::V6(_), Field::Destination) => (24, 16),
        };
        self.load(Base::Network, offset, length)
    }

    /// Clears the bits that are not in the mask.
    fn mask(self, mask: &[u8]) -> Self {
        self.bitwise(mask, &vec![0; mask.len()])
    }

    /// Clears the bits that are not in the mask, then flips the bits in `flip`.
    fn bitwise(self, mask: &[u8], flip: &[u8]) -> Self {
        let registers = Attributes::new()
            .be32(nfta::BITWISE_SREG, REGISTER)
            .be32(nfta::BITWISE_DREG, REGISTER)
            .be32(nfta::BITWISE_LEN, mask.len() as u32);
        let masks =
            registers.nest(nfta::BITWISE_MASK, &data(mask)).nest(nfta::BITWISE_XOR, &data(flip));
        self.expression("bitwise", &masks)
    }

    /// Compares [`REGISTER`] with a value.
    fn compare(self, operator: u32, value: &[u8]) -> Self {
        let operands =
            Attributes::new().be32(nfta::CMP_SREG, REGISTER).be32(nfta::CMP_OP, operator);
        self.expression("cmp", &operands.nest(nfta::CMP_DATA, &data(value)))
    }

    /// Ends the rule with a verdict.
    fn verdict(self, code: u32) -> Self {
        let code = Attributes::new().be32(nfta::VERDICT_CODE, code);
        let verdict = Attributes::new().nest(nfta::DATA_VERDICT, &code);
        let loaded = Attributes::new().be32(nfta::IMMEDIATE_DREG, VERDICT_REGISTER);
        self.expression("immediate", &loaded.nest(nfta::IMMEDIATE_DATA, &verdict))
    }

    /// Appends an expression.
    fn expression(self, name: &str, data: &Attributes) -> Self {
        let expression = Attributes::new().text(nfta::EXPR_NAME, name).nest(nfta::EXPR_DATA, data);
        Self(self.0.nest(nfta::LIST_ELEM, &expression))
    }
}

/// Returns an expression that matches at most this many packets per second, and this many at once.
pub fn limit(packets: u64, burst: u32) -> Attributes {
    let (rate, second) = (packets.to_be_bytes(), 1_u64.to_be_bytes());
    let rates = Attributes::new().put(nfta::LIMIT_RATE, &rate).put(nfta::LIMIT_UNIT, &second);
    let limit = rates.be32(nfta::LIMIT_BURST, burst);
    Attributes::new().text(nfta::EXPR_NAME, "limit").nest(nfta::EXPR_DATA, &limit)
}

/// Returns bytes as the value of an expression.
fn data(bytes: &[u8]) -> Attributes {
    Attributes::new().put(nfta::DATA_VALUE, bytes)
}

/// Returns the data of an expression that loads these bytes into [`REGISTER`].
fn immediate(bytes: &[u8]) -> Attributes {
    let loaded = Attributes::new().be32(nfta::IMMEDIATE_DREG, REGISTER);
    loaded.nest(nfta::IMMEDIATE_DATA, &data(bytes))
}

/// Returns the data of an expression that looks up [`REGISTER`] in a set.
fn lookup(set: &str) -> Attributes {
    Attributes::new().text(nfta::LOOKUP_SET, set).be32(nfta::LOOKUP_SREG, REGISTER)
}

/// Returns the data of an expression that loads bytes of the packet into a register.
fn payload(register: u32, base: Base, offset: u32, length: u32) -> Attributes {
    Attributes::new()
        .be32(nfta::PAYLOAD_DREG, register)
        .be32(nfta::PAYLOAD_BASE, base as u32)
        .be32(nfta::PAYLOAD_OFFSET, offset)
        .be32(nfta::PAYLOAD_LEN, length)
}

/// Returns the data of an expression that sets a property of the packet to [`REGISTER`].
fn set_meta(key: u32) -> Attributes {
    Attributes::new().be32(nfta::META_KEY, key).be32(nfta::META_SREG, REGISTER)
}

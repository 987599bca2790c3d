//! Classic BPF programs (linux/filter.h) for the sockets of trials.
//!
//! Packets of other programs must not fill the buffer of such a socket: the trial's own packets would be
//! dropped there and count as lost.

use std::{io, net::IpAddr, os::fd::AsFd};

use ipnet::IpNet;
use nix::libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_H, BPF_IMM, BPF_IND, BPF_JA, BPF_JEQ, BPF_JMP, BPF_K,
    BPF_LD, BPF_LDX, BPF_MSH, BPF_RET, BPF_W,
};
use socket2::{SockFilter, SockRef};

use crate::{dataplane::forwarding::Field, netlink::attributes::octets};

/// `SKF_NET_OFF` of linux/filter.h: offsets from here count from the IP header.
const IP_HEADER: u32 = 0xfff0_0000;
/// Offset of the source address in the IPv4 header.
const SOURCE4: u32 = 12;
/// Offset of the source address in the IPv6 header.
const SOURCE6: u32 = 8;

/// The part of a packet that the kernel passes to the filter of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterInput {
    /// The packet from the UDP or TCP header on.
    Segment,
    /// The same, preceded by the IPv4 header.
    Ipv4Packet,
}

impl FilterInput {
    /// Returns what the filter of a raw socket bound to this address receives.
    pub const fn raw(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4Packet,
            IpAddr::V6(_) => Self::Segment,
        }
    }
}

/// Sources that may send: hosts of a network whose addresses end like one of these, and all hosts outside the
/// network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    network: IpNet,
    /// The bits of the last 32 bits of an address that belong to the host.
    host_mask: u32,
    /// Host parts of the admitted addresses.
    ends: Vec<u32>,
}

impl Sources {
    /// Admits the host parts of addresses in one subnet, in every subnet of the network.
    pub fn new(network: IpNet, subnet: IpNet, hosts: impl IntoIterator<Item = IpAddr>) -> Self {
        let host_len = subnet.max_prefix_len() - subnet.prefix_len();
        let host_mask = 1_u32.checked_shl(host_len.into()).map_or(u32::MAX, |above| above - 1);
        let end = |host: IpAddr| words(host).last().copied().unwrap_or_default() & host_mask;
        Self { network, host_mask, ends: hosts.into_iter().map(end).collect() }
    }

    /// Whether the network is IPv4.
    pub const fn is_ipv4(&self) -> bool {
        matches!(self.network, IpNet::V4(_))
    }
}

/// A condition on a packet.
#[derive(Clone, Copy, Debug)]
pub enum Condition<'a> {
    /// A field of the UDP or TCP header, or of the payload, has a value.
    Field(Field),
    /// The packet has one of these sources.
    From(&'a Sources),
}

/// Lets the socket receive only packets in which one of these fields has its value; with no fields, none.
/// Offsets count from the UDP or TCP header.
///
/// # Errors
/// Fails when the kernel refuses the filter.
pub fn receive_only(socket: &impl AsFd, input: FilterInput, fields: &[Field]) -> io::Result<()> {
    let alternatives: Vec<[Condition<'_>; 1]> =
        fields.iter().map(|field| [Condition::Field(*field)]).collect();
    receive_only_where(
        socket,
        input,
        &alternatives.iter().map(<[_; 1]>::as_slice).collect::<Vec<_>>(),
    )
}

/// Lets the socket receive only packets that meet all conditions of at least one list.
///
/// # Errors
/// Fails when the kernel refuses the filter.
pub fn receive_only_where(
    socket: &impl AsFd,
    input: FilterInput,
    alternatives: &[&[Condition<'_>]],
) -> io::Result<()> {
    SockRef::from(socket).attach_filter(&program(input, alternatives))
}

/// Returns the program. It keeps the offset of the UDP or TCP header in the register X.
fn program(input: FilterInput, alternatives: &[&[Condition<'_>]]) -> Vec<SockFilter> {
    let mut program = vec![match input {
        FilterInput::Segment => step(BPF_LDX | BPF_IMM, 0),
        FilterInput::Ipv4Packet => step(BPF_LDX | BPF_B | BPF_MSH, 0),
    }];
    for conditions in alternatives {
        let mut steps: Vec<Step> =
            conditions.iter().flat_map(|condition| condition.steps()).collect();
        steps.push(Step::Do(step(BPF_RET | BPF_K, u32::MAX)));
        let length = steps.len();
        program.extend(steps.into_iter().enumerate().map(|(at, next)| match next {
            Step::Do(step) => step,
            Step::Fail => step(BPF_JMP | BPF_JA, (length - at - 1) as u32),
        }));
    }
    program.push(step(BPF_RET | BPF_K, 0));
    program
}

/// An instruction, or a jump whose target is not known yet.
enum Step {
    /// An instruction.
    Do(SockFilter),
    /// Continue with the next list of conditions.
    Fail,
}

impl Condition<'_> {
    /// Returns the steps that check the condition. Execution continues behind them if it is met.
    fn steps(self) -> Vec<Step> {
        match self {
            Self::Field(field) => {
                let (size, at, value) = match field {
                    Field::Half(at, value) => (BPF_H, at, value.into()),
                    Field::Word(at, value) => (BPF_W, at, value),
                };
                let load = step(BPF_LD | size | BPF_IND, at);
                vec![Step::Do(load), Step::Do(when(value, 1, 0)), Step::Fail]
            }
            Self::From(sources) => sources.steps(),
        }
    }
}

impl Sources {
    /// Returns the steps that check the source address.
    fn steps(&self) -> Vec<Step> {
        let first = IP_HEADER + if self.network.addr().is_ipv4() { SOURCE4 } else { SOURCE6 };
        let masks = words(self.network.netmask());
        let mut steps = Vec::new();
        // Built from the end, where the lengths of the jumps are known.
        steps.push(Step::Fail);
        for end in self.ends.iter().rev() {
            steps.push(Step::Do(when(*end, steps.len() as u8, 0)));
        }
        let load = |at: usize, mask: u32| {
            let load = step(BPF_LD | BPF_W | BPF_ABS, first + 4 * at as u32);
            [step(BPF_ALU | BPF_AND | BPF_K, mask), load].map(Step::Do)
        };
        steps.extend(load(masks.len() - 1, self.host_mask));
        let parts = words(self.network.addr()).into_iter().zip(&masks).enumerate();
        for (at, (value, mask)) in parts.rev().filter(|(_, (_, mask))| **mask != 0) {
            let to_end = steps.len() as u8;
            steps.push(Step::Do(when(value & mask, 0, to_end)));
            steps.extend(load(at, *mask));
        }
        steps.reverse();
        steps
    }
}

/// Returns an instruction without a jump.
pub fn step(code: u32, operand: u32) -> SockFilter {
    SockFilter::new(code as u16, 0, 0, operand)
}

/// Returns an instruction that skips `then` instructions if the loaded value equals `value`, and `otherwise`
/// instructions if not.
pub fn when(value: u32, then: u8, otherwise: u8) -> SockFilter {
    SockFilter::new((BPF_JMP | BPF_JEQ | BPF_K) as u16, then, otherwise, value)
}

/// Returns an address as 32-bit words.
fn words(ip: IpAddr) -> Vec<u32> {
    octets(ip)
        .chunks_exact(4)
        .map(|word| word.iter().fold(0, |all, byte| all << 8 | u32::from(*byte)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::unix::net::UnixDatagram};

    use super::*;

    /// The kernel applies filters to sockets of any kind.
    #[test]
    fn receive_only_admits_packets_with_one_of_the_fields() {
        let ip_header = [&[0x46][..], &[7; 23]].concat();
        for (input, header) in
            [(FilterInput::Segment, &[][..]), (FilterInput::Ipv4Packet, &ip_header)]
        {
            let passes = |fields: &[Field], segment: &[u8]| {
                let (to, from) = UnixDatagram::pair().expect("sockets");
                from.set_nonblocking(true).expect("a socket");
                receive_only(&from, input, fields).expect("a filter");
                to.send(&[header, segment].concat()).is_ok() && from.recv(&mut [0; 64]).is_ok()
            };
            let fields = [Field::Half(2, 0x0304), Field::Word(4, 0x0506_0708)];
            assert!(passes(&fields, &[9, 9, 3, 4, 9, 9, 9, 9]), "{input:?}");
            assert!(passes(&fields, &[9, 9, 9, 9, 5, 6, 7, 8]), "{input:?}");
            assert!(!passes(&fields, &[3, 4, 9, 9, 9, 6, 7, 8]), "{input:?}");
            assert!(!passes(&fields, &[9, 9, 9, 9, 5, 6, 7]), "{input:?}");
            assert!(!passes(&[], &[9, 9, 3, 4, 5, 6, 7, 8]), "{input:?}");
        }
    }

    /// Returns whether a UDP socket with this filter receives a datagram from this address.
    fn receives(from: &str, alternatives: &[&[Condition<'_>]]) -> bool {
        let from: IpAddr = from.parse().expect("an address");
        let sender = UdpSocket::bind((from, 0)).expect("a socket");
        let to = if from.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
        let socket = UdpSocket::bind(to).expect("a socket");
        receive_only_where(&socket, FilterInput::Segment, alternatives).expect("a filter");
        let payload = [1, 2, 3, 4];
        sender.send_to(&payload, socket.local_addr().expect("an address")).expect("sent");
        socket.set_nonblocking(true).expect("a socket");
        socket.recv(&mut [0; 8]).is_ok()
    }

    #[test]
    fn sources_inside_the_network_are_admitted_by_their_host_part() {
        let net = |text: &str| -> IpNet { text.parse().expect("a network") };
        let sources = |network: &str, ends: &[&str]| {
            let hosts = ends.iter().map(|host| host.parse::<IpAddr>().expect("an address"));
            Sources::new(net(network), net("127.42.7.0/24"), hosts)
        };
        let first_and_last = sources("127.42.0.0/16", &["127.42.7.1", "127.42.7.254"]);
        let payload = Condition::Field(Field::Word(8, 0x0102_0304));
        for (from, passes) in [
            ("127.42.9.1", true),
            ("127.42.9.254", true),
            ("127.42.9.2", false),
            ("127.43.9.2", true),
        ] {
            let from_them = Condition::From(&first_and_last);
            assert_eq!(receives(from, &[&[from_them, payload]]), passes, "{from}");
            let other = Condition::Field(Field::Word(8, 5));
            assert!(!receives(from, &[&[from_them, other]]), "{from}");
            assert!(receives(from, &[&[from_them, other], &[payload]]), "{from}");
        }
        let v6 = |network: &str, host: &str| {
            let hosts = [host.parse().expect("an address")];
            Sources::new(net(network), net("fd42:0:0:7::/64"), hosts)
        };
        for (network, host, passes) in
            [("::/48", "::1", true), ("::/48", "::2", false), ("fd42::/48", "fd42::2", true)]
        {
            let sources = v6(network, host);
            assert_eq!(
                receives("::1", &[&[Condition::From(&sources)]]),
                passes,
                "{network} {host}"
            );
        }
    }
}

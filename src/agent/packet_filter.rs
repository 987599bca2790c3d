//! Classic programs for the kernel's packet filter (linux/filter.h) at sockets of trials.
//!
//! What others send to such a socket must not fill its buffer, or the trial's own packets are dropped there
//! and pass for lost.

use std::{io, net::IpAddr, os::fd::AsFd};

use nix::libc::{
    BPF_B, BPF_H, BPF_IMM, BPF_IND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET,
    BPF_W,
};
use socket2::{SockFilter, SockRef};

use crate::dataplane::forwarding::Field;

/// What the filter of a socket is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A packet from the header of UDP or TCP on.
    Segment,
    /// The same with the header of IPv4 before it.
    Ipv4Packet,
}

impl Shown {
    /// To a raw socket that has this address.
    pub const fn raw(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4Packet,
            IpAddr::V6(_) => Self::Segment,
        }
    }
}

/// Lets the socket receive only packets in which one of these fields of the header of UDP or TCP, or of what
/// follows it, has its value; nothing if there is no field.
pub fn only(socket: &impl AsFd, shown: Shown, fields: &[Field]) -> io::Result<()> {
    SockRef::from(socket).attach_filter(&program(shown, fields))
}

/// X is where the header of UDP or TCP begins.
fn program(shown: Shown, fields: &[Field]) -> Vec<SockFilter> {
    let step = |code: u32, operand| SockFilter::new(code as u16, 0, 0, operand);
    let mut program = vec![match shown {
        Shown::Segment => step(BPF_LDX | BPF_IMM, 0),
        Shown::Ipv4Packet => step(BPF_LDX | BPF_B | BPF_MSH, 0),
    }];
    for (number, field) in fields.iter().enumerate() {
        let (size, at, value) = match *field {
            Field::Half(at, value) => (BPF_H, at, value.into()),
            Field::Word(at, value) => (BPF_W, at, value),
        };
        program.push(step(BPF_LD | size | BPF_IND, at));
        // Over the other fields, and over the refusal.
        let to_end = (fields.len() - number - 1) * 2 + 1;
        program.push(SockFilter::new((BPF_JMP | BPF_JEQ | BPF_K) as u16, to_end as u8, 0, value));
    }
    program.extend([step(BPF_RET | BPF_K, 0), step(BPF_RET | BPF_K, u32::MAX)]);
    program
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// The kernel filters what comes to a socket of any kind.
    #[test]
    fn socket_receives_only_packets_with_one_of_the_fields() {
        let ip_header = [&[0x46][..], &[7; 23]].concat();
        for (shown, header) in [(Shown::Segment, &[][..]), (Shown::Ipv4Packet, &ip_header)] {
            let passes = |fields: &[Field], segment: &[u8]| {
                let (to, from) = UnixDatagram::pair().expect("sockets");
                from.set_nonblocking(true).expect("a socket");
                only(&from, shown, fields).expect("a filter");
                to.send(&[header, segment].concat()).is_ok() && from.recv(&mut [0; 64]).is_ok()
            };
            let fields = [Field::Half(2, 0x0304), Field::Word(4, 0x0506_0708)];
            assert!(passes(&fields, &[9, 9, 3, 4, 9, 9, 9, 9]), "{shown:?}");
            assert!(passes(&fields, &[9, 9, 9, 9, 5, 6, 7, 8]), "{shown:?}");
            assert!(!passes(&fields, &[3, 4, 9, 9, 9, 6, 7, 8]), "{shown:?}");
            assert!(!passes(&fields, &[9, 9, 9, 9, 5, 6, 7]), "{shown:?}");
            assert!(!passes(&[], &[9, 9, 3, 4, 5, 6, 7, 8]), "{shown:?}");
        }
    }
}

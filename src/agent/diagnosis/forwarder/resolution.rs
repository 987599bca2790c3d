//! Address resolution between pods of one host. The first pod of the agent sends ARP or neighbor
//! discovery frames to the second one, where they are captured before the kernel answers them.
//!
//! The frames state the truth: the MAC of the first pod's address.

use std::{io, net::IpAddr};

use nix::libc::{BPF_ABS, BPF_H, BPF_K, BPF_LD, BPF_RET, BPF_W};
use socket2::{SockFilter, Socket, Type};

use super::pod::drain;
use crate::{
    agent::diagnosis::packet_filter::{step, when},
    frames::{self, ARP, IPV6, packet_socket, sender_at},
    model::Mac,
    pods::agent_pod::{AgentPod, INNER, second_pod_mac},
};

/// Number of frames: one to all stations, one to the second pod.
const FRAMES: usize = 2;

/// The sockets and frames of one family.
pub struct Resolution {
    sender: Socket,
    /// The expected frames, without padding.
    receiver: Socket,
    frames: [Vec<u8>; FRAMES],
}

impl Resolution {
    /// Opens sockets to send from the first pod, with address `from`, to the second one, with address
    /// `to`.
    ///
    /// # Errors
    /// Fails if a socket cannot be opened, or if the addresses are of different families.
    pub fn open(first: &AgentPod, second: &AgentPod, from: IpAddr, to: IpAddr) -> io::Result<Self> {
        let (sender, mac) = first.inside(|| sender_at(INNER))?;
        let to_mac = second_pod_mac(first.addresses());
        let (frames, protocol) = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let all = frames::arp(mac, None, from, from);
                ([all, frames::arp_answer((mac, from), (to_mac, to))], ARP)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let one = frames::solicitation(mac, Some(to_mac), from, to);
                ([frames::advertisement(mac, from), one], IPV6)
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let receiver = second.inside(|| packet_socket(Type::RAW, protocol))?;
        receiver.attach_filter(&comes_from(mac))?;
        Ok(Self { sender, receiver, frames })
    }

    /// Sends the frames. A frame that cannot be sent does not arrive, and is detected that way.
    pub fn send(&self) {
        // Discards frames of an earlier trial.
        drain(&self.receiver, |_, _| {});
        for frame in &self.frames {
            if let Err(error) = self.sender.send(frame) {
                tracing::trace!(%error, "not sent");
            }
        }
    }

    /// Returns the receiving socket, to poll it.
    pub const fn socket(&self) -> &Socket {
        &self.receiver
    }

    /// Records which of the frames have arrived.
    pub fn receive(&self, arrived: &mut [bool; FRAMES]) {
        drain(&self.receiver, |frame, _| {
            for (arrived, sent) in arrived.iter_mut().zip(&self.frames) {
                *arrived |= frame.starts_with(sent);
            }
        });
    }
}

/// Returns a socket filter that accepts frames of this sender.
fn comes_from(mac: Mac) -> Vec<SockFilter> {
    let [a, b, c, d, e, f] = *mac.as_bytes();
    vec![
        step(BPF_LD | BPF_W | BPF_ABS, 6),
        when(u32::from_be_bytes([a, b, c, d]), 0, 3),
        step(BPF_LD | BPF_H | BPF_ABS, 10),
        when(u32::from(u16::from_be_bytes([e, f])), 0, 1),
        step(BPF_RET | BPF_K, u32::MAX),
        step(BPF_RET | BPF_K, 0),
    ]
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use socket2::SockRef;

    use super::*;

    #[test]
    fn filter_rejects_frames_of_other_senders() {
        let mac = Mac::from_bytes([2, 0x85, 0, 0, 0x90, 1]);
        let (to, from) = UnixDatagram::pair().expect("sockets");
        from.set_nonblocking(true).expect("a socket");
        SockRef::from(&from).attach_filter(&comes_from(mac)).expect("a filter");
        for sender in [[2, 0x85, 0, 0, 0x90, 1], [2, 0x85, 0, 0, 0x90, 2], [6, 0x85, 0, 0, 0x90, 1]]
        {
            let ip = [10, 42, 1, 254].into();
            let passes = to.send(&frames::arp(Mac::from_bytes(sender), None, ip, ip)).is_ok()
                && from.recv(&mut [0; 64]).is_ok();
            assert_eq!(passes, sender == *mac.as_bytes(), "{sender:?}");
        }
    }
}

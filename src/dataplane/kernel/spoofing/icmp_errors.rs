//! Rules against forged ICMP errors of pods.
//!
//! An ICMP error quotes the packet that it is about, and the kernel of the receiver then takes a smaller path
//! MTU from it. A pod can know only about packets that were sent to it, so a pod's error passes only if the
//! quoted packet's destination is an address of the pod. An error whose quoted destination is in a later
//! fragment is dropped with its first one.

use super::{ICMP, ICMPV6, IPV4, IPV6, SOURCE4, SOURCE6, own4, own6};
use crate::netlink::nftables::{Base, Rule};

/// The destination of the packet that an ICMP error quotes, after eight bytes (RFC 792, RFC 4443).
const QUOTED4: (Base, u32, u32) = (Base::Transport, 8 + 16, 4);
const QUOTED6: (Base, u32, u32) = (Base::Transport, 8 + 24, 16);

/// ICMP errors about a quoted packet: destination unreachable, time exceeded, parameter problem (RFC 792).
const ERRORS: [u8; 3] = [3, 11, 12];

/// Rules for IPv4 that accept ICMP about packets to the pod, and drop all other errors.
pub(super) fn rules4() -> impl Iterator<Item = Rule> {
    let icmp = || Rule::new().ether_type(IPV4).transport(ICMP);
    let about_own = own4(own4(icmp(), SOURCE4), QUOTED4).accept();
    // The kernel takes the data of a later fragment for an ICMP header.
    let unfragmented = move || icmp().masked(Base::Network, 6, &[0x1f, 0xff], &[0; 2], true);
    let error = move |kind| unfragmented().holds(Base::Transport, 0, &[kind]).count().drop();
    std::iter::once(about_own).chain(ERRORS.into_iter().map(error))
}

/// The same for IPv6.
pub(super) fn rules6() -> [Rule; 2] {
    // Types 1 to 4. Of a later fragment the kernel loads the first byte of the IPv6 header, which is 0x60.
    let error = || {
        let icmpv6 = Rule::new().ether_type(IPV6).transport(ICMPV6);
        icmpv6.masked(Base::Transport, 0, &[0xf8], &[0], true)
    };
    [own6(own6(error(), SOURCE6), QUOTED6).accept(), error().count().drop()]
}

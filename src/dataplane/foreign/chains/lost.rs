//! Packets of trials that were lost, and a check for rules that certainly do not match them: rules
//! for another protocol, port, address or interface.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::super::rules::{compared_value, expressions, number};
use crate::{
    dataplane::forwarding::{
        TrialProtocol, UNUSED, UNUSED_OUT,
        remote::message::{REMOTE_DATA_PORT, REMOTE_PORT},
    },
    netlink::{
        attributes::{self, octets},
        nftables::{INET, IP, IP6, Object, nfta},
    },
};

/// `NFT_META_*`
const META_PROTOCOL: u32 = 1;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
/// `NFT_PAYLOAD_*`
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
/// `NFT_CMP_EQ`
const EQUAL: u32 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Protocols whose rules always count: large packets may need ICMP errors to pass.
const ICMP: [u8; 2] = [1, 58];
/// Length of an interface's name in a comparison, in bytes; a comparison with a prefix is shorter.
const NAME_LEN: usize = 16;

/// The lost packets.
#[derive(Clone, Debug)]
pub struct LostPackets {
    /// Their transport protocols.
    pub transports: BTreeSet<TrialProtocol>,
    /// Their sources and destinations: the overlay's networks, and hosts of the underlay.
    pub networks: Vec<IpNet>,
    /// UDP port of the tunnels.
    pub port: u16,
    /// Names of the interfaces that they use.
    pub links: Vec<String>,
}

/// The part of a packet that a rule has loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loaded {
    /// The family, as `NFPROTO` number or EtherType.
    Family,
    Protocol,
    Port,
    Address,
    Interface,
}

impl LostPackets {
    /// Returns whether a rule in a table of this family certainly matches none of these packets. A
    /// rule whose form is unknown may match them.
    pub fn misses(&self, family: u8, rule: &Object) -> bool {
        let mut is_ipv4 = match family {
            IP => Some(true),
            IP6 => Some(false),
            _ => None,
        };
        let mut last: Option<(u32, Loaded)> = None;
        for (name, data) in expressions(rule) {
            let get = |attribute| number(attributes::find(data, attribute));
            match name {
                "meta" if get(nfta::META_SREG).is_none() => {
                    last = get(nfta::META_DREG).zip(of_meta(family, get(nfta::META_KEY)));
                }
                "payload" if get(nfta::PAYLOAD_SREG).is_none() => {
                    let place = [nfta::PAYLOAD_BASE, nfta::PAYLOAD_OFFSET, nfta::PAYLOAD_LEN];
                    let place = place.map(|attribute| get(attribute).unwrap_or_default());
                    last = get(nfta::PAYLOAD_DREG).zip(of_payload(is_ipv4, place));
                }
                "cmp" if get(nfta::CMP_OP) == Some(EQUAL) => {
                    let compared =
                        last.filter(|(register, _)| get(nfta::CMP_SREG) == Some(*register));
                    let (Some((_, loaded)), Some(value)) = (compared, compared_value(data)) else {
                        continue;
                    };
                    if loaded == Loaded::Family {
                        is_ipv4 = is_ipv4.or(of_family(value));
                    } else if self.differs(loaded, value) {
                        return true;
                    }
                }
                "cmp" | "counter" | "range" | "lookup" => {}
                // Another expression may have changed the register.
                _ => last = None,
            }
        }
        false
    }

    /// Whether none of the packets has this value.
    fn differs(&self, loaded: Loaded, value: &[u8]) -> bool {
        match (loaded, value) {
            (Loaded::Protocol, [TCP]) => !self.transports.contains(&TrialProtocol::Tcp),
            (Loaded::Protocol, [UDP]) => !self.transports.contains(&TrialProtocol::Udp),
            (Loaded::Protocol, [other]) => !ICMP.contains(other),
            // The source port of a trial changes each time.
            (Loaded::Port, [high, low]) => {
                let port = u16::from_be_bytes([*high, *low]);
                ![UNUSED, UNUSED_OUT, REMOTE_PORT, REMOTE_DATA_PORT, self.port].contains(&port)
            }
            (Loaded::Address, first) => !self.networks.iter().any(|network| {
                let own = octets(network.network());
                let length = first.len().min(usize::from(network.prefix_len() / 8));
                own.len() >= first.len() && own[..length] == first[..length]
            }),
            (Loaded::Interface, name) if name.len() == NAME_LEN => {
                let name = attributes::text(name);
                !self.links.iter().any(|link| link == name)
            }
            _ => false,
        }
    }
}

/// Returns what a `meta` expression loads.
fn of_meta(family: u8, key: Option<u32>) -> Option<Loaded> {
    match key? {
        META_PROTOCOL | META_NFPROTO => Some(Loaded::Family),
        META_L4PROTO => Some(Loaded::Protocol),
        // In other families, the interfaces are ports of bridges.
        META_IIFNAME | META_OIFNAME if [INET, IP, IP6].contains(&family) => Some(Loaded::Interface),
        _ => None,
    }
}

/// Returns what a payload expression loads, by base, offset and length.
fn of_payload(is_ipv4: Option<bool>, place: [u32; 3]) -> Option<Loaded> {
    match (is_ipv4, place) {
        (_, [TRANSPORT, 0 | 2, 2]) => Some(Loaded::Port),
        (Some(true), [NETWORK, 9, 1]) | (Some(false), [NETWORK, 6, 1]) => Some(Loaded::Protocol),
        (Some(true), [NETWORK, 12 | 16, 1..=4]) | (Some(false), [NETWORK, 8 | 24, 1..=16]) => {
            Some(Loaded::Address)
        }
        _ => None,
    }
}

/// Returns whether the value of a family stands for IPv4; `None` if it is neither family.
fn of_family(value: &[u8]) -> Option<bool> {
    match value {
        [2] | [0x08, 0x00] => Some(true),
        [10] | [0x86, 0xdd] => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attributes::Attributes;

    const BRIDGE: u8 = 7;

    type Expression = (&'static str, Attributes);

    fn meta(key: u32) -> Expression {
        ("meta", Attributes::new().be32(1, 1).be32(2, key))
    }

    fn payload(base: u32, at: u32, length: u32) -> Expression {
        ("payload", Attributes::new().be32(1, 1).be32(2, base).be32(3, at).be32(4, length))
    }

    fn cmp(operator: u32, bytes: &[u8]) -> Expression {
        let value = Attributes::new().put(1, bytes);
        ("cmp", Attributes::new().be32(1, 1).be32(2, operator).nest(3, &value))
    }

    fn misses(family: u8, expressions: &[Expression]) -> bool {
        let list = expressions.iter().fold(Attributes::new(), |list, (name, data)| {
            list.nest(1, &Attributes::new().text(1, name).nest(2, data))
        });
        let attributes = Attributes::new().nest(4, &list).as_bytes().to_vec();
        let net = |text: &str| text.parse().expect("a network");
        let lost = LostPackets {
            transports: [TrialProtocol::Udp].into(),
            networks: vec![net("10.42.0.0/16"), net("fd42::/48"), net("10.99.0.10/32")],
            port: 8472,
            links: vec!["gsm0".into(), "gossamer.1".into()],
        };
        lost.misses(family, &Object { family, attributes })
    }

    fn name(text: &str) -> Vec<u8> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(NAME_LEN, 0);
        bytes
    }

    #[test]
    fn rule_for_another_protocol_port_address_or_interface_misses_lost_packets() {
        let protocol = |number| [meta(META_L4PROTO), cmp(0, &[number])];
        let port = |port: u16| [payload(TRANSPORT, 2, 2), cmp(0, &port.to_be_bytes())];
        let from = |bytes: &[u8]| [payload(NETWORK, 12, bytes.len() as u32), cmp(0, bytes)];
        let by = |text: &[u8]| [meta(META_IIFNAME), cmp(0, text)];
        for (family, rule, misses_it) in [
            (INET, protocol(TCP), true),
            (INET, protocol(132), true),
            (INET, protocol(UDP), false),
            (INET, protocol(1), false),
            (IP, port(80), true),
            (IP, port(8472), false),
            (IP, port(REMOTE_DATA_PORT), false),
            (IP, from(&[192, 168]), true),
            (IP, from(&[10, 42, 1, 9]), false),
            (IP, from(&[10]), false),
            (IP, from(&[10, 99, 0, 10]), false),
            (IP, from(&[10, 99, 0, 11]), true),
            // In family `inet` this offset may be something else than an address.
            (INET, from(&[192, 168]), false),
            (INET, by(&name("docker0")), true),
            (INET, by(&name("gsm0")), false),
            (INET, by(b"br-"), false),
            (BRIDGE, by(&name("gsv1")), false),
        ] {
            assert_eq!(misses(family, &rule), misses_it, "{family} {rule:?}");
        }
    }

    #[test]
    fn uncertain_rule_is_not_ruled_out() {
        let family = [meta(META_NFPROTO), cmp(0, &[2])];
        let outside = [payload(NETWORK, 12, 2), cmp(0, &[192, 168])];
        assert!(misses(INET, &[&family[..], &outside].concat()));
        assert!(!misses(INET, &[]));
        assert!(!misses(INET, &[meta(META_L4PROTO), cmp(1, &[TCP])]), "another operator");
        let masked = ("bitwise", Attributes::new().be32(1, 1).be32(2, 1));
        assert!(!misses(IP, &[payload(NETWORK, 12, 4), masked, cmp(0, &[192, 168, 0, 0])]));
        let other = ("cmp", Attributes::new().be32(1, 2).be32(2, 0));
        assert!(!misses(IP, &[meta(META_L4PROTO), other]), "another register");
    }
}

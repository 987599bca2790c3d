//! The parsers to fuzz, and samples that they accept.

use std::net::{IpAddr, Ipv4Addr};

use foca::{Header, Member, Message, State};
use rtnetlink::{
    LinkUnspec,
    packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        neighbour::{NeighbourAttribute, NeighbourMessage},
        route::{RouteAttribute, RouteMessage, RouteProtocol},
    },
};

use crate::{
    cni, config,
    dataplane::forwarding,
    docker, icmp,
    model::{
        BootId, ClusterId, Forget, Identity, Incarnation, Mac, MemberRecord, NodeId, PathState,
        Run, Slot, SlotRecord, SlotState, Version, Vtep,
    },
    netavark, netlink,
    wire::{
        Arrivals, Facts, Frame, Gossip, GrantWish, Hello, Inquiry, InquiryAnswer, Key, Keyring,
        PathReport, Push, Record, Refusal, Report, Request, Response, Roots, Secret, SecretOrder,
        SwimPacket, Token,
    },
};

use super::Target;

/// All parsers of external bytes.
pub(super) const TARGETS: &[Target] = &[
    Target { name: "frame", samples: frames, parse: |bytes| Frame::decode(bytes).is_ok() },
    Target { name: "push", samples: pushes, parse: |bytes| Push::decode(bytes).is_ok() },
    Target { name: "request", samples: requests, parse: |bytes| Request::decode(bytes).is_ok() },
    Target { name: "response", samples: responses, parse: |bytes| Response::decode(bytes).is_ok() },
    Target { name: "inquiry", samples: inquiries, parse: |bytes| Inquiry::decode(bytes).is_ok() },
    Target {
        name: "answer",
        samples: answers,
        parse: |bytes| InquiryAnswer::decode(bytes).is_ok(),
    },
    Target { name: "swim", samples: packets, parse: gossip },
    Target { name: "record", samples: records, parse: parse_record },
    Target {
        name: "token",
        samples: tokens,
        parse: |bytes| as_text(bytes, |text| text.parse::<Token>().is_ok()),
    },
    Target {
        name: "keyring",
        samples: keyrings,
        parse: |bytes| as_text(bytes, |text| text.parse::<Keyring>().is_ok()),
    },
    Target {
        name: "netlink",
        samples: netlink_messages,
        parse: |bytes| netlink::parse_messages(bytes).is_ok(),
    },
    Target { name: "icmp", samples: icmp::samples, parse: icmp::fuzz },
    Target { name: "tunnel packet", samples: forwarding::samples, parse: forwarding::fuzz },
    Target { name: "cni", samples: cni::samples, parse: cni::fuzz },
    Target { name: "docker", samples: docker::samples, parse: docker::fuzz },
    Target { name: "netavark", samples: netavark::samples, parse: netavark::fuzz },
    Target { name: "settings", samples: config::samples, parse: config::fuzz },
];

/// Runs a parser of text on bytes.
fn as_text(bytes: &[u8], parse: impl FnOnce(&str) -> bool) -> bool {
    std::str::from_utf8(bytes).is_ok_and(parse)
}

fn node(seed: u8) -> NodeId {
    NodeId::from_bytes([seed; 8])
}

fn member(seed: u8) -> Option<MemberRecord> {
    let ip = IpAddr::from([10, 99, 0, seed]);
    Some(MemberRecord {
        node: node(seed),
        version: Version { starts: 3, change: 7 },
        boot: BootId::from_bytes([seed; 8]),
        name: format!("edge-{seed}").parse().ok()?,
        address: (ip, 8473).into(),
        vtep: Vtep { mac: Mac::of_node(node(seed)), underlay: ip },
        left_to: None,
    })
}

fn facts() -> Facts {
    let record =
        SlotRecord { epoch: 5, owner: node(1), state: SlotState::Leased, granter: node(2) };
    let incarnation = Incarnation { starts: 3, renewals: 1 };
    Facts {
        members: (1..4).filter_map(member).collect(),
        slots: vec![Run { start: Slot(7), len: 3, record }],
        active: vec![Identity { node: node(1), incarnation }],
        forgets: vec![Forget { node: node(9), successor: node(1), round: 2, forced: false }],
    }
}

fn pushes() -> Vec<Vec<u8>> {
    vec![Push { facts: facts() }.encode(), Push { facts: Facts::default() }.encode()]
}

fn identity() -> Identity {
    Identity { node: node(1), incarnation: Incarnation { starts: 3, renewals: 1 } }
}

fn requests() -> Vec<Vec<u8>> {
    let hello = member(1).map(|member| {
        let (settings, grant) = (Default::default(), GrantWish::default());
        Request::Hello(Hello { member, identity: identity(), settings, grant })
    });
    let exchange = Request::Exchange { buckets: 3, identity: identity(), facts: facts() };
    let all = [Request::Grant(GrantWish::default()), Request::BeMySuccessor, exchange];
    all.into_iter().chain(hello).map(|request| request.encode()).collect()
}

fn responses() -> Vec<Vec<u8>> {
    let refused = Response::Refused(Refusal::Malformed("no such bucket".to_owned().into()));
    let facts = Response::Facts { facts: facts(), down: Vec::new(), down_as: None };
    [Response::Same, refused, facts].into_iter().map(|response| response.encode()).collect()
}

fn inquiries() -> Vec<Vec<u8>> {
    let add = Secret::new(vec![7; 32]).ok().map(|secret| Inquiry::Secret(SecretOrder::Add(secret)));
    let all = [Inquiry::Report, Inquiry::Arrivals(7), Inquiry::Ping];
    all.into_iter().chain(add).map(|inquiry| inquiry.encode()).collect()
}

fn answers() -> Vec<Vec<u8>> {
    let arrivals = Arrivals { pod_age_ms: 60_000, came: 0x55, samples: 20, shed: false };
    let path = PathReport { node: node(1), state: PathState::Ok, round_trip_us: Some(300) };
    let report = Report { arrivals: Some(arrivals), paths: vec![path], ..Report::default() };
    let all = [
        InquiryAnswer::Pong,
        InquiryAnswer::Report(Box::new(report)),
        InquiryAnswer::Refused(Refusal::Left),
    ];
    all.into_iter().map(|answer| answer.encode()).collect()
}

fn frames() -> Vec<Vec<u8>> {
    let cluster = ClusterId::from_bytes([9; 8]);
    let push = Push { facts: facts() }.encode();
    let request = Request::BeMySuccessor.encode();
    vec![Frame::Push(&push).encode(cluster), Frame::Request(&request).encode(cluster)]
}

fn packets() -> Vec<Vec<u8>> {
    let incarnation = Incarnation { starts: 1, renewals: 0 };
    let other = Identity { node: node(2), incarnation };
    let header =
        Header { src: identity(), src_incarnation: 3, dst: other, message: Message::Ping(7) };
    let members = vec![Member::new(other, 2, State::Suspect)];
    let packet = SwimPacket::new(header, members).encode();
    vec![Gossip { roots: Roots::default(), packet: &packet }.encode()]
}

/// Parses a database entry: key, zero byte, value.
fn gossip(bytes: &[u8]) -> bool {
    Gossip::decode(bytes).is_ok_and(|gossip| SwimPacket::decode(gossip.packet).is_ok())
}

fn parse_record(bytes: &[u8]) -> bool {
    let Some(end) = bytes.iter().position(|byte| *byte == 0) else { return false };
    Record::decode(&bytes[..end], &bytes[end + 1..]).is_ok()
}

fn records() -> Vec<Vec<u8>> {
    let Facts { slots, forgets, .. } = facts();
    let member = member(1).map(|member| (Key::Member(member.node), Record::Member(member)));
    let forgets =
        forgets.into_iter().map(|forget| (Key::Forget(forget.node), Record::Forget(forget)));
    let others = [(Key::Starts, Record::Starts(7)), (Key::Slots(3), Record::Slots(slots))];
    let all = others.into_iter().chain(member).chain(forgets);
    let bytes = |(key, record): (Key, Record)| {
        [key.to_string().into_bytes(), vec![0], record.encode()].concat()
    };
    all.map(bytes).collect()
}

fn tokens() -> Vec<Vec<u8>> {
    let token = |seeds: &[&str]| {
        let secret = Secret::new(vec![7; 32]).ok()?;
        let seeds = seeds.iter().map(|seed| (*seed).to_owned()).collect();
        Some(
            Token { cluster: ClusterId::from_bytes([9; 8]), secret, seeds }
                .to_string()
                .into_bytes(),
        )
    };
    [token(&[]), token(&["10.99.0.10:8473", "[2001:db8::1]:8473"])].into_iter().flatten().collect()
}

fn keyrings() -> Vec<Vec<u8>> {
    let secret = Secret::new(vec![7; 32]).ok();
    secret.map(|secret| Keyring::new(secret).to_string().into_bytes()).into_iter().collect()
}

/// Returns messages of the kernel about a link, a neighbor and a route, and all three in one buffer.
fn netlink_messages() -> Vec<Vec<u8>> {
    let link = LinkUnspec::new_with_index(5).name("gossamer.1".to_owned());
    let mut neighbor = NeighbourMessage::default();
    neighbor.header.ifindex = 5;
    neighbor.attributes = vec![
        NeighbourAttribute::Destination(Ipv4Addr::new(10, 42, 1, 0).into()),
        NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 1]),
    ];
    let mut route = RouteMessage::default();
    route.header.protocol = RouteProtocol::Other(73);
    route.attributes = vec![RouteAttribute::Oif(5), RouteAttribute::Priority(73)];
    let all = [
        RouteNetlinkMessage::NewLink(link.build()),
        RouteNetlinkMessage::NewNeighbour(neighbor),
        RouteNetlinkMessage::NewRoute(route),
    ];
    let bytes = |message| {
        let mut message =
            NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    };
    let mut samples: Vec<Vec<u8>> = all.into_iter().map(bytes).collect();
    samples.push(samples.concat());
    samples
}

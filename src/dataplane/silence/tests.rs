//! Captured packets and the causes that follow from them.

use super::*;
use crate::frames::SOLICITATION;

const LOCAL: [u8; 4] = [192, 0, 2, 1];
const PEER: [u8; 4] = [192, 0, 2, 2];
const OTHER: [u8; 4] = [192, 0, 2, 100];
const PORT: u16 = 8_472;

fn mac(last: u8) -> Mac {
    Mac::from_bytes([2, 0, 0, 0, 0, last])
}

fn suspect() -> Suspect {
    let node = NodeId::from_bytes([2; 8]);
    let (name, vtep) = ("n2".to_owned(), [10, 42, 2, 0].into());
    Suspect {
        node,
        name,
        address: PEER.into(),
        gossip: 8_473,
        mac: mac(9),
        vtep,
        lives: true,
        tunnelled: true,
    }
}

fn watch() -> Watch {
    Watch::new(LOCAL.into(), PORT, BTreeSet::from([mac(1)]), &[suspect()])
}

fn place() -> Place {
    let (local, interface) = (LOCAL.into(), "eth0".to_owned());
    let overlay = "10.42.0.0/16".parse().expect("a network");
    Place {
        link: 2,
        interface,
        device: "gossamer.1".to_owned(),
        local,
        source: local,
        port: PORT,
        gossip: 8_473,
        guard: true,
        overlay,
    }
}

fn arp(sender: Mac, address: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, 2];
    bytes.extend(sender.as_bytes());
    bytes.extend(address);
    bytes.extend([0; 10]);
    bytes
}

fn tunnel(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    bytes.extend(from);
    bytes.extend(to);
    bytes.extend([0x30, 0x39]);
    bytes.extend(PORT.to_be_bytes());
    bytes.extend([0; 4 + 8 + 6]);
    bytes.extend(mac(9).as_bytes());
    bytes
}

fn on_packet(watch: &mut Watch, kind: u8, protocol: u16, bytes: &[u8]) {
    watch.on_packet(&Packet { link: 2, kind, protocol, bytes });
    // Truncated packets must not panic.
    (0..bytes.len()).for_each(|end| {
        let mut other = Watch::new(LOCAL.into(), PORT, BTreeSet::new(), &[suspect()]);
        other.on_packet(&Packet { link: 2, kind, protocol, bytes: &bytes[..end] });
    });
}

fn cause_of(watch: &Watch, facts: Facts) -> Option<String> {
    let facts = BTreeMap::from([(suspect().node, facts)]);
    let verdict = watch.conclude(&[suspect()], &facts, &place()).into_values().next()?;
    verdict.cause.map(|cause| cause.to_string())
}

fn assert_cause(watch: &Watch, facts: Facts, parts: &[&str]) {
    let sentence = cause_of(watch, facts).expect("a cause");
    parts.iter().for_each(|part| assert!(sentence.contains(part), "{part}: {sentence}"));
}

#[test]
fn packets_that_leave_and_arrive_give_no_cause() {
    let mut watch = watch();
    on_packet(&mut watch, PACKET_OUTGOING, IPV4, &tunnel(LOCAL, PEER));
    on_packet(&mut watch, PACKET_HOST, IPV4, &tunnel(PEER, LOCAL));
    on_packet(&mut watch, PACKET_HOST, ARP, &arp(mac(2), PEER));
    assert_eq!(cause_of(&watch, Facts { sent: true, ..Facts::default() }), None);
}

#[test]
fn address_claimed_by_another_mac_is_reported_unless_the_mac_claims_several() {
    let mut watch = watch();
    on_packet(&mut watch, PACKET_HOST, ARP, &arp(mac(1), LOCAL));
    assert_eq!(watch.claim(), None, "this host's own MAC");
    on_packet(&mut watch, PACKET_HOST, ARP, &arp(mac(7), LOCAL));
    assert_cause(&watch, Facts::default(), &["address 192.0.2.1", "02:00:00:00:00:07"]);
    on_packet(&mut watch, PACKET_HOST, ARP, &arp(mac(7), PEER));
    assert_eq!(watch.claim(), None, "a router with proxy ARP");
}

#[test]
fn card_that_answers_for_this_host_and_several_neighbors_is_no_other_machine() {
    let mut watch = watch();
    let neighbors: [[u8; 4]; 2] = [[192, 0, 2, 30], [192, 0, 2, 31]];
    watch.expect_answers(neighbors.map(IpAddr::from));
    on_packet(&mut watch, PACKET_HOST, ARP, &arp(mac(7), LOCAL));
    on_packet(&mut watch, PACKET_HOST, ARP, &arp(mac(7), neighbors[0]));
    assert_eq!(watch.claim(), Some(mac(7)), "its own address and that of this host");
    on_packet(&mut watch, PACKET_HOST, ARP, &arp(mac(7), neighbors[1]));
    assert_eq!(watch.claim(), None, "a fabric that answers all queries");
}

#[test]
fn macs_of_a_peer_distinguish_cloned_machine_from_duplicate_address() {
    let mut clone = watch();
    on_packet(&mut clone, 1, ARP, &arp(mac(1), PEER));
    assert_cause(&clone, Facts::default(), &["same MAC address 02:00:00:00:00:01", "n2"]);
    let mut again = watch();
    again.add_known_duplicates(&clone.duplicates());
    assert_eq!(again.duplicates(), clone.duplicates(), "from an earlier capture");
    let mut probe = watch();
    let question = [&arp(mac(1), [0; 4])[..24], &PEER].concat();
    on_packet(&mut probe, 1, ARP, &question);
    assert_eq!(probe.duplicates(), clone.duplicates(), "an ARP probe for its own address");
    let mut double = watch();
    on_packet(&mut double, PACKET_HOST, ARP, &arp(mac(3), PEER));
    on_packet(&mut double, PACKET_HOST, ARP, &arp(mac(4), PEER));
    assert_cause(&double, Facts::default(), &["02:00:00:00:00:03, 02:00:00:00:00:04"]);
}

#[test]
fn translated_source_addresses_are_reported_at_both_ends() {
    let mut here = watch();
    on_packet(&mut here, PACKET_OUTGOING, IPV4, &tunnel(OTHER, PEER));
    let facts = Facts { translating: Some("ip nat POSTROUTING".to_owned()), ..Facts::default() };
    let parts = ["under the address 192.0.2.100", "iptables -t nat -I POSTROUTING -p udp"];
    assert_cause(&here, facts, &parts);
    let rule = ("iptables-legacy has `-A X -j SNAT`, which".to_owned(), "fix it".to_owned());
    let legacy = Facts { translating_legacy: Some(rule), ..Facts::default() };
    assert_cause(&here, legacy, &["`-A X -j SNAT`, which changes it: exempt UDP 8472: fix it"]);
    let mut there = watch();
    on_packet(&mut there, PACKET_HOST, IPV4, &tunnel(OTHER, LOCAL));
    assert_cause(
        &there,
        Facts::default(),
        &["of n2 (192.0.2.2) arrive under the address 192.0.2.100"],
    );
}

#[test]
fn flows_that_keep_a_translation_are_reported_with_the_command_that_ends_it() {
    let mut here = watch();
    on_packet(&mut here, PACKET_OUTGOING, IPV4, &tunnel(LOCAL, PEER));
    on_packet(&mut here, PACKET_OUTGOING, IPV4, &tunnel(OTHER, PEER));
    on_packet(&mut here, PACKET_OUTGOING, IPV4, &tunnel(LOCAL, PEER));
    let command = "conntrack -D -p udp --orig-port-dst 8472";
    assert_cause(&here, Facts::default(), &["under the address 192.0.2.100", command]);
    for (outgoing, is_source, words) in [
        (true, true, "to n2 (192.0.2.2) are lost on this host"),
        (false, false, "of n2 (192.0.2.2) are lost on this host"),
    ] {
        let kept = Some(Kept { outgoing, is_source, address: OTHER.into() });
        assert_cause(&here, Facts { kept, ..Facts::default() }, &[words, "192.0.2.100", command]);
    }
    let facts = BTreeMap::from([(suspect().node, Facts::default())]);
    let verdicts = here.conclude(&[suspect()], &facts, &place());
    assert!(verdicts.into_values().all(|verdict| verdict.loses_flows), "pods may reach the peer");
}

#[test]
fn ipsec_policy_that_refuses_packets_behind_the_guard_is_reported() {
    let ipsec = || Facts { ipsec: vec!["a policy".to_owned()], ..Facts::default() };
    assert_eq!(cause_of(&watch(), ipsec()), None, "nothing arrives");
    let mut here = watch();
    on_packet(&mut here, PACKET_HOST, IPV4, &tunnel(PEER, LOCAL));
    assert_cause(&here, ipsec(), &["pass the guard", "/proc/net/xfrm_stat shows: a policy"]);
}

#[test]
fn tunnel_packets_of_own_trial_are_not_translated_packets_of_a_peer() {
    let mut here = watch();
    on_packet(&mut here, PACKET_HOST, IPV4, &tunnel(LOCAL, LOCAL));
    let cause = cause_of(&here, Facts::default()).unwrap_or_default();
    assert!(!cause.contains("arrive under the address"), "{cause}");
}

#[test]
fn packets_that_do_not_leave_are_explained_by_rule_or_hints() {
    let by = DroppedBy { chain: "inet hard out".to_owned(), handle: None, queued: false };
    let dropped = Facts { sent: true, dropped: [Some(by), None], ..Facts::default() };
    let parts = ["the policy of chain inet hard out", "to n2", "nft insert rule inet hard out udp"];
    assert_cause(&watch(), dropped.clone(), &parts);
    let hints = [vec!["look there".to_owned()], Vec::new()];
    let sent = Facts { sent: true, hints, ..Facts::default() };
    assert_cause(&watch(), sent, &["do not leave this host", "look there"]);
    let mut left = watch();
    on_packet(&mut left, PACKET_OUTGOING, IPV4, &tunnel(LOCAL, PEER));
    assert_eq!(cause_of(&left, dropped), None, "it has left");
    let hidden = Facts { sent: true, xdp: true, ..Facts::default() };
    assert_cause(&left, hidden, &["none arrive", "XDP program of eth0"]);
}

#[test]
fn agent_refused_by_kernel_is_distinguished_from_packets_that_do_not_leave() {
    let words = ["packets of the agent to n2", "(EPERM): IPAddressDeny=", "bpftool cgroup tree"];
    let forbidden = Facts { sent: true, forbidden: true, ..Facts::default() };
    assert_cause(&watch(), forbidden.clone(), &words);
    let mut left = watch();
    on_packet(&mut left, PACKET_OUTGOING, IPV4, &tunnel(LOCAL, PEER));
    assert_cause(&left, forbidden.clone(), &words);
    let by = DroppedBy { chain: "inet hard out".to_owned(), handle: None, queued: false };
    let dropped = Facts { dropped: [Some(by), None], ..forbidden };
    assert_cause(&watch(), dropped, &["the policy of chain inet hard out"]);
}

#[test]
fn packets_that_arrive_and_are_lost_are_explained_by_rule_filter_or_interface() {
    let mut watch = watch();
    on_packet(&mut watch, PACKET_HOST, IPV4, &tunnel(PEER, LOCAL));
    let by = DroppedBy { chain: "netdev ddos in".to_owned(), handle: Some(4), queued: false };
    let dropped = Facts { dropped: [None, Some(by)], ..Facts::default() };
    assert_cause(&watch, dropped, &["chain netdev ddos in (handle 4", "from n2"]);
    let filtered = Facts { filtered: Some("eth1.5".to_owned()), ..Facts::default() };
    let parts = ["arrive on eth1.5, not on eth0", "net.ipv4.conf.eth1/5.rp_filter=2"];
    assert_cause(&watch, filtered, &parts);
    let hints = [Vec::new(), vec!["look there".to_owned()]];
    let uncounted = Facts { uncounted: true, hints, ..Facts::default() };
    assert_cause(&watch, uncounted, &["arrive on eth0", "before its guard: look there"]);
}

#[test]
fn loss_in_device_is_distinguished_from_loss_in_network() {
    let hints = || [vec!["look there".to_owned()], vec!["look here".to_owned()]];
    let entered = Facts { sent: true, entered: true, device_hints: hints(), ..Facts::default() };
    let of_device = |mut packet: Vec<u8>| {
        packet[28] = VNI_IS_VALID;
        packet
    };
    let mut here = watch();
    // A test packet of the agent, which bypasses the device.
    on_packet(&mut here, PACKET_OUTGOING, IPV4, &tunnel(LOCAL, PEER));
    let parts =
        ["handed to gossamer.1, which emits no tunnel packets for them", "eth0: look there"];
    assert_cause(&here, entered.clone(), &parts);
    on_packet(&mut here, PACKET_OUTGOING, IPV4, &of_device(tunnel(LOCAL, PEER)));
    assert_eq!(cause_of(&here, entered.clone()), None, "lost in the network");
    on_packet(&mut here, PACKET_HOST, IPV4, &of_device(tunnel(PEER, LOCAL)));
    assert_cause(
        &here,
        entered.clone(),
        &["may be dropped by what is attached to gossamer.1: look here"],
    );
    let nothing = Facts { device_hints: Default::default(), ..entered };
    assert_eq!(cause_of(&here, nothing), None, "nothing is attached to the device");
}

#[test]
fn unresolved_next_hop_is_reported_as_peer_or_gateway() {
    let facts = |address: [u8; 4]| Facts {
        sent: true,
        unresolved: Some((address.into(), "eth0".to_owned())),
        ..Facts::default()
    };
    assert_cause(&watch(), facts(PEER), &["answers ARP for 192.0.2.2, so"]);
    assert_cause(&watch(), facts([192, 0, 2, 254]), &["ARP for 192.0.2.254, the gateway"]);
}

#[test]
fn unresolved_hop_of_several_concerns_its_flows_and_is_named_before_the_device() {
    let facts = Facts {
        sent: true,
        entered: true,
        is_shared: true,
        unresolved: Some(("fe80::1".parse().expect("an address"), "eth2".to_owned())),
        ..Facts::default()
    };
    let parts = ["eth2 answers neighbor discovery for fe80::1, one of several next hops, so flows"];
    assert_cause(&watch(), facts, &parts);
}

#[test]
fn gateway_that_two_machines_answer_for_in_turn_is_named_and_a_takeover_is_not() {
    const GATEWAY: [u8; 4] = [192, 0, 2, 254];
    let contestants = |macs: &[Mac]| {
        let mut watch = watch();
        watch.expect_answers([GATEWAY.into()]);
        for mac in macs {
            on_packet(&mut watch, PACKET_HOST, ARP, &arp(*mac, GATEWAY));
        }
        watch.contestants(GATEWAY.into())
    };
    let [router, other] = [mac(5), mac(6)];
    assert!(contestants(&[router, router]).is_empty(), "one machine");
    assert!(contestants(&[router, router, other, other]).is_empty(), "a takeover");
    let shared = |last| Mac::from_bytes([0x00, 0x07, 0xb4, 0x00, 0x01, last]);
    assert!(contestants(&[shared(1), shared(2), shared(1)]).is_empty(), "GLBP");
    let macs = contestants(&[router, other, router, other]);
    assert_eq!(macs, BTreeSet::from([router, other]));
    let facts = Facts { contested: Some((GATEWAY.into(), macs)), ..Facts::default() };
    let parts = [
        "several machines answer ARP for 192.0.2.254, the gateway, on eth0: ",
        "02:00:00:00:00:05, 02:00:00:00:00:06",
    ];
    assert_cause(&watch(), facts, &parts);
}

#[test]
fn cause_of_several_peers_is_reported_once() {
    let (first, second) = (
        suspect(),
        Suspect {
            node: NodeId::from_bytes([3; 8]),
            name: "n3".to_owned(),
            address: [192, 0, 2, 3].into(),
            gossip: 8_473,
            mac: mac(8),
            vtep: [10, 42, 3, 0].into(),
            lives: false,
            tunnelled: true,
        },
    );
    let suspects = [first, second];
    let watch = Watch::new(LOCAL.into(), PORT, BTreeSet::new(), &suspects);
    let facts = Facts { filtered: Some("eth1".to_owned()), ..Facts::default() };
    let facts = suspects.iter().map(|suspect| (suspect.node, facts.clone())).collect();
    let verdicts = watch.conclude(&suspects, &facts, &place());
    let sentences: BTreeSet<String> = verdicts
        .values()
        .filter_map(|verdict| verdict.cause.as_ref().map(ToString::to_string))
        .collect();
    assert_eq!((verdicts.len(), sentences.len()), (2, 1));
    assert!(sentences.iter().all(|text| text.contains("n2 (192.0.2.2), n3 (192.0.2.3)")));
}

#[test]
fn answers_for_next_hop_are_collected_in_both_families() {
    let hops = [IpAddr::from(PEER), "fd99::2".parse().expect("an address")];
    let mut watch = watch();
    watch.expect_answers(hops);
    on_packet(&mut watch, PACKET_OUTGOING, ARP, &arp(mac(2), PEER));
    assert!(watch.answering(hops[0]).is_empty(), "sent by this host");
    on_packet(&mut watch, PACKET_HOST, ARP, &arp(mac(2), PEER));
    let mut advertisement = vec![0x60; 40];
    (advertisement[6], advertisement[7]) = (ICMPV6, 255);
    advertisement.extend([ADVERTISEMENT, 0, 0, 0, 0x60, 0, 0, 0]);
    advertisement.extend("fd99::2".parse::<std::net::Ipv6Addr>().expect("an address").octets());
    advertisement.extend([2, 1]);
    advertisement.extend(mac(3).as_bytes());
    on_packet(&mut watch, PACKET_HOST, IPV6, &advertisement);
    for (hop, last) in hops.into_iter().zip([2, 3]) {
        assert_eq!(watch.answering(hop), BTreeSet::from([mac(last)]));
        assert_eq!(watch.answered_at(hop).collect::<Vec<_>>(), [2]);
    }
}

#[test]
fn answers_dropped_by_this_host_are_explained_by_rule() {
    let by = |chain: &str| DroppedBy { chain: chain.to_owned(), handle: None, queued: false };
    let facts = |address: [u8; 4], by| Facts {
        sent: true,
        unresolved: Some((address.into(), "eth0".to_owned())),
        refused: Some(by),
        ..Facts::default()
    };
    let parts =
        ["answers of n2 (192.0.2.2) to ARP arrive on eth0", "arptables -I INPUT -s 192.0.2.2 -j"];
    assert_cause(&watch(), facts(PEER, Some(by("arp filter INPUT"))), &parts);
    let gateway = facts([192, 0, 2, 254], Some(by("netdev wall in")));
    let parts =
        ["of the gateway 192.0.2.254", "nft insert rule netdev wall in arp saddr ip 192.0.2.254"];
    assert_cause(&watch(), gateway, &parts);
    assert_cause(&watch(), facts(PEER, None), &["arptables-legacy -S INPUT"]);
}

#[test]
fn dropped_packets_of_pods_that_arrive_diverted_are_explained_by_rule() {
    let by = |chain: &str| DroppedBy { chain: chain.to_owned(), handle: Some(4), queued: false };
    let diverted = |chain| {
        let (came, goes) = ("eth0".to_owned(), "gossamer.1".to_owned());
        Facts { diverted: Some(Diverted { by: by(chain), came, goes }), ..Facts::default() }
    };
    let parts = [
        "a rule of chain ip mangle rpf (handle 4: ",
        "come in by eth0, and packets to them leave by gossamer.1",
        "nft insert rule ip mangle rpf ip saddr 10.42.0.0/16 accept",
    ];
    assert_cause(&watch(), diverted("ip mangle rpf"), &parts);
    let built_in = "iptables -t raw -I PREROUTING -s 10.42.0.0/16 -j ACCEPT";
    assert_cause(&watch(), diverted("ip raw PREROUTING"), &[built_in]);
}

#[test]
fn signs_of_running_machine_are_found_in_both_families() {
    let sign = |watch: &Watch| watch.traces[&suspect().node].sign;
    let mut here = watch();
    on_packet(&mut here, 1, ARP, &arp(mac(1), PEER));
    on_packet(&mut here, PACKET_OUTGOING, ARP, &arp(mac(2), PEER));
    assert_eq!(sign(&here), None, "this host's own");
    on_packet(&mut here, 1, ARP, &arp(mac(2), PEER));
    assert_eq!(sign(&here), Some(Sign::Arp));
    let peer: std::net::Ipv6Addr = "fd99::2".parse().expect("an address");
    let local = "fd99::1".parse().expect("an address");
    let suspect = Suspect { address: peer.into(), ..suspect() };
    let mut here = Watch::new(local, PORT, BTreeSet::new(), &[suspect]);
    let mut question = vec![0x60; 40];
    (question[6], question[7]) = (ICMPV6, 255);
    question[8..24].copy_from_slice(&peer.octets());
    question.extend([SOLICITATION, 0, 0, 0, 0, 0, 0, 0]);
    on_packet(&mut here, PACKET_OUTGOING, IPV6, &question);
    assert_eq!(sign(&here), None, "this host's own");
    on_packet(&mut here, 2, IPV6, &question);
    assert_eq!(sign(&here), Some(Sign::Discovery));
}

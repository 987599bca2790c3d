//! Which handshakes begin, which are displaced, and what is reported.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    tally::WINDOW,
    used_ids::{MAX_IDS, MIN_RETENTION},
    *,
};

/// Lifetime of QUIC's tokens.
const TOKEN_LIFETIME: Duration = Duration::from_secs(15);

fn ids() -> FirstIds {
    FirstIds::new(&[[7; 32]])
}

fn admissions(now: Instant) -> Admissions {
    Admissions::new(now, ids())
}

/// Returns the decision about a new first packet of a host without the secret.
fn non_member(
    admissions: &mut Admissions,
    now: Instant,
    from: IpAddr,
    is_proven: bool,
) -> Admission {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let id = ConnectionId::new(&NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    admissions.decide(now, FirstPacket { from, id, is_proven })
}

/// Returns the decision about a new first packet of a host with the secret.
fn holder(admissions: &mut Admissions, now: Instant, from: IpAddr, is_proven: bool) -> Admission {
    admissions.decide(now, FirstPacket { from, id: ids().choose(), is_proven })
}

fn ip(number: u32) -> IpAddr {
    IpAddr::V4((0x0a00_0000 + number).into())
}

fn begun(admission: Admission) -> Option<Budget> {
    match admission {
        Admission::Begin(begun) => Some(begun.budget),
        _ => None,
    }
}

fn number(admission: Admission) -> u64 {
    let Admission::Begin(begun) = admission else { panic!("{admission:?}") };
    begun.number
}

#[test]
fn non_member_proves_its_address_before_a_handshake_begins() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    assert_eq!(non_member(&mut admissions, now, ip(1), false), Admission::Retry);
    assert_eq!(begun(non_member(&mut admissions, now, ip(1), true)), Some(Budget::NonMember));
    admissions.learn_member(now, ip(2));
    assert_eq!(begun(holder(&mut admissions, now, ip(2), false)), Some(Budget::Unproven));
    let counts = Handshakes { begun: 2, retried: 1, ..Handshakes::default() };
    assert_eq!(admissions.counts(), counts);
}

#[test]
fn flooding_non_members_do_not_use_members_budget() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    for number in 0..100_000 {
        assert_eq!(non_member(&mut admissions, now, ip(number), false), Admission::Retry);
        admissions.may_send(now, ip(number));
    }
    for number in 0..1_000 {
        non_member(&mut admissions, now, ip(number), true);
    }
    assert_eq!(non_member(&mut admissions, now, ip(9), true), Admission::Refuse);
    admissions.learn_member(now, ip(200_000));
    assert_eq!(begun(holder(&mut admissions, now, ip(200_000), false)), Some(Budget::Unproven));
    assert_eq!(begun(holder(&mut admissions, now, ip(200_000), true)), Some(Budget::Member));
    assert!(admissions.may_send(now, ip(200_000)), "answers to members are not limited");
    assert_eq!(admissions.counts().unanswered, 99_000);
}

#[test]
fn member_with_a_forged_address_begins_without_a_proof() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    admissions.learn_member(now, ip(1));
    for _ in 0..1_000 {
        assert_eq!(non_member(&mut admissions, now, ip(1), false), Admission::Retry);
    }
    assert_eq!(begun(holder(&mut admissions, now, ip(1), false)), Some(Budget::Unproven));
}

#[test]
fn member_with_many_first_packets_is_admitted_with_a_proof() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    admissions.learn_member(now, ip(1));
    let mut first = 0;
    for _ in 0..MAX_UNPROVEN_PER_MEMBER {
        first = number(holder(&mut admissions, now, ip(1), false));
    }
    assert_eq!(holder(&mut admissions, now, ip(1), false), Admission::Retry);
    assert_eq!(begun(holder(&mut admissions, now, ip(1), true)), Some(Budget::Member));
    admissions.end(first);
    assert_eq!(begun(holder(&mut admissions, now, ip(1), false)), Some(Budget::Unproven));
}

#[test]
fn non_members_with_a_members_address_take_none_of_its_places() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    admissions.learn_member(start, ip(1));
    for host in [ip(1), ip(2)] {
        for millisecond in 0..2_000 {
            let now = start + Duration::from_millis(millisecond);
            let budget = begun(non_member(&mut admissions, now, host, true));
            assert!(budget.is_none_or(|budget| budget == Budget::NonMember), "{budget:?}");
        }
        let now = start + Duration::from_secs(2);
        let Admission::Begin(begun) = holder(&mut admissions, now, host, true) else {
            panic!("{host} was refused")
        };
        assert_eq!((begun.budget, begun.instead_of), (Budget::Member, None));
    }
}

#[test]
fn host_with_a_removed_secret_is_a_non_member() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    assert_eq!(begun(holder(&mut admissions, now, ip(1), true)), Some(Budget::Member));
    admissions.accept_ids(FirstIds::new(&[[8; 32]]));
    assert_eq!(begun(holder(&mut admissions, now, ip(1), true)), Some(Budget::NonMember));
}

#[test]
fn repeated_first_packet_begins_one_handshake() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    for (id, other) in [(ids().choose(), 1), (ConnectionId::new(&[1; 8]), 2)] {
        let first = FirstPacket { from: ip(1), id, is_proven: false };
        assert_eq!(admissions.decide(now, first), Admission::Retry);
        let proof = FirstPacket { is_proven: true, ..first };
        let number = number(admissions.decide(now, proof));
        admissions.end(number);
        // Nor does it from another address, which an observer of the packet can prove.
        for from in [ip(1), ip(other)] {
            let later = now + MIN_RETENTION - Duration::from_secs(1);
            assert_eq!(admissions.decide(later, FirstPacket { from, ..proof }), Admission::Ignore);
        }
    }
    let counts = Handshakes { begun: 2, retried: 2, repeated: 4, ..Handshakes::default() };
    assert_eq!(admissions.counts(), counts);
}

#[test]
fn refused_first_packet_may_be_repeated() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let begun: Vec<_> = (0..MAX_PER_SOURCE)
        .map(|_| number(non_member(&mut admissions, now, ip(1), true)))
        .collect();
    let proof = FirstPacket { from: ip(1), id: ConnectionId::new(&[1; 8]), is_proven: true };
    assert_eq!(admissions.decide(now, proof), Admission::Refuse);
    admissions.end(begun[0]);
    number(admissions.decide(now, proof));
    assert_eq!(admissions.decide(now, proof), Admission::Ignore);
}

#[test]
fn non_members_begin_few_handshakes_a_second_and_their_ids_are_stored_while_proofs_are_valid() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    let holder = FirstPacket { from: ip(1), id: ids().choose(), is_proven: true };
    number(admissions.decide(start, holder));
    let mut proofs = Vec::new();
    for host in 0..100_000_u32 {
        let now = start + Duration::from_millis(u64::from(host));
        let id = ConnectionId::new(&host.to_be_bytes());
        let proof = FirstPacket { from: ip(host), id, is_proven: true };
        if let Admission::Begin(begun) = admissions.decide(now, proof) {
            admissions.end(begun.number);
            proofs.push((now, proof));
        }
    }
    let (second, now) = (NON_MEMBERS_PER_SECOND as usize, start + Duration::from_secs(100));
    assert!((100 * second..=101 * second).contains(&proofs.len()), "{}", proofs.len());
    let most = admissions.begun.iter().map(UsedIds::len).max();
    assert!(most <= Some(MAX_IDS), "{most:?}");
    for (_, proof) in proofs.iter().filter(|(begun, _)| now - *begun < TOKEN_LIFETIME) {
        assert_eq!(admissions.decide(now, *proof), Admission::Ignore);
    }
    assert_eq!(
        admissions.decide(now, holder),
        Admission::Ignore,
        "non-members displace non-members"
    );
}

#[test]
fn first_packet_ids_expire() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    let proof = FirstPacket { from: ip(1), id: ids().choose(), is_proven: true };
    for seconds in [0, 61, 122] {
        let now = start + Duration::from_secs(seconds);
        number(holder(&mut admissions, now, ip(2), true));
        let is_known = seconds == 61;
        assert_eq!(admissions.decide(now, proof) == Admission::Ignore, is_known, "{seconds} s");
    }
}

#[test]
fn repeated_first_packets_are_reported() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let proof = FirstPacket { from: ip(1), id: ConnectionId::new(&[1; 8]), is_proven: true };
    for _ in 0..=CROWD_THRESHOLD {
        admissions.decide(now, proof);
    }
    assert_eq!(admissions.crowd(now), Some(Flood { packets: CROWD_THRESHOLD, example: ip(1) }));
}

#[test]
fn addresses_of_one_ipv6_network_share_one_budget() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let host = |network: u128, host: u128| {
        IpAddr::V6(Ipv6Addr::from_bits((0x2001_0db8 << 96) + (network << 64) + host))
    };
    for number in 0..MAX_PER_SOURCE as u128 {
        assert!(matches!(
            non_member(&mut admissions, now, host(1, number), true),
            Admission::Begin(_)
        ));
    }
    assert_eq!(non_member(&mut admissions, now, host(1, 1 << 40), true), Admission::Refuse);
    assert!(matches!(non_member(&mut admissions, now, host(2, 1), true), Admission::Begin(_)));
    // Addresses of one network displace each other's handshakes after a while.
    let later = now + MIN_DISPLACED_AGE_IN_SOURCE;
    let kept = PROTECTED_PER_SOURCE as u64;
    assert_eq!(displaced_by(&mut admissions, later, host(1, 1 << 40)), Some(kept));
}

#[test]
fn address_with_all_places_of_its_network_does_not_exclude_others() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let host = |host: u16| IpAddr::V6(Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, host));
    for _ in 0..100 {
        non_member(&mut admissions, now, host(4), true);
    }
    let Admission::Begin(joiner) = non_member(&mut admissions, now, host(3), true) else {
        panic!("refused")
    };
    assert_eq!(joiner.instead_of, Some(0), "the oldest of the other");
    // The other address displaces only its own handshakes.
    for milliseconds in 0..2_000 {
        let later = now + Duration::from_millis(milliseconds);
        let displaced = displaced_by(&mut admissions, later, host(4));
        assert_ne!(displaced, Some(joiner.number), "after {milliseconds} ms");
    }
    assert!(admissions.in_progress.contains_key(&joiner.number));
    assert_eq!(admissions.places(Budget::NonMember).values().sum::<usize>(), MAX_PER_SOURCE);
}

#[test]
fn newcomer_of_a_full_source_displaces_handshakes_above_the_minimum_age() {
    let start = Instant::now();
    for has_secret in [false, true] {
        let mut admissions = admissions(start);
        let (of_one, kept, host): (_, _, fn(&mut _, _, _, _) -> _) = match has_secret {
            false => (MAX_PER_SOURCE, PROTECTED_PER_SOURCE, non_member),
            true => (MAX_PER_MEMBER, PROTECTED_PER_MEMBER, holder),
        };
        let mut decide = |now| host(&mut admissions, now, ip(1), true);
        for _ in 0..of_one {
            number(decide(start));
        }
        assert_eq!(decide(start), Admission::Refuse);
        let later = start + MIN_DISPLACED_AGE_IN_SOURCE;
        for displaced in kept..of_one {
            let Admission::Begin(begun) = decide(later) else { panic!("refused") };
            assert_eq!(begun.instead_of, Some(displaced as u64));
        }
        assert_eq!(decide(later), Admission::Refuse, "the oldest are kept");
        assert_eq!(admissions.counts().displaced, (of_one - kept) as u64);
        assert_eq!(admissions.in_progress.len(), of_one);
    }
}

#[test]
fn excess_from_a_members_address_is_reported() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    admissions.learn_member(start, ip(1));
    for _ in 0..MAX_PER_SOURCE as u64 + CROWD_THRESHOLD {
        non_member(&mut admissions, start, ip(1), true);
    }
    let flood = Some(Flood { packets: CROWD_THRESHOLD, example: ip(1) });
    assert_eq!(admissions.crowd(start), flood);
}

#[test]
fn answers_are_limited_per_second_except_to_proven_addresses() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    let sent = (0..10_000).filter(|number| admissions.may_send(start, ip(*number))).count();
    assert_eq!(sent, ANSWER_BURST as usize);
    non_member(&mut admissions, start, ip(20_000), true);
    assert!(admissions.may_send(start, ip(20_000)));
    assert!(!admissions.may_send(start, ip(20_001)));
    assert!(admissions.may_send(start + Duration::from_millis(100), ip(20_001)));
}

#[test]
fn answers_to_addresses_proven_long_ago_are_limited() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    for number in 0..MAX_PROVEN as u32 {
        non_member(&mut admissions, start, ip(number), true);
    }
    let sent = |admissions: &mut Admissions, now| {
        let packets = (0..10_000).map(|packet| ip(packet % MAX_PROVEN as u32));
        packets.filter(|to| admissions.may_send(now, *to)).count()
    };
    let during_dial = start + Duration::from_secs(4);
    assert_eq!(sent(&mut admissions, during_dial), 10_000);
    let later = start + UNLIMITED_AFTER_PROOF;
    assert_eq!(sent(&mut admissions, later), ANSWER_BURST as usize);
    non_member(&mut admissions, later, ip(1), true);
    assert!(admissions.may_send(later, ip(1)), "proven again");
}

#[test]
fn flood_is_reported_until_it_has_ended() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    for number in 0..10_000 {
        non_member(&mut admissions, start, ip(number), false);
    }
    assert_eq!(admissions.flood(start), Some(Flood { packets: 10_000, example: ip(2_999) }));
    assert!(admissions.flood(start + WINDOW + Duration::from_secs(1)).is_some());
    assert_eq!(admissions.flood(start + 3 * WINDOW), None);
}

#[test]
fn hosts_that_prove_their_addresses_are_no_flood() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    for number in 0..20_000 {
        let later = now + Duration::from_millis(u64::from(number));
        assert_eq!(non_member(&mut admissions, later, ip(number), false), Admission::Retry);
        let begun = self::number(holder(&mut admissions, later, ip(number), true));
        admissions.end(begun);
    }
    assert_eq!(admissions.flood(now + Duration::from_secs(20)), None);
}

#[test]
fn known_addresses_are_bounded() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    for number in 0..MAX_MEMBERS as u32 + 100 {
        admissions.learn_member(now + Duration::from_micros(u64::from(number)), ip(number));
    }
    assert_eq!(admissions.members.len(), MAX_MEMBERS);
    assert!(!admissions.members.contains_key(&ip(0)));
}

/// Returns the handshake that a new one of this address displaces.
fn displaced_by(admissions: &mut Admissions, now: Instant, from: IpAddr) -> Option<u64> {
    let Admission::Begin(begun) = non_member(admissions, now, from, true) else { return None };
    begun.instead_of
}

#[test]
fn full_source_is_refused_and_loses_its_oldest_to_other_sources() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let sources = MAX_OF_NON_MEMBERS / MAX_PER_SOURCE;
    for source in 0..sources as u32 {
        for _ in 0..MAX_PER_SOURCE {
            number(non_member(&mut admissions, now, ip(source), true));
        }
        assert_eq!(non_member(&mut admissions, now, ip(source), true), Admission::Refuse);
    }
    // Two hosts arrive: they displace the oldest handshake of a source with the most, each another
    // one.
    assert_eq!(displaced_by(&mut admissions, now, ip(1_000)), Some(0));
    assert_eq!(displaced_by(&mut admissions, now, ip(1_001)), Some(MAX_PER_SOURCE as u64));
    // A source that has lost one does not displace a host that has one.
    let own = (MAX_PER_SOURCE * 2) as u64;
    assert_eq!(displaced_by(&mut admissions, now, ip(0)), None, "it would have the most again");
    assert_eq!(displaced_by(&mut admissions, now + MIN_DISPLACED_AGE, ip(0)), Some(own));
    assert_eq!(admissions.counts().displaced, 3);
    assert_eq!(admissions.places(Budget::NonMember).values().sum::<usize>(), MAX_OF_NON_MEMBERS);
}

#[test]
fn hosts_that_join_at_once_do_not_displace_each_other_at_first() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    for host in 0..MAX_OF_NON_MEMBERS as u32 {
        number(non_member(&mut admissions, now, ip(host), true));
    }
    assert_eq!(non_member(&mut admissions, now, ip(1_000), true), Admission::Refuse);
    assert_eq!(displaced_by(&mut admissions, now + MIN_DISPLACED_AGE, ip(1_000)), Some(0));
}

#[test]
fn loopback_and_pods_are_one_source_each() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    admissions.learn_overlay(vec!["10.42.0.0/16".parse().expect("a network")]);
    for net in ["127.0.0.0", "10.42.7.0"] {
        let net: Ipv4Addr = net.parse().expect("an address");
        let host = |host: usize| IpAddr::V4((net.to_bits() + host as u32 * 259).into());
        for number in 1..=MAX_PER_SOURCE {
            assert_eq!(
                begun(non_member(&mut admissions, now, host(number), true)),
                Some(Budget::NonMember)
            );
        }
        assert_eq!(non_member(&mut admissions, now, host(99), true), Admission::Refuse);
    }
    assert_eq!(begun(non_member(&mut admissions, now, ip(1), true)), Some(Budget::NonMember));
}

#[test]
fn handshakes_without_a_place_are_reported_until_there_are_few() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    for _ in 0..MAX_PER_SOURCE {
        number(non_member(&mut admissions, start, ip(1), true));
    }
    for refused in 0..CROWD_THRESHOLD {
        assert_eq!(admissions.crowd(start), None, "{refused}");
        assert_eq!(non_member(&mut admissions, start, ip(1), true), Admission::Refuse);
    }
    let flood = Some(Flood { packets: CROWD_THRESHOLD, example: ip(1) });
    assert_eq!((admissions.crowd(start), admissions.flood(start)), (flood, None));
    assert_eq!(admissions.crowd(start + 3 * WINDOW), None);
}

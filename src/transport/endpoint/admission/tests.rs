//! Which handshakes begin, which give way, and what is told of them.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    once::{REMEMBERED, REMEMBERED_FOR},
    tally::WINDOW,
    *,
};

/// For so long QUIC takes a token.
const TOKEN_LIFETIME: Duration = Duration::from_secs(15);

fn ids() -> FirstIds {
    FirstIds::new(&[[7; 32]])
}

fn admissions(now: Instant) -> Admissions {
    Admissions::new(now, ids())
}

/// What becomes of another first packet of a host without the secret.
fn stranger(admissions: &mut Admissions, now: Instant, from: IpAddr, is_proven: bool) -> Admission {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let id = ConnectionId::new(&NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    admissions.judge(now, First { from, id, is_proven })
}

/// The same of one that has it.
fn holder(admissions: &mut Admissions, now: Instant, from: IpAddr, is_proven: bool) -> Admission {
    admissions.judge(now, First { from, id: ids().choose(), is_proven })
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
fn stranger_proves_its_address_before_a_handshake_begins() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    assert_eq!(stranger(&mut admissions, now, ip(1), false), Admission::Retry);
    assert_eq!(begun(stranger(&mut admissions, now, ip(1), true)), Some(Budget::Stranger));
    admissions.learn_member(now, ip(2));
    assert_eq!(begun(holder(&mut admissions, now, ip(2), false)), Some(Budget::Unproven));
    let counts = Handshakes { begun: 2, retried: 1, ..Handshakes::default() };
    assert_eq!(admissions.counts(), counts);
}

#[test]
fn strangers_that_flood_leave_members_their_budget() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    for number in 0..100_000 {
        assert_eq!(stranger(&mut admissions, now, ip(number), false), Admission::Retry);
        admissions.may_send(now, ip(number));
    }
    for number in 0..1_000 {
        stranger(&mut admissions, now, ip(number), true);
    }
    assert_eq!(stranger(&mut admissions, now, ip(9), true), Admission::Refuse);
    admissions.learn_member(now, ip(200_000));
    assert_eq!(begun(holder(&mut admissions, now, ip(200_000), false)), Some(Budget::Unproven));
    assert_eq!(begun(holder(&mut admissions, now, ip(200_000), true)), Some(Budget::Member));
    assert!(admissions.may_send(now, ip(200_000)), "answers to members are not limited");
    assert_eq!(admissions.counts().unanswered, 99_000);
}

#[test]
fn member_whose_address_is_forged_begins_without_a_proof() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    admissions.learn_member(now, ip(1));
    for _ in 0..1_000 {
        assert_eq!(stranger(&mut admissions, now, ip(1), false), Admission::Retry);
    }
    assert_eq!(begun(holder(&mut admissions, now, ip(1), false)), Some(Budget::Unproven));
}

#[test]
fn member_whose_first_packets_are_many_gets_in_by_a_proof() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    admissions.learn_member(now, ip(1));
    let mut first = 0;
    for _ in 0..MAX_UNPROVEN_OF_ONE {
        first = number(holder(&mut admissions, now, ip(1), false));
    }
    assert_eq!(holder(&mut admissions, now, ip(1), false), Admission::Retry);
    assert_eq!(begun(holder(&mut admissions, now, ip(1), true)), Some(Budget::Member));
    admissions.end(first);
    assert_eq!(begun(holder(&mut admissions, now, ip(1), false)), Some(Budget::Unproven));
}

#[test]
fn users_of_a_host_with_the_secret_that_prove_its_address_take_none_of_its_places() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    admissions.learn_member(start, ip(1));
    for host in [ip(1), ip(2)] {
        for millisecond in 0..2_000 {
            let now = start + Duration::from_millis(millisecond);
            let budget = begun(stranger(&mut admissions, now, host, true));
            assert!(budget.is_none_or(|budget| budget == Budget::Stranger), "{budget:?}");
        }
        let now = start + Duration::from_secs(2);
        let Admission::Begin(begun) = holder(&mut admissions, now, host, true) else {
            panic!("{host} was kept out")
        };
        assert_eq!((begun.budget, begun.instead_of), (Budget::Member, None));
    }
}

#[test]
fn hosts_with_a_secret_that_is_accepted_no_more_are_strangers() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    assert_eq!(begun(holder(&mut admissions, now, ip(1), true)), Some(Budget::Member));
    admissions.accept_ids(FirstIds::new(&[[8; 32]]));
    assert_eq!(begun(holder(&mut admissions, now, ip(1), true)), Some(Budget::Stranger));
}

#[test]
fn first_packet_begins_one_handshake_however_often_it_comes() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    for (id, other) in [(ids().choose(), 1), (ConnectionId::new(&[1; 8]), 2)] {
        let first = First { from: ip(1), id, is_proven: false };
        assert_eq!(admissions.judge(now, first), Admission::Retry);
        let proof = First { is_proven: true, ..first };
        let number = number(admissions.judge(now, proof));
        admissions.end(number);
        // Nor does it from another address: who has seen it can prove that one.
        for from in [ip(1), ip(other)] {
            let later = now + REMEMBERED_FOR - Duration::from_secs(1);
            assert_eq!(admissions.judge(later, First { from, ..proof }), Admission::Ignore);
        }
    }
    let counts = Handshakes { begun: 2, retried: 2, repeated: 4, ..Handshakes::default() };
    assert_eq!(admissions.counts(), counts);
}

#[test]
fn first_packet_that_found_no_place_may_come_again() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let begun: Vec<_> = (0..MAX_OF_ONE_SOURCE)
        .map(|_| number(stranger(&mut admissions, now, ip(1), true)))
        .collect();
    let proof = First { from: ip(1), id: ConnectionId::new(&[1; 8]), is_proven: true };
    assert_eq!(admissions.judge(now, proof), Admission::Refuse);
    admissions.end(begun[0]);
    number(admissions.judge(now, proof));
    assert_eq!(admissions.judge(now, proof), Admission::Ignore);
}

#[test]
fn strangers_begin_few_handshakes_a_second_and_are_remembered_while_their_proofs_hold() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    let holder = First { from: ip(1), id: ids().choose(), is_proven: true };
    number(admissions.judge(start, holder));
    let mut proofs = Vec::new();
    for host in 0..100_000_u32 {
        let now = start + Duration::from_millis(u64::from(host));
        let id = ConnectionId::new(&host.to_be_bytes());
        let proof = First { from: ip(host), id, is_proven: true };
        if let Admission::Begin(begun) = admissions.judge(now, proof) {
            admissions.end(begun.number);
            proofs.push((now, proof));
        }
    }
    let (second, now) = (STRANGERS_PER_SECOND as usize, start + Duration::from_secs(100));
    assert!((100 * second..=101 * second).contains(&proofs.len()), "{}", proofs.len());
    let most = admissions.begun.iter().map(Once::len).max();
    assert!(most <= Some(REMEMBERED), "{most:?}");
    for (_, proof) in proofs.iter().filter(|(begun, _)| now - *begun < TOKEN_LIFETIME) {
        assert_eq!(admissions.judge(now, *proof), Admission::Ignore);
    }
    assert_eq!(admissions.judge(now, holder), Admission::Ignore, "strangers displace strangers");
}

#[test]
fn first_packets_are_forgotten_in_time() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    let proof = First { from: ip(1), id: ids().choose(), is_proven: true };
    for seconds in [0, 61, 122] {
        let now = start + Duration::from_secs(seconds);
        number(holder(&mut admissions, now, ip(2), true));
        let is_known = seconds == 61;
        assert_eq!(admissions.judge(now, proof) == Admission::Ignore, is_known, "{seconds} s");
    }
}

#[test]
fn repeated_first_packets_are_told() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let proof = First { from: ip(1), id: ConnectionId::new(&[1; 8]), is_proven: true };
    for _ in 0..=CROWD {
        admissions.judge(now, proof);
    }
    assert_eq!(admissions.crowd(now), Some(Flood { packets: CROWD, example: ip(1) }));
}

#[test]
fn addresses_of_one_ipv6_network_share_one_budget() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let host = |network: u128, host: u128| {
        IpAddr::V6(Ipv6Addr::from_bits((0x2001_0db8 << 96) + (network << 64) + host))
    };
    for number in 0..MAX_OF_ONE_SOURCE as u128 {
        assert!(matches!(
            stranger(&mut admissions, now, host(1, number), true),
            Admission::Begin(_)
        ));
    }
    assert_eq!(stranger(&mut admissions, now, host(1, 1 << 40), true), Admission::Refuse);
    assert!(matches!(stranger(&mut admissions, now, host(2, 1), true), Admission::Begin(_)));
    // With each address of its own, they give way after a while.
    let later = now + UNDISTURBED_BY_OWN;
    let kept = KEPT_OF_ONE_SOURCE as u64;
    assert_eq!(displaced_by(&mut admissions, later, host(1, 1 << 40)), Some(kept));
}

#[test]
fn address_that_takes_all_places_of_its_network_keeps_no_other_address_out() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let host = |host: u16| IpAddr::V6(Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, host));
    for _ in 0..100 {
        stranger(&mut admissions, now, host(4), true);
    }
    let Admission::Begin(joiner) = stranger(&mut admissions, now, host(3), true) else {
        panic!("kept out")
    };
    assert_eq!(joiner.instead_of, Some(0), "the oldest of the other");
    // The other one takes places from itself alone.
    for milliseconds in 0..2_000 {
        let later = now + Duration::from_millis(milliseconds);
        let displaced = displaced_by(&mut admissions, later, host(4));
        assert_ne!(displaced, Some(joiner.number), "after {milliseconds} ms");
    }
    assert!(admissions.under_way.contains_key(&joiner.number));
    assert_eq!(admissions.places(Budget::Stranger).values().sum::<usize>(), MAX_OF_ONE_SOURCE);
}

#[test]
fn newcomer_of_a_full_source_takes_a_place_in_which_a_near_host_would_have_finished() {
    let start = Instant::now();
    for has_secret in [false, true] {
        let mut admissions = admissions(start);
        let (of_one, kept, host): (_, _, fn(&mut _, _, _, _) -> _) = match has_secret {
            false => (MAX_OF_ONE_SOURCE, KEPT_OF_ONE_SOURCE, stranger),
            true => (MAX_OF_ONE_MEMBER, KEPT_OF_ONE_MEMBER, holder),
        };
        let mut judge = |now| host(&mut admissions, now, ip(1), true);
        for _ in 0..of_one {
            number(judge(start));
        }
        assert_eq!(judge(start), Admission::Refuse);
        let later = start + UNDISTURBED_BY_OWN;
        for displaced in kept..of_one {
            let Admission::Begin(begun) = judge(later) else { panic!("kept out") };
            assert_eq!(begun.instead_of, Some(displaced as u64));
        }
        assert_eq!(judge(later), Admission::Refuse, "the oldest are kept");
        assert_eq!(admissions.counts().displaced, (of_one - kept) as u64);
        assert_eq!(admissions.under_way.len(), of_one);
    }
}

#[test]
fn users_of_a_members_host_that_take_its_places_are_told() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    admissions.learn_member(start, ip(1));
    for _ in 0..MAX_OF_ONE_SOURCE as u64 + CROWD {
        stranger(&mut admissions, start, ip(1), true);
    }
    let told = Some(Flood { packets: CROWD, example: ip(1) });
    assert_eq!(admissions.crowd(start), told);
}

#[test]
fn answers_come_back_with_time_and_not_at_all_for_who_has_proven_its_address() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    let sent = (0..10_000).filter(|number| admissions.may_send(start, ip(*number))).count();
    assert_eq!(sent, ANSWER_BURST as usize);
    stranger(&mut admissions, start, ip(20_000), true);
    assert!(admissions.may_send(start, ip(20_000)));
    assert!(!admissions.may_send(start, ip(20_001)));
    assert!(admissions.may_send(start + Duration::from_millis(100), ip(20_001)));
}

#[test]
fn flood_is_told_until_it_has_ended() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    for number in 0..10_000 {
        stranger(&mut admissions, start, ip(number), false);
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
        assert_eq!(stranger(&mut admissions, later, ip(number), false), Admission::Retry);
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

/// The handshake that ends for one of this address.
fn displaced_by(admissions: &mut Admissions, now: Instant, from: IpAddr) -> Option<u64> {
    let Admission::Begin(begun) = stranger(admissions, now, from, true) else { return None };
    begun.instead_of
}

#[test]
fn source_has_few_places_and_loses_the_oldest_when_all_are_taken() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    let sources = MAX_OF_STRANGERS / MAX_OF_ONE_SOURCE;
    for source in 0..sources as u32 {
        for _ in 0..MAX_OF_ONE_SOURCE {
            number(stranger(&mut admissions, now, ip(source), true));
        }
        assert_eq!(stranger(&mut admissions, now, ip(source), true), Admission::Refuse);
    }
    // Two hosts come: the first two handshakes of those that have most end, and nothing of the hosts.
    assert_eq!(displaced_by(&mut admissions, now, ip(1_000)), Some(0));
    assert_eq!(displaced_by(&mut admissions, now, ip(1_001)), Some(MAX_OF_ONE_SOURCE as u64));
    // Who lost one does not take it from a host that has one.
    let own = (MAX_OF_ONE_SOURCE * 2) as u64;
    assert_eq!(displaced_by(&mut admissions, now, ip(0)), None, "it would have the most again");
    assert_eq!(displaced_by(&mut admissions, now + UNDISTURBED, ip(0)), Some(own));
    assert_eq!(admissions.counts().displaced, 3);
    assert_eq!(admissions.places(Budget::Stranger).values().sum::<usize>(), MAX_OF_STRANGERS);
}

#[test]
fn hosts_that_join_at_once_leave_each_other_time_to_finish() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    for host in 0..MAX_OF_STRANGERS as u32 {
        number(stranger(&mut admissions, now, ip(host), true));
    }
    assert_eq!(stranger(&mut admissions, now, ip(1_000), true), Admission::Refuse);
    assert_eq!(displaced_by(&mut admissions, now + UNDISTURBED, ip(1_000)), Some(0));
}

#[test]
fn loopback_is_one_source_and_so_are_all_pods() {
    let now = Instant::now();
    let mut admissions = admissions(now);
    admissions.learn_overlay(vec!["10.42.0.0/16".parse().expect("a network")]);
    for net in ["127.0.0.0", "10.42.7.0"] {
        let net: Ipv4Addr = net.parse().expect("an address");
        let host = |host: usize| IpAddr::V4((net.to_bits() + host as u32 * 259).into());
        for number in 1..=MAX_OF_ONE_SOURCE {
            assert_eq!(
                begun(stranger(&mut admissions, now, host(number), true)),
                Some(Budget::Stranger)
            );
        }
        assert_eq!(stranger(&mut admissions, now, host(99), true), Admission::Refuse);
    }
    assert_eq!(begun(stranger(&mut admissions, now, ip(1), true)), Some(Budget::Stranger));
}

#[test]
fn handshakes_without_a_place_are_told_until_there_are_few() {
    let start = Instant::now();
    let mut admissions = admissions(start);
    for _ in 0..MAX_OF_ONE_SOURCE {
        number(stranger(&mut admissions, start, ip(1), true));
    }
    for refused in 0..CROWD {
        assert_eq!(admissions.crowd(start), None, "{refused}");
        assert_eq!(stranger(&mut admissions, start, ip(1), true), Admission::Refuse);
    }
    let told = Some(Flood { packets: CROWD, example: ip(1) });
    assert_eq!((admissions.crowd(start), admissions.flood(start)), (told, None));
    assert_eq!(admissions.crowd(start + 3 * WINDOW), None);
}

//! Tests of members that exchange packets in memory, without loss.

use rand::SeedableRng as _;

use super::*;

fn identity(seed: u8) -> Identity {
    let node = NodeId::of_public_key(&[seed; 32]);
    Identity { node, incarnation: Incarnation { starts: 1, renewals: 0 } }
}

fn member(seed: u8) -> Membership {
    Membership::new(identity(seed), StdRng::from_seed([seed; 32]))
}

/// Handles timers and delivers packets between `members` until `until`.
fn run(members: &mut [Membership], until: Time) {
    loop {
        let Some(now) = members.iter().filter_map(Membership::next_timeout).min() else {
            return;
        };
        if now > until {
            return;
        }
        members.iter_mut().for_each(|member| member.handle_timeout(now));
        while let Some((to, packet)) = members.iter_mut().find_map(|member| {
            std::iter::from_fn(|| member.poll_notice()).find_map(|notice| match notice {
                Notice::Send { to, packet } => Some((to, packet)),
                _ => None,
            })
        }) {
            if let Some(member) = members.iter_mut().find(|m| m.identity().node == to) {
                member.handle_packet(now, &packet);
            }
        }
    }
}

#[test]
fn introduced_members_find_each_other_and_silent_member_goes_down() {
    let mut members = vec![member(1), member(2)];
    members[0].introduce(Time::ZERO, [identity(2)].into_iter());
    run(&mut members, Time::ZERO + Duration::from_secs(3));
    assert_eq!(members[1].active().len(), 2, "the probe introduced the prober");

    let lost = members.pop().expect("two members").identity().node;
    run(&mut members, Time::ZERO + Duration::from_secs(15));
    assert_eq!(members[0].opinions()[&lost], Liveness::Down);
    assert!(!members[0].is_active(lost));
}

#[test]
fn frozen_process_does_not_hold_its_peers_as_down() {
    let mut members = vec![member(1), member(2)];
    members[0].introduce(Time::ZERO, [identity(2)].into_iter());
    run(&mut members, Time::ZERO + Duration::from_secs(3));
    let mut peer = members.pop().expect("two members");
    // The peer is silent until it is suspected. Then this process is frozen for longer than a suspicion
    // lasts, with the refutation unread in its socket.
    run(&mut members, Time::ZERO + Duration::from_secs(7));
    assert_eq!(members[0].opinions()[&identity(2).node], Liveness::Suspect);
    let now = Time::ZERO + Duration::from_secs(30);
    members[0].handle_timeout(now);
    let suspicion = Suspicion { identity: peer.identity(), refutation: 0 };
    let alive = peer.refute(now, &suspicion);
    members[0].clear_suspicion(now + Duration::from_millis(1), &alive);
    let mut both = vec![members.remove(0), peer];
    run(&mut both, now + Duration::from_secs(20));
    assert_eq!(both[0].opinions()[&identity(2).node], Liveness::Alive);
    assert_eq!(both[1].identity(), identity(2), "the peer had no reason to renew its identity");
}

#[test]
fn renewed_member_detects_dead_peers_without_receiving_a_packet() {
    let mut members = vec![member(1), member(2)];
    members[0].introduce(Time::ZERO, [identity(2)].into_iter());
    run(&mut members, Time::ZERO + Duration::from_secs(3));
    members.pop();
    let now = Time::ZERO + Duration::from_secs(3);
    members[0].renew(now);
    run(&mut members, now + Duration::from_secs(15));
    assert_eq!(members[0].opinions()[&identity(2).node], Liveness::Down);
}

#[test]
fn large_cluster_is_probed_more_slowly() {
    let mut member = member(0);
    let others = (0..1_000_u32).map(|number| Identity {
        node: NodeId::of_public_key(
            &[&[7; 28][..], &number.to_le_bytes()].concat().try_into().unwrap(),
        ),
        incarnation: Incarnation { starts: 1, renewals: 0 },
    });
    member.introduce(Time::ZERO, others);
    assert!(member.tuned_for > 500, "{}", member.tuned_for);
    let mut probed = Vec::new();
    while let Some(now) =
        member.next_timeout().filter(|now| *now < Time::ZERO + Duration::from_secs(9))
    {
        member.handle_timeout(now);
        while let Some(notice) = member.poll_notice() {
            let Notice::Send { packet, .. } = notice else { continue };
            let header = SwimCodec.decode_header(packet.as_ref()).expect("a header");
            if matches!(header.message, Message::Ping(_)) {
                probed.push(now.since(Time::ZERO).as_secs());
            }
        }
    }
    assert_eq!(probed, [4, 8]);
}

#[test]
fn equal_views_have_equal_hashes_and_renewal_changes_them() {
    let (mut one, mut two) = (member(1), member(2));
    one.introduce(Time::ZERO, [identity(2)].into_iter());
    two.introduce(Time::ZERO, [identity(1)].into_iter());
    assert_eq!(one.hashes(std::iter::empty()), two.hashes(std::iter::empty()));
    two.renew(Time::ZERO);
    assert_ne!(one.hashes(std::iter::empty()), two.hashes(std::iter::empty()));
    assert!(two.identity().incarnation > identity(2).incarnation);
}

#[test]
fn identity_takes_at_most_18_bytes_of_a_packet() {
    let newest = Incarnation { starts: u32::MAX, renewals: u32::MAX };
    let member = Member::alive(Identity { incarnation: newest, ..identity(1) });
    let mut bytes = Vec::new();
    SwimCodec.encode_member(&member, &mut bytes).expect("memory");
    assert!(bytes.len() <= 8 + 5 + 5 + 2, "{}", bytes.len());
}

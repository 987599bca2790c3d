//! Tests of members that exchange packets in memory, without loss.

use foca::Codec as _;
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

/// Returns a member that knows 1,000 others, none of which answers.
fn member_of_large_cluster() -> Membership {
    let mut member = member(0);
    let others = (0..1_000_u32).map(|number| Identity {
        node: NodeId::of_public_key(
            &[&[7; 28][..], &number.to_le_bytes()].concat().try_into().unwrap(),
        ),
        incarnation: Incarnation { starts: 1, renewals: 0 },
    });
    member.introduce(Time::ZERO, others);
    assert!(member.tuned_for > 500, "{}", member.tuned_for);
    member
}

#[test]
fn member_of_a_large_cluster_contacts_neighbors_only_and_probes_one_each_second() {
    let mut member = member_of_large_cluster();
    let neighbors = member.neighbors().clone();
    let mut turns = BTreeMap::new();
    let mut probed = Vec::new();
    let mut gossip = 0;
    let until = Time::ZERO + Duration::from_secs(5);
    while let Some(now) = member.next_timeout().filter(|now| *now < until) {
        member.handle_timeout(now);
        *turns.entry(now).or_insert(0) += 1;
        while let Some(notice) = member.poll_notice() {
            let Notice::Send { to, packet } = notice else { continue };
            assert!(neighbors.contains(&to), "{to} is no neighbor");
            let header = SwimCodec.decode_header(packet.as_ref()).expect("a header");
            assert_eq!(header.dst.node, to);
            match header.message {
                Message::Ping(_) => probed.push(now.since(Time::ZERO).as_secs()),
                Message::Gossip => gossip += 1,
                Message::PingReq { target, .. } => assert_ne!(target.node, to),
                _ => {}
            }
        }
    }
    assert_eq!(probed, [1, 2, 3, 4]);
    assert!(turns.values().any(|turns| *turns > 1), "a long search takes several turns");
    assert!(gossip > 0, "updates are not lost with probes that are not sent");
}

#[test]
fn member_that_is_no_neighbor_is_never_suspected_by_silence() {
    let mut member = member_of_large_cluster();
    let neighbors = member.neighbors().clone();
    let until = Time::ZERO + Duration::from_secs(20);
    while let Some(now) = member.next_timeout().filter(|now| *now < until) {
        member.handle_timeout(now);
    }
    let opinions = member.opinions();
    let suspects = opinions.iter().filter(|(_, liveness)| **liveness != Liveness::Alive);
    let suspects: BTreeSet<NodeId> = suspects.map(|(node, _)| *node).collect();
    assert!(!suspects.is_empty());
    // When a neighbor is down, the members next to it become neighbors.
    let later: BTreeSet<NodeId> = member.neighbors().union(&neighbors).copied().collect();
    assert!(suspects.is_subset(&later), "{suspects:?} {later:?}");
}

#[test]
fn answer_that_a_neighbor_relays_ends_the_probe_and_one_of_a_stranger_does_not() {
    for asks_helper in [true, false] {
        let mut member = member_of_large_cluster();
        let mut target = None;
        let mut helper = None;
        let until = Time::ZERO + Duration::from_secs(2);
        while let Some(now) = member.next_timeout().filter(|now| *now < until) {
            member.handle_timeout(now);
            while let Some(notice) = member.poll_notice() {
                let Notice::Send { to, packet } = notice else { continue };
                let header = SwimCodec.decode_header(packet.as_ref()).expect("a header");
                match header.message {
                    Message::Ping(_) if target.is_none() => target = Some(header.dst),
                    Message::PingReq { target: asked, probe_number }
                        if Some(asked) == target && helper.is_none() =>
                    {
                        helper = Some(to);
                        let mut members = member.active().into_values();
                        let stranger = members
                            .find(|id| {
                                !member.neighbors().contains(&id.node) && *id != member.identity()
                            })
                            .expect("a member");
                        let src = if asks_helper { header.dst } else { stranger };
                        let answer = foca::Header {
                            src,
                            src_incarnation: 0,
                            dst: member.identity(),
                            message: Message::ForwardedAck { origin: asked, probe_number },
                        };
                        member.handle_packet(now, &SwimPacket::bare(answer).encode());
                    }
                    _ => {}
                }
            }
        }
        let (target, _) = (target.expect("a probe"), helper.expect("an indirect probe"));
        let expected = if asks_helper { Liveness::Alive } else { Liveness::Suspect };
        let later = Time::ZERO + Duration::from_millis(2_500);
        member.handle_timeout(later);
        assert_eq!(member.opinions()[&target.node], expected, "relayed by a helper: {asks_helper}");
    }
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

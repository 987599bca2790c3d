//! Dials that a member causes leave places for those of the node itself.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, UdpSocket},
};

use super::{
    super::{
        Received,
        tests::{address, bind, next_received, next_while},
    },
    *,
};
use crate::model::CallId;

fn invented(number: u32) -> NodeId {
    NodeId::of_public_key(&[number.to_le_bytes(); 8].concat().try_into().expect("32 bytes"))
}

#[tokio::test]
async fn frames_to_many_silent_members_dial_few_of_them_and_leave_places_to_calls_and_neighbors() {
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let silent = silent.local_addr().expect("bound");
    let (mut one, mut two, mut three) = (bind(1, 1), bind(1, 2), bind(1, 3));
    for number in 0..10_000 {
        one.0.send(invented(number), silent, b"ping".to_vec());
    }
    assert_eq!(one.0.dials.running, MAX_DIALS_OF_FRAMES);
    assert_eq!(one.0.peers.len(), MAX_DIALS_OF_FRAMES, "nothing is kept for the others");

    let (two_id, three_id) = (two.0.dialer.me, three.0.dialer.me);
    one.0.call(Call::Node(CallId(1)), two_id, address(&two), b"question".to_vec());
    let Received::Request { bytes, .. } = next_while(&mut two, &mut one).await else {
        panic!("a request")
    };
    assert_eq!(bytes, b"question");
    one.0.close_unused(&BTreeSet::from([three_id]));
    one.0.send(three_id, address(&three), b"to a neighbor".to_vec());
    let Received::Message { bytes, .. } = next_while(&mut three, &mut one).await else {
        panic!("a message")
    };
    assert_eq!(bytes, b"to a neighbor");
}

#[tokio::test]
async fn frames_begin_a_limited_number_of_dials_per_second_however_soon_these_end() {
    let mut one = bind(1, 1);
    let begun = Instant::now();
    let mut failed = 0;
    for number in 0..1_000 {
        // No dial to port 0 is possible.
        one.0.send(invented(number), (Ipv4Addr::LOCALHOST, 0).into(), b"ping".to_vec());
        if one.0.dials.running > 0 {
            let event = one.1.recv().await.expect("the endpoint lives");
            assert!(one.0.handle(event).is_none());
            failed += 1;
        }
    }
    let span = begun.elapsed().as_secs_f64();
    assert!(f64::from(failed) <= FRAME_DIALS_BURST + FRAME_DIALS_PER_SECOND * span, "{failed}");
    assert!(f64::from(failed) >= FRAME_DIALS_BURST, "{failed}");
    assert!(one.0.peers.is_empty());
}

#[tokio::test]
async fn call_without_a_place_waits_for_the_end_of_a_dial() {
    let (mut one, mut two) = (bind(1, 1), bind(1, 2));
    let (two_id, to) = (two.0.dialer.me, address(&two));
    one.0.dials.running = MAX_DIALS;
    one.0.call(Call::Node(CallId(0)), two_id, to, b"question".to_vec());
    one.0.send(two_id, to, b"frame".to_vec());
    assert!(!one.0.peers[&two_id].is_dialing);
    for number in 1..=MAX_WAITING as u64 {
        let whom = invented(u32::try_from(number).expect("few"));
        one.0.call(Call::Node(CallId(number)), whom, to, b"question".to_vec());
    }
    let Received::Answer { call, result } = next_received(&mut one).await else {
        panic!("an answer")
    };
    assert_eq!(call, Call::Node(CallId(MAX_WAITING as u64)), "no further call can wait");
    assert!(result.is_err() && one.0.peers.len() == MAX_WAITING);

    one.0.dial_ended();
    let mut arrived = BTreeSet::new();
    while arrived.len() < 2 {
        tokio::select! {
            Some(event) = two.1.recv() => match two.0.handle(event) {
                Some(Received::Request { bytes, .. } | Received::Message { bytes, .. }) => {
                    arrived.insert(bytes);
                }
                Some(other @ Received::Answer { .. }) => panic!("{other:?}"),
                None => {}
            },
            // The calls to invented members are dialed next, and fail.
            Some(event) = one.1.recv() => {
                let _ = one.0.handle(event);
            }
        }
    }
    assert_eq!(arrived, [b"question".to_vec(), b"frame".to_vec()].into());
    assert!(one.0.dials.waiting.len() < MAX_WAITING);
}

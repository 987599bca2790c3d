//! Two endpoints on loopback: which peers are accepted, and how connections are replaced.

use std::{collections::BTreeSet, net::Ipv4Addr};

use super::{
    super::{NodeKey, connection::CALL_TIMEOUT, credentials::SERVER_NAME},
    links::{MAX_CONNECTIONS, UNUSED_TIMEOUT},
    *,
};
use crate::{model::CallId, wire::Secret};

pub(super) type Side = (Transport, mpsc::Receiver<Event>);

pub(super) fn bind(secret: u8, key: u16) -> Side {
    let secret = Secret::new(vec![secret; 32]).expect("long enough");
    let seed = std::array::from_fn(|byte| key.to_le_bytes()[byte % 2]);
    let key = NodeKey::from_seed(seed).expect("any seed is a key");
    let credentials = Credentials::new(&[secret], &key).expect("credentials");
    Transport::bind((Ipv4Addr::LOCALHOST, 0).into(), &credentials).expect("loopback")
}

pub(super) fn address(side: &Side) -> SocketAddr {
    side.0.local_address().expect("bound")
}

/// Returns what arrives next.
pub(super) async fn next_received(side: &mut Side) -> Received {
    loop {
        let event = side.1.recv().await.expect("the endpoint lives");
        if let Some(received) = side.0.handle(event) {
            return received;
        }
    }
}

/// Returns what arrives next at `side`, while `other` processes its events.
pub(super) async fn next_while(side: &mut Side, other: &mut Side) -> Received {
    loop {
        tokio::select! {
            Some(event) = side.1.recv() => {
                if let Some(received) = side.0.handle(event) {
                    return received;
                }
            }
            Some(event) = other.1.recv() => assert!(other.0.handle(event).is_none()),
        }
    }
}

#[tokio::test]
async fn frames_and_requests_reach_a_member_with_a_proven_id() {
    let (mut one, mut two) = (bind(1, 1), bind(1, 2));
    let to = address(&two);
    let two_id = two.0.dialer.me;
    one.0.send(two_id, to, b"small".to_vec());
    let Received::Message { from, bytes } = next_while(&mut two, &mut one).await else {
        panic!("a message")
    };
    assert_eq!((from, bytes.as_slice()), (one.0.dialer.me, &b"small"[..]));

    one.0.send(two_id, to, vec![7; 100_000]);
    let Received::Message { bytes, .. } = next_while(&mut two, &mut one).await else {
        panic!("a message")
    };
    assert_eq!(bytes, vec![7; 100_000], "too large for a datagram, so it took a stream");

    // The response uses the connection that the other side has dialed.
    let back = address(&one);
    two.0.call(Call::Node(CallId(5)), one.0.dialer.me, back, b"question".to_vec());
    let Received::Request { reply, bytes, .. } = next_while(&mut one, &mut two).await else {
        panic!("a request")
    };
    assert_eq!(bytes, b"question");
    one.0.reply(reply, b"answer".to_vec());
    let Received::Answer { call, result } = next_while(&mut two, &mut one).await else {
        panic!("a response")
    };
    assert_eq!((call, result), (Call::Node(CallId(5)), Ok((one.0.dialer.me, b"answer".to_vec()))));

    // A request that is given up fails, and gets no empty response.
    two.0.call(Call::Node(CallId(6)), one.0.dialer.me, back, b"question".to_vec());
    let Received::Request { reply, .. } = next_while(&mut one, &mut two).await else {
        panic!("a request")
    };
    one.0.give_up(reply);
    let Received::Answer { call, result } = next_while(&mut two, &mut one).await else {
        panic!("a response")
    };
    assert!(
        call == Call::Node(CallId(6)) && matches!(result, Err(CallError::Unreachable(_))),
        "{result:?}"
    );
    assert_eq!((one.0.connections(), two.0.connections()), (1, 1));
}

#[tokio::test]
async fn member_that_moves_is_reached_at_its_new_address() {
    let (mut one, mut two) = (bind(1, 1), bind(1, 2));
    let (me, two_id, old) = (one.0.dialer.me, two.0.dialer.me, address(&two));
    one.0.send(two_id, old, b"hello".to_vec());
    next_while(&mut two, &mut one).await;
    // The old endpoint stays open and is not read, as one behind an address that is gone.
    let mut moved = bind(1, 2);
    let new = address(&moved);
    one.0.call(Call::Node(CallId(1)), two_id, new, b"question".to_vec());
    let Received::Request { from, .. } = next_while(&mut moved, &mut one).await else {
        panic!("a request")
    };
    assert_eq!((from, one.0.connections()), (me, 1));
}

#[tokio::test]
async fn connection_is_closed_when_its_secret_is_removed_during_the_handshake() {
    let (mut member, mut late) = (bind(1, 1), bind(1, 2));
    let (to, member_id) = (address(&member), member.0.dialer.me);
    late.0.send(member_id, to, b"hello".to_vec());
    // The handshake is complete, and the loop has not processed the event yet.
    let connected = member.1.recv().await.expect("an event");
    assert!(matches!(connected, Event::Connected { .. }), "{connected:?}");
    let key = NodeKey::from_seed([9; 32]).expect("a key");
    let newer = [Secret::new(vec![2; 32]).expect("long enough")];
    member.0.use_credentials(&Credentials::new(&newer, &key).expect("credentials"));
    assert!(member.0.handle(connected).is_none());
    assert_eq!(member.0.connections(), 0);
}

#[tokio::test]
async fn handshake_without_the_secret_fails() {
    let (non_member, mut member) = (bind(2, 1), bind(1, 2));
    let mut non_member = non_member;
    let to = address(&member).to_string();
    non_member.0.call_name(Call::Node(CallId(1)), to, b"let me in".to_vec());
    let Received::Answer { result: Err(error), .. } = next_received(&mut non_member).await else {
        panic!("no answer")
    };
    assert!(matches!(&error, CallError::OtherSecret(_)), "{error:?}");
    assert!(error.to_string().contains("or older than a rotation"), "{error}");
    assert!(member.1.try_recv().is_err(), "the member saw neither connection nor bytes");

    // A client that accepts any server still has a certificate of its own secret, or none.
    let roots = danger::client_without_certificate();
    let connecting = non_member
        .0
        .dialer
        .endpoint
        .connect_with(roots, address(&member), SERVER_NAME)
        .expect("dials");
    if let Ok(connection) = connecting.await {
        let _ = connection.send_datagram(b"let me in".to_vec().into());
        connection.closed().await;
    }
    assert!(member.1.try_recv().is_err(), "the member saw neither connection nor bytes");
}

#[tokio::test]
async fn call_fails_when_another_node_or_none_answers() {
    let (mut one, two) = (bind(1, 1), bind(1, 2));
    let expected = NodeKey::from_seed([9; 32]).expect("key").id();
    one.0.call(Call::Node(CallId(1)), expected, address(&two), b"hello".to_vec());
    let Received::Answer { result: Err(error), .. } = next_received(&mut one).await else {
        panic!()
    };
    assert!(error.to_string().contains("is node"), "{error}");

    let own = address(&one).to_string();
    one.0.call_name(Call::Node(CallId(2)), own, b"hello".to_vec());
    let Received::Answer { result: Err(error), .. } = next_received(&mut one).await else {
        panic!()
    };
    assert_eq!(error, CallError::Myself);

    one.0.call_name(Call::Node(CallId(3)), "no-such-host.invalid:1".to_owned(), b"hello".to_vec());
    let Received::Answer { result: Err(error), .. } = next_received(&mut one).await else {
        panic!()
    };
    assert!(matches!(&error, CallError::Unresolved { name, .. } if name == "no-such-host.invalid"));
}

#[tokio::test]
async fn port_in_use_is_reported() {
    let one = bind(1, 1);
    let secret = Secret::new(vec![1; 32]).expect("long enough");
    let key = NodeKey::from_seed([2; 32]).expect("key");
    let credentials = Credentials::new(&[secret], &key).expect("credentials");
    let error = Transport::bind(address(&one), &credentials).err().expect("taken").to_string();
    assert!(error.contains("in use") && error.contains("--listen"), "{error}");
}

mod danger {
    //! An attacker: a TLS client that accepts any server and has no certificate.

    use rustls::{
        DigitallySignedStruct, Error, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        pki_types::{CertificateDer, ServerName, UnixTime},
        version::TLS13,
    };

    use super::*;
    use crate::wire::WIRE_VERSION;

    #[derive(Debug)]
    struct AcceptAnyServer;

    impl ServerCertVerifier for AcceptAnyServer {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }
    }

    pub fn client_without_certificate() -> quinn::ClientConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAnyServer))
            .with_no_client_auth();
        tls.alpn_protocols = vec![format!("gossamer/{WIRE_VERSION}").into_bytes()];
        let quic = quinn::crypto::rustls::QuicClientConfig::try_from(tls).expect("suites");
        quinn::ClientConfig::new(Arc::new(quic))
    }
}

/// Starts a relay between two endpoints that can be blocked.
async fn relay(to: SocketAddr) -> (SocketAddr, Arc<std::sync::atomic::AtomicBool>) {
    let socket = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback");
    let address = socket.local_addr().expect("bound");
    let open = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let passes = open.clone();
    tokio::spawn(async move {
        let (mut buffer, mut dialer) = ([0; 2048], None);
        while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
            let next = if from == to { dialer } else { Some(to) };
            dialer = if from == to { dialer } else { Some(from) };
            if let Some(next) = next.filter(|_| passes.load(Ordering::Relaxed)) {
                let _ = socket.send_to(&buffer[..len], next).await;
            }
        }
    });
    (address, open)
}

#[tokio::test]
async fn connection_without_answers_is_recreated() {
    let (mut one, mut two) = (bind(1, 1), bind(1, 2));
    let two_id = two.0.dialer.me;
    let (way, open) = relay(address(&two)).await;
    one.0.send(two_id, way, b"hello".to_vec());
    next_while(&mut two, &mut one).await;
    assert_eq!(one.0.connections(), 1);

    open.store(false, Ordering::Relaxed);
    one.0.call(Call::Node(CallId(1)), two_id, way, b"question".to_vec());
    let Received::Answer { result: Err(_), .. } = next_received(&mut one).await else {
        panic!("silence")
    };
    assert_eq!(one.0.connections(), 0);

    open.store(true, Ordering::Relaxed);
    one.0.call(Call::Node(CallId(2)), two_id, way, b"question".to_vec());
    let Received::Request { reply, .. } = next_while(&mut two, &mut one).await else {
        panic!("a request")
    };
    two.0.reply(reply, b"answer".to_vec());
    let Received::Answer { result, .. } = next_while(&mut one, &mut two).await else {
        panic!("none")
    };
    assert_eq!(result, Ok((two_id, b"answer".to_vec())));
}

#[tokio::test]
async fn least_recently_used_connection_to_no_neighbor_is_closed() {
    let mut hub = bind(1, 0);
    let to = address(&hub);
    let mut spokes: Vec<Side> = Vec::new();
    for key in 1..=MAX_CONNECTIONS as u16 + 1 {
        let mut spoke = bind(1, key);
        spoke.0.send(hub.0.dialer.me, to, b"hello".to_vec());
        next_while(&mut hub, &mut spoke).await;
        hub.0.close_unused(&BTreeSet::from([spokes.first().unwrap_or(&spoke).0.dialer.me]));
        spokes.push(spoke);
    }
    assert_eq!(hub.0.connections(), MAX_CONNECTIONS);
    let kept = |spoke: &Side| {
        hub.0.peers.get(&spoke.0.dialer.me).is_some_and(|link| link.live().is_some())
    };
    assert!(kept(&spokes[0]), "the first is unused for longer, and a neighbor");
    assert!(!kept(&spokes[1]) && spokes[2..].iter().all(kept));
}

#[tokio::test]
async fn unused_connection_is_closed_by_the_node_that_opened_it_unless_the_peer_is_a_neighbor() {
    let mut hub = bind(1, 0);
    let mut spokes = Vec::new();
    for key in 1..=3 {
        let mut spoke = bind(1, key);
        let (id, to) = (spoke.0.dialer.me, address(&spoke));
        hub.0.send(id, to, b"hello".to_vec());
        next_while(&mut spoke, &mut hub).await;
        spokes.push(spoke);
    }
    let ids: Vec<NodeId> = spokes.iter().map(|spoke| spoke.0.dialer.me).collect();
    let long_ago = Instant::now().checked_sub(UNUSED_TIMEOUT).expect("uptime");
    for id in &ids[..2] {
        hub.0.peers.get_mut(id).expect("connected").last_used = Some(long_ago);
    }
    let spoke = &mut spokes[1].0;
    spoke.peers.get_mut(&hub.0.dialer.me).expect("connected").last_used = Some(long_ago);
    spoke.close_unused(&BTreeSet::new());
    assert_eq!(spoke.connections(), 1, "the node that opened it closes it first");
    hub.0.close_unused(&BTreeSet::from([ids[0]]));
    let is_open = |id: &NodeId| hub.0.peers[id].live().is_some();
    assert_eq!(ids.iter().map(is_open).collect::<Vec<_>>(), [true, false, true]);
}

/// Sends half a message on each of `streams` streams of one node, and never finishes them.
async fn stall(hub: &mut Side, key: u16, streams: usize, bytes: usize) -> (Side, Vec<SendStream>) {
    let mut node = bind(1, key);
    let (hub_id, to) = (hub.0.dialer.me, address(hub));
    node.0.send(hub_id, to, b"hello".to_vec());
    next_while(hub, &mut node).await;
    let connection = node.0.peers[&hub_id].live().expect("connected").clone();
    let mut open = Vec::new();
    for _ in 0..streams {
        let mut stream = connection.open_uni().await.expect("a stream");
        stream.write_all(&vec![0; bytes]).await.expect("written");
        open.push(stream);
    }
    (node, open)
}

/// Returns how long a request takes to arrive.
async fn request_delay(hub: &mut Side) -> Duration {
    let mut asking = bind(1, 1);
    let begun = Instant::now();
    asking.0.call(Call::Node(CallId(1)), hub.0.dialer.me, address(hub), b"question".to_vec());
    let Received::Request { .. } = next_while(hub, &mut asking).await else { panic!("a request") };
    begun.elapsed()
}

#[tokio::test]
async fn unfinished_messages_do_not_delay_other_nodes() {
    let mut hub = bind(1, 0);
    let mut stalled = Vec::new();
    for key in 2..22 {
        stalled.push(stall(&mut hub, key, 2, 66_000).await);
    }
    // Long before the unfinished messages time out.
    let took = request_delay(&mut hub).await;
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn messages_without_progress_release_their_room() {
    let mut hub = bind(1, 0);
    let mut stalled = Vec::new();
    for key in 2..18 {
        stalled.push(stall(&mut hub, key, 16, 60_000).await);
    }
    let took = request_delay(&mut hub).await;
    assert!(took < Duration::from_secs(5), "{took:?}");
}

/// Regression: a reply waited for its reader without a limit of time or memory.
#[tokio::test]
async fn replies_that_a_peer_does_not_read_are_dropped_beyond_its_budget_and_in_time() {
    let mut hub = bind(1, 0);
    let (node, _) = stall(&mut hub, 2, 0, 0).await;
    let connection = node.0.peers[&hub.0.dialer.me].live().expect("connected").clone();
    let mut answers = Vec::new();
    for _ in 0..16 {
        let (mut send, recv) = connection.open_bi().await.expect("a stream");
        send.write_all(b"everything").await.expect("written");
        send.finish().expect("open");
        let Received::Request { reply, .. } = next_received(&mut hub).await else {
            panic!("a request")
        };
        hub.0.reply(reply, vec![0; 700_000]);
        answers.push(recv);
    }
    let begun = Instant::now();
    let mut answers = answers.into_iter().rev();
    let refused = answers.next().expect("the last").read_to_end(1 << 20).await;
    assert!(refused.is_err(), "the budget is used up");
    assert!(begun.elapsed() < Duration::from_secs(2));
    // None of the others is read within the time limit.
    tokio::time::sleep(CALL_TIMEOUT).await;
    for mut answer in answers.take(10) {
        assert!(answer.read_to_end(1 << 20).await.is_err());
    }
}

//! Which questions are asked, and what follows from the answers.

use super::*;
use crate::{
    dataplane::{
        desired::Underlay,
        plan::tests::{dual_stack_view, underlay, view},
    },
    model::{Condition, Ports},
};

const DEVICE: u32 = 7;
const BRIDGE: u32 = 8;

fn net(text: &str) -> IpNet {
    text.parse().expect("a network")
}

fn desired(peers: u32) -> Desired {
    let members: Vec<(u8, u32)> = (0..=peers).map(|n| (n as u8 + 1, n + 1)).collect();
    Desired::new(&view(&members), &underlay(), &BTreeSet::new())
}

fn ground(inside: Option<u32>) -> Ground {
    let has: Vec<_> = inside.map(|link| (link, [10, 42, 1, 1].into())).into_iter().collect();
    Ground {
        device: DEVICE,
        underlay: 2,
        local: [192, 0, 2, 1].into(),
        own: vec![Own::new(net("10.42.1.0/24"), DEVICE, &has, None)],
        has: has.iter().map(|(_, ip)| *ip).collect(),
        masquerade: false,
        selected: Vec::new(),
    }
}

fn cause(number: u32) -> Cause {
    Cause::Table { table: number, priority: Some(number), interface: "d0".to_owned(), ipv4: true }
}

/// One pass in which the packets of one kind to some subjects go astray.
fn pass(
    audit: &mut Audit,
    desired: &Desired,
    astray: impl Fn(&Question) -> Option<Cause>,
) -> usize {
    let questions = audit.questions(desired, &ground(Some(BRIDGE)));
    let count = questions.len();
    audit.conclude(questions.into_iter().map(|question| (question, astray(&question))));
    count
}

#[test]
fn peers_are_asked_about_as_pods_send_and_receive() {
    let questions = Audit::default().questions(&desired(1), &ground(Some(BRIDGE)));
    let by_device = Expected::Way { link: DEVICE, gateway: Some([10, 42, 2, 0].into()) };
    let of = |kind: Kind| questions.iter().filter(move |q| q.kind == kind).collect::<Vec<_>>();
    let out = of(Kind::Out);
    assert_eq!(
        out.iter().take(4).map(|q| q.to.to_string()).collect::<Vec<_>>(),
        ["10.42.2.1", "10.42.2.254", "10.42.2.128", "10.42.2.64"]
    );
    assert!(out.iter().all(|q| q.input == Some(BRIDGE) && q.expected == by_device));
    assert!(out.iter().all(|q| q.from == Some([10, 42, 1, 254].into())));
    assert_eq!((of(Kind::Own)[0].input, of(Kind::Own)[0].from), (None, None));
    let comes_in = of(Kind::In)[0];
    assert_eq!((comes_in.input, comes_in.to), (Some(DEVICE), [10, 42, 1, 254].into()));
    assert_eq!(comes_in.expected, Expected::Way { link: BRIDGE, gateway: None });
    let filtered = of(Kind::PodsToHost)[0];
    assert_eq!((filtered.input, filtered.to), (Some(2), [192, 0, 2, 1].into()));
    assert_eq!(of(Kind::HostsToPods)[0].from, Some([192, 0, 2, 2].into()));
    // Without pods it is this host that sends, and nothing comes in.
    let questions = Audit::default().questions(&desired(1), &ground(None));
    let comes_in = [Kind::In, Kind::HostsToPods, Kind::Home];
    assert!(questions.iter().all(|q| !comes_in.contains(&q.kind)));
    assert!(questions.iter().all(|q| q.kind == Kind::PodsToHost || q.input.is_none()));
}

#[test]
fn address_of_a_host_that_is_filtered_is_not_asked_about_as_one_of_its_pods() {
    let (desired, mut audit) = (desired(1), Audit::default());
    let filter = Cause::Filter { interface: "gossamer.1".to_owned() };
    for _ in 0..3 {
        pass(&mut audit, &desired, |q| (q.kind == Kind::HostsToPods).then(|| filter.clone()));
    }
    let questions = audit.questions(&desired, &ground(Some(BRIDGE)));
    let of_pods = |q: &&Question| matches!(q.kind, Kind::Out | Kind::In);
    for question in questions.iter().filter(of_pods) {
        let there = if question.kind == Kind::Out { Some(question.to) } else { question.from };
        assert!(there.is_some_and(|ip| net("10.42.2.0/24").contains(&ip)), "{question:?}");
    }
    let said = audit.sentences(desired.pool.networks());
    assert!(said[0].contains("packets of other nodes' own addresses to pods here"), "{said:?}");
}

#[test]
fn each_family_is_asked_about_and_direct_and_withdrawn_peers_have_ways_of_their_own() {
    let view = dual_stack_view(&[(1, 1), (2, 2), (3, 3)]);
    let withdrawn = view.peers.keys().take(1).copied().collect();
    let direct = Underlay { mode: crate::dataplane::desired::Mode::Direct, ..underlay() };
    let desired = Desired::new(&view, &direct, &withdrawn);
    let mut ground = ground(Some(BRIDGE));
    let has = [(BRIDGE, "fd42:0:0:1::1".parse().expect("an address"))];
    ground.own.push(Own::new(net("fd42:0:0:1::/64"), DEVICE, &has, None));
    let questions = Audit::default().questions(&desired, &ground);
    let is_lost = |q: &&Question| q.expected == Expected::Nowhere;
    let lost: BTreeSet<IpNet> = questions.iter().filter(is_lost).map(|q| q.subject).collect();
    assert_eq!(lost.len(), 2, "both families of one peer: {lost:?}");
    let direct = questions.iter().filter(|q| q.kind == Kind::In && !lost.contains(&q.subject));
    let inputs: BTreeMap<bool, Option<u32>> = direct.map(|q| (q.to.is_ipv4(), q.input)).collect();
    assert_eq!(inputs, BTreeMap::from([(true, Some(2)), (false, Some(DEVICE))]));
}

#[test]
fn a_cause_is_told_once_however_many_peers_it_concerns_and_only_if_it_lasts() {
    let (desired, mut audit) = (desired(9), Audit::default());
    let networks = desired.pool.networks();
    let table = |q: &Question| (q.kind == Kind::Out).then(|| cause(52));
    pass(&mut audit, &desired, table);
    assert!(audit.sentences(networks).is_empty(), "it may be a change that is under way");
    assert!(audit.is_unfinished());
    pass(&mut audit, &desired, table);
    let said = audit.sentences(networks);
    assert_eq!(said.len(), 1, "{said:?}");
    for words in ["10.42.2.0/24, 10.42.3.0/24, 10.42.4.0/24, 6 more", "table 52", "ip rule 52"] {
        assert!(said[0].contains(words), "{words}: {said:?}");
    }
    assert_eq!(audit.astray().len(), 9);
    assert!(!audit.is_unfinished());
    pass(&mut audit, &desired, |_| None);
    assert!(audit.sentences(networks).is_empty() && audit.astray().is_empty());
}

#[test]
fn a_thousand_peers_are_asked_in_turn_and_those_in_doubt_each_time() {
    let members: Vec<(u8, u32)> = (0..250).map(|n| (n as u8, n + 1)).collect();
    let desired = Desired::new(&view(&members), &underlay(), &BTreeSet::new());
    let mut audit = Audit::default();
    audit.begin();
    let doubted = net("10.42.9.0/24");
    let mut asked = BTreeSet::new();
    let mut passes = 0;
    loop {
        passes += 1;
        let questions = audit.questions(&desired, &ground(Some(BRIDGE)));
        let about_peers = questions.iter().filter(|q| q.kind != Kind::Home).count();
        assert!(about_peers < QUESTIONS + 10, "{about_peers}");
        assert!(passes < 3 || questions.iter().any(|q| q.subject == doubted));
        asked.extend(questions.iter().filter(|q| q.kind != Kind::Home).map(|q| q.subject));
        let astray = |q: &Question| (q.subject == doubted).then(|| cause(52));
        audit.conclude(questions.into_iter().map(|question| (question, astray(&question))));
        if !audit.is_unfinished() {
            break;
        }
    }
    assert_eq!(asked.len(), 249);
    assert!((3..=4).contains(&passes), "{passes}");
    // One that is gone is in doubt no more.
    let desired = Desired::new(&view(&[(1, 1), (2, 2)]), &underlay(), &BTreeSet::new());
    pass(&mut audit, &desired, |_| None);
    assert!(audit.astray().is_empty());
}

#[test]
fn one_route_for_all_is_asked_about_where_no_other_outranks_it() {
    let mut desired = desired(2);
    let pool = net("10.42.0.0/16");
    desired.tables.routes.insert(pool, Hop::new(Way::Device, 1));
    let mut audit = Audit::default();
    for _ in 0..300 {
        let questions = audit.questions(&desired, &ground(Some(BRIDGE)));
        let wide: Vec<_> = questions.iter().filter(|q| q.subject == pool).collect();
        let covered = |ip: IpAddr| (1..4).any(|n| net(&format!("10.42.{n}.0/24")).contains(&ip));
        let asked = wide.iter().filter(|q| matches!(q.kind, Kind::Out | Kind::Own));
        assert!(asked.clone().count() > 1 && asked.clone().all(|q| !covered(q.to)), "{wide:?}");
        audit.conclude(questions.into_iter().map(|question| (question, None)));
    }
}

#[test]
fn the_own_subnet_is_asked_about_as_a_whole_and_what_takes_a_part_of_it_is_told_as_long_as_it_does()
{
    let (desired, mut audit) = (desired(1), Audit::default());
    let own = net("10.42.1.0/24");
    let mut asked = BTreeSet::new();
    for _ in 0..4 {
        let questions = audit.questions(&desired, &ground(Some(BRIDGE)));
        let home: Vec<_> = questions.iter().filter(|q| q.kind == Kind::Home).collect();
        assert!(home.iter().all(|q| q.expected == Expected::Way { link: BRIDGE, gateway: None }));
        let from = Some([10, 42, 2, 254].into());
        let inputs: BTreeSet<_> = home.iter().map(|q| (q.input, q.from)).collect();
        assert_eq!(inputs, BTreeSet::from([(None, None), (Some(DEVICE), from)]));
        asked.extend(home.iter().map(|q| q.to));
        audit.conclude(questions.into_iter().map(|question| (question, None)));
    }
    // All but the network's address, the gateway's and that for broadcasts.
    assert_eq!(asked, own.hosts().skip(1).collect());
    // A route that has just been made is asked about at once, and as long as it is there.
    let stolen: [IpAddr; 2] = [[10, 42, 1, 5].into(), [10, 42, 1, 200].into()];
    audit.suspect(stolen);
    let route = |q: &Question| {
        let found = stolen.iter().find(|ip| **ip == q.to && q.kind == Kind::Home);
        found.map(|ip| Cause::Route {
            destination: IpNet::from(*ip),
            metric: 0,
            interface: "d0".to_owned(),
            ours: None,
            condition: Condition::default(),
        })
    };
    for _ in 0..6 {
        pass(&mut audit, &desired, route);
        if audit.is_unfinished() {
            continue;
        }
        let said = audit.sentences(desired.pool.networks());
        assert!(
            said.len() == 2 && said[0].contains("ip route del 10.42.1.5/32 dev d0"),
            "{said:?}"
        );
    }
    assert!(audit.astray().is_empty(), "peers have nothing to do with it");
    pass(&mut audit, &desired, |_| None);
    assert!(audit.sentences(desired.pool.networks()).is_empty());
    // What takes packets to peers too is told as that.
    for _ in 0..2 {
        pass(&mut audit, &desired, |q| (q.input != Some(2)).then(|| cause(52)));
    }
    let said = audit.sentences(desired.pool.networks());
    assert!(said.len() == 1 && said[0].starts_with("packets of pods to 10.42.2.0/24 "), "{said:?}");
}

#[test]
fn an_own_ipv6_subnet_is_asked_about_where_pods_are() {
    let mut ground = ground(Some(BRIDGE));
    let own = net("fd42:0:0:1::/64");
    ground.own = vec![Own::new(own, DEVICE, &[], Some(BRIDGE))];
    let questions = Audit::default().questions(&desired(1), &ground);
    let home: BTreeSet<_> =
        questions.iter().filter(|q| q.kind == Kind::Home).map(|q| q.to).collect();
    for address in ["fd42:0:0:1::80", "fd42:0:0:1:8000::", "fd42:0:0:1:4000::"] {
        assert!(home.contains(&address.parse().expect("an address")), "{address}: {home:?}");
    }
}

#[test]
fn addresses_in_turn_find_a_narrow_route_in_few_passes() {
    let subnet = net("10.42.7.0/24");
    let narrow = net("10.42.7.64/27");
    let found = (1..).find(|number| narrow.contains(&between(subnet, *number)));
    assert!(found.is_some_and(|pass| pass <= 8), "{found:?}");
    let six = net("fd42:0:0:7::/64");
    assert!((1..99).all(|number| six.contains(&between(six, number))));
    assert_eq!(between(net("10.42.7.1/32"), 3), net("10.42.7.1/32").addr());
}

#[test]
fn an_address_that_went_astray_or_has_a_route_of_its_own_is_asked_about_again() {
    let (desired, mut audit) = (desired(9), Audit::default());
    let narrow: IpAddr = [10, 42, 3, 77].into();
    pass(&mut audit, &desired, |_| None);
    audit.suspect([narrow, [10, 42, 1, 9].into()]);
    let astray = |q: &Question| (q.kind == Kind::Out && q.to == narrow).then(|| cause(52));
    for _ in 0..5 {
        pass(&mut audit, &desired, astray);
    }
    assert_eq!(audit.astray(), BTreeSet::from([net("10.42.3.0/24")]));
    pass(&mut audit, &desired, |_| None);
    assert!(audit.astray().is_empty());
}

#[test]
fn what_wins_is_named_with_what_helps() {
    let question = Question {
        kind: Kind::Out,
        subject: net("10.42.2.0/24"),
        from: Some([10, 42, 1, 254].into()),
        to: [10, 42, 2, 1].into(),
        input: Some(BRIDGE),
        expected: Expected::Way { link: DEVICE, gateway: Some([10, 42, 2, 0].into()) },
        selector: None,
    };
    let fact = |name: &str| Fact { name: name.to_owned(), forwards: true, ..Fact::default() };
    let healthy = Evidence {
        input: Some(fact("gsm0")),
        output: Some(fact("tun.0")),
        wanted: Some(fact("gossamer.1")),
        back: Some(BRIDGE),
        ours: Some(3),
        rules: vec![(0, 255, false), (5270, 52, false), (32766, 254, false)],
        forwards: true,
        ..Evidence::default()
    };
    let by = |table| Answer::Way { link: 3, gateway: None, table };
    let in_vrf = Fact { vrf: Some(("blue".to_owned(), 10)), ..fact("gsm0") };
    let refusals = [("10.42.2.0/25", "blackhole", MAIN), ("10.42.0.0/16", "prohibit", 99)];
    let refusals: Vec<_> = refusals
        .iter()
        .map(|(to, kind, table)| (net(to), *kind, *table, Condition::default()))
        .collect();
    let cases = [
        (
            question,
            by(52),
            healthy.clone(),
            "ip rule add to 10.42.0.0/16 lookup main priority 5269",
        ),
        (question, by(60), healthy.clone(), "table 60 has a route for them (see ip rule)"),
        (
            question,
            by(MAIN),
            Evidence { entry: Some((net("10.42.2.0/24"), 0)), ..healthy.clone() },
            "its metric is 0, ours is 3; remove it (ip route del 10.42.2.0/24 metric 0)",
        ),
        (
            question,
            by(MAIN),
            Evidence { entry: Some((net("10.42.2.0/25"), 4)), ..healthy.clone() },
            "more specific than the overlay's: remove it (ip route del 10.42.2.0/25 metric 4)",
        ),
        (
            question,
            by(10),
            Evidence { input: Some(in_vrf.clone()), ..healthy.clone() },
            "ip link set gsm0 nomaster",
        ),
        (
            question,
            Answer::Refused(113),
            Evidence { input: Some(in_vrf), ..healthy.clone() },
            "gsm0 is in VRF blue",
        ),
        (
            question,
            Answer::Refused(22),
            Evidence { refusals: refusals.clone(), ..healthy.clone() },
            "ip route del blackhole 10.42.2.0/25)",
        ),
        (
            question,
            Answer::Refused(113),
            Evidence { input: Some(Fact { forwards: false, ..fact("br.7") }), ..healthy.clone() },
            "sysctl -w net.ipv4.conf.br/7.forwarding=1",
        ),
        (
            question,
            Answer::Refused(13),
            Evidence { rules: vec![(100, 0, true)], ..healthy.clone() },
            "dropped by ip rule 100; let the overlay come first",
        ),
        (question, Answer::Refused(113), healthy.clone(), "find no way here: No route to host"),
        (
            question,
            Answer::Refused(101),
            Evidence { without_main: true, ..healthy.clone() },
            "no ip rule leads to table main, where the overlay's routes are: ip rule add to 10.42.0.0/16 \
             lookup main priority 32766",
        ),
        (
            Question { kind: Kind::PodsToHost, expected: Expected::Unfiltered, ..question },
            Answer::Refused(22),
            Evidence {
                input: Some(Fact { filters: true, ..fact("eth0") }),
                back: Some(DEVICE),
                ..healthy.clone()
            },
            "rp_filter of eth0 drops packets of other nodes' pods to this host's own address",
        ),
        (
            Question {
                input: Some(DEVICE),
                to: [10, 42, 1, 254].into(),
                kind: Kind::In,
                ..question
            },
            Answer::Refused(EXDEV),
            Evidence { input: Some(fact("gossamer.1")), ..healthy.clone() },
            "sysctl -w net.ipv4.conf.gossamer/1.rp_filter=2",
        ),
    ];
    for (question, answer, evidence, words) in cases {
        assert!(!question.agrees(answer), "{words}");
        let cause = Cause::of(&question, answer, &evidence).expect(words);
        let said = cause.sentence(question.kind, "10.42.2.0/24", net("10.42.0.0/16"));
        assert!(said.as_ref().is_some_and(|said| said.contains(words)), "{words}: {said:?}");
    }
    // A route of a table to which no rule leads drops nothing.
    let others = Evidence { refusals: refusals[1..].to_vec(), ..healthy.clone() };
    let cause = Cause::of(&question, Answer::Refused(13), &others);
    assert_eq!(cause, Some(Cause::Unknown { errno: 13 }));
    // What is told as an overlap or by a sysctl, and what has nothing to do with the question.
    let connected = Evidence { connected: true, ..healthy.clone() };
    for cause in
        [Cause::of(&question, by(255), &healthy), Cause::of(&question, by(MAIN), &connected)]
    {
        let cause = cause.expect("a cause");
        assert_eq!(cause.sentence(Kind::Out, "", net("10.42.0.0/16")), None, "{cause:?}");
    }
    let off = Evidence { forwards: false, ..healthy.clone() };
    let cause = Cause::of(&question, Answer::Refused(113), &off).expect("a cause");
    assert_eq!(cause.sentence(Kind::Out, "", net("10.42.0.0/16")), None);
    let other = Question { expected: Expected::Unfiltered, ..question };
    assert_eq!(Cause::of(&other, Answer::Refused(22), &healthy), None);
}

/// Packets that rules select are asked about with addresses and ports that the rules take, and with no
/// address of the host itself.
#[test]
fn packets_that_rules_select_are_asked_about_as_rules_select_them() {
    let selector = |from: Option<&str>, to: Option<&str>, dport: Option<u16>| Selector {
        priority: Some(100),
        from: from.map(net),
        to: to.map(net),
        destination: dport.map(|port| Ports { first: port, last: port }),
        ..Selector::default()
    };
    let asked = |selector: Selector, input: Option<u32>| {
        let mut ground = ground(Some(BRIDGE));
        ground.selected = vec![Selected { selector, input, ipv4: true }];
        let questions = Audit::default().questions(&desired(1), &ground).into_iter();
        let selected = questions.filter(|question| question.selector == Some(selector));
        let shown =
            |q: Question| format!("{:?} {} {}", q.kind, q.from.expect("an address of a pod"), q.to);
        selected.map(shown).collect::<Vec<_>>()
    };
    let one = selector(Some("10.42.1.9/32"), None, None);
    assert_eq!(asked(one, None), ["Out 10.42.1.9 10.42.2.1"]);
    let half = selector(Some("10.42.1.0/25"), None, None);
    assert_eq!(asked(half, None), ["Out 10.42.1.64 10.42.2.1"]);
    let of_both = ["Out 10.42.1.254 10.42.2.1", "In 10.42.2.16 10.42.1.254"];
    assert_eq!(asked(selector(None, None, Some(80)), None), of_both);
    assert_eq!(asked(selector(None, None, Some(80)), Some(BRIDGE)), of_both[..1]);
    assert_eq!(asked(selector(None, None, Some(80)), Some(DEVICE)), of_both[1..]);
    let to = selector(None, Some("10.42.2.128/25"), None);
    assert_eq!(asked(to, None), ["Out 10.42.1.254 10.42.2.128"]);
    let gateway = selector(Some("10.42.1.1/32"), None, None);
    assert_eq!(asked(gateway, None), [""; 0]);
    assert_eq!(asked(selector(Some("192.0.2.0/24"), None, None), None), [""; 0]);
}

/// A rule that takes all packets is told once; one that takes some is told with what it selects.
#[test]
fn rule_that_takes_some_packets_is_told_with_what_it_selects() {
    let selector = Selector {
        priority: Some(100),
        destination: Some(Ports { first: 80, last: 90 }),
        ..Selector::default()
    };
    let told = |some_only: bool| {
        let (desired, mut audit) = (desired(1), Audit::default());
        let mut ground = ground(Some(BRIDGE));
        ground.selected = vec![Selected { selector, input: None, ipv4: true }];
        for _ in 0..2 {
            let questions = audit.questions(&desired, &ground).into_iter();
            let answered = questions.map(|question| {
                let cause = match question.selector {
                    Some(selector) => {
                        Some(Cause::Selected { selector, cause: Box::new(cause(100)) })
                    }
                    None => (!some_only && question.kind == Kind::Out).then(|| cause(100)),
                };
                (question, cause)
            });
            audit.conclude(answered.collect::<Vec<_>>());
        }
        audit.sentences(desired.pool.networks())
    };
    let some = told(true);
    assert_eq!(some.len(), 1, "{some:?}");
    let words = "packets of pods to 10.42.2.0/24 that rule 100 selects (dport 80-90) leave by d0";
    assert!(some[0].starts_with(words), "{some:?}");
    let all = told(false);
    assert_eq!(all.len(), 1, "{all:?}");
    assert!(all[0].starts_with("packets of pods to 10.42.2.0/24 leave by d0"), "{all:?}");
}

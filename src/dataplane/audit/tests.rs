//! Tests of which lookups are chosen, and of the causes that follow from the results.

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
/// The rule of the local table has the priority 0, as by default.
const LOCAL_FIRST: LocalPriorities = LocalPriorities { ipv4: 0, ipv6: 0 };

fn net(text: &str) -> IpNet {
    text.parse().expect("a network")
}

fn desired(peers: u32) -> Desired {
    let members: Vec<(u8, u32)> = (0..=peers).map(|n| (n as u8 + 1, n + 1)).collect();
    Desired::new(&view(&members), &underlay(), &BTreeSet::new())
}

fn host(inside: Option<u32>) -> HostState {
    let has: Vec<_> = inside.map(|link| (link, [10, 42, 1, 1].into())).into_iter().collect();
    HostState {
        device: DEVICE,
        underlay: 2,
        local: [192, 0, 2, 1].into(),
        own: vec![OwnSubnet::new(net("10.42.1.0/24"), DEVICE, &has, None)],
        has: has.iter().map(|(_, ip)| *ip).collect(),
        masquerade: false,
        selected: Vec::new(),
    }
}

fn cause(number: u32) -> Cause {
    Cause::Table { table: number, priority: Some(number), interface: "d0".to_owned(), ipv4: true }
}

/// Runs one pass in which `diverted` gives the cause of each deviation; returns the number of
/// lookups.
fn pass(
    audit: &mut Audit,
    desired: &Desired,
    diverted: impl Fn(&Lookup) -> Option<Cause>,
) -> usize {
    let lookups = audit.lookups(desired, &host(Some(BRIDGE)));
    let count = lookups.len();
    audit.evaluate(lookups.into_iter().map(|lookup| (lookup, diverted(&lookup))));
    count
}

#[test]
fn lookups_are_of_packets_as_pods_send_and_receive_them() {
    let lookups = Audit::default().lookups(&desired(1), &host(Some(BRIDGE)));
    let by_device = Expected::Way { link: DEVICE, gateway: Some([10, 42, 2, 0].into()) };
    let of = |kind: Kind| lookups.iter().filter(move |q| q.kind == kind).collect::<Vec<_>>();
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
    // Without pods, this host itself is the sender, and no packet arrives for pods.
    let lookups = Audit::default().lookups(&desired(1), &host(None));
    let comes_in = [Kind::In, Kind::HostsToPods, Kind::Home];
    assert!(lookups.iter().all(|q| !comes_in.contains(&q.kind)));
    assert!(lookups.iter().all(|q| q.kind == Kind::PodsToHost || q.input.is_none()));
}

#[test]
fn filtered_host_address_is_not_looked_up_as_a_pod_address() {
    let (desired, mut audit) = (desired(1), Audit::default());
    let filter = Cause::Filter { interface: "gossamer.1".to_owned() };
    for _ in 0..3 {
        pass(&mut audit, &desired, |q| (q.kind == Kind::HostsToPods).then(|| filter.clone()));
    }
    let lookups = audit.lookups(&desired, &host(Some(BRIDGE)));
    let of_pods = |q: &&Lookup| matches!(q.kind, Kind::Out | Kind::In);
    for lookup in lookups.iter().filter(of_pods) {
        let there = if lookup.kind == Kind::Out { Some(lookup.to) } else { lookup.from };
        assert!(there.is_some_and(|ip| net("10.42.2.0/24").contains(&ip)), "{lookup:?}");
    }
    let sentences = audit.problems(desired.pool.networks(), LOCAL_FIRST);
    assert!(
        sentences[0].contains("packets of other nodes' own addresses to pods here"),
        "{sentences:?}"
    );
}

#[test]
fn lookups_cover_both_families_and_expect_the_ways_of_direct_and_withdrawn_peers() {
    let view = dual_stack_view(&[(1, 1), (2, 2), (3, 3)]);
    let withdrawn = view.peers.keys().take(1).copied().collect();
    let direct = Underlay { mode: crate::dataplane::desired::Mode::Direct, ..underlay() };
    let desired = Desired::new(&view, &direct, &withdrawn);
    let mut host = host(Some(BRIDGE));
    let has = [(BRIDGE, "fd42:0:0:1::1".parse().expect("an address"))];
    host.own.push(OwnSubnet::new(net("fd42:0:0:1::/64"), DEVICE, &has, None));
    let lookups = Audit::default().lookups(&desired, &host);
    let is_lost = |q: &&Lookup| q.expected == Expected::Nowhere;
    let lost: BTreeSet<IpNet> = lookups.iter().filter(is_lost).map(|q| q.subject).collect();
    assert_eq!(lost.len(), 2, "both families of one peer: {lost:?}");
    let direct = lookups.iter().filter(|q| q.kind == Kind::In && !lost.contains(&q.subject));
    let inputs: BTreeMap<bool, Option<u32>> = direct.map(|q| (q.to.is_ipv4(), q.input)).collect();
    assert_eq!(inputs, BTreeMap::from([(true, Some(2)), (false, Some(DEVICE))]));
}

#[test]
fn cause_is_reported_once_for_all_peers_and_only_after_two_passes() {
    let (desired, mut audit) = (desired(9), Audit::default());
    let networks = desired.pool.networks();
    let table = |q: &Lookup| (q.kind == Kind::Out).then(|| cause(52));
    pass(&mut audit, &desired, table);
    assert!(
        audit.problems(networks, LOCAL_FIRST).is_empty(),
        "it may be a change that is under way"
    );
    assert!(audit.is_unfinished());
    pass(&mut audit, &desired, table);
    let sentences = audit.problems(networks, LOCAL_FIRST);
    assert_eq!(sentences.len(), 1, "{sentences:?}");
    for words in ["10.42.2.0/24, 10.42.3.0/24, 10.42.4.0/24 and 6 more", "table 52", "ip rule 52"] {
        assert!(sentences[0].contains(words), "{words}: {sentences:?}");
    }
    assert_eq!(audit.diverted().len(), 9);
    assert!(!audit.is_unfinished());
    pass(&mut audit, &desired, |_| None);
    assert!(audit.problems(networks, LOCAL_FIRST).is_empty() && audit.diverted().is_empty());
}

#[test]
fn many_peers_are_looked_up_in_turn_and_deviating_ones_in_each_pass() {
    let members: Vec<(u8, u32)> = (0..250).map(|n| (n as u8, n + 1)).collect();
    let desired = Desired::new(&view(&members), &underlay(), &BTreeSet::new());
    let mut audit = Audit::default();
    audit.begin();
    let deviating = net("10.42.9.0/24");
    let mut looked_up = BTreeSet::new();
    let mut passes = 0;
    loop {
        passes += 1;
        let lookups = audit.lookups(&desired, &host(Some(BRIDGE)));
        let about_peers = lookups.iter().filter(|q| q.kind != Kind::Home).count();
        assert!(about_peers < MAX_LOOKUPS + 10, "{about_peers}");
        assert!(passes < 3 || lookups.iter().any(|q| q.subject == deviating));
        looked_up.extend(lookups.iter().filter(|q| q.kind != Kind::Home).map(|q| q.subject));
        let diverted = |q: &Lookup| (q.subject == deviating).then(|| cause(52));
        audit.evaluate(lookups.into_iter().map(|lookup| (lookup, diverted(&lookup))));
        if !audit.is_unfinished() {
            break;
        }
    }
    assert_eq!(looked_up.len(), 249);
    assert!((3..=4).contains(&passes), "{passes}");
    // A subnet that is gone has no deviations.
    let desired = Desired::new(&view(&[(1, 1), (2, 2)]), &underlay(), &BTreeSet::new());
    pass(&mut audit, &desired, |_| None);
    assert!(audit.diverted().is_empty());
}

#[test]
fn pool_route_is_looked_up_where_no_other_route_outranks_it() {
    let mut desired = desired(2);
    let pool = net("10.42.0.0/16");
    desired.tables.routes.insert(pool, Hop::new(RouteTarget::Device, 1));
    let mut audit = Audit::default();
    for _ in 0..300 {
        let lookups = audit.lookups(&desired, &host(Some(BRIDGE)));
        let wide: Vec<_> = lookups.iter().filter(|q| q.subject == pool).collect();
        let covered = |ip: IpAddr| (1..4).any(|n| net(&format!("10.42.{n}.0/24")).contains(&ip));
        let looked_up = wide.iter().filter(|q| matches!(q.kind, Kind::Out | Kind::Own));
        assert!(
            looked_up.clone().count() > 1 && looked_up.clone().all(|q| !covered(q.to)),
            "{wide:?}"
        );
        audit.evaluate(lookups.into_iter().map(|lookup| (lookup, None)));
    }
}

#[test]
fn own_subnet_is_covered_completely_and_a_foreign_route_is_reported_while_it_exists() {
    let (desired, mut audit) = (desired(1), Audit::default());
    let own = net("10.42.1.0/24");
    let mut looked_up = BTreeSet::new();
    for _ in 0..4 {
        let lookups = audit.lookups(&desired, &host(Some(BRIDGE)));
        let home: Vec<_> = lookups.iter().filter(|q| q.kind == Kind::Home).collect();
        assert!(home.iter().all(|q| q.expected == Expected::Way { link: BRIDGE, gateway: None }));
        let from = Some([10, 42, 2, 254].into());
        let inputs: BTreeSet<_> = home.iter().map(|q| (q.input, q.from)).collect();
        assert_eq!(inputs, BTreeSet::from([(None, None), (Some(DEVICE), from)]));
        looked_up.extend(home.iter().map(|q| q.to));
        audit.evaluate(lookups.into_iter().map(|lookup| (lookup, None)));
    }
    // All but the network's address, the gateway's and the broadcast address.
    assert_eq!(looked_up, own.hosts().skip(1).collect());
    // A new foreign route is looked up at once, and in each pass while it exists.
    let stolen: [IpAddr; 2] = [[10, 42, 1, 5].into(), [10, 42, 1, 200].into()];
    audit.suspect(stolen);
    let route = |q: &Lookup| {
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
        let sentences = audit.problems(desired.pool.networks(), LOCAL_FIRST);
        assert!(
            sentences.len() == 2 && sentences[0].contains("ip route del 10.42.1.5/32 dev d0"),
            "{sentences:?}"
        );
    }
    assert!(audit.diverted().is_empty(), "peers have nothing to do with it");
    pass(&mut audit, &desired, |_| None);
    assert!(audit.problems(desired.pool.networks(), LOCAL_FIRST).is_empty());
    // A cause that also affects packets to peers is reported for those.
    for _ in 0..2 {
        pass(&mut audit, &desired, |q| (q.input != Some(2)).then(|| cause(52)));
    }
    let sentences = audit.problems(desired.pool.networks(), LOCAL_FIRST);
    assert!(
        sentences.len() == 1 && sentences[0].starts_with("packets of pods to 10.42.2.0/24 "),
        "{sentences:?}"
    );
}

#[test]
fn own_ipv6_subnet_is_looked_up_where_pods_are() {
    let mut host = host(Some(BRIDGE));
    let own = net("fd42:0:0:1::/64");
    host.own = vec![OwnSubnet::new(own, DEVICE, &[], Some(BRIDGE))];
    let lookups = Audit::default().lookups(&desired(1), &host);
    let home: BTreeSet<_> = lookups.iter().filter(|q| q.kind == Kind::Home).map(|q| q.to).collect();
    for address in ["fd42:0:0:1::80", "fd42:0:0:1:8000::", "fd42:0:0:1:4000::"] {
        assert!(home.contains(&address.parse().expect("an address")), "{address}: {home:?}");
    }
}

#[test]
fn spread_addresses_find_a_narrow_route_in_few_passes() {
    let subnet = net("10.42.7.0/24");
    let narrow = net("10.42.7.64/27");
    let found = (1..).find(|number| narrow.contains(&spread_address(subnet, *number)));
    assert!(found.is_some_and(|pass| pass <= 8), "{found:?}");
    let six = net("fd42:0:0:7::/64");
    assert!((1..99).all(|number| six.contains(&spread_address(six, number))));
    assert_eq!(spread_address(net("10.42.7.1/32"), 3), net("10.42.7.1/32").addr());
}

#[test]
fn diverted_or_suspected_address_is_looked_up_again() {
    let (desired, mut audit) = (desired(9), Audit::default());
    let narrow: IpAddr = [10, 42, 3, 77].into();
    pass(&mut audit, &desired, |_| None);
    audit.suspect([narrow, [10, 42, 1, 9].into()]);
    let diverted = |q: &Lookup| (q.kind == Kind::Out && q.to == narrow).then(|| cause(52));
    for _ in 0..5 {
        pass(&mut audit, &desired, diverted);
    }
    assert_eq!(audit.diverted(), BTreeSet::from([net("10.42.3.0/24")]));
    pass(&mut audit, &desired, |_| None);
    assert!(audit.diverted().is_empty());
}

#[test]
#[expect(clippy::too_many_lines, reason = "one line for each cause")]
fn cause_is_reported_with_the_command_that_removes_it() {
    let lookup = Lookup {
        kind: Kind::Out,
        subject: net("10.42.2.0/24"),
        from: Some([10, 42, 1, 254].into()),
        to: [10, 42, 2, 1].into(),
        input: Some(BRIDGE),
        expected: Expected::Way { link: DEVICE, gateway: Some([10, 42, 2, 0].into()) },
        selector: None,
    };
    let fact = |name: &str| InterfaceState {
        name: name.to_owned(),
        forwards: true,
        ..InterfaceState::default()
    };
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
    let by = |table| LookupResult::Way { link: 3, gateway: None, table };
    let in_vrf = InterfaceState { vrf: Some(("blue".to_owned(), 10)), ..fact("gsm0") };
    let refusals = [("10.42.2.0/25", "blackhole", MAIN), ("10.42.0.0/16", "prohibit", 99)];
    let refusals: Vec<_> = refusals
        .iter()
        .map(|(to, kind, table)| (net(to), *kind, *table, Condition::default()))
        .collect();
    let cases = [
        (lookup, by(52), healthy.clone(), "ip rule add to 10.42.0.0/16 lookup main priority 5269"),
        (lookup, by(60), healthy.clone(), "table 60 has a route for them: see ip rule"),
        (
            lookup,
            by(MAIN),
            Evidence { entry: Some((net("10.42.2.0/24"), 0)), ..healthy.clone() },
            "its metric is 0, the overlay's is 3: remove it (ip route del 10.42.2.0/24 metric 0)",
        ),
        (
            lookup,
            by(MAIN),
            Evidence { entry: Some((net("10.42.2.0/25"), 4)), ..healthy.clone() },
            "more specific than the overlay's: remove it (ip route del 10.42.2.0/25 metric 4)",
        ),
        (
            lookup,
            by(10),
            Evidence { input: Some(in_vrf.clone()), ..healthy.clone() },
            "ip link set gsm0 nomaster",
        ),
        (
            lookup,
            LookupResult::Refused(113),
            Evidence { input: Some(in_vrf), ..healthy.clone() },
            "gsm0 is in VRF blue",
        ),
        (
            lookup,
            LookupResult::Refused(22),
            Evidence { refusals: refusals.clone(), ..healthy.clone() },
            "ip route del blackhole 10.42.2.0/25)",
        ),
        (
            lookup,
            LookupResult::Refused(113),
            Evidence {
                input: Some(InterfaceState { forwards: false, ..fact("br.7") }),
                ..healthy.clone()
            },
            "sysctl -w net.ipv4.conf.br/7.forwarding=1",
        ),
        (
            lookup,
            LookupResult::Refused(13),
            Evidence { rules: vec![(100, 0, true)], ..healthy.clone() },
            "dropped by ip rule 100: give the overlay precedence",
        ),
        (
            lookup,
            LookupResult::Refused(113),
            healthy.clone(),
            "have no route here: No route to host",
        ),
        (
            lookup,
            LookupResult::Refused(101),
            Evidence { without_main: true, ..healthy.clone() },
            "no ip rule leads to table main, where the overlay's routes are: ip rule add to 10.42.0.0/16 \
             lookup main priority 32766",
        ),
        (
            Lookup { kind: Kind::PodsToHost, expected: Expected::Unfiltered, ..lookup },
            LookupResult::Refused(22),
            Evidence {
                input: Some(InterfaceState { filters: true, ..fact("eth0") }),
                back: Some(DEVICE),
                ..healthy.clone()
            },
            "rp_filter of eth0 drops packets of other nodes' pods to this host's own address",
        ),
        (
            Lookup { input: Some(DEVICE), to: [10, 42, 1, 254].into(), kind: Kind::In, ..lookup },
            LookupResult::Refused(EXDEV),
            Evidence { input: Some(fact("gossamer.1")), ..healthy.clone() },
            "sysctl -w net.ipv4.conf.gossamer/1.rp_filter=2",
        ),
    ];
    for (lookup, result, evidence, words) in cases {
        assert!(!lookup.agrees(result), "{words}");
        let cause = Cause::of(&lookup, result, &evidence).expect(words);
        let sentences =
            cause.problem(lookup.kind, "10.42.2.0/24", net("10.42.0.0/16"), LOCAL_FIRST);
        assert!(
            sentences.as_ref().is_some_and(|sentences| sentences.contains(words)),
            "{words}: {sentences:?}"
        );
    }
    // A route in a table to which no rule leads drops nothing.
    let others = Evidence { refusals: refusals[1..].to_vec(), ..healthy.clone() };
    let cause = Cause::of(&lookup, LookupResult::Refused(13), &others);
    assert_eq!(cause, Some(Cause::Unknown { errno: 13 }));
    // Causes that other checks report, and causes that are irrelevant for the lookup.
    let connected = Evidence { connected: true, ..healthy.clone() };
    for cause in [Cause::of(&lookup, by(255), &healthy), Cause::of(&lookup, by(MAIN), &connected)] {
        let cause = cause.expect("a cause");
        assert_eq!(
            cause.problem(Kind::Out, "", net("10.42.0.0/16"), LOCAL_FIRST),
            None,
            "{cause:?}"
        );
    }
    let off = Evidence { forwards: false, ..healthy.clone() };
    let cause = Cause::of(&lookup, LookupResult::Refused(113), &off).expect("a cause");
    assert_eq!(cause.problem(Kind::Out, "", net("10.42.0.0/16"), LOCAL_FIRST), None);
    let other = Lookup { expected: Expected::Unfiltered, ..lookup };
    assert_eq!(Cause::of(&other, LookupResult::Refused(22), &healthy), None);
}

/// Lookups have addresses and ports that the rules select, and no address of the host itself.
#[test]
fn lookups_of_selected_packets_match_the_selector() {
    let selector = |from: Option<&str>, to: Option<&str>, dport: Option<u16>| Selector {
        priority: Some(100),
        from: from.map(net),
        to: to.map(net),
        destination: dport.map(|port| Ports { first: port, last: port }),
        ..Selector::default()
    };
    let looked_up = |selector: Selector, input: Option<u32>| {
        let mut host = host(Some(BRIDGE));
        host.selected = vec![SelectedPackets { selector, input, ipv4: true }];
        let lookups = Audit::default().lookups(&desired(1), &host).into_iter();
        let selected = lookups.filter(|lookup| lookup.selector == Some(selector));
        let shown =
            |q: Lookup| format!("{:?} {} {}", q.kind, q.from.expect("an address of a pod"), q.to);
        selected.map(shown).collect::<Vec<_>>()
    };
    let one = selector(Some("10.42.1.9/32"), None, None);
    assert_eq!(looked_up(one, None), ["Out 10.42.1.9 10.42.2.1"]);
    let half = selector(Some("10.42.1.0/25"), None, None);
    assert_eq!(looked_up(half, None), ["Out 10.42.1.64 10.42.2.1"]);
    let of_both = ["Out 10.42.1.254 10.42.2.1", "In 10.42.2.16 10.42.1.254"];
    assert_eq!(looked_up(selector(None, None, Some(80)), None), of_both);
    assert_eq!(looked_up(selector(None, None, Some(80)), Some(BRIDGE)), of_both[..1]);
    assert_eq!(looked_up(selector(None, None, Some(80)), Some(DEVICE)), of_both[1..]);
    let to = selector(None, Some("10.42.2.128/25"), None);
    assert_eq!(looked_up(to, None), ["Out 10.42.1.254 10.42.2.128"]);
    let gateway = selector(Some("10.42.1.1/32"), None, None);
    assert_eq!(looked_up(gateway, None), [""; 0]);
    assert_eq!(looked_up(selector(Some("192.0.2.0/24"), None, None), None), [""; 0]);
}

/// A rule that affects all packets is reported once; a rule that affects some is reported with its
/// selector.
#[test]
fn rule_that_affects_some_packets_is_reported_with_its_selector() {
    let selector = Selector {
        priority: Some(100),
        destination: Some(Ports { first: 80, last: 90 }),
        ..Selector::default()
    };
    let report = |some_only: bool| {
        let (desired, mut audit) = (desired(1), Audit::default());
        let mut host = host(Some(BRIDGE));
        host.selected = vec![SelectedPackets { selector, input: None, ipv4: true }];
        for _ in 0..2 {
            let lookups = audit.lookups(&desired, &host).into_iter();
            let answered = lookups.map(|lookup| {
                let cause = match lookup.selector {
                    Some(selector) => {
                        Some(Cause::Selected { selector, cause: Box::new(cause(100)) })
                    }
                    None => (!some_only && lookup.kind == Kind::Out).then(|| cause(100)),
                };
                (lookup, cause)
            });
            audit.evaluate(answered.collect::<Vec<_>>());
        }
        audit.problems(desired.pool.networks(), LOCAL_FIRST)
    };
    let some = report(true);
    assert_eq!(some.len(), 1, "{some:?}");
    let words = "packets of pods to 10.42.2.0/24 that rule 100 selects (dport 80-90) leave by d0";
    assert!(some[0].starts_with(words), "{some:?}");
    let all = report(false);
    assert_eq!(all.len(), 1, "{all:?}");
    assert!(all[0].starts_with("packets of pods to 10.42.2.0/24 leave by d0"), "{all:?}");
}

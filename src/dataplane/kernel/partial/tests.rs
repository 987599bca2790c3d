//! Rules as the kernel shows them, and what the reader makes of them.

use super::*;

type Expression = (&'static str, Attributes);

fn data(attribute: u16, bytes: &[u8]) -> Attributes {
    Attributes::new().nest(attribute, &Attributes::new().put(1, bytes))
}

fn joined(parts: &[Attributes]) -> Attributes {
    parts.iter().fold(Attributes::new(), |all, part| {
        attributes::read(part.as_bytes()).fold(all, |all, (kind, bytes)| all.put(kind, bytes))
    })
}

fn payload(base: u32, at: u32, length: u32) -> Expression {
    ("payload", Attributes::new().be32(1, 1).be32(2, base).be32(3, at).be32(4, length))
}

fn cmp(operator: u32, bytes: &[u8]) -> Expression {
    ("cmp", joined(&[Attributes::new().be32(1, 1).be32(2, operator), data(3, bytes)]))
}

fn port(port: u16) -> [Expression; 2] {
    [payload(2, 2, 2), cmp(0, &port.to_be_bytes())]
}

fn states(states: u32) -> [Expression; 3] {
    let mask = data(4, &states.to_ne_bytes());
    [("ct", Attributes::new().be32(1, 1).be32(2, 0)), ("bitwise", mask), cmp(1, &[0; 4])]
}

fn verdict(code: i32, chain: Option<&str>) -> Expression {
    let verdict = Attributes::new().put(1, &code.to_be_bytes());
    let verdict = chain.map_or(verdict.clone(), |chain| verdict.text(2, chain));
    ("immediate", Attributes::new().nest(2, &Attributes::new().nest(2, &verdict)))
}

const DROP: i32 = 0;
const ACCEPT: i32 = 1;
const JUMP: i32 = -3;

fn drop() -> [Expression; 1] {
    [verdict(DROP, None)]
}

fn of_iptables(name: &str, info: &[u8]) -> [Expression; 1] {
    [("match", Attributes::new().text(1, name).be32(2, 0).put(3, info))]
}

fn rule(chain: &str, expressions: &[&[Expression]]) -> Object {
    let list = expressions.concat().into_iter().fold(Attributes::new(), |list, (name, data)| {
        list.nest(1, &Attributes::new().text(1, name).nest(2, &data))
    });
    let attributes = Attributes::new().text(2, chain).put(3, &7u64.to_be_bytes()).nest(4, &list);
    Object { family: 2, attributes: attributes.as_bytes().to_vec() }
}

/// What is found in these rules of a chain `base`, in words.
fn found(rules: &[Object], hook: u32) -> Vec<String> {
    let network = ["10.42.0.0/16".parse().expect("a network")];
    let interfaces = [(3, "gsm0".to_owned()), (4, "gossamer.1".to_owned())];
    let traffic = Traffic {
        sources: &network,
        destinations: &network,
        interfaces: &interfaces,
        tunnel: None,
    };
    let mut elements = |set: &str| match set {
        "bans" => {
            ranges_of([[10, 42, 1, 2], [203, 0, 113, 9]].map(|key| (key.to_vec(), true)).to_vec())
        }
        _ => Vec::new(),
    };
    let mut walk = Walk {
        rules: by_chain(rules),
        traffic: &traffic,
        hook,
        elements: &mut elements,
        left: RULES,
        passes_established: false,
        prefix: "ip t".to_owned(),
        base: "base",
        found: BTreeMap::new(),
    };
    walk.chain("base", DEPTH, &Selection::default());
    let shown = |partial: &Partial| format!("{:?} {} +{}", partial.act, partial.what, partial.more);
    few(walk.found).iter().map(shown).collect()
}

fn one(expressions: &[&[Expression]]) -> Vec<String> {
    found(&[rule("base", expressions)], FORWARD)
}

#[test]
fn rule_that_drops_some_packets_is_found_with_what_it_takes() {
    assert_eq!(one(&[&port(443), &drop()]), ["Drops to port 443 +0"]);
    let bans = || ("lookup", Attributes::new().text(1, "bans").be32(2, 1));
    assert_eq!(one(&[&[payload(1, 12, 4), bans()], &drop()]), ["Drops from 10.42.1.2 +0"]);
    let range = [payload(1, 16, 4), cmp(5, &[10, 42, 2, 2]), cmp(3, &[10, 42, 2, 99])];
    assert_eq!(one(&[&range, &drop()]), ["Drops to 10.42.2.2-10.42.2.99 +0"]);
    let both = [payload(1, 12, 8), cmp(0, &[10, 42, 1, 2, 10, 42, 2, 2])];
    assert_eq!(one(&[&both, &drop()]), ["Drops from 10.42.1.2 to 10.42.2.2 +0"]);
    let long = [&1501u16.to_ne_bytes()[..], &u16::MAX.to_ne_bytes(), &[0]].concat();
    assert_eq!(one(&[&of_iptables("length", &long), &drop()]), ["Drops of 1501 to 65535 bytes +0"]);
    assert_eq!(one(&[&of_iptables("statistic", &[]), &drop()]), ["Drops taken by chance +0"]);
    let queue = |flags: u16| {
        let all = Attributes::new().put(1, &7u16.to_be_bytes()).put(3, &flags.to_be_bytes());
        [("queue", all)]
    };
    assert_eq!(one(&[&port(443), &queue(0)]), ["Queues to port 443 +0"]);
    assert!(one(&[&port(443), &queue(1)]).is_empty(), "it passes without a listener");
    let many: Vec<Object> = (1..=1_000).map(|at| rule("base", &[&port(at), &drop()])).collect();
    assert_eq!(found(&many, FORWARD), ["Drops to port 1 +999"]);
}

#[test]
fn rule_that_leaves_packets_between_pods_alone_is_not_found() {
    let outside = [payload(1, 12, 4), cmp(0, &[203, 0, 113, 9])];
    assert!(one(&[&outside, &port(443), &drop()]).is_empty());
    assert!(one(&[&drop()]).is_empty(), "a trial finds it");
    assert!(one(&[&states(1), &port(443), &drop()]).is_empty(), "invalid");
    let uplink = [("meta", Attributes::new().be32(1, 1).be32(2, 6)), cmp(0, b"eth0\0")];
    assert!(one(&[&uplink, &port(443), &drop()]).is_empty());
    let limit = [("limit", Attributes::new().be32(5, 1))];
    assert!(one(&[&port(443), &limit, &drop()]).is_empty());
    let traceroute =
        [payload(2, 2, 2), cmp(5, &33434u16.to_be_bytes()), cmp(3, &33534u16.to_be_bytes())];
    assert!(one(&[&traceroute, &drop()]).is_empty());
    let local = ("fib", Attributes::new().be32(1, 1).be32(2, 3).be32(3, 2));
    assert!(one(&[&[local, cmp(0, &2u32.to_ne_bytes())], &port(443), &drop()]).is_empty());
    // SYN and FIN; a new connection that begins with something else.
    let flags = |operator, value| {
        [payload(2, 13, 1), ("bitwise", data(4, &[0x17])), cmp(operator, &[value])]
    };
    assert!(one(&[&flags(0, 3), &port(443), &drop()]).is_empty());
    assert!(one(&[&flags(1, 2), &states(8), &port(443), &drop()]).is_empty());
    assert_eq!(one(&[&flags(0, 2), &port(443), &drop()]).len(), 1, "a plain SYN");
}

#[test]
fn rule_after_one_that_accepts_is_found_only_if_packets_come_to_it() {
    let pods = || [payload(1, 12, 2), cmp(0, &[10, 42])];
    let accept = || [verdict(ACCEPT, None)];
    let dropping = || rule("base", &[&port(443), &drop()]);
    let after = |first: Object| found(&[first, dropping()], FORWARD).len();
    assert_eq!(after(rule("base", &[&pods(), &accept()])), 0);
    assert_eq!(after(rule("base", &[&states(6), &accept()])), 1, "not new ones");
    assert_eq!(after(rule("base", &[&port(443), &accept()])), 0);
    let limit = || [("limit", Attributes::new().be32(5, 0))];
    assert_eq!(after(rule("base", &[&port(443), &limit(), &accept()])), 0, "a limit of a rate");
    let amount = || rule("base", &[&of_iptables("connbytes", &[]), &drop()]);
    let established = rule("base", &[&states(6), &accept()]);
    assert_eq!(found(&[amount()], FORWARD).len(), 1);
    assert_eq!(found(&[established, amount()], FORWARD).len(), 0);
    let jump = |to| rule("base", &[&[verdict(JUMP, Some(to))]]);
    let passing = rule("more", &[&pods(), &accept()]);
    assert_eq!(found(&[jump("more"), passing, dropping()], FORWARD).len(), 0);
    let returning = rule("more", &[&pods(), &[verdict(rules::RETURN, None)]]);
    assert_eq!(found(&[jump("more"), returning, dropping()], FORWARD).len(), 1);
    let narrow = rule("base", &[&port(443), &[verdict(JUMP, Some("more"))]]);
    let all = rule("more", &[&drop()]);
    assert_eq!(found(&[narrow, all], FORWARD), ["Drops to port 443 +0"]);
    let of_docker = rule("DOCKER-USER", &[&port(443), &drop()]);
    assert_eq!(found(&[jump("DOCKER-USER"), of_docker], FORWARD).len(), 0);
}

#[test]
fn mark_and_translation_of_some_packets_are_found() {
    let set = ("meta", Attributes::new().be32(2, META_MARK).be32(3, 1));
    let load = ("meta", Attributes::new().be32(1, 1).be32(2, META_MARK));
    let bits = |mask: u32, xor: u32| {
        ("bitwise", joined(&[data(4, &mask.to_ne_bytes()), data(5, &xor.to_ne_bytes())]))
    };
    let pod = || [payload(1, 12, 4), cmp(0, &[10, 42, 1, 2])];
    let marking = rule("base", &[&pod(), &[load, bits(0xff00_ffff, 0x1_0000), set]]);
    assert_eq!(found(&[marking], PREROUTING), ["Marks(65536) from 10.42.1.2 +0"]);
    let masking = rule("base", &[&pod(), &[("masq", Attributes::new())]]);
    assert_eq!(found(&[masking], POSTROUTING), ["Translates from 10.42.1.2 +0"]);
}

#[test]
fn intervals_of_a_set_end_before_the_element_that_ends_them() {
    let read = ranges_of(vec![(vec![10, 0], true), (vec![9, 0], false), (vec![10, 4], false)]);
    assert_eq!(read, [(vec![10, 0], vec![10, 3])]);
    assert_eq!(ranges_of(vec![(vec![7], true), (vec![9], true)]).len(), 2);
}

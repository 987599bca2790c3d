//! Tests with rules in the kernel's form, and what the reader finds in them.

mod policies;
mod programs;
mod rates;

use std::rc::Rc;

use super::{
    sets::{Data, Element, KernelElement, Set, SetName, elements_of},
    *,
};
use crate::dataplane::foreign::rules::{self, ACCEPT, DROP, JUMP};

const META_MARK: u32 = 3;

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
    [("ct", Attributes::new().be32(1, 1).be32(2, 0)), masked(&[mask]), cmp(1, &[0; 4])]
}

/// Masks the value in the first register.
fn masked(parts: &[Attributes]) -> Expression {
    let registers = Attributes::new().be32(1, 1).be32(2, 1);
    ("bitwise", joined(&[&[registers], parts].concat()))
}

fn verdict(code: i32, chain: Option<&str>) -> Expression {
    let verdict = Attributes::new().put(1, &code.to_be_bytes());
    let verdict = chain.map_or(verdict.clone(), |chain| verdict.text(2, chain));
    ("immediate", Attributes::new().nest(2, &Attributes::new().nest(2, &verdict)))
}

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

fn element(key: &[u8], data: Option<Data>) -> Element {
    Element { parts: vec![(key.to_vec(), key.to_vec())], data }
}

fn base_at(hook: u32) -> Base {
    Base {
        order: (0, 0),
        place: Place { hook, at: None },
        table: 0,
        family: IP,
        prefix: "ip t".to_owned(),
        name: "base".to_owned(),
        drops: false,
        program: None,
    }
}

/// Returns the findings in the rules of a chain `base`, in words.
fn found_in(rules: &Rules<'_>, hook: u32, marks: &mut Marks) -> Vec<String> {
    found_by(rules, base_at(hook), marks, ("gossamer.1", 0))
}

/// The same for packets that reach other hosts by an interface. No trial covers the ways of the bits.
fn found_by(
    rules: &Rules<'_>,
    base: Base,
    marks: &mut Marks,
    (outside, untested): (&str, u8),
) -> Vec<String> {
    let network = ["10.42.0.0/16".parse().expect("a network")];
    let [bridge, tunnel] = [(3, "gsm0".to_owned()), (4, outside.to_owned())];
    let way = |input: &(u32, String), output: &(u32, String)| Interfaces {
        input: Some(input.clone()),
        output: Some(output.clone()),
    };
    let ways = [way(&bridge, &tunnel), way(&tunnel, &bridge)];
    let traffic = Traffic {
        sources: &network,
        destinations: &network,
        ways: &ways,
        untested,
        ports: &[],
        tunnel: None,
    };
    let drop = || Some(Data::Verdict(DROP, None));
    let address_and_port =
        |octets: [u8; 4]| [&octets[..], &443_u16.to_be_bytes(), &[0; 2]].concat();
    let mut sets = |set: &SetName| {
        let elements = match set {
            SetName::OfTable(name) if name == "bans" => {
                [[10, 42, 1, 2], [203, 0, 113, 9]].map(|key| element(&key, None)).to_vec()
            }
            SetName::OfTable(name) if name == "verdicts" => vec![
                element(&443_u16.to_be_bytes(), drop()),
                element(&80_u16.to_be_bytes(), Some(Data::Verdict(JUMP, Some("more".to_owned())))),
                element(&22_u16.to_be_bytes(), Some(Data::Verdict(ACCEPT, None))),
            ],
            SetName::OfTable(name) if name == "services" => [[203, 0, 113, 9], [10, 42, 1, 2]]
                .map(|octets| element(&address_and_port(octets), None))
                .to_vec(),
            SetName::Ipset(name) | SetName::Recent(name) if name == "bans" => {
                return Rc::new(Set::of(
                    vec![(vec![10, 42, 1, 2], vec![10, 42, 1, 2])],
                    Some(crate::netlink::ipset::Dimension::Address),
                ));
            }
            _ => Vec::new(),
        };
        Rc::new(Set { dimensions: Vec::new(), elements })
    };
    found_of(rules, &base, marks, &traffic, &mut sets)
}

/// The same for any packets.
fn found_of(
    rules: &Rules<'_>,
    base: &Base,
    marks: &mut Marks,
    traffic: &Traffic<'_>,
    sets: sets::Sets<'_>,
) -> Vec<String> {
    let (mut left, mut found) = (MAX_RULES, BTreeMap::new());
    let mut walk = Walk {
        rules,
        traffic,
        sets,
        marks,
        base,
        left: &mut left,
        passes_established: 0,
        accepts_new: 0,
        accepts_new_at_any_rate: 0,
        rated: Vec::new(),
        found: &mut found,
    };
    walk.base_chain(base.place.ways(traffic));
    let shown = |partial: &Partial| format!("{:?} {} +{}", partial.act, partial.what, partial.more);
    limit_per_kind(found).iter().map(shown).collect()
}

fn found(rules: &[Object], hook: u32) -> Vec<String> {
    found_in(&by_chain(rules), hook, &mut Marks::default())
}

/// Like [`found`], for lines of `iptables-legacy-save`.
fn found_in_lines(lines: &[&str], hook: u32) -> Vec<String> {
    let text = format!(":base ACCEPT [0:0]\n:more - [0:0]\n{}\n", lines.join("\n"));
    let table = LegacyTable::new("iptables-legacy", "filter", &text);
    found_in(&Rules::Legacy(&table.chains), hook, &mut Marks::default())
}

fn one(expressions: &[&[Expression]]) -> Vec<String> {
    found(&[rule("base", expressions)], FORWARD)
}

#[test]
fn rule_that_drops_some_packets_is_found_with_its_selection() {
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
fn rule_that_selects_by_class_hash_or_amount_is_found() {
    let class = |operator, class: u8| {
        [payload(1, 1, 1), masked(&[data(4, &[0xfc]), data(5, &[0])]), cmp(operator, &[class << 2])]
    };
    let hash = Attributes::new().be32(1, 1).be32(2, 1).be32(3, 4).be32(4, 4).be32(5, 0);
    let by_hash = [("hash", hash), cmp(0, &[0; 4])];
    let carried = Attributes::new().be32(1, 1).be32(2, 15).put(3, &[0]);
    let amount = [("ct", carried), cmp(4, &100_000_u64.to_be_bytes())];
    for (expressions, words) in [
        (&class(1, 0)[..], "with a certain DSCP"),
        (&class(0, 46), "with a certain DSCP"),
        (&by_hash, "taken by chance"),
        (&amount, "of connections that have carried a certain amount"),
        (&of_iptables("dscp", &[46, 0]), "with a certain DSCP"),
        (&of_iptables("tos", &[0xff, 0x10, 0]), "with a certain DSCP"),
    ] {
        let found = one(&[expressions, &drop()]);
        assert!(found.iter().any(|found| found.contains(words)), "{words}: {found:?}");
    }
    assert_eq!(reader::adjacent_number(&[1, 255], true), Some(vec![2, 0]));
    assert_eq!(reader::adjacent_number(&[2, 0], false), Some(vec![1, 255]));
    assert_eq!(
        (reader::adjacent_number(&[255], true), reader::adjacent_number(&[0], false)),
        (None, None)
    );
}

#[test]
fn rule_that_does_not_match_packets_between_pods_is_not_found() {
    let outside = [payload(1, 12, 4), cmp(0, &[203, 0, 113, 9])];
    assert!(one(&[&outside, &port(443), &drop()]).is_empty());
    assert!(one(&[&drop()]).is_empty(), "a trial finds it");
    assert!(one(&[&states(1), &port(443), &drop()]).is_empty(), "invalid");
    let uplink = [("meta", Attributes::new().be32(1, 1).be32(2, 6)), cmp(0, b"eth0\0")];
    assert!(one(&[&uplink, &port(443), &drop()]).is_empty());
    let traceroute =
        [payload(2, 2, 2), cmp(5, &33434u16.to_be_bytes()), cmp(3, &33534u16.to_be_bytes())];
    assert!(one(&[&traceroute, &drop()]).is_empty());
    let local = ("fib", Attributes::new().be32(1, 1).be32(2, 3).be32(3, 2));
    assert!(one(&[&[local, cmp(0, &2u32.to_ne_bytes())], &port(443), &drop()]).is_empty());
    // SYN and FIN, and a new connection that begins with something else than SYN.
    let flags =
        |operator, value| [payload(2, 13, 1), masked(&[data(4, &[0x17])]), cmp(operator, &[value])];
    assert!(one(&[&flags(0, 3), &port(443), &drop()]).is_empty());
    assert!(one(&[&flags(1, 2), &states(8), &port(443), &drop()]).is_empty());
    assert_eq!(one(&[&flags(0, 2), &port(443), &drop()]).len(), 1, "a plain SYN");
}

#[test]
fn rule_after_an_accepting_one_is_found_only_if_packets_reach_it() {
    let pods = || [payload(1, 12, 2), cmp(0, &[10, 42])];
    let accept = || [verdict(ACCEPT, None)];
    let dropping = || rule("base", &[&port(443), &drop()]);
    let after = |first: Object| found(&[first, dropping()], FORWARD).len();
    assert_eq!(after(rule("base", &[&pods(), &accept()])), 0);
    assert_eq!(after(rule("base", &[&states(6), &accept()])), 1, "not new ones");
    assert_eq!(after(rule("base", &[&port(443), &accept()])), 0);
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
}

#[test]
fn mark_and_translation_of_some_packets_are_found() {
    let set = ("meta", Attributes::new().be32(2, META_MARK).be32(3, 1));
    let load = ("meta", Attributes::new().be32(1, 1).be32(2, META_MARK));
    let bits =
        |mask: u32, xor: u32| masked(&[data(4, &mask.to_ne_bytes()), data(5, &xor.to_ne_bytes())]);
    let pod = || [payload(1, 12, 4), cmp(0, &[10, 42, 1, 2])];
    let marking = rule("base", &[&pod(), &[load, bits(0xff00_ffff, 0x1_0000), set]]);
    assert_eq!(found(&[marking], PREROUTING), ["Marks(65536) from 10.42.1.2 +0"]);
    let masking = rule("base", &[&pod(), &[("masq", Attributes::new())]]);
    assert_eq!(found(&[masking], POSTROUTING), ["Translates from 10.42.1.2 +0"]);
}

#[test]
fn intervals_of_a_set_end_before_the_element_that_ends_them() {
    let shown =
        |key: &[u8], begins| KernelElement { key: key.to_vec(), begins, end: None, data: None };
    let read =
        elements_of(vec![shown(&[10, 0], true), shown(&[9, 0], false), shown(&[10, 4], false)]);
    assert_eq!(read, [Element { parts: vec![(vec![10, 0], vec![10, 3])], data: None }]);
    let adjacent = elements_of(vec![shown(&[7], true), shown(&[9], false), shown(&[9], true)]);
    let ranges: Vec<_> = adjacent.into_iter().flat_map(|element| element.parts).collect();
    assert_eq!(ranges, [(vec![7], vec![8]), (vec![9], vec![255])]);
    assert_eq!(elements_of(vec![shown(&[7], true), shown(&[9], true)]).len(), 2);
    let whole = KernelElement { end: Some(vec![9]), ..shown(&[7], true) };
    assert_eq!(elements_of(vec![whole])[0].parts, [(vec![7], vec![9])]);
}

fn lookup(set: &str, map: Option<u32>) -> Expression {
    let lookup = Attributes::new().text(1, set).be32(2, 1);
    ("lookup", map.map_or(lookup.clone(), |register| lookup.be32(3, register)))
}

#[test]
fn verdict_map_is_followed_for_each_element() {
    let by_port = || rule("base", &[&[payload(2, 2, 2), lookup("verdicts", Some(0))]]);
    let more = rule("more", &[&drop()]);
    assert_eq!(found(&[by_port(), more], FORWARD), ["Drops to port 443 +0", "Drops to port 80 +0"]);
    let after = [by_port(), rule("base", &[&port(22), &drop()])];
    assert_eq!(found(&after, FORWARD), ["Drops to port 443 +0"], "port 22 is accepted");
}

#[test]
fn set_of_addresses_with_ports_is_read_part_by_part() {
    let load = |register, base, at, length| {
        ("payload", Attributes::new().be32(1, register).be32(2, base).be32(3, at).be32(4, length))
    };
    let both = [load(1, 1, 12, 4), load(9, 2, 2, 2), lookup("services", None)];
    assert_eq!(one(&[&both, &drop()]), ["Drops from 10.42.1.2 to port 443 +0"]);
    let other = [load(1, 1, 12, 4), load(9, 2, 0, 2), lookup("services", None)];
    assert_eq!(one(&[&other, &drop()]), ["Drops from 10.42.1.2 from port 443 +0"]);
}

#[test]
fn mark_is_followed_from_the_setting_rule_to_the_dropping_rule() {
    let set = |mark: u32| {
        let value = Attributes::new().nest(2, &Attributes::new().put(1, &mark.to_ne_bytes()));
        [("immediate", value), ("meta", Attributes::new().be32(2, META_MARK).be32(3, 1))]
    };
    let load = |key| ("meta", Attributes::new().be32(1, 1).be32(2, key));
    let is = |mark: u32| [load(META_MARK), cmp(0, &mark.to_ne_bytes())];
    let dropping = |mark| rule("base", &[&is(mark), &drop()]);
    assert!(found(&[dropping(7)], FORWARD).is_empty(), "no rule gives that mark");
    let marking = || rule("base", &[&port(443), &set(7)]);
    let found_by = |mark| found(&[marking(), dropping(mark)], PREROUTING);
    assert_eq!(found_by(7), ["Drops to port 443 +0", "Marks(7) to port 443 +0"]);
    assert_eq!(found_by(8), ["Marks(7) to port 443 +0"]);
    // By the mark of the connection, which a later rule sets.
    let save = "-A base -p tcp -m tcp --dport 443 -j CONNMARK --set-xmark 0x7/0xffffffff";
    let restore = "-A base -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff";
    let table = LegacyTable::new("iptables-legacy", "mangle", &[restore, save].join("\n"));
    let rules = Rules::Legacy(&table.chains);
    let mut marks = Marks::default();
    assert!(found_in(&rules, PREROUTING, &mut marks).is_empty(), "so far none is known");
    assert_eq!(found_in(&rules, PREROUTING, &mut marks), ["Marks(7) to port 443 +0"]);
}

#[test]
fn too_small_ttl_is_found_where_packets_are_forwarded_further() {
    let write = ("payload", Attributes::new().be32(2, 1).be32(3, 8).be32(4, 2).be32(5, 1));
    let masked = masked(&[data(4, &[0, 255]), data(5, &[1, 0])]);
    let native = || rule("base", &[&[payload(1, 8, 2), masked.clone(), write.clone()]]);
    assert_eq!(found(&[native()], POSTROUTING), ["Shortens(1)  +0"]);
    assert_eq!(found(&[native()], PREROUTING).len(), 1);
    let target = |info: [u8; 2]| [("target", Attributes::new().text(1, "TTL").put(3, &info))];
    let of = |info: [u8; 2]| found(&[rule("base", &[&target(info)])], POSTROUTING);
    assert_eq!(of([0, 1]), ["Shortens(1)  +0"]);
    assert_eq!(of([2, 64]), ["Shortens(0)  +0"], "decreased");
    assert!(of([0, 64]).is_empty() && of([1, 1]).is_empty() && of([2, 1]).is_empty());
    let lines = |line: &str, hook| found_in_lines(&[line], hook);
    assert_eq!(lines("-A base -o gossamer.1 -j TTL --ttl-set 1", POSTROUTING).len(), 1);
    assert!(
        lines("-A base -o gsm0 -j TTL --ttl-set 1", POSTROUTING).is_empty(),
        "no host forwards them further"
    );
    assert_eq!(lines("-A base -j TTL --ttl-set 2", PREROUTING).len(), 1, "here and there");
    assert!(lines("-A base -i gossamer.1 -j TTL --ttl-set 2", PREROUTING).is_empty());
}

#[test]
fn rule_of_iptables_legacy_is_read_by_its_options() {
    let lines = |lines: &[&str]| found_in_lines(lines, FORWARD);
    for (line, found) in [
        (
            "-s 10.42.1.2/32 -j REJECT --reject-with icmp-port-unreachable",
            "Rejects from 10.42.1.2 +0",
        ),
        ("-p tcp -m multiport --dports 80,8000:8010 -j DROP", "Drops to port 80, 8000-8010 +0"),
        ("-m set --match-set bans src -j DROP", "Drops from 10.42.1.2 +0"),
        (
            "-m recent --rcheck --name bans --mask 255.255.255.255 --rsource -j DROP",
            "Drops from 10.42.1.2 +0",
        ),
        (
            "-m recent --update --seconds 60 --hitcount 9 --name bans --rsource -j DROP",
            "Drops from 10.42.1.2 above a certain rate +0",
        ),
        ("-m iprange --dst-range 10.42.2.2-10.42.2.9 -j DROP", "Drops to 10.42.2.2-10.42.2.9 +0"),
        (
            "-m string --string \"-j ACCEPT\" --algo bm --to 65535 -j DROP",
            "Drops with some content +0",
        ),
        ("-m u32 --u32 \"0x6&0xff=0x1\" -j DROP", "Drops with some content +0"),
        ("-m time --timestart 22:00:00 --timestop 06:00:00 -j DROP", "Drops at some times +0"),
        ("-m length --length 1400:65535 -j DROP", "Drops of 1400 to 65535 bytes +0"),
        (
            "-i gsm+ -p udp -m udp --dport 53 -m comment --comment \"a \\\" b\" -j DROP",
            "Drops to port 53 +0",
        ),
    ] {
        assert_eq!(lines(&[&format!("-A base {line}")]), [found], "{line}");
    }
    for line in [
        "-s 203.0.113.0/24 -j DROP",
        "-m set --match-set others src -j DROP",
        "! -s 10.42.0.0/16 -p tcp -m tcp --dport 80 -j DROP",
        "-i eth0 -p tcp -m tcp --dport 80 -j DROP",
        "-p icmp -m icmp --icmp-type 8 -j DROP",
        "-p tcp -m tcp --dport 80 -m geoip --source-country XX -j DROP",
        "-p tcp -m tcp --tcp-flags FIN,SYN FIN,SYN -j DROP",
        "-m addrtype --dst-type LOCAL -p tcp -m tcp --dport 80 -j DROP",
        "-m conntrack --ctstate INVALID -j DROP",
        "-p tcp -m tcp --dport 80 -j LOG",
        "-m set ! --match-set others src -j DROP",
        "-m recent --rcheck --name others --rsource -j DROP",
        "-p tcp -m tcp --dport 80 -m recent --set --name bans --rsource",
    ] {
        assert!(lines(&[&format!("-A base {line}")]).is_empty(), "{line}");
    }
    let banned = "-A more -s 10.42.1.2/32 -j DROP";
    assert_eq!(lines(&["-A base -p tcp -j more", banned]), ["Drops from 10.42.1.2 +0"]);
    let exempt = "-A base -s 10.42.0.0/16 -d 10.42.0.0/16 -j ACCEPT";
    assert!(lines(&[exempt, "-A base -p tcp -j more", banned]).is_empty());
    // A packet that one way's rule accepts still passes the next rule on the other way.
    let one_way = ["-A base -i gsm0 -j ACCEPT", "-A base -p tcp -m tcp --dport 80 -j DROP"];
    assert_eq!(lines(&one_way).len(), 1);
    let both = [one_way[0], "-A base -o gsm0 -j ACCEPT", one_way[1]];
    assert!(lines(&both).is_empty());
}

/// Returns the CPU time of this thread in hundredths of a second: fields 14 and 15 of proc(5).
fn cpu_time() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("proc");
    let (_, fields) = stat.rsplit_once(") ").expect("a name in brackets");
    fields.split(' ').skip(11).take(2).map(|field| field.parse::<u64>().expect("a number")).sum()
}

#[test]
fn reading_time_grows_linearly_with_rules_and_chains() {
    let half = 20_000_u16;
    let accept = || [verdict(ACCEPT, None)];
    let pairs = (1..=half).flat_map(|at| {
        [rule("base", &[&port(at), &accept()]), rule("base", &[&port(at + half), &drop()])]
    });
    let long: Vec<Object> = pairs.collect();
    let names: Vec<String> = (0..half).map(|at| format!("c{at}")).collect();
    let chains = names.iter().map(|name| rule("base", &[&[verdict(JUMP, Some(name.as_str()))]]));
    let ends = (1..).zip(&names).map(|(at, name)| rule(name, &[&port(at), &drop()]));
    let many: Vec<Object> = chains.chain(ends).collect();
    for (rules, named) in [(&long, 1), (&many, MAX_FINDINGS_PER_KIND)] {
        let begun = cpu_time();
        assert_eq!(found(rules, FORWARD).len(), named);
        let taken = cpu_time() - begun;
        assert!(taken < 500, "{taken} hundredths of a second");
    }
}

#[test]
fn rule_that_takes_all_arriving_packets_counts_if_no_trial_covers_them() {
    let found = |lines: &[&str], untested| {
        let text = format!(":base ACCEPT [0:0]\n{}\n", lines.join("\n"));
        let table = LegacyTable::new("iptables-legacy", "filter", &text);
        let mut marks = Marks::default();
        found_by(&Rules::Legacy(&table.chains), base_at(FORWARD), &mut marks, ("eth0", untested))
    };
    let established = "-A base -m conntrack --ctstate RELATED,ESTABLISHED -j RETURN";
    let drop = "-A base -i eth0 ! -s 192.0.2.0/24 -j DROP";
    assert_eq!(found(&[established, drop], 2), ["Drops that arrive by eth0 +0"]);
    assert_eq!(found(&[established, drop], 0), [""; 0]);
    // A trial covers the packets that leave, so what drops both is not reported by its form.
    assert_eq!(found(&[established, "-A base -j REJECT"], 2), [""; 0]);
    assert_eq!(found(&["-A base -s 10.42.0.0/16 -j ACCEPT", drop], 2), [""; 0]);
}

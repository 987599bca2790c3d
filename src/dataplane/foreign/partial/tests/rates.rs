//! Limits of a rate: the packets above it are dropped.

use super::{
    super::{FORWARD, Rules},
    Attributes, BTreeMap, Expression, Marks, base_at, drop, found, found_by, found_in_lines, one,
    port, rule,
    rules::ACCEPT,
    states, verdict,
};

fn limit(flags: u32) -> [Expression; 1] {
    [("limit", Attributes::new().be32(5, flags))]
}

fn counter(packets: u64) -> [Expression; 1] {
    let data = Attributes::new().put(1, &[0; 8]).put(2, &packets.to_be_bytes());
    [("counter", data)]
}

#[test]
fn packets_above_a_rate_are_found_whatever_they_begin() {
    let above = limit(1);
    assert_eq!(one(&[&above, &drop()]), ["Drops above a certain rate +0"]);
    assert_eq!(one(&[&port(443), &above, &drop()]), ["Drops to port 443 above a certain rate +0"]);
    assert!(one(&[&port(443), &limit(0), &drop()]).is_empty(), "those up to a rate");
    let new = "that begin connections above a certain rate";
    assert_eq!(one(&[&states(8), &above, &drop()]), [format!("Drops {new} +0")]);
    let lines = |line: &str| found_in_lines(&[line], FORWARD);
    let above = "-A base -m hashlimit --hashlimit-above 9/sec --hashlimit-name h -j DROP";
    assert_eq!(lines(above), ["Drops above a certain rate +0"]);
    let of_new = "-A base -p tcp -m state --state NEW -m hashlimit --hashlimit-above 9/sec -j DROP";
    assert_eq!(lines(of_new), [format!("Drops {new} +0")]);
}

#[test]
fn drop_counts_only_if_a_counter_behind_all_conditions_does_not_contradict() {
    let above = || limit(1);
    assert!(one(&[&above(), &counter(0), &drop()]).is_empty());
    assert_eq!(one(&[&above(), &counter(7), &drop()]).len(), 1);
    assert_eq!(one(&[&counter(0), &above(), &drop()]).len(), 1, "it counts other packets");
    assert_eq!(one(&[&port(443), &counter(0), &drop()]).len(), 1, "not a limit of a rate");
}

#[test]
fn what_remains_behind_a_limit_and_is_dropped_is_above_the_rate() {
    let passing = |flags: u32| rule("base", &[&port(443), &limit(flags), &[verdict(ACCEPT, None)]]);
    let dropping = || rule("base", &[&port(443), &drop()]);
    let above = ["Drops to port 443 above a certain rate +0"];
    assert_eq!(found(&[passing(0), dropping()], FORWARD), above);
    let counted = rule("base", &[&port(443), &counter(0), &drop()]);
    assert!(found(&[passing(0), counted], FORWARD).is_empty(), "none was above it");
    let quota =
        rule("base", &[&port(443), &[("quota", Attributes::new())], &[verdict(ACCEPT, None)]]);
    assert!(found(&[quota, dropping()], FORWARD).is_empty(), "an amount is no rate");

    let lines = |lines: &[&str]| found_in_lines(lines, FORWARD);
    let flood = [
        "-A base -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j flood",
        "-A flood -m limit --limit 60/sec --limit-burst 20 -j RETURN",
        "-A flood -j DROP",
    ];
    assert_eq!(lines(&flood), ["Drops that begin connections above a certain rate +0"]);
    assert!(lines(&flood[..2]).is_empty(), "nothing is dropped");
    assert!(lines(&["-A base -i eth0 -j flood", flood[1], flood[2]]).is_empty(), "by eth0 only");
    let rest = "-A flood -p tcp -j ACCEPT";
    assert!(lines(&[flood[0], flood[1], rest, flood[2]]).is_empty(), "the rest is accepted");
    let log = "-A flood -m limit --limit 3/min -j LOG";
    assert!(lines(&[flood[0], log]).is_empty());
    let echo = "-A base -p icmp -m icmp --icmp-type 8 -m limit --limit 1/sec -j ACCEPT";
    let of_uplink = "-A base -i eth0 -j DROP";
    assert!(lines(&[echo, of_uplink]).is_empty());
}

#[test]
fn policy_behind_an_acceptance_up_to_a_rate_drops_what_is_above_it() {
    let found = |lines: &[&str]| {
        let lines = lines.iter().map(|line| (*line).to_owned()).collect();
        let chains = BTreeMap::from([("base".to_owned(), lines)]);
        let base = super::super::Base { drops: true, ..base_at(FORWARD) };
        found_by(&Rules::Legacy(&chains), base, &mut Marks::default(), ("gossamer.1", 0))
    };
    let established = "-A base -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";
    let rated =
        "-A base -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m limit --limit 1/sec -j ACCEPT";
    let words = ["Drops that begin connections above a certain rate +0"];
    assert_eq!(found(&[established, rated]), words);
    let all = "-A base -m conntrack --ctstate NEW -j ACCEPT";
    assert_eq!(found(&[established, rated, all]), [""; 0]);
}

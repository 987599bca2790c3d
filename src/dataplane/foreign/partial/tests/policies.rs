//! Policies that drop packets, and tunnel packets that this host forwards between other hosts.

use super::*;

/// Returns the findings about packets that no trial covers in a chain FORWARD with the policy DROP.
fn found_with_policy(lines: &[&str]) -> Vec<String> {
    let text = format!(":base DROP [0:0]\n{}\n", lines.join("\n"));
    let table = LegacyTable::new("iptables-legacy", "filter", &text);
    let base = Base { drops: table.dropping.contains("base"), ..base_at(FORWARD) };
    let mut marks = Marks::default();
    found_by(&Rules::Legacy(&table.chains), base, &mut marks, ("eth0", 2))
}

#[test]
fn policy_counts_like_a_last_rule_if_no_rule_accepts_first_packets() {
    let established = "-A base -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";
    let arriving = ["Drops that arrive by eth0 +0"];
    assert_eq!(found_with_policy(&[established, "-A base -i gsm0 -j ACCEPT"]), arriving);
    assert_eq!(found_with_policy(&[established, "-A base -i gsm0 -o eth0 -j ACCEPT"]), arriving);
    // What both ways lose is shown by the trials.
    assert_eq!(found_with_policy(&[established]), [""; 0]);
    for accepting in [
        "-A base -o gsm0 -j ACCEPT",
        "-A base -s 10.42.0.0/16 -j ACCEPT",
        "-A base -i eth0 -m conntrack --ctstate NEW -j ACCEPT",
        // A peer's trials show what the policy takes of the rest.
        "-A base -p tcp -m tcp --dport 80 -j ACCEPT",
    ] {
        let lines = [established, "-A base -i gsm0 -j ACCEPT", accepting];
        assert_eq!(found_with_policy(&lines), [""; 0], "{accepting}");
    }
}

/// Returns the findings about tunnel packets between two other hosts.
fn found_in_transit(hook: u32, lines: &[&str], drops: bool) -> Vec<String> {
    let table = LegacyTable::new("iptables-legacy", "filter", &lines.join("\n"));
    let base = Base { drops, ..base_at(hook) };
    let [from, to] = ["10.99.2.2/32", "10.99.3.2/32"].map(|host| [host.parse().expect("a host")]);
    let way =
        Interfaces { input: Some((3, "lan2".to_owned())), output: Some((4, "lan3".to_owned())) };
    let traffic = Traffic {
        sources: &from,
        destinations: &to,
        ways: &[way],
        untested: u8::MAX,
        ports: &[],
        tunnel: Some(8_472),
    };
    let mut sets = |_: &SetName| Rc::new(Set { dimensions: Vec::new(), elements: Vec::new() });
    let rules = Rules::Legacy(&table.chains);
    found_of(&rules, &base, &mut Marks::default(), &traffic, &mut sets)
}

#[test]
fn tunnel_packets_between_other_hosts_are_followed_through_the_forward_hook() {
    let others = [
        "-A base -s 10.42.0.0/16 -j ACCEPT",
        "-A base -i lan2 -o lan3 -p udp -m udp --dport 8473 -j ACCEPT",
        "-A base -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ];
    assert_eq!(found_in_transit(FORWARD, &others, true), ["Drops  +0"]);
    assert_eq!(found_in_transit(FORWARD, &others, false), [""; 0]);
    assert_eq!(found_in_transit(INPUT, &others, true), [""; 0], "not for this host");
    let rule = ["-A base -p udp -m udp --dport 8472 -j REJECT"];
    assert_eq!(found_in_transit(FORWARD, &rule, false), ["Rejects  +0"]);
    for accepting in [
        "-A base -p udp -m multiport --dports 8472,8473 -j ACCEPT",
        "-A base -i lan2 -j ACCEPT",
        "-A base -d 10.99.3.0/24 -j ACCEPT",
    ] {
        let lines = [&[accepting], &others[..]].concat();
        assert_eq!(found_in_transit(FORWARD, &lines, true), [""; 0], "{accepting}");
    }
}

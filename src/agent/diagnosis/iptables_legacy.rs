//! Rules of iptables-legacy that may drop packets or change their addresses.
//!
//! The kernel's traces of nftables do not contain these rules, so they are read with `iptables-legacy-save`
//! where that is installed. They are read only where packets are known to be lost or changed on this host.

use std::{
    fs,
    io::Read as _,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use ipnet::IpNet;

use crate::dataplane::{foreign::LegacyTable, remedies::iptables_ports};
use crate::model::{Problem, ProblemCode};

/// How long to wait for the output of the program.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Limit of the output, in bytes.
const MAX_OUTPUT: u64 = 1 << 20;
/// Limit of tables read per family.
const MAX_TABLES: usize = 5;
/// Limit of rules named in one result.
const MAX_NAMED: usize = 3;
/// Targets and policies that drop packets.
const DROPPING: [&str; 2] = ["DROP", "REJECT"];
/// Targets that change the destination.
const REDIRECTING: [&str; 3] = ["DNAT", "REDIRECT", "NETMAP"];
/// Targets that change the source.
const TRANSLATING: [&str; 3] = ["SNAT", "MASQUERADE", "NETMAP"];
/// Chains that the kernel calls itself.
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// The route of a packet through the built-in chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPath {
    /// Sent by this host.
    Out,
    /// Received by this host.
    In,
    /// Forwarded by this host.
    Forward,
}

impl HookPath {
    /// Returns the built-in chains in the order in which a packet passes them.
    const fn chains(self) -> &'static [&'static str] {
        match self {
            Self::Out => &["OUTPUT", "POSTROUTING"],
            Self::In => &["PREROUTING", "INPUT"],
            Self::Forward => &["PREROUTING", "FORWARD", "POSTROUTING"],
        }
    }
}

/// A rule or policy that may affect the packets.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SuspectRule {
    /// As `iptables-save` prints it.
    line: String,
    chain: String,
}

/// Returns the rules that may drop tunnel packets (UDP to `port`), each with a remedy that also admits gossip
/// to its port.
pub fn around_tunnels(ipv4: bool, way: HookPath, port: u16, gossip: Option<u16>) -> Vec<String> {
    let ports: Vec<u16> = [port].into_iter().chain(gossip).collect();
    let ports = iptables_ports(&ports);
    suspects(ipv4, way, Some(port), |command| format!("{command} {ports} -j ACCEPT"))
}

/// Returns the rules that may drop some or all forwarded packets of pods, each with a remedy.
pub fn around_pods(network: IpNet) -> Vec<String> {
    suspects(network.addr().is_ipv4(), HookPath::Forward, None, |command| {
        format!("{command} -s {network} -j ACCEPT; {command} -d {network} -j ACCEPT")
    })
}

/// Returns the rules that give arriving tunnel packets (UDP to `port`) another destination, each with a
/// remedy.
pub fn redirecting(ipv4: bool, port: u16) -> Vec<String> {
    let rules = translating_rules(ipv4, HookPath::In, port, &REDIRECTING).into_iter();
    let sentence = |(rule, fix)| {
        format!(
            "{rule} gives UDP {port} another destination (DNAT, as for a port that a container publishes): \
             publish another port, or exempt it: {fix}; then conntrack -D -p udp --orig-port-dst {port}"
        )
    };
    rules.map(sentence).collect()
}

/// Returns the first rule that gives leaving tunnel packets (UDP to `port`) another source, and the command
/// that exempts them.
pub fn translating(ipv4: bool, port: u16) -> Option<(String, String)> {
    translating_rules(ipv4, HookPath::Out, port, &TRANSLATING).into_iter().next()
}

/// Returns the rules of the table `nat` with one of these targets, and the command that exempts UDP to `port`
/// from each.
fn translating_rules(
    ipv4: bool,
    way: HookPath,
    port: u16,
    targets: &[&str],
) -> Vec<(String, String)> {
    let name = program(ipv4);
    if !tables(ipv4).iter().any(|table| table == "nat") {
        return Vec::new();
    }
    let Some(rules) = save(name, "nat") else {
        let rule = format!("a rule of {name}, which cannot be read here, probably");
        return vec![(rule, format!("check {name} -t nat -S"))];
    };
    let found = suspect_rules(&rules, way, Some(port), targets).into_iter().take(MAX_NAMED);
    let named = found.map(|SuspectRule { line, chain }| {
        let open = format!("{name} -t nat -I {chain} {} -j ACCEPT", iptables_ports(&[port]));
        (format!("{name} has `{line}` in its table nat, which"), open)
    });
    named.collect()
}

/// Returns a notice for each policy that drops forwarded packets of pods, if no rule seems to accept them.
/// For hosts on which forwarding cannot be tested with packets.
pub fn closed_policies(network: IpNet, bridge: &str) -> Vec<Problem> {
    let name = program(network.addr().is_ipv4());
    let notice = |table: &str, what: String, fix: String| {
        let subject = format!("{name} {table}");
        Problem::new(ProblemCode::NotForwarding, subject, what, fix).notice()
    };
    let mut notices = Vec::new();
    for table in tables(network.addr().is_ipv4()).iter().filter(|table| *table != "nat") {
        let Some(rules) = save(name, table) else {
            let what =
                format!("{name} has rules that cannot be read here and may drop packets of pods");
            notices.push(notice(table, what, format!("{name} -t {table} -S")));
            continue;
        };
        for SuspectRule { line, chain } in closed(&rules, network, bridge) {
            let fix = format!("{name} -t {table} -I {chain}");
            let what = format!(
                "{name} has `{line}` in its table {table}, and no rule there seems to accept packets of \
                 pods"
            );
            let fix = format!("{fix} -s {network} -j ACCEPT; {fix} -d {network} -j ACCEPT");
            notices.push(notice(table, what, fix));
        }
    }
    notices.truncate(MAX_NAMED);
    notices
}

/// Returns the dropping policies, unless a rule accepts packets of the network or the bridge, or all.
fn closed(rules: &str, network: IpNet, bridge: &str) -> Vec<SuspectRule> {
    let is_of_pods = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let names_network = words.windows(2).any(|pair| {
            let named = pair[1].parse::<IpNet>();
            ["-s", "-d"].contains(&pair[0])
                && named.is_ok_and(|named| network.contains(&named) || named.contains(&network))
        });
        let is_unconditional = words.len() == 4;
        line.ends_with("-j ACCEPT")
            && (is_unconditional || names_network || words.contains(&bridge))
    };
    if rules.lines().any(is_of_pods) {
        return Vec::new();
    }
    let mut found = suspect_rules(rules, HookPath::Forward, None, &DROPPING);
    found.retain(|rule| rule.line.starts_with("-P "));
    found
}

/// Returns the tables of a family that can be read.
pub fn all_tables(ipv4: bool) -> Vec<LegacyTable> {
    let name = program(ipv4);
    let read = |table: &String| Some(LegacyTable::new(name, table, &save(name, table)?));
    tables(ipv4).iter().take(MAX_TABLES).filter_map(read).collect()
}

/// Returns the name of the program of a family.
const fn program(ipv4: bool) -> &'static str {
    if ipv4 { "iptables-legacy" } else { "ip6tables-legacy" }
}

/// Returns the names of the tables that the kernel has loaded.
fn tables(ipv4: bool) -> Vec<String> {
    let file = if ipv4 { "/proc/net/ip_tables_names" } else { "/proc/net/ip6_tables_names" };
    let names = fs::read_to_string(file).unwrap_or_default();
    names.lines().map(str::to_owned).collect()
}

/// Returns the dropping rules as sentences; `fix` makes the remedy from the command that inserts a rule.
fn suspects(
    ipv4: bool,
    way: HookPath,
    port: Option<u16>,
    fix: impl Fn(&str) -> String,
) -> Vec<String> {
    let name = program(ipv4);
    let mut suspects = Vec::new();
    for table in tables(ipv4).iter().filter(|table| *table != "nat").take(MAX_TABLES) {
        let Some(rules) = save(name, table) else {
            suspects.push(format!(
                "{name} also has rules, which cannot be read here: check {name} -t {table} -S"
            ));
            continue;
        };
        let found = suspect_rules(&rules, way, port, &DROPPING).into_iter();
        suspects.extend(found.map(|SuspectRule { line, chain }| {
            let fix = fix(&format!("{name} -t {table} -I {chain}"));
            format!("{name} has `{line}` in its table {table}, which may: {fix}")
        }));
    }
    suspects.truncate(MAX_NAMED);
    suspects
}

/// Returns what `iptables-save` prints for one table; `None` if it fails or takes too long.
fn save(name: &str, table: &str) -> Option<String> {
    let mut child = Command::new(format!("{name}-save"))
        .args(["-t", table])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let output = child.stdout.take()?;
    let (done, read) = mpsc::channel();
    let reader = thread::Builder::new().spawn(move || {
        let mut text = String::new();
        let whole = output.take(MAX_OUTPUT).read_to_string(&mut text);
        let _ = done.send(whole.is_ok().then_some(text));
    });
    // Without a thread the sender is dropped, and `recv_timeout` returns at once.
    let text = read.recv_timeout(TIMEOUT).ok().flatten();
    let _ = child.kill();
    let _ = child.wait();
    let _ = reader.map(thread::JoinHandle::join);
    text
}

/// Returns the rules and policies with one of these targets that affect the packets, or may. With a port,
/// rules for another protocol or port are omitted.
fn suspect_rules(
    rules: &str,
    way: HookPath,
    port: Option<u16>,
    targets: &[&str],
) -> Vec<SuspectRule> {
    let concerned = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            [chain, policy, ..] if line.starts_with(':') => {
                let chain = chain.strip_prefix(':')?;
                let is_match = way.chains().contains(&chain) && targets.contains(&policy);
                let line = format!("-P {chain} {policy}");
                is_match.then(|| SuspectRule { line, chain: chain.to_owned() })
            }
            ["-A", chain, ref rest @ ..] => {
                let value_of = |option: &str| {
                    let at = rest.iter().position(|word| *word == option)?;
                    rest.get(at + 1).copied()
                };
                let is_other_path = BUILT_IN.contains(&chain) && !way.chains().contains(&chain);
                let is_target = value_of("-j").is_some_and(|target| targets.contains(&target));
                let ports = value_of("--dport").or_else(|| value_of("--dports"));
                let concerns = port.is_none_or(|port| {
                    value_of("-p").is_none_or(|protocol| protocol == "udp" || protocol == "all")
                        && ports.is_none_or(|ports| contains_port(ports, port))
                });
                let found = || SuspectRule { line: line.to_owned(), chain: chain.to_owned() };
                (is_target && concerns && !is_other_path).then(found)
            }
            _ => None,
        }
    };
    rules.lines().filter_map(concerned).collect()
}

/// Whether a list of ports and ranges, as iptables writes it, contains a port.
fn contains_port(ports: &str, port: u16) -> bool {
    ports.split(',').any(|part| {
        let (first, last) = part.split_once(':').unwrap_or((part, part));
        let number = |text: &str| text.parse::<u16>().ok();
        number(first).zip(number(last)).is_some_and(|(first, last)| (first..=last).contains(&port))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suspect_rules_returns_only_rules_that_drop_the_port() {
        let rules = "*filter\n:INPUT ACCEPT [0:0]\n:OUTPUT DROP [1:2]\n:mine - [0:0]\n\
                     -A INPUT -p udp -m udp --dport 8472 -j DROP\n\
                     -A OUTPUT -p tcp -j DROP\n\
                     -A OUTPUT -p udp -m multiport --dports 53,8000:9000 -j REJECT --reject-with x\n\
                     -A mine -p udp -m udp --dport 53 -j DROP\n\
                     -A mine -s 192.0.2.1/32 -j DROP\nCOMMIT\n";
        let drop = |way, port| {
            let found = suspect_rules(rules, way, port, &DROPPING).into_iter();
            found.map(|rule| rule.line).collect::<Vec<_>>()
        };
        assert_eq!(
            drop(HookPath::Out, Some(8_472)),
            [
                "-P OUTPUT DROP",
                "-A OUTPUT -p udp -m multiport --dports 53,8000:9000 -j REJECT --reject-with x",
                "-A mine -s 192.0.2.1/32 -j DROP",
            ]
        );
        let first = drop(HookPath::In, Some(8_472)).into_iter().next();
        assert_eq!(first.as_deref(), Some("-A INPUT -p udp -m udp --dport 8472 -j DROP"));
        let of_pods =
            ["-A mine -p udp -m udp --dport 53 -j DROP", "-A mine -s 192.0.2.1/32 -j DROP"];
        assert_eq!(drop(HookPath::Forward, None), of_pods);
    }

    #[test]
    fn dropping_policy_is_returned_unless_a_rule_accepts_packets_of_pods() {
        let network = "10.42.0.0/16".parse().expect("a network");
        let with = |rule: &str| {
            let rules = format!("*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n{rule}\n");
            let found = closed(&rules, network, "gsm0").into_iter();
            found.map(|rule| rule.line).collect::<Vec<_>>()
        };
        for other in ["", "-A FORWARD -i docker0 -j ACCEPT", "-A FORWARD -s 10.42.0.0/16 -j DROP"] {
            assert_eq!(with(other), ["-P FORWARD DROP"], "{other}");
        }
        for accepting in [
            "-A FORWARD -s 10.42.1.0/24 -j ACCEPT",
            "-A FORWARD -d 10.0.0.0/8 -j ACCEPT",
            "-A FORWARD -i gsm0 -j ACCEPT",
            "-A FORWARD -j ACCEPT",
        ] {
            assert!(with(accepting).is_empty(), "{accepting}");
        }
    }

    #[test]
    fn suspect_rules_translating_the_port_are_returned_with_their_chain() {
        let rules = "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n\
                     -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
                     -A OUTPUT -p udp -j REDIRECT --to-ports 9\n\
                     -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE\n\
                     -A DOCKER -p tcp -m tcp --dport 8472 -j DNAT --to-destination 172.17.0.9:8472\n\
                     -A DOCKER -p udp -m udp --dport 8472 -j DNAT --to-destination 172.17.0.2:8472\n";
        let chains = |way, targets: &[&str]| {
            let found = suspect_rules(rules, way, Some(8_472), targets).into_iter();
            found.map(|rule| rule.chain).collect::<Vec<_>>()
        };
        assert_eq!(chains(HookPath::In, &REDIRECTING), ["DOCKER"]);
        assert_eq!(chains(HookPath::Out, &TRANSLATING), ["POSTROUTING"]);
    }
}

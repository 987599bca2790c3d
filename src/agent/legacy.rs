//! Rules of iptables-legacy: read by its own program where that is installed. The kernel's traces of nftables
//! do not tell of them. Which may drop packets or change their addresses is looked for where packets are
//! known to be lost or changed on this host.

use std::{
    fs,
    io::Read as _,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use ipnet::IpNet;

use crate::dataplane::{kernel::LegacyTable, silence::iptables_ports};

/// The program prints at once, or does not at all.
const TIMEOUT: Duration = Duration::from_secs(2);
const MOST: u64 = 1 << 20;
/// Tables that are read, and rules that are named.
const TABLES: usize = 5;
const NAMED: usize = 3;
const DROPPING: [&str; 2] = ["DROP", "REJECT"];
const REDIRECTING: [&str; 3] = ["DNAT", "REDIRECT", "NETMAP"];
const TRANSLATING: [&str; 3] = ["SNAT", "MASQUERADE", "NETMAP"];
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// The way of a packet through the built-in chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Out,
    In,
    Forward,
}

impl Way {
    const fn chains(self) -> &'static [&'static str] {
        match self {
            Self::Out => &["OUTPUT", "POSTROUTING"],
            Self::In => &["PREROUTING", "INPUT"],
            Self::Forward => &["PREROUTING", "FORWARD", "POSTROUTING"],
        }
    }
}

/// A rule, or a policy, as `iptables-save` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Suspicious {
    line: String,
    chain: String,
}

/// What may drop tunnel packets, UDP to this port, and what helps: what lets gossip to a port pass, too.
pub fn around_tunnels(ipv4: bool, way: Way, port: u16, gossip: Option<u16>) -> Vec<String> {
    let ports: Vec<u16> = [port].into_iter().chain(gossip).collect();
    let ports = iptables_ports(&ports);
    suspects(ipv4, way, Some(port), |command| format!("{command} {ports} -j ACCEPT"))
}

/// What may drop packets of pods that are forwarded, all or some: with what helps.
pub fn around_pods(network: IpNet) -> Vec<String> {
    suspects(network.addr().is_ipv4(), Way::Forward, None, |command| {
        format!("{command} -s {network} -j ACCEPT; {command} -d {network} -j ACCEPT")
    })
}

/// What gives tunnel packets that come in, UDP to this port, another destination: with what helps.
pub fn redirecting(ipv4: bool, port: u16) -> Vec<String> {
    let rules = translating_rules(ipv4, Way::In, port, &REDIRECTING).into_iter();
    let sentence = |(rule, fix)| {
        format!(
            "{rule} gives UDP {port} another destination (DNAT, as for a port that a container publishes): \
             publish another port, or exempt it: {fix}; then conntrack -D -p udp --orig-port-dst {port}"
        )
    };
    rules.map(sentence).collect()
}

/// The rule that gives tunnel packets which leave, UDP to this port, another source, and what exempts them.
pub fn translating(ipv4: bool, port: u16) -> Option<(String, String)> {
    translating_rules(ipv4, Way::Out, port, &TRANSLATING).into_iter().next()
}

/// Rules of the table of address translations, and what exempts UDP to a port from each.
fn translating_rules(ipv4: bool, way: Way, port: u16, targets: &[&str]) -> Vec<(String, String)> {
    let name = program(ipv4);
    if !tables(ipv4).iter().any(|table| table == "nat") {
        return Vec::new();
    }
    let Some(rules) = save(name, "nat") else {
        let rule = format!("a rule of {name} that cannot be read here may be what");
        return vec![(rule, format!("look at {name} -t nat -S"))];
    };
    let found = suspicious(&rules, way, Some(port), targets).into_iter().take(NAMED);
    let named = found.map(|Suspicious { line, chain }| {
        let open = format!("{name} -t nat -I {chain} {} -j ACCEPT", iptables_ports(&[port]));
        (format!("{name} has `{line}` in its table nat, which"), open)
    });
    named.collect()
}

/// All tables of a family that can be read.
pub fn all_tables(ipv4: bool) -> Vec<LegacyTable> {
    let name = program(ipv4);
    let read = |table: &String| Some(LegacyTable::new(name, table, &save(name, table)?));
    tables(ipv4).iter().take(TABLES).filter_map(read).collect()
}

const fn program(ipv4: bool) -> &'static str {
    if ipv4 { "iptables-legacy" } else { "ip6tables-legacy" }
}

/// Tables that are in the kernel.
fn tables(ipv4: bool) -> Vec<String> {
    let file = if ipv4 { "/proc/net/ip_tables_names" } else { "/proc/net/ip6_tables_names" };
    let names = fs::read_to_string(file).unwrap_or_default();
    names.lines().map(str::to_owned).collect()
}

fn suspects(ipv4: bool, way: Way, port: Option<u16>, fix: impl Fn(&str) -> String) -> Vec<String> {
    let name = program(ipv4);
    let mut suspects = Vec::new();
    for table in tables(ipv4).iter().filter(|table| *table != "nat").take(TABLES) {
        let Some(rules) = save(name, table) else {
            suspects.push(format!(
                "{name} has rules, too, which cannot be read here: {name} -t {table} -S"
            ));
            continue;
        };
        let found = suspicious(&rules, way, port, &DROPPING).into_iter();
        suspects.extend(found.map(|Suspicious { line, chain }| {
            let fix = fix(&format!("{name} -t {table} -I {chain}"));
            format!("{name} has `{line}` in its table {table}, which may: {fix}")
        }));
    }
    suspects.truncate(NAMED);
    suspects
}

/// What `iptables-save` prints of one table.
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
        let whole = output.take(MOST).read_to_string(&mut text);
        let _ = done.send(whole.is_ok().then_some(text));
    });
    // Without a thread its end of the channel is gone, and nothing is waited for.
    let text = read.recv_timeout(TIMEOUT).ok().flatten();
    let _ = child.kill();
    let _ = child.wait();
    let _ = reader.map(thread::JoinHandle::join);
    text
}

/// Rules with one of these targets, and policies, that concern such packets, or may: with a port those that
/// name no other protocol or port.
fn suspicious(rules: &str, way: Way, port: Option<u16>, targets: &[&str]) -> Vec<Suspicious> {
    let concerned = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            [chain, policy, ..] if line.starts_with(':') => {
                let chain = chain.strip_prefix(':')?;
                let is_it = way.chains().contains(&chain) && targets.contains(&policy);
                let line = format!("-P {chain} {policy}");
                is_it.then(|| Suspicious { line, chain: chain.to_owned() })
            }
            ["-A", chain, ref rest @ ..] => {
                let of = |option: &str| {
                    let at = rest.iter().position(|word| *word == option)?;
                    rest.get(at + 1).copied()
                };
                let is_other = BUILT_IN.contains(&chain) && !way.chains().contains(&chain);
                let is_target = of("-j").is_some_and(|target| targets.contains(&target));
                let ports = of("--dport").or_else(|| of("--dports"));
                let concerns = port.is_none_or(|port| {
                    of("-p").is_none_or(|protocol| protocol == "udp" || protocol == "all")
                        && ports.is_none_or(|ports| holds(ports, port))
                });
                let found = || Suspicious { line: line.to_owned(), chain: chain.to_owned() };
                (is_target && concerns && !is_other).then(found)
            }
            _ => None,
        }
    };
    rules.lines().filter_map(concerned).collect()
}

/// Ports as iptables writes them: numbers and ranges.
fn holds(ports: &str, port: u16) -> bool {
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
    fn rules_that_drop_the_port_are_found_and_others_are_not() {
        let rules = "*filter\n:INPUT ACCEPT [0:0]\n:OUTPUT DROP [1:2]\n:mine - [0:0]\n\
                     -A INPUT -p udp -m udp --dport 8472 -j DROP\n\
                     -A OUTPUT -p tcp -j DROP\n\
                     -A OUTPUT -p udp -m multiport --dports 53,8000:9000 -j REJECT --reject-with x\n\
                     -A mine -p udp -m udp --dport 53 -j DROP\n\
                     -A mine -s 192.0.2.1/32 -j DROP\nCOMMIT\n";
        let drop = |way, port| {
            let found = suspicious(rules, way, port, &DROPPING).into_iter();
            found.map(|rule| rule.line).collect::<Vec<_>>()
        };
        assert_eq!(
            drop(Way::Out, Some(8_472)),
            [
                "-P OUTPUT DROP",
                "-A OUTPUT -p udp -m multiport --dports 53,8000:9000 -j REJECT --reject-with x",
                "-A mine -s 192.0.2.1/32 -j DROP",
            ]
        );
        let first = drop(Way::In, Some(8_472)).into_iter().next();
        assert_eq!(first.as_deref(), Some("-A INPUT -p udp -m udp --dport 8472 -j DROP"));
        let of_pods =
            ["-A mine -p udp -m udp --dport 53 -j DROP", "-A mine -s 192.0.2.1/32 -j DROP"];
        assert_eq!(drop(Way::Forward, None), of_pods);
    }
    #[test]
    fn rules_that_translate_the_port_are_found_with_the_chain_that_has_them() {
        let rules = "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n\
                     -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
                     -A OUTPUT -p udp -j REDIRECT --to-ports 9\n\
                     -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE\n\
                     -A DOCKER -p tcp -m tcp --dport 8472 -j DNAT --to-destination 172.17.0.9:8472\n\
                     -A DOCKER -p udp -m udp --dport 8472 -j DNAT --to-destination 172.17.0.2:8472\n";
        let chains = |way, targets: &[&str]| {
            let found = suspicious(rules, way, Some(8_472), targets).into_iter();
            found.map(|rule| rule.chain).collect::<Vec<_>>()
        };
        assert_eq!(chains(Way::In, &REDIRECTING), ["DOCKER"]);
        assert_eq!(chains(Way::Out, &TRANSLATING), ["POSTROUTING"]);
    }
}

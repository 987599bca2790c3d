//! Rules of iptables-legacy that may drop packets: read by its own program where that is installed, and only
//! where packets are known to be lost on this host.

use std::{
    fs,
    io::Read as _,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use ipnet::IpNet;

use crate::dataplane::silence::iptables_ports;

/// The program prints at once, or does not at all.
const PATIENCE: Duration = Duration::from_secs(2);
const MOST: u64 = 1 << 20;
/// Tables that are read, and rules that are named.
const TABLES: usize = 4;
const NAMED: usize = 3;
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

    /// The chain of a table through which such packets go in any case.
    fn chain(self, table: &str) -> &'static str {
        match (self, table) {
            (Self::Out, _) => "OUTPUT",
            (Self::In, "filter") => "INPUT",
            (Self::Forward, "filter") => "FORWARD",
            _ => "PREROUTING",
        }
    }
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

fn suspects(ipv4: bool, way: Way, port: Option<u16>, fix: impl Fn(&str) -> String) -> Vec<String> {
    let name = if ipv4 { "iptables-legacy" } else { "ip6tables-legacy" };
    let file = if ipv4 { "/proc/net/ip_tables_names" } else { "/proc/net/ip6_tables_names" };
    let tables = fs::read_to_string(file).unwrap_or_default();
    let mut suspects = Vec::new();
    for table in tables.lines().filter(|table| *table != "nat").take(TABLES) {
        let Some(rules) = save(name, table) else {
            suspects.push(format!(
                "{name} has rules, too, which cannot be read here: {name} -t {table} -S"
            ));
            continue;
        };
        let fix = fix(&format!("{name} -t {table} -I {}", way.chain(table)));
        let found = droppers(&rules, way, port).into_iter();
        suspects.extend(
            found.map(|rule| format!("{name} has `{rule}` in its table {table}, which may: {fix}")),
        );
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
    let reader = thread::spawn(move || {
        let mut text = String::new();
        let whole = output.take(MOST).read_to_string(&mut text);
        let _ = done.send(whole.is_ok().then_some(text));
    });
    let text = read.recv_timeout(PATIENCE).ok().flatten();
    let _ = child.kill();
    let _ = child.wait();
    let _ = reader.join();
    text
}

/// Rules and policies that drop such packets, or may: with a port those that name no other protocol or port.
fn droppers(rules: &str, way: Way, port: Option<u16>) -> Vec<String> {
    let dropper = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            [chain, "DROP", ..] => {
                let chain = chain.strip_prefix(':')?;
                way.chains().contains(&chain).then(|| format!("-P {chain} DROP"))
            }
            ["-A", chain, ref rest @ ..] => {
                let of = |option: &str| {
                    let at = rest.iter().position(|word| *word == option)?;
                    rest.get(at + 1).copied()
                };
                let is_other = BUILT_IN.contains(&chain) && !way.chains().contains(&chain);
                let drops = matches!(of("-j"), Some("DROP" | "REJECT"));
                let ports = of("--dport").or_else(|| of("--dports"));
                let concerns = port.is_none_or(|port| {
                    of("-p").is_none_or(|protocol| protocol == "udp" || protocol == "all")
                        && ports.is_none_or(|ports| holds(ports, port))
                });
                (drops && concerns && !is_other).then(|| line.to_owned())
            }
            _ => None,
        }
    };
    rules.lines().filter_map(dropper).collect()
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
        let drop = |way, port| droppers(rules, way, port);
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
}

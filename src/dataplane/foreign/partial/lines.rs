//! Reads rules of iptables-legacy in the format of `iptables-legacy-save`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    effects::{connection_mark, queued},
    matches,
    reading::{Change, Context, Reading, Verdict},
    selection::{Range, Selection, Side, UNICAST, bounds},
    sets::SetName,
};
use crate::netlink::attributes;

/// States of connections as bits (`linux/netfilter/nf_conntrack_common.h`, `xt_conntrack.h`).
const STATES: [(&str, u32); 5] =
    [("INVALID", 1), ("ESTABLISHED", 2), ("RELATED", 4), ("NEW", 8), ("UNTRACKED", 64)];
/// Types of addresses (`RTN_*`).
const ADDRESS_TYPES: [(&str, u32); 9] = [
    ("UNSPEC", 0),
    ("UNICAST", 1),
    ("LOCAL", 2),
    ("BROADCAST", 3),
    ("ANYCAST", 4),
    ("MULTICAST", 5),
    ("BLACKHOLE", 6),
    ("UNREACHABLE", 7),
    ("PROHIBIT", 8),
];
const TCP_FLAGS: [(&str, u8); 6] =
    [("FIN", 1), ("SYN", 2), ("RST", 4), ("PSH", 8), ("ACK", 16), ("URG", 32)];

/// A table of iptables-legacy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LegacyTable {
    /// `iptables-legacy` or `ip6tables-legacy`.
    pub program: &'static str,
    /// The table's name.
    pub name: String,
    /// The rules of each chain, one line each.
    pub chains: BTreeMap<String, Vec<String>>,
    /// The chains whose policy drops packets.
    pub dropping: BTreeSet<String>,
}

impl LegacyTable {
    /// Parses the output of `iptables-legacy-save` for one table.
    pub fn new(program: &'static str, name: &str, text: &str) -> Self {
        let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut dropping = BTreeSet::new();
        for line in text.lines() {
            let mut words = line.split(' ');
            match (words.next(), words.next()) {
                (Some("-A"), Some(chain)) => {
                    chains.entry(chain.to_owned()).or_default().push(line.to_owned());
                }
                (Some(chain), policy) => {
                    if let Some(chain) = chain.strip_prefix(':') {
                        chains.entry(chain.to_owned()).or_default();
                        dropping.extend((policy == Some("DROP")).then(|| chain.to_owned()));
                    }
                }
                _ => {}
            }
        }
        Self { program, name: name.to_owned(), chains, dropping }
    }
}

/// An option with its values.
struct Word<'a> {
    name: &'a str,
    values: Vec<&'a str>,
    /// Whether `!` precedes it.
    is_inverted: bool,
}

impl<'a> Word<'a> {
    fn first(&self) -> Option<&'a str> {
        self.values.first().copied()
    }
}

/// Returns what a rule does with the packets; `None` if it matches none of them or cannot be read.
/// `is_chain` says whether the table has a chain of this name.
pub fn read(
    context: &mut Context<'_>,
    line: &str,
    is_chain: impl Fn(&str) -> bool,
) -> Option<Reading> {
    let words = words(line);
    let mut taken = Selection::default();
    let mut verdict = Verdict::Next;
    let mut changes = Vec::new();
    let mut list = words.iter().skip(1).peekable();
    while let Some(word) = list.next() {
        match word.name {
            "-m" => {
                let mut options = Vec::new();
                while let Some(option) = list.next_if(|other| other.name.starts_with("--")) {
                    options.push(option);
                }
                limit_by_match(context, &mut taken, word.first()?, &options)?;
            }
            "-j" => {
                let target = word.first()?;
                let options: Vec<&Word<'_>> = list.by_ref().collect();
                verdict = match is_chain(target) {
                    true => Verdict::Jump(target.to_owned()),
                    false => of_target(context, target, &options, &mut changes),
                };
            }
            "-g" => verdict = Verdict::Goto(word.first()?.to_owned()),
            _ => limit_by_option(context, &mut taken, word)?,
        }
    }
    let taken = Selection::default().and(&taken)?;
    Some(Reading { branches: vec![(taken, verdict)], changes })
}

/// Narrows the selection by an option that belongs to no match.
fn limit_by_option(context: &Context<'_>, taken: &mut Selection, word: &Word<'_>) -> Option<()> {
    let (traffic, is_inverted) = (context.traffic, word.is_inverted);
    match word.name {
        "-s" | "-d" => {
            let network = network(word.first()?)?;
            taken.limit_addresses(traffic, word.name == "-d", &[bounds(&network)], is_inverted)
        }
        "-i" | "-o" => {
            let wanted = word.first()?;
            let side = if word.name == "-i" { Side::Input } else { Side::Output };
            taken.limit_ways(traffic, side, is_inverted, |(_, name)| {
                match wanted.strip_suffix('+') {
                    Some(prefix) => name.starts_with(prefix),
                    None => name == wanted,
                }
            })
        }
        "-p" => {
            let wanted = word.first()?;
            let [tcp, udp] = [["tcp", "6"], ["udp", "17"]].map(|names| names.contains(&wanted));
            let is_all = wanted == "all" || wanted == "0";
            taken.limit_protocol(
                traffic,
                (tcp || is_all) != is_inverted,
                (udp || is_all) != is_inverted,
            )
        }
        _ => None,
    }
}

/// Narrows the selection by a match with its options.
#[expect(clippy::too_many_lines, reason = "one arm for each match of iptables")]
fn limit_by_match(
    context: &mut Context<'_>,
    taken: &mut Selection,
    module: &str,
    all: &[&Word<'_>],
) -> Option<()> {
    let traffic = context.traffic;
    let find = |name: &str| all.iter().find(|word| word.name == name).copied();
    match module {
        "comment" => {}
        "tcp" | "udp" => {
            for (name, to) in [("--sport", false), ("--dport", true)] {
                if let Some(word) = find(name) {
                    let ports = [range::<u16>(word.first()?, ':')?];
                    taken.limit_ports(traffic, to, &ports, word.is_inverted)?;
                }
            }
            if let Some(word) = find("--tcp-flags").filter(|_| module == "tcp") {
                let [mask, wanted] = word.values[..] else { return None };
                let (mask, wanted) = (flags(mask)?, flags(wanted)?);
                taken.limit_flags(mask, |found| (found == wanted) != word.is_inverted);
            }
            if find("--tcp-option").is_some() {
                return None;
            }
        }
        "multiport" => {
            for (name, to) in [("--sports", false), ("--dports", true), ("--ports", true)] {
                let Some(word) = find(name) else { continue };
                let ports = word.first()?.split(',').map(|ports| range::<u16>(ports, ':'));
                let ports: Vec<(u16, u16)> = ports.collect::<Option<_>>()?;
                taken.limit_ports(traffic, to, &ports, word.is_inverted)?;
            }
        }
        "iprange" => {
            for (name, to) in [("--src-range", false), ("--dst-range", true)] {
                let Some(word) = find(name) else { continue };
                let (first, last) = range::<IpAddr>(word.first()?, '-')?;
                let range: Range = (attributes::octets(first), attributes::octets(last));
                taken.limit_addresses(traffic, to, &[range], word.is_inverted)?;
            }
        }
        "addrtype" => {
            for (name, of) in [("--src-type", UNICAST), ("--dst-type", traffic.destination_type())]
            {
                let Some(word) = find(name) else { continue };
                let is_it = |name: &str| ADDRESS_TYPES.contains(&(name, of));
                (word.first()?.split(',').any(is_it) != word.is_inverted).then_some(())?;
            }
            if all.iter().any(|word| word.name.starts_with("--limit-iface")) {
                return None;
            }
        }
        "state" | "conntrack" => {
            let word = find("--state").or(find("--ctstate"))?;
            if all.iter().any(|word| word.name.starts_with("--ct") && word.name != "--ctstate") {
                return None;
            }
            let number = |name| STATES.iter().find(|(known, _)| *known == name);
            let named = word.first()?.split(',').filter_map(number);
            let states = named.fold(0, |all, (_, state)| all | state);
            taken.limit_states(if word.is_inverted { !states } else { states });
        }
        "mark" | "connmark" => {
            let word = find("--mark")?;
            let (wanted, mask) = masked(word.first()?)?;
            let is_it = |known: u32| (known & mask == wanted) != word.is_inverted;
            match module {
                "mark" => taken.limit_mark(&context.marks.packets, is_it)?,
                _ => taken.limit_mark(&context.marks.restored(), is_it)?,
            }
        }
        "set" => {
            let word = find("--match-set")?;
            let [name, sides] = word.values[..] else { return None };
            let set = (context.sets)(&SetName::Ipset(name.to_owned()));
            let to: Vec<bool> = sides.split(',').map(|side| side == "dst").collect();
            set.limit(traffic, taken, &to, word.is_inverted)?;
        }
        "recent" => {
            let action = all
                .iter()
                .find(|word| ["--set", "--rcheck", "--update", "--remove"].contains(&word.name))?;
            let list = find("--name").and_then(Word::first).unwrap_or("DEFAULT");
            let (to, is_counted) = (find("--rdest").is_some(), find("--hitcount").is_some());
            let does = (action.name == "--set", is_counted, action.is_inverted);
            matches::recent(context, taken, (list, to), does)?;
        }
        "length" => {
            let word = find("--length")?;
            let (first, last) = range::<u16>(word.first()?, ':')?;
            taken.limit_length(first, last, word.is_inverted)?;
        }
        "limit" => taken.limit_rate(false),
        "hashlimit" => taken.limit_rate(find("--hashlimit-above").is_some()),
        "string" | "u32" | "bpf" => taken.limit_content(),
        "connbytes" => taken.limit_amount(),
        "connlimit" => taken.limit_connections(),
        "statistic" => taken.limit_share(),
        "time" => taken.limit_times(),
        _ => return None,
    }
    Some(())
}

/// Returns where a rule with this target leads, and adds what it changes.
fn of_target(
    context: &Context<'_>,
    target: &str,
    options: &[&Word<'_>],
    changes: &mut Vec<Change>,
) -> Verdict {
    let find = |name: &str| options.iter().find(|word| word.name == name);
    let number = |name: &str| find(name)?.first()?.parse::<u8>().ok();
    match target {
        "ACCEPT" => return Verdict::Accept,
        "DROP" => return Verdict::Drop,
        "REJECT" => return Verdict::Reject,
        "RETURN" => return Verdict::Return,
        "DNAT" | "REDIRECT" | "TPROXY" => {
            changes.push(Change::Destination);
            return Verdict::Accept;
        }
        "SNAT" | "MASQUERADE" => {
            changes.push(Change::Source);
            return Verdict::Accept;
        }
        "NETMAP" => {
            changes.extend([Change::Destination, Change::Source]);
            return Verdict::Accept;
        }
        "NFQUEUE" => {
            let first =
                find("--queue-num").or(find("--queue-balance")).and_then(|word| word.first());
            let queues = range::<u16>(first.unwrap_or("0"), ':').unwrap_or_default();
            let count = queues.1.saturating_sub(queues.0).saturating_add(1);
            let queued = queued(queues.0, count, find("--queue-bypass").is_some());
            return queued.unwrap_or(Verdict::Next);
        }
        "MARK" | "CONNMARK" => {
            let mask_of = |name: &str| find(name).and_then(|word| Some(masked(word.first()?)?.0));
            let [of_connection, of_packet] =
                ["--ctmask", "--nfmask"].map(|name| mask_of(name).unwrap_or(u32::MAX));
            let set = find("--set-xmark").and_then(|word| masked(word.first()?));
            match (set, target) {
                (Some((mark, mask)), "MARK") => {
                    let before = &context.marks.packets;
                    changes.extend(Change::marks(before, false, |old| old & !mask ^ mark));
                }
                (Some((mark, mask)), _) => {
                    changes.extend(connection_mark(context, 0, [mark, mask, of_packet]));
                }
                (None, _) => {
                    let mode = if find("--save-mark").is_some() { 1 } else { 2 };
                    changes.extend(connection_mark(context, mode, [0, of_connection, of_packet]));
                }
            }
        }
        "TTL" | "HL" => {
            let modes = [("set", 0), ("inc", 1), ("dec", 2)];
            let found = modes.iter().find_map(|(name, mode)| {
                Some((*mode, number(&format!("--{}-{name}", target.to_lowercase()))?))
            });
            changes.extend(found.and_then(|(mode, number)| Change::ttl(mode, number)));
        }
        _ => {}
    }
    Verdict::Next
}

/// Splits a line into options with their values.
fn words(line: &str) -> Vec<Word<'_>> {
    let mut words: Vec<Word<'_>> = Vec::new();
    let mut is_inverted = false;
    let mut rest = line;
    while !rest.is_empty() {
        let (token, is_quoted);
        (token, rest, is_quoted) = next_token(rest);
        if token == "!" && !is_quoted {
            is_inverted = true;
        } else if token.starts_with('-') && !is_quoted {
            words.push(Word { name: token, values: Vec::new(), is_inverted });
            is_inverted = false;
        } else if let Some(word) = words.last_mut().filter(|_| !token.is_empty()) {
            word.values.push(token);
        }
    }
    words
}

/// Returns the next word, the rest, and whether the word was quoted. Escapes in a quoted word are
/// kept.
fn next_token(text: &str) -> (&str, &str, bool) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (token, rest) = text.split_once(' ').unwrap_or((text, ""));
        return (token, rest, false);
    };
    let mut is_escaped = false;
    for (at, letter) in quoted.char_indices() {
        match letter {
            '"' if !is_escaped => {
                let rest = &quoted[at + 1..];
                return (&quoted[..at], rest.strip_prefix(' ').unwrap_or(rest), true);
            }
            letter => is_escaped = letter == '\\' && !is_escaped,
        }
    }
    (quoted, "", true)
}

/// Parses an address, optionally with a prefix length or a netmask.
fn network(text: &str) -> Option<IpNet> {
    let (address, mask) = text.split_once('/').unwrap_or((text, ""));
    let address: IpAddr = address.parse().ok()?;
    let full = if address.is_ipv4() { 32 } else { 128 };
    match (mask, mask.parse::<u8>()) {
        ("", _) => IpNet::new(address, full).ok(),
        (_, Ok(length)) => IpNet::new(address, length).ok(),
        (mask, Err(_)) => IpNet::with_netmask(address, mask.parse().ok()?).ok(),
    }
}

/// Parses `FIRST`, or `FIRST` and `LAST` with the separator between them.
fn range<T: std::str::FromStr + Copy>(text: &str, between: char) -> Option<(T, T)> {
    let (first, last) = text.split_once(between).unwrap_or((text, text));
    Some((first.parse().ok()?, last.parse().ok()?))
}

/// Parses names of TCP flags.
fn flags(names: &str) -> Option<u8> {
    let number = |name: &str| TCP_FLAGS.iter().find(|(known, _)| *known == name);
    match names {
        "NONE" => Some(0),
        "ALL" => Some(0x3f),
        names => names.split(',').try_fold(0, |all, name| Some(all | number(name)?.1)),
    }
}

/// Parses a mark and its mask, `MARK/MASK`.
fn masked(text: &str) -> Option<(u32, u32)> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    match text.split_once('/') {
        Some((mark, mask)) => Some((number(mark)?, number(mask)?)),
        None => Some((number(text)?, u32::MAX)),
    }
}

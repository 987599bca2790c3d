//! What a rule of nftables does with matching packets. This includes rules that iptables makes,
//! whose targets are structs of its headers (linux/netfilter/xt_*.h).

use std::fs;

use super::{
    super::rules::{
        self, expressions, number, text_of, translates_destination, translates_source, value,
        verdict_in, verdict_of,
    },
    matches::{byte, half, word},
    reading::{Change, Context, Verdict},
    selection::MarkedPackets,
    sets::{Data, SetName},
};
use crate::netlink::{
    attributes,
    nftables::{Object, nfta},
};

/// `NFT_META_MARK` and `NFT_CT_MARK`.
const META_MARK: u32 = 3;
const CT_MARK: u32 = 3;
/// `NFT_PAYLOAD_NETWORK_HEADER`, and the offsets of TTL and hop limit in the headers.
const NETWORK: u32 = 1;
const TTL_AT: u32 = 8;
const HOP_LIMIT_AT: u32 = 7;
/// `NFT_QUEUE_FLAG_BYPASS`.
const QUEUE_BYPASS: u16 = 1;
/// Table of the queues that have a listener; the first column is the queue's number.
const QUEUES: &str = "/proc/thread-self/net/netfilter/nfnetlink_queue";

/// Converts a verdict code.
pub fn verdict(code: i32, chain: Option<&str>) -> Option<Verdict> {
    let chain = chain.map(str::to_owned);
    Some(match code {
        rules::DROP => Verdict::Drop,
        rules::ACCEPT => Verdict::Accept,
        rules::RETURN => Verdict::Return,
        rules::GOTO => Verdict::Goto(chain?),
        rules::JUMP => Verdict::Jump(chain?),
        _ => Verdict::Next,
    })
}

/// Returns where a rule without a verdict map leads.
pub fn of_rule(rule: &Object) -> Verdict {
    let mut found = Verdict::Next;
    for (name, data) in expressions(rule) {
        let of = match name {
            "immediate" => verdict_of(data).and_then(|code| {
                let chain = attributes::find(verdict_in(data)?, nfta::VERDICT_CHAIN);
                verdict(code, chain.map(attributes::text))
            }),
            "reject" => Some(Verdict::Reject),
            // No further rule of the hook sees a translated packet.
            "masq" | "nat" | "redir" => Some(Verdict::Accept),
            "queue" => {
                let number = |attribute| {
                    attributes::find(data, attribute)?
                        .first_chunk()
                        .copied()
                        .map(u16::from_be_bytes)
                };
                number(nfta::QUEUE_NUM).and_then(|first| {
                    let total = number(nfta::QUEUE_TOTAL).unwrap_or(1);
                    queued(first, total, number(nfta::QUEUE_FLAGS).unwrap_or(0) & QUEUE_BYPASS != 0)
                })
            }
            "target" => {
                target(text_of(data), attributes::find(data, nfta::TARGET_INFO).unwrap_or_default())
            }
            _ => None,
        };
        found = of.unwrap_or(found);
    }
    found
}

/// Returns where a target of iptables leads.
fn target(name: Option<&str>, info: &[u8]) -> Option<Verdict> {
    match name? {
        "REJECT" => Some(Verdict::Reject),
        "DROP" => Some(Verdict::Drop),
        "ACCEPT" | "MASQUERADE" | "SNAT" | "NETMAP" | "DNAT" | "REDIRECT" => Some(Verdict::Accept),
        "NFQUEUE" => {
            let bypasses = half(info, 4).unwrap_or(0) & 1 != 0;
            queued(half(info, 0)?, half(info, 2).unwrap_or(1), bypasses)
        }
        _ => None,
    }
}

/// Returns [`Verdict::Queue`] if one of the queues has no listener and packets are then lost, not
/// passed on (`bypass`).
pub fn queued(first: u16, count: u16, bypasses: bool) -> Option<Verdict> {
    let table = fs::read_to_string(QUEUES).unwrap_or_default();
    let number = |line: &str| line.split_whitespace().next()?.parse::<u16>().ok();
    let known: Vec<u16> = table.lines().filter_map(number).collect();
    let last = first.saturating_add(count.max(1) - 1);
    let is_lost = !bypasses && (first..=last).any(|queue| !known.contains(&queue));
    is_lost.then_some(Verdict::Queue)
}

/// Returns what a rule changes in matching packets.
pub fn changes(context: &mut Context<'_>, rule: &Object) -> Vec<Change> {
    let mut changes = register_changes(context, rule);
    if translates_destination(rule) {
        changes.push(Change::Destination);
    }
    if translates_source(rule) {
        changes.push(Change::Source);
    }
    for (name, data) in expressions(rule) {
        let info = attributes::find(data, nfta::TARGET_INFO).unwrap_or_default();
        let word = |at| word(info, at).unwrap_or_default();
        match text_of(data).filter(|_| name == "target") {
            Some("MARK") => {
                let (mark, mask) = (word(0), word(4));
                let before = &context.marks.packets;
                changes.extend(Change::marks(before, false, |old| old & !mask ^ mark));
            }
            Some("CONNMARK") => {
                // The second revision of the struct has a shift before the mode.
                let is_second = number(attributes::find(data, nfta::TARGET_REV)) == Some(2);
                let mode = byte(info, if is_second { 14 } else { 12 }).unwrap_or_default();
                changes.extend(connection_mark(context, mode, [word(0), word(4), word(8)]));
            }
            Some("TTL" | "HL") => {
                let [mode, number] = [0, 1].map(|at| byte(info, at).unwrap_or_default());
                changes.extend(Change::ttl(mode, number));
            }
            _ => {}
        }
    }
    changes
}

/// Returns what `-j CONNMARK` changes: set (0), save (1) or restore (2), with the mark and both
/// masks.
pub fn connection_mark(
    context: &Context<'_>,
    mode: u8,
    [mark, of_connection, of_packet]: [u32; 3],
) -> Vec<Change> {
    let marks = context.marks;
    match mode {
        0 => Change::marks(&marks.connections, true, |old| old & !of_connection ^ mark),
        1 => Change::marks(&marks.packets, true, |old| old & of_packet),
        _ => Change::marks(&marks.restored(), false, |old| old & of_connection),
    }
}

/// Returns changes whose values a rule computes in registers and then writes to a mark or a header.
fn register_changes(context: &mut Context<'_>, rule: &Object) -> Vec<Change> {
    let mut changes = Vec::new();
    let unmarked = || vec![MarkedPackets { mark: 0, what: Vec::new() }];
    // The possible values of the register that was written last.
    let mut held: Option<Vec<MarkedPackets>> = None;
    let mut bytes: Option<Vec<u8>> = None;
    for (name, data) in expressions(rule) {
        let get = |attribute| number(attributes::find(data, attribute));
        let native = |bytes: &[u8]| bytes.first_chunk().copied().map(u32::from_ne_bytes);
        let word = |attribute| native(value(attributes::find(data, attribute))?);
        let sets = |held: &Option<Vec<MarkedPackets>>, of_connection| {
            let held = held.iter().flatten().filter(|marked| marked.mark != 0).cloned();
            held.map(|marked| Change::Mark { marked, of_connection }).collect::<Vec<_>>()
        };
        match name {
            "immediate" => {
                bytes = value(attributes::find(data, nfta::IMMEDIATE_DATA)).map(<[u8]>::to_vec);
                held = word(nfta::IMMEDIATE_DATA)
                    .map(|mark| vec![MarkedPackets { mark, what: Vec::new() }]);
            }
            "meta" if get(nfta::META_SREG).is_some() => {
                if get(nfta::META_KEY) == Some(META_MARK) {
                    changes.extend(sets(&held, false));
                }
            }
            "ct" if get(nfta::CT_SREG).is_some() => {
                if get(nfta::CT_KEY) == Some(CT_MARK) {
                    changes.extend(sets(&held, true));
                }
            }
            "payload" if get(nfta::PAYLOAD_SREG).is_some() => {
                let place =
                    (get(nfta::PAYLOAD_BASE), get(nfta::PAYLOAD_OFFSET), get(nfta::PAYLOAD_LEN));
                changes.extend(written_ttl(place, bytes.as_deref()));
            }
            "meta" => {
                let known = || [unmarked(), context.marks.packets.clone()].concat();
                held = (get(nfta::META_KEY) == Some(META_MARK)).then(known);
            }
            "ct" => {
                let known = || [unmarked(), context.marks.restored()].concat();
                held = (get(nfta::CT_KEY) == Some(CT_MARK)).then(known);
            }
            "payload" => (bytes, held) = (None, None),
            "bitwise" => {
                // A mask on a header keeps the bits beside the new value.
                bytes = value(attributes::find(data, nfta::BITWISE_XOR)).map(<[u8]>::to_vec);
                let change = |mut marked: MarkedPackets| {
                    marked.mark =
                        marked.mark & word(nfta::BITWISE_MASK)? ^ word(nfta::BITWISE_XOR)?;
                    Some(marked)
                };
                held = held.and_then(|held| held.into_iter().map(change).collect());
            }
            "lookup" if get(nfta::LOOKUP_DREG).is_some_and(|register| register != 0) => {
                let name = attributes::find(data, nfta::LOOKUP_SET)
                    .map(attributes::text)
                    .unwrap_or_default();
                let set = (context.sets)(&SetName::OfTable(name.to_owned()));
                let mark = |data: &Option<Data>| match data {
                    Some(Data::Value(bytes)) => native(bytes),
                    _ => None,
                };
                let marks = set.elements.iter().filter_map(|element| mark(&element.data));
                held = Some(
                    marks.map(|mark| MarkedPackets { mark, what: Vec::new() }).take(1).collect(),
                );
            }
            "counter" | "cmp" => {}
            _ => held = None,
        }
    }
    changes
}

/// Returns the new number of hops, if it is written to the header, alone or with the following
/// byte.
fn written_ttl(
    (base, at, length): (Option<u32>, Option<u32>, Option<u32>),
    bytes: Option<&[u8]>,
) -> Option<Change> {
    let is_hop_count = base == Some(NETWORK)
        && matches!((at, length), (Some(TTL_AT), Some(1 | 2)) | (Some(HOP_LIMIT_AT), Some(1)));
    bytes.filter(|_| is_hop_count)?.first().map(|ttl| Change::Ttl(*ttl))
}

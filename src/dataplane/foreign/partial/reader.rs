//! Reads which packets a rule of nftables matches, as far as its form shows.

use super::{
    super::rules::{compared_value, expressions, number, text_of, value},
    effects, matches,
    reading::{Context, Reading, Verdict},
    registers::{Loaded, Registers, Value},
    selection::{Range, Selection, Side, Traffic},
    sets::{Data, Element, SetName, limit_to_any, port_range},
};
use crate::netlink::{
    attributes,
    nftables::{Object, nfta},
};

/// `NFT_META_*`.
const META_LEN: u32 = 0;
const META_PROTOCOL: u32 = 1;
const META_MARK: u32 = 3;
const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const META_RANDOM: u32 = 24;
const META_TIMES: [u32; 3] = [26, 27, 28];
/// `NFT_PAYLOAD_*`.
const LINK: u32 = 0;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
const INNER: u32 = 3;
/// `NFT_CT_*`.
const CT_STATE: u32 = 0;
const CT_MARK: u32 = 3;
const CT_PACKETS: u32 = 14;
const CT_BYTES: u32 = 15;
const CT_AVERAGE: u32 = 16;
/// `NFT_FIB_RESULT_ADDRTYPE` and `NFTA_FIB_F_DADDR`.
const FIB_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 2;
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`, each with its EtherType.
const FAMILIES: [(u8, [u8; 2]); 2] = [(2, [0x08, 0x00]), (10, [0x86, 0xdd])];
const TCP: u8 = 6;
const UDP: u8 = 17;
/// `NFT_CMP_*`.
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const LESS: u32 = 2;
const AT_MOST: u32 = 3;
const MORE: u32 = 4;
const AT_LEAST: u32 = 5;
/// `NFT_OBJECT_COUNTER`.
const COUNTER: u32 = 1;
/// `NFT_LIMIT_F_INV` and `NFT_LOOKUP_F_INV`.
const INVERTED: u32 = 1;

/// Returns what a rule does with the packets; `None` if it matches none of them or cannot be read.
#[expect(clippy::too_many_lines, reason = "one arm for each expression of nftables")]
pub fn read(context: &mut Context<'_>, rule: &Object) -> Option<Reading> {
    let traffic = context.traffic;
    let mut registers = Registers::default();
    let mut taken = Selection::default();
    let mut map: Option<Vec<(Selection, Verdict)>> = None;
    let mut list = expressions(rule).peekable();
    while let Some((name, data)) = list.next() {
        let get = |attribute| number(attributes::find(data, attribute));
        match name {
            // With a source register, these expressions set something.
            "meta" if get(nfta::META_SREG).is_some() => {}
            "ct" if get(nfta::CT_SREG).is_some() => {}
            "payload" if get(nfta::PAYLOAD_SREG).is_some() => {}
            "meta" | "payload" | "ct" | "fib" | "numgen" => {
                // The attribute has the same number in all of them.
                registers.load(get(nfta::META_DREG)?, load(traffic, name, &get));
            }
            // A hash of the connection selects an apparently random share.
            "hash" => {
                registers.load(
                    get(nfta::HASH_DREG)?,
                    Value { loaded: Loaded::Share, bytes: 4, mask: None },
                );
            }
            "bitwise" => {
                let mask = value(attributes::find(data, nfta::BITWISE_MASK));
                let mut loaded = registers.value(get(nfta::BITWISE_SREG)?)?.clone();
                loaded.mask = mask;
                registers.load(get(nfta::BITWISE_DREG)?, loaded);
            }
            "byteorder" => {
                let loaded = registers.value(get(nfta::BYTEORDER_SREG)?)?.clone();
                registers.load(get(nfta::BYTEORDER_DREG)?, loaded);
            }
            "cmp" => {
                let found = compared_value(data)?;
                let (range, is_inverted) = match get(nfta::CMP_OP)? {
                    operator @ (EQUAL | NOT_EQUAL) => {
                        ((found.to_vec(), found.to_vec()), operator == NOT_EQUAL)
                    }
                    AT_LEAST => match list.peek() {
                        Some(("cmp", data))
                            if number(attributes::find(data, nfta::CMP_OP)) == Some(AT_MOST) =>
                        {
                            let last = compared_value(data)?.to_vec();
                            list.next();
                            ((found.to_vec(), last), false)
                        }
                        _ => ((found.to_vec(), vec![u8::MAX; found.len()]), false),
                    },
                    AT_MOST => ((vec![0; found.len()], found.to_vec()), false),
                    LESS => ((vec![0; found.len()], adjacent_number(found, false)?), false),
                    MORE => ((adjacent_number(found, true)?, vec![u8::MAX; found.len()]), false),
                    _ => return None,
                };
                let value = registers.value(get(nfta::CMP_SREG)?)?.clone();
                compare(context, &mut taken, &value, &[range], is_inverted)?;
            }
            "range" => {
                let [from, to] = [nfta::RANGE_FROM_DATA, nfta::RANGE_TO_DATA]
                    .map(|kind| value(attributes::find(data, kind)));
                let range = (from?.to_vec(), to?.to_vec());
                let value = registers.value(get(nfta::RANGE_SREG)?)?.clone();
                let is_inverted = get(nfta::RANGE_OP)? == NOT_EQUAL;
                compare(context, &mut taken, &value, &[range], is_inverted)?;
            }
            "lookup" => {
                let name = attributes::text(attributes::find(data, nfta::LOOKUP_SET)?);
                let set = (context.sets)(&SetName::OfTable(name.to_owned()));
                let of = |context: &Context<'_>, element: &Element| {
                    key(context, &registers, get(nfta::LOOKUP_SREG)?, element)
                };
                // A verdict map has a branch for each element.
                if get(nfta::LOOKUP_DREG) == Some(0) {
                    let branches = set.elements.iter().filter_map(|element| {
                        let Some(Data::Verdict(code, chain)) = &element.data else { return None };
                        let verdict = effects::verdict(*code, chain.as_deref())?;
                        Some((of(context, element)?, verdict))
                    });
                    map = Some(branches.collect());
                    continue;
                }
                let is_inverted = get(nfta::LOOKUP_FLAGS).unwrap_or(0) & INVERTED != 0;
                let bytes =
                    set.elements.iter().find_map(|element| Some(element.parts.first()?.0.len()));
                let values = registers.of_key(get(nfta::LOOKUP_SREG)?, bytes.unwrap_or(1));
                match values[..] {
                    [(_, value)] => {
                        let ranges = set.elements.iter().flat_map(|element| element.parts.clone());
                        let (ranges, value) = (ranges.collect::<Vec<_>>(), value.clone());
                        compare(context, &mut taken, &value, &ranges, is_inverted)?;
                    }
                    _ => {
                        let several: Vec<_> =
                            set.elements.iter().filter_map(|one| of(context, one)).collect();
                        limit_to_any(&mut taken, several.into_iter(), is_inverted)?;
                    }
                }
            }
            "match" => {
                let info = attributes::find(data, nfta::MATCH_INFO).unwrap_or_default();
                matches::read(context, &mut taken, text_of(data)?, info)?;
            }
            "connlimit" => taken.limit_connections(),
            "dynset" => {
                let inner = attributes::find(data, nfta::DYNSET_EXPR).or_else(|| {
                    let list = attributes::find(data, nfta::DYNSET_EXPRESSIONS)?;
                    attributes::read(list).next().map(|(_, inner)| inner)
                });
                let of_inner = |kind| inner.and_then(|inner| attributes::find(inner, kind));
                match of_inner(nfta::EXPR_NAME).map(attributes::text) {
                    Some("connlimit") => taken.limit_connections(),
                    None | Some("counter") => {}
                    Some(_) => taken.limit_rate(of_inner(nfta::EXPR_DATA).is_some_and(is_above)),
                }
            }
            "objref" if get(nfta::OBJREF_IMM_TYPE) == Some(COUNTER) => {}
            "limit" => taken.limit_rate(is_above(data)),
            "quota" | "objref" => taken.limit_otherwise(),
            "immediate" | "counter" | "log" | "redir" | "nat" | "masq" | "tproxy" | "target"
            | "reject" | "notrack" | "queue" | "last" | "dup" => {}
            _ => return None,
        }
    }
    let taken = Selection::default().and(&taken)?;
    let branches = match map {
        Some(map) => {
            let both = |(own, verdict): (Selection, Verdict)| Some((taken.and(&own)?, verdict));
            map.into_iter().filter_map(both).collect()
        }
        None => vec![(taken, effects::of_rule(rule))],
    };
    Some(Reading { branches, changes: effects::changes(context, rule) })
}

/// Returns the next higher or lower number of the same length; `None` beyond the last.
pub fn adjacent_number(number: &[u8], is_higher: bool) -> Option<Vec<u8>> {
    let mut number = number.to_vec();
    for byte in number.iter_mut().rev() {
        let (next, carries) =
            if is_higher { byte.overflowing_add(1) } else { byte.overflowing_sub(1) };
        *byte = next;
        if !carries {
            return Some(number);
        }
    }
    None
}

/// Whether a limit matches packets above the rate.
fn is_above(limit: &[u8]) -> bool {
    number(attributes::find(limit, nfta::LIMIT_FLAGS)).unwrap_or(0) & INVERTED != 0
}

/// Returns the packets that an element of a set or map stands for.
fn key(
    context: &Context<'_>,
    registers: &Registers<'_>,
    register: u32,
    element: &Element,
) -> Option<Selection> {
    let mut taken = Selection::default();
    let Some((first, last)) = element.parts.first() else {
        // A catch-all element.
        taken.is_partial = true;
        return Some(taken);
    };
    let values = registers.of_key(register, first.len());
    if values.is_empty() {
        return None;
    }
    let is_one = values.len() == 1;
    for (at, value) in values {
        let end = if is_one { first.len() } else { at + value.bytes };
        let range = (first.get(at..end)?.to_vec(), last.get(at..end)?.to_vec());
        compare(context, &mut taken, value, &[range], false)?;
    }
    Selection::default().and(&taken)
}

fn load<'a>(traffic: &Traffic<'_>, name: &str, get: &impl Fn(u16) -> Option<u32>) -> Value<'a> {
    let interface = |side, by_name| Loaded::Interface { side, by_name };
    let of_meta = |key| match key {
        META_LEN => (Loaded::Length, 4),
        META_PROTOCOL => (Loaded::EtherType, 2),
        META_MARK => (Loaded::Mark { of_connection: false }, 4),
        META_IIF => (interface(Side::Input, false), 4),
        META_OIF => (interface(Side::Output, false), 4),
        META_IIFNAME => (interface(Side::Input, true), 16),
        META_OIFNAME => (interface(Side::Output, true), 16),
        META_NFPROTO => (Loaded::Family, 1),
        META_L4PROTO => (Loaded::Protocol, 1),
        META_RANDOM => (Loaded::Share, 4),
        key if META_TIMES.contains(&key) => (Loaded::Time, 8),
        _ => (Loaded::Unknown, 4),
    };
    let of_ct = |key| match key {
        CT_STATE => (Loaded::State, 4),
        CT_MARK => (Loaded::Mark { of_connection: true }, 4),
        CT_PACKETS | CT_BYTES | CT_AVERAGE => (Loaded::Amount, 8),
        _ => (Loaded::Unknown, 4),
    };
    let of_payload = |base| {
        let length = get(nfta::PAYLOAD_LEN);
        let place = (base, get(nfta::PAYLOAD_OFFSET), length);
        (payload(traffic, place), length.unwrap_or(0) as usize)
    };
    let is_destination_type =
        || get(nfta::FIB_RESULT) == Some(FIB_TYPE) && get(nfta::FIB_FLAGS) == Some(FIB_DESTINATION);
    let known = match name {
        "meta" => get(nfta::META_KEY).map(of_meta),
        "ct" => get(nfta::CT_KEY).map(of_ct),
        "payload" => get(nfta::PAYLOAD_BASE).map(of_payload),
        "fib" => is_destination_type().then_some((Loaded::DestinationType, 4)),
        "numgen" => Some((Loaded::Share, 4)),
        _ => None,
    };
    let (loaded, bytes) = known.unwrap_or((Loaded::Unknown, 4));
    Value { loaded, bytes, mask: None }
}

fn payload(traffic: &Traffic<'_>, (base, at, length): (u32, Option<u32>, Option<u32>)) -> Loaded {
    let (Some(at), Some(length)) = (at, length) else { return Loaded::Unknown };
    let (source, octets, protocol) = if traffic.is_ipv4() { (12, 4, 9) } else { (8, 16, 6) };
    let class = if traffic.is_ipv4() { (1, 1) } else { (0, 2) };
    match base {
        LINK if (at, length) == (12, 2) => Loaded::EtherType,
        NETWORK if at == source && length == 2 * octets => Loaded::Addresses,
        NETWORK if at == source && length <= octets => Loaded::Source,
        NETWORK if at == source + octets && length <= octets => Loaded::Destination,
        NETWORK if (at, length) == (protocol, 1) => Loaded::Protocol,
        NETWORK if (at, length) == class => Loaded::Class,
        TRANSPORT if (at, length) == (0, 2) => Loaded::SourcePort,
        TRANSPORT if (at, length) == (2, 2) => Loaded::DestinationPort,
        TRANSPORT if (at, length) == (13, 1) => Loaded::Flags,
        TRANSPORT if at >= 20 => Loaded::Content,
        INNER => Loaded::Content,
        _ => Loaded::Unknown,
    }
}

/// Narrows the selection by a comparison; returns `None` if it matches none of the packets.
#[expect(clippy::too_many_lines, reason = "one arm for each property of a packet")]
fn compare(
    context: &Context<'_>,
    taken: &mut Selection,
    Value { loaded, mask, .. }: &Value<'_>,
    ranges: &[Range],
    is_inverted: bool,
) -> Option<()> {
    let traffic = context.traffic;
    let family = FAMILIES[usize::from(!traffic.is_ipv4())];
    let is_any =
        |known: &[u8]| ranges.iter().any(|(first, last)| &first[..] <= known && known <= &last[..]);
    let agrees = |holds: bool| (holds != is_inverted).then_some(());
    let native = |bytes: &[u8]| bytes.first_chunk().copied().map(u32::from_ne_bytes);
    match loaded {
        Loaded::Unknown => None,
        Loaded::Interface { side, by_name } => {
            taken.limit_ways(traffic, *side, is_inverted, |(index, name)| match by_name {
                true => ranges.iter().any(|(wanted, _)| is_named(wanted, name)),
                false => is_any(&index.to_ne_bytes()),
            })
        }
        Loaded::Source | Loaded::Destination => {
            let full_range = |range| full_range(range, *mask, traffic);
            let ranges: Vec<Range> = ranges.iter().map(full_range).collect();
            let to = matches!(loaded, Loaded::Destination);
            taken.limit_addresses(traffic, to, &ranges, is_inverted)
        }
        Loaded::Addresses => {
            let [(both, _)] = ranges else { return None };
            let (source, destination) = both.split_at_checked(both.len() / 2)?;
            let one = |bytes: &[u8]| [(bytes.to_vec(), bytes.to_vec())];
            if is_inverted || mask.is_some() {
                return None;
            }
            taken.limit_addresses(traffic, false, &one(source), false)?;
            taken.limit_addresses(traffic, true, &one(destination), false)
        }
        Loaded::SourcePort | Loaded::DestinationPort => {
            let ports: Option<Vec<(u16, u16)>> = ranges.iter().map(port_range).collect();
            let to = matches!(loaded, Loaded::DestinationPort);
            taken.limit_ports(traffic, to, &ports?, is_inverted)
        }
        Loaded::DestinationType => agrees(is_any(&traffic.destination_type().to_ne_bytes())),
        Loaded::Family => agrees(is_any(&[family.0])),
        Loaded::EtherType => agrees(is_any(&family.1)),
        Loaded::Protocol => {
            let [tcp, udp] = [TCP, UDP].map(|protocol| is_any(&[protocol]) != is_inverted);
            taken.limit_protocol(traffic, tcp, udp)
        }
        Loaded::Mark { of_connection } => {
            let mask = mask.and_then(native).unwrap_or(u32::MAX);
            let holds = |mark: u32| is_any(&(mark & mask).to_ne_bytes()) != is_inverted;
            let marks = context.marks;
            match of_connection {
                true => taken.limit_mark(&marks.restored(), holds),
                false => taken.limit_mark(&marks.packets, holds),
            }
        }
        Loaded::State => {
            let states = ranges.iter().filter_map(|(state, _)| native(state));
            let found = states.fold(0, |all, state| all | state);
            let mask = mask.and_then(native).unwrap_or(u32::MAX);
            let states = match (found, is_inverted) {
                (0, true) => mask,
                (0, false) => !mask,
                (found, false) => found,
                (found, true) => !found,
            };
            taken.limit_states(states);
            Some(())
        }
        Loaded::Flags => {
            let mask = mask.and_then(|mask| mask.first().copied()).unwrap_or(u8::MAX);
            taken.limit_flags(mask, |flags| is_any(&[flags]) != is_inverted);
            Some(())
        }
        Loaded::Length => {
            let [(first, last)] = ranges else { return None };
            // Ranges are compared in network order, single values in host order.
            let read = |bytes: &[u8]| {
                let bytes = *bytes.first_chunk()?;
                let length = if first == last {
                    u32::from_ne_bytes(bytes)
                } else {
                    u32::from_be_bytes(bytes)
                };
                Some(u16::try_from(length).unwrap_or(u16::MAX))
            };
            taken.limit_length(read(first)?, read(last)?, is_inverted)
        }
        Loaded::Content => {
            taken.limit_content();
            Some(())
        }
        Loaded::Share => {
            taken.limit_share();
            Some(())
        }
        Loaded::Amount => {
            taken.limit_amount();
            Some(())
        }
        Loaded::Time => {
            taken.limit_times();
            Some(())
        }
        Loaded::Class => {
            // The lower bits are ECN, in IPv6 also the first bits of the flow label.
            let below = if traffic.is_ipv4() { 2 } else { 6 };
            let encoded = |class: u8| match traffic.is_ipv4() {
                true => vec![class << below],
                false => (u16::from(class) << below).to_be_bytes().to_vec(),
            };
            if mask.is_none_or(|mask| *mask != encoded(0x3f)) {
                return None;
            }
            taken.limit_classes(|class| is_any(&encoded(class)) != is_inverted);
            Some(())
        }
    }
}

/// Whether an interface has this name; without a final zero byte, `wanted` is a prefix.
fn is_named(wanted: &[u8], name: &str) -> bool {
    match wanted.iter().position(|byte| *byte == 0) {
        Some(end) => &wanted[..end] == name.as_bytes(),
        None => name.as_bytes().starts_with(wanted),
    }
}

/// Extends addresses that are compared by their first bytes, or with a mask.
fn full_range((first, last): &Range, mask: Option<&[u8]>, traffic: &Traffic<'_>) -> Range {
    let length = if traffic.is_ipv4() { 4 } else { 16 };
    let (mut first, mut last) = (first.clone(), last.clone());
    for (byte, mask) in last.iter_mut().zip(mask.unwrap_or_default()) {
        *byte |= !mask;
    }
    first.resize(length.max(first.len()), 0);
    last.resize(length.max(last.len()), u8::MAX);
    (first, last)
}

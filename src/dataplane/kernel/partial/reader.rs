//! What a rule of others takes of the packets that matter, as far as its form tells.

use super::{
    super::rules::{expressions, number, text_of},
    matches,
    selection::{Range, Selection, Traffic},
};
use crate::netlink::{attributes, nftables::Object};

/// `NFT_META_*`
const META_LEN: u32 = 0;
const META_PROTOCOL: u32 = 1;
const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
/// `NFT_PAYLOAD_*`
const LINK: u32 = 0;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
const INNER: u32 = 3;
/// `NFT_CT_*`
const CT_STATE: u32 = 0;
const CT_PACKETS: u32 = 14;
const CT_BYTES: u32 = 15;
const CT_AVERAGE: u32 = 16;
/// `NFT_FIB_RESULT_ADDRTYPE` and `NFTA_FIB_F_DADDR`
const FIB_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 2;
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`, and the types of Ethernet.
const FAMILIES: [(u8, [u8; 2]); 2] = [(2, [0x08, 0x00]), (10, [0x86, 0xdd])];
const TCP: u8 = 6;
const UDP: u8 = 17;
/// `NFT_CMP_*`
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const AT_MOST: u32 = 3;
const AT_LEAST: u32 = 5;
/// `NFT_OBJECT_COUNTER`
const COUNTER: u32 = 1;

/// What the next comparison is about.
#[derive(Clone)]
enum Loaded {
    Unknown,
    Interface { by_name: bool },
    Source,
    Destination,
    Addresses,
    SourcePort,
    DestinationPort,
    DestinationType,
    Family,
    EtherType,
    Protocol,
    State,
    Flags,
    Length,
    Content,
    Share,
    Amount,
}

/// The packets that matter of those that a rule takes, if it stood alone; none, if it leaves them out or
/// cannot be read.
pub fn selection(
    traffic: &Traffic<'_>,
    rule: &Object,
    elements: &mut dyn FnMut(&str) -> Vec<Range>,
) -> Option<Selection> {
    let mut loaded = Loaded::Unknown;
    let mut mask: Option<&[u8]> = None;
    let mut taken = Selection::default();
    let mut list = expressions(rule).peekable();
    while let Some((name, data)) = list.next() {
        let get = |attribute| number(attributes::find(data, attribute));
        match name {
            // Those that set something instead.
            "meta" if get(3).is_some() => {}
            "ct" if get(4).is_some() => {}
            "meta" | "payload" | "ct" | "fib" | "numgen" => {
                loaded = load(traffic, name, &get);
                mask = None;
            }
            "bitwise" => mask = value(attributes::find(data, 4)),
            "byteorder" => {}
            "cmp" => {
                let found = value(attributes::find(data, 3))?;
                let first = |bytes: &[u8]| (bytes.to_vec(), vec![u8::MAX; bytes.len()]);
                let (range, is_inverted) = match get(2)? {
                    operator @ (EQUAL | NOT_EQUAL) => {
                        ((found.to_vec(), found.to_vec()), operator == NOT_EQUAL)
                    }
                    AT_LEAST => match list.peek() {
                        Some(("cmp", data))
                            if number(attributes::find(data, 2)) == Some(AT_MOST) =>
                        {
                            let last = value(attributes::find(data, 3))?.to_vec();
                            list.next();
                            ((found.to_vec(), last), false)
                        }
                        _ => (first(found), false),
                    },
                    AT_MOST => ((vec![0; found.len()], found.to_vec()), false),
                    _ => return None,
                };
                compare(traffic, &mut taken, &loaded, mask, &[range], is_inverted)?;
            }
            "range" => {
                let [from, to] = [3, 4].map(|kind| value(attributes::find(data, kind)));
                let range = (from?.to_vec(), to?.to_vec());
                compare(traffic, &mut taken, &loaded, mask, &[range], get(2)? == NOT_EQUAL)?;
            }
            // A map leads to another place for each element.
            "lookup" if get(3).is_none() => {
                let ranges = elements(attributes::text(attributes::find(data, 1)?));
                compare(traffic, &mut taken, &loaded, mask, &ranges, get(5).unwrap_or(0) & 1 != 0)?;
            }
            "match" => {
                let info = attributes::find(data, 3).unwrap_or_default();
                matches::read(traffic, &mut taken, text_of(data)?, info)?;
            }
            "connlimit" => taken.limit_connections(),
            "dynset" => {
                let inner = attributes::find(data, 7).or_else(|| {
                    attributes::read(attributes::find(data, 10)?).next().map(|(_, inner)| inner)
                });
                match inner.and_then(|inner| attributes::find(inner, 1)).map(attributes::text) {
                    Some("connlimit") => taken.limit_connections(),
                    None | Some("counter") => {}
                    Some(_) => (taken.is_partial, taken.is_limited) = (true, true),
                }
            }
            "objref" if get(1) == Some(COUNTER) => {}
            "limit" | "quota" | "objref" => (taken.is_partial, taken.is_limited) = (true, true),
            "immediate" | "counter" | "log" | "redir" | "nat" | "masq" | "tproxy" | "target"
            | "reject" | "notrack" | "queue" | "last" => {}
            _ => return None,
        }
    }
    Selection::default().and(&taken)
}

fn load(traffic: &Traffic<'_>, name: &str, get: &impl Fn(u16) -> Option<u32>) -> Loaded {
    let of_meta = |key| match key {
        META_LEN => Loaded::Length,
        META_PROTOCOL => Loaded::EtherType,
        META_IIF | META_OIF => Loaded::Interface { by_name: false },
        META_IIFNAME | META_OIFNAME => Loaded::Interface { by_name: true },
        META_NFPROTO => Loaded::Family,
        META_L4PROTO => Loaded::Protocol,
        _ => Loaded::Unknown,
    };
    match (name, get(2)) {
        // A tunnel packet has nothing that leaves again.
        ("meta", Some(META_OIF | META_OIFNAME)) if traffic.tunnel.is_some() => Loaded::Unknown,
        ("meta", Some(key)) => of_meta(key),
        ("ct", Some(CT_STATE)) => Loaded::State,
        ("ct", Some(CT_PACKETS | CT_BYTES | CT_AVERAGE)) => Loaded::Amount,
        ("fib", Some(FIB_TYPE)) if get(3) == Some(FIB_DESTINATION) => Loaded::DestinationType,
        ("numgen", _) => Loaded::Share,
        ("payload", Some(base)) => payload(traffic, (base, get(3), get(4))),
        _ => Loaded::Unknown,
    }
}

fn payload(traffic: &Traffic<'_>, (base, at, length): (u32, Option<u32>, Option<u32>)) -> Loaded {
    let (Some(at), Some(length)) = (at, length) else { return Loaded::Unknown };
    let (source, octets, protocol) = if traffic.is_ipv4() { (12, 4, 9) } else { (8, 16, 6) };
    match base {
        LINK if (at, length) == (12, 2) => Loaded::EtherType,
        NETWORK if at == source && length == 2 * octets => Loaded::Addresses,
        NETWORK if at == source && length <= octets => Loaded::Source,
        NETWORK if at == source + octets && length <= octets => Loaded::Destination,
        NETWORK if (at, length) == (protocol, 1) => Loaded::Protocol,
        TRANSPORT if (at, length) == (0, 2) => Loaded::SourcePort,
        TRANSPORT if (at, length) == (2, 2) => Loaded::DestinationPort,
        TRANSPORT if (at, length) == (13, 1) => Loaded::Flags,
        TRANSPORT if at >= 20 => Loaded::Content,
        INNER => Loaded::Content,
        _ => Loaded::Unknown,
    }
}

/// Narrows the selection by a comparison; none, if it leaves all packets out that matter.
fn compare(
    traffic: &Traffic<'_>,
    taken: &mut Selection,
    loaded: &Loaded,
    mask: Option<&[u8]>,
    ranges: &[Range],
    is_inverted: bool,
) -> Option<()> {
    let family = FAMILIES[usize::from(!traffic.is_ipv4())];
    let is_any =
        |known: &[u8]| ranges.iter().any(|(first, last)| &first[..] <= known && known <= &last[..]);
    let agrees = |is_it: bool| (is_it != is_inverted).then_some(());
    let native = |bytes: &[u8]| bytes.first_chunk().copied().map(u32::from_ne_bytes);
    match loaded {
        Loaded::Unknown => None,
        Loaded::Interface { by_name } => {
            let is_it = |(index, name): &(u32, String)| match by_name {
                true => ranges.iter().any(|(wanted, _)| is_named(wanted, name)),
                false => is_any(&index.to_ne_bytes()),
            };
            traffic.interfaces.iter().any(|known| is_it(known) != is_inverted).then_some(())
        }
        Loaded::Source | Loaded::Destination => {
            let ranges: Vec<Range> =
                ranges.iter().map(|range| whole(range, mask, traffic.is_ipv4())).collect();
            taken.limit_addresses(
                traffic,
                matches!(loaded, Loaded::Destination),
                &ranges,
                is_inverted,
            )
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
            let port = |bytes: &[u8]| <[u8; 2]>::try_from(bytes).ok().map(u16::from_be_bytes);
            let ports: Option<Vec<(u16, u16)>> =
                ranges.iter().map(|(first, last)| Some((port(first)?, port(last)?))).collect();
            taken.limit_ports(
                traffic,
                matches!(loaded, Loaded::DestinationPort),
                &ports?,
                is_inverted,
            )
        }
        Loaded::DestinationType => agrees(is_any(&traffic.destination_type().to_ne_bytes())),
        Loaded::Family => agrees(is_any(&[family.0])),
        Loaded::EtherType => agrees(is_any(&family.1)),
        Loaded::Protocol => {
            let [tcp, udp] = [TCP, UDP].map(|protocol| is_any(&[protocol]) != is_inverted);
            taken.is_partial |= !(tcp && udp) && traffic.tunnel.is_none();
            (udp || tcp && traffic.tunnel.is_none()).then_some(())
        }
        Loaded::State => {
            let found = ranges
                .iter()
                .filter_map(|(state, _)| native(state))
                .fold(0, |all, state| all | state);
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
            // Ranges are compared in network order, single values are not.
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
    }
}

/// Whether an interface has this name, or one that begins like this if nothing ends it.
fn is_named(wanted: &[u8], name: &str) -> bool {
    match wanted.iter().position(|byte| *byte == 0) {
        Some(end) => &wanted[..end] == name.as_bytes(),
        None => name.as_bytes().starts_with(wanted),
    }
}

/// Addresses of which first bytes are compared, or those bits that the mask has.
fn whole((first, last): &Range, mask: Option<&[u8]>, ipv4: bool) -> Range {
    let length = if ipv4 { 4 } else { 16 };
    let (mut first, mut last) = (first.clone(), last.clone());
    for (byte, mask) in last.iter_mut().zip(mask.unwrap_or_default()) {
        *byte |= !mask;
    }
    first.resize(length.max(first.len()), 0);
    last.resize(length.max(last.len()), u8::MAX);
    (first, last)
}

/// What a comparison or a mask holds.
pub fn value(data: Option<&[u8]>) -> Option<&[u8]> {
    attributes::find(data?, 1)
}

//! Reads matches of iptables, whose parameters are structs of its headers (linux/netfilter/xt_*.h).

use super::{
    reading::Context,
    selection::{Range, Selection, Traffic, UNICAST},
    sets::SetName,
};
use crate::netlink::attributes;

/// `XT_TCP_INV_*`; those for ports are the same as `XT_UDP_INV_*`.
const INVERTED_SOURCE_PORT: u8 = 1;
const INVERTED_PORT: u8 = 2;
const INVERTED_FLAGS: u8 = 4;
const INVERTED_OPTION: u8 = 8;

/// Narrows the selection by a match. Returns `None` if it matches none of the packets or cannot be
/// read.
#[expect(clippy::too_many_lines, reason = "one arm for each match of iptables")]
pub fn read(
    context: &mut Context<'_>,
    taken: &mut Selection,
    name: &str,
    info: &[u8],
) -> Option<()> {
    let traffic = context.traffic;
    match name {
        "comment" => {}
        "tcp" | "udp" => {
            let is_tcp = name == "tcp";
            if is_tcp && traffic.tunnel.is_some() {
                return None;
            }
            taken.is_partial |= traffic.tunnel.is_none();
            let inverted = byte(info, if is_tcp { 11 } else { 8 })?;
            let ports = |at| Some([(half(info, at)?, half(info, at + 2)?)]);
            taken.limit_ports(traffic, false, &ports(0)?, inverted & INVERTED_SOURCE_PORT != 0)?;
            taken.limit_ports(traffic, true, &ports(4)?, inverted & INVERTED_PORT != 0)?;
            if is_tcp {
                let (option, mask, flags) = (byte(info, 8)?, byte(info, 9)?, byte(info, 10)?);
                if option != 0 || inverted & INVERTED_OPTION != 0 {
                    return None;
                }
                if mask != 0 {
                    let is_inverted = inverted & INVERTED_FLAGS != 0;
                    taken.limit_flags(mask, |found| (found == flags) != is_inverted);
                }
            }
        }
        "multiport" => multiport(traffic, taken, info)?,
        "iprange" => {
            let length = if traffic.is_ipv4() { 4 } else { 16 };
            let flags = byte(info, 64)?;
            for (to, at, used, inverted) in [(false, 0, 1, 16), (true, 32, 2, 32)] {
                if flags & used != 0 {
                    let range: Range = (
                        info.get(at..at + length)?.to_vec(),
                        info.get(at + 16..at + 16 + length)?.to_vec(),
                    );
                    taken.limit_addresses(traffic, to, &[range], flags & inverted != 0)?;
                }
            }
        }
        "addrtype" => is_of_type(info, traffic.destination_type())?.then_some(())?,
        "state" => taken.limit_states(word(info, 0)?),
        "conntrack" => {
            let (flags, inverted) = (half(info, 146)?, half(info, 148)?);
            let states = u32::from(half(info, 150)?);
            // `XT_CONNTRACK_STATE` and `XT_CONNTRACK_STATE_ALIAS`.
            if flags & !(1 | 1 << 13) != 0 {
                return None;
            }
            taken.limit_states(if inverted & 1 == 0 { states } else { !states });
        }
        "length" => taken.limit_length(half(info, 0)?, half(info, 2)?, byte(info, 4)? != 0)?,
        "mark" | "connmark" => {
            let (mark, mask, inverts) = (word(info, 0)?, word(info, 4)?, byte(info, 8)? != 0);
            let matches_mark = |known: u32| (known & mask == mark) != inverts;
            match name {
                "mark" => taken.limit_mark(&context.marks.packets, matches_mark)?,
                _ => taken.limit_mark(&context.marks.restored(), matches_mark)?,
            }
        }
        "dscp" => {
            let (class, inverts) = (byte(info, 0)?, byte(info, 1)? != 0);
            taken.limit_classes(|known| (known == class) != inverts);
        }
        // The upper six bits are the class.
        "tos" => {
            let (mask, value, inverts) = (byte(info, 0)?, byte(info, 1)?, byte(info, 2)? != 0);
            taken.limit_classes(|known| (known << 2 & mask == value) != inverts);
        }
        "set" => {
            let (number, count, flags) = (half(info, 0)?, byte(info, 2)?, byte(info, 3)?);
            // `IPSET_DIM_ONE_SRC` and the following bits.
            let to: Vec<bool> = (1..=count.min(6)).map(|part| flags & 1 << part == 0).collect();
            let set = (context.sets)(&SetName::Number(number));
            set.limit(traffic, taken, &to, flags & 1 != 0)?;
        }
        "recent" => {
            let flags = byte(info, 8)?;
            let list = attributes::text(info.get(10..210)?);
            let (to, is_counted) = (byte(info, 210)? != 0, word(info, 4)? > 0);
            recent(context, taken, (list, to), (flags & 2 != 0, is_counted, byte(info, 9)? != 0))?;
        }
        "limit" => taken.limit_rate(false),
        "hashlimit" => taken.limit_rate(is_above(info)),
        "string" | "u32" | "bpf" => taken.limit_content(),
        "time" => taken.limit_times(),
        "connbytes" => taken.limit_amount(),
        "connlimit" => taken.limit_connections(),
        "statistic" => taken.limit_share(),
        _ => return None,
    }
    Some(())
}

/// Narrows the selection to addresses in a list of `recent`. A match that only adds to the list
/// takes all packets; one that counts takes frequent ones.
pub fn recent(
    context: &mut Context<'_>,
    taken: &mut Selection,
    (list, to): (&str, bool),
    (adds, is_counted, is_inverted): (bool, bool, bool),
) -> Option<()> {
    if adds {
        return (!is_inverted).then_some(());
    }
    let set = (context.sets)(&SetName::Recent(list.to_owned()));
    set.limit(context.traffic, taken, &[to], is_inverted)?;
    if is_counted {
        taken.limit_rate(!is_inverted);
    }
    Some(())
}

/// Whether `-m hashlimit` matches packets above the rate (`XT_HASHLIMIT_INVERT`). The offset of the
/// mode depends on the struct's revision.
fn is_above(info: &[u8]) -> bool {
    const INVERTED: u32 = 1 << 4;
    const SHORT: usize = 64;
    let mode_at = if info.len() <= SHORT { 16 } else { 272 };
    word(info, mode_at).is_some_and(|mode| mode & INVERTED != 0)
}

/// Reads `struct xt_multiport_v1`.
fn multiport(traffic: &Traffic<'_>, taken: &mut Selection, info: &[u8]) -> Option<()> {
    const SOURCE: u8 = 0;
    let (side, count) = (byte(info, 0)?, usize::from(byte(info, 1)?).min(15));
    let is_inverted = byte(info, 47)? != 0;
    let mut ports = Vec::new();
    let mut at = 0;
    while at < count {
        let first = half(info, 2 + 2 * at)?;
        let is_range = byte(info, 32 + at)? != 0;
        at += usize::from(is_range);
        ports.push((first, half(info, 2 + 2 * at)?));
        at += 1;
    }
    taken.limit_ports(traffic, side != SOURCE, &ports, is_inverted)
}

/// Whether `struct xt_addrtype_info_v1` matches packets from other hosts to a destination of this
/// type.
fn is_of_type(info: &[u8], destination: u32) -> Option<bool> {
    const INVERTS: [u32; 2] = [1, 2];
    let flags = word(info, 4)?;
    let matches = |at: usize, kind: u32| {
        let types = u32::from(half(info, 2 * at)?);
        Some(types == 0 || (types & 1 << kind != 0) != (flags & INVERTS[at] != 0))
    };
    Some(matches(0, UNICAST)? && matches(1, destination)?)
}

/// Reads a byte of a struct.
pub fn byte(info: &[u8], at: usize) -> Option<u8> {
    info.get(at).copied()
}

/// Reads a 16-bit number of a struct, in host order.
pub fn half(info: &[u8], at: usize) -> Option<u16> {
    info.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes)
}

/// Reads a 32-bit number of a struct, in host order.
pub fn word(info: &[u8], at: usize) -> Option<u32> {
    info.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_type_local_does_not_match_packets_between_pods() {
        let matches = |types: u16, flags: u32| {
            let info = [&[0, 0][..], &types.to_ne_bytes(), &flags.to_ne_bytes()].concat();
            is_of_type(&info, UNICAST)
        };
        assert_eq!(matches(4, 0), Some(false));
        assert_eq!(matches(4, 2), Some(true));
        assert_eq!(matches(0, 0), Some(true));
        assert_eq!(matches(8, 0), Some(false), "broadcasts");
        assert_eq!(is_of_type(&[0; 3], UNICAST), None);
    }
}

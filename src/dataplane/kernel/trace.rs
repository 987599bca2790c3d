//! What the rules of nftables do with single packets, as the kernel tells it (`nft monitor trace`).
//!
//! For as long as a [`Trace`] lives, a few packets a second to and from some addresses are traced by tables
//! of our own, which decide nothing. The kernel removes them with their socket, where it can (since 5.12).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
};

use ipnet::IpNet;
use rtnetlink::packet_core::NLM_F_CREATE;

use super::{
    firewall::{append, create, create_table, delete_table, name_of},
    rules::{base_of, family_name, number},
};
use crate::{
    dataplane::{
        forwarding::MAGIC,
        silence::{self, DroppingRule, IN, OUT},
    },
    netlink::{
        attributes::{self, Attributes},
        nftables::{
            ANY, Base, Field, INET, Kind, NETDEV, Nftables, Rule, Step, Traces, base_chain,
        },
    },
};

/// Addresses that are traced at once.
const ADDRESSES: usize = 8;
/// Packets that are traced, of each address and way.
const PER_SECOND: u64 = 5;
/// Packets that are remembered.
const PACKETS: usize = 1_024;
const ARP: u8 = 3;
const ARP_INPUT: u32 = 0;
const ICMPV6: u8 = 58;
const PREROUTING: u32 = 0;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;
const INGRESS: u32 = 0;
/// Before all others.
const FIRST: i32 = i32::MIN;
/// The same in hooks where the kernel puts fragments together (at -400) first.
const EARLY: i32 = -399;
const PORT_OFFSET: u32 = 2;
/// Headers of UDP, VXLAN and Ethernet, which stand before that of the packet inside.
const AROUND: u32 = 8 + 8 + 14;
const UDP: u8 = 17;
/// `NFT_TABLE_F_OWNER`
const OWNED: u32 = 2;
/// `NFTA_TRACE_*`
const TABLE: u16 = 1;
const CHAIN: u16 = 2;
const HANDLE: u16 = 3;
const TYPE: u16 = 4;
const VERDICT: u16 = 5;
const ID: u16 = 6;
const NETWORK_HEADER: u16 = 8;
const INPUT: u16 = 10;
const POLICY: u16 = 16;
/// `NFT_TRACETYPE_*`
const BY_POLICY: u32 = 1;
const BY_RULE: u32 = 3;
/// `NF_*`
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
const STOLEN: u32 = 2;
const QUEUE: u32 = 3;

/// Tables that mark packets, and what is told of those.
pub struct Trace {
    nftables: Nftables,
    traces: Traces,
    table: String,
    told: TraceReport,
}

/// What was told, by source and destination of the packets.
#[derive(Debug, Default)]
pub struct TraceReport {
    /// Chains that change source addresses: family, table and name.
    translating: BTreeSet<String>,
    packets: BTreeMap<u32, (IpAddr, IpAddr)>,
    dropped: BTreeMap<(IpAddr, IpAddr), DroppingRule>,
    translated: BTreeMap<(IpAddr, IpAddr), String>,
    /// Indexes of the interfaces at which packets came in, by their sources.
    inputs: BTreeMap<IpAddr, u32>,
}

impl Trace {
    /// Traces packets to this UDP port, to and from these addresses, and packets from those of peers in the
    /// overlay. `device` is where those from there come in, `name` that of our device.
    pub fn begin(
        name: &str,
        device: &str,
        port: u16,
        addresses: &[IpAddr],
        overlay: &[IpAddr],
    ) -> io::Result<Self> {
        let mut nftables = Nftables::open()?;
        let traces = Traces::open()?;
        let told =
            TraceReport { translating: translating(&mut nftables)?, ..TraceReport::default() };
        let table = format!("{name}-trace");
        let mut inet = Vec::new();
        for (chain, hook) in [("to", OUTPUT), ("from", PREROUTING)] {
            let chain = base_chain(&table, chain, "filter", hook, EARLY);
            inet.push(create(Kind::NewChain, chain));
        }
        let mut ingress = vec![create(Kind::NewChain, at_device(&table, "from", device))];
        for address in addresses.iter().take(ADDRESSES) {
            let at_port =
                |rule: Rule| rule.udp().holds(Base::Transport, PORT_OFFSET, &port.to_be_bytes());
            let is = |rule: Rule, field| {
                rule.address(field, IpNet::from(*address), true).limit(PER_SECOND).trace()
            };
            let of_family = || at_port(Rule::new().family_of(*address));
            inet.push(append(&table, "to", &is(of_family(), Field::Destination)));
            inet.push(append(&table, "from", &is(of_family(), Field::Source)));
            let ether_type = if address.is_ipv4() { 0x0800 } else { 0x86dd };
            let framed = at_port(Rule::new().ether_type(ether_type));
            ingress.push(append(&table, "from", &is(framed, Field::Source)));
        }
        for vtep in overlay.iter().take(ADDRESSES) {
            let from = Rule::new().family_of(*vtep).address(Field::Source, (*vtep).into(), true);
            inet.push(append(&table, "from", &from.limit(PER_SECOND).trace()));
        }
        set_up(&mut nftables, INET, &table, inet)?;
        // Without the hook at interfaces nothing is there to be traced.
        if let Err(error) = set_up(&mut nftables, NETDEV, &table, ingress) {
            tracing::debug!(%error, device, "no trace at the interface");
        }
        Ok(Self { nftables, traces, table, told })
    }

    /// Traces what this host says by ICMP of packets from these addresses: that they are unreachable, or too
    /// large. Also tunnel packets with datagrams of a trial inside, if it is told of which family their outer
    /// addresses are. `name` is that of our device.
    pub fn of_trial(name: &str, addresses: &[IpAddr], tunnels: Option<IpAddr>) -> io::Result<Self> {
        let mut nftables = Nftables::open()?;
        let traces = Traces::open()?;
        let table = format!("{name}-trial");
        let chain = base_chain(&table, "to", "filter", OUTPUT, EARLY);
        let mut steps = vec![create(Kind::NewChain, chain)];
        for address in addresses.iter().take(ADDRESSES) {
            let (icmp, kind) = if address.is_ipv4() { (1, 3) } else { (58, 2) };
            let rule = Rule::new().family_of(*address).transport(icmp);
            let rule = rule.holds(Base::Transport, 0, &[kind]);
            let rule = rule.address(Field::Destination, IpNet::from(*address), true);
            steps.push(append(&table, "to", &rule.limit(PER_SECOND).trace()));
        }
        // The protocol and the length of the header inside: with IPv4, and with IPv6.
        for (protocol_at, header) in [(9, 20), (6, 40)] {
            let Some(outer) = tunnels else { break };
            let rule = Rule::new().family_of(outer).udp();
            let rule = rule.holds(Base::Transport, AROUND + protocol_at, &[UDP]);
            let rule = rule.holds(Base::Transport, AROUND + header + 8, &MAGIC);
            steps.push(append(&table, "to", &rule.limit(PER_SECOND).trace()));
        }
        set_up(&mut nftables, INET, &table, steps)?;
        Ok(Self { nftables, traces, table, told: TraceReport::default() })
    }

    /// Traces answers to ARP or neighbor discovery for these next hops. `device` is where they come in,
    /// `name` that of our device.
    pub fn of_answers(name: &str, device: &str, hops: &BTreeSet<IpAddr>) -> io::Result<Self> {
        let mut nftables = Nftables::open()?;
        let traces = Traces::open()?;
        let table = format!("{name}-trace");
        let (mut arp, mut inet, mut ingress) = (Vec::new(), Vec::new(), Vec::new());
        let chain = |hook| base_chain(&table, "from", "filter", hook, EARLY);
        arp.push(create(Kind::NewChain, chain(ARP_INPUT)));
        inet.push(create(Kind::NewChain, chain(PREROUTING)));
        ingress.push(create(Kind::NewChain, at_device(&table, "from", device)));
        for hop in hops.iter().take(ADDRESSES) {
            let octets = attributes::octets(*hop);
            let add = |rule: Rule| append(&table, "from", &rule.limit(PER_SECOND).trace());
            if hop.is_ipv4() {
                // Operation 2, and the sender's address (RFC 826).
                let answer = |rule: Rule| {
                    rule.holds(Base::Network, 6, &[0, 2]).holds(Base::Network, 14, &octets)
                };
                arp.push(add(answer(Rule::new())));
                ingress.push(add(answer(Rule::new().ether_type(silence::ARP))));
            } else {
                let answer = |rule: Rule| {
                    let rule = rule.transport(ICMPV6);
                    let rule = rule.holds(Base::Transport, 0, &[silence::ADVERTISEMENT]);
                    rule.holds(Base::Transport, 8, &octets)
                };
                inet.push(add(answer(Rule::new().family_of(*hop))));
                ingress.push(add(answer(Rule::new().ether_type(0x86dd))));
            }
        }
        for (family, content) in [(ARP, arp), (INET, inet), (NETDEV, ingress)] {
            if let Err(error) = set_up(&mut nftables, family, &table, content) {
                tracing::debug!(%error, family, "answers are not traced");
            }
        }
        Ok(Self { nftables, traces, table, told: TraceReport::default() })
    }

    /// Takes note of what has been told since.
    pub fn read(&mut self) -> io::Result<()> {
        let Self { traces, told, .. } = self;
        traces.read(|family, attributes| _ = told.note(family, attributes))
    }

    pub const fn told(&self) -> &TraceReport {
        &self.told
    }
}

impl AsFd for Trace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.traces.as_fd()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        for family in [ARP, INET, NETDEV] {
            let removed = self.nftables.transaction_in(family, &[delete_table(&self.table)]);
            if let Err(error) = removed {
                tracing::debug!(%error, family, "no table of traces removed");
            }
        }
    }
}

impl TraceReport {
    /// What drops packets to a host, and from it.
    pub fn dropped(&self, local: IpAddr, peer: IpAddr) -> [Option<DroppingRule>; 2] {
        let mut dropped = [None, None];
        // Under whatever address of this host.
        dropped[OUT] = self.dropped_to(peer);
        dropped[IN] = self.dropped.get(&(peer, local)).cloned();
        dropped
    }

    /// What drops packets of this host to an address, whatever their source.
    pub fn dropped_to(&self, to: IpAddr) -> Option<DroppingRule> {
        self.dropped.iter().find(|((_, end), _)| *end == to).map(|(_, by)| by.clone())
    }

    /// What drops packets that come from an address, or answer for it.
    pub fn dropped_from(&self, from: IpAddr) -> Option<DroppingRule> {
        self.dropped.iter().find(|((start, _), _)| *start == from).map(|(_, by)| by.clone())
    }

    /// What drops packets that come from an address, and the index of the interface at which they come in.
    pub fn dropped_at(&self, from: IpAddr) -> Option<(DroppingRule, u32)> {
        self.dropped_from(from).zip(self.inputs.get(&from).copied())
    }

    /// What drops packets of this host to any other address than these.
    pub fn dropped_beside(&self, addresses: &[IpAddr]) -> Option<DroppingRule> {
        let beside = self.dropped.iter().find(|((_, to), _)| !addresses.contains(to));
        beside.map(|(_, by)| by.clone())
    }

    /// The chain that changes the source of packets to a host.
    pub fn translating(&self, peer: IpAddr) -> Option<String> {
        let to_peer = self.translated.iter().find(|((_, to), _)| *to == peer);
        to_peer.map(|(_, chain)| chain.clone())
    }

    fn note(&mut self, family: u8, told: &[u8]) -> Option<()> {
        let id = number(attributes::find(told, ID))?;
        // Only the first that is told of a packet shows it.
        if let Some(ends) = attributes::find(told, NETWORK_HEADER).and_then(ends)
            && self.packets.len() < PACKETS
        {
            self.packets.entry(id).or_insert(ends);
            if let Some(input) = number(attributes::find(told, INPUT)) {
                self.inputs.insert(ends.0, input);
            }
        }
        let ends = *self.packets.get(&id)?;
        let (verdict, handle) = match number(attributes::find(told, TYPE))? {
            BY_POLICY => (number(attributes::find(told, POLICY))?, None),
            BY_RULE => {
                let verdict = number(attributes::find(attributes::find(told, VERDICT)?, 1))?;
                let handle = attributes::find(told, HANDLE)?.first_chunk()?;
                (verdict, Some(u64::from_be_bytes(*handle)))
            }
            _ => return None,
        };
        let name = |kind| attributes::find(told, kind).map(attributes::text);
        let chain = format!("{} {} {}", family_name(family), name(TABLE)?, name(CHAIN)?);
        match verdict {
            DROP | STOLEN | QUEUE => {
                let culprit = DroppingRule { chain, handle, queued: verdict == QUEUE };
                self.dropped.insert(ends, culprit);
            }
            ACCEPT if handle.is_some() && self.translating.contains(&chain) => {
                self.translated.insert(ends, chain);
            }
            _ => {}
        }
        Some(())
    }
}

fn set_up(nftables: &mut Nftables, family: u8, table: &str, content: Vec<Step>) -> io::Result<()> {
    let owned = Attributes::new().text(1, table).be32(2, OWNED);
    let owned = Step { kind: Kind::NewTable, flags: NLM_F_CREATE, attributes: owned };
    let mut made = Ok(());
    for first in [owned, create_table(table)] {
        let steps = [vec![first], content.clone()].concat();
        // What an earlier process has left.
        let _ = nftables.transaction_in(family, &[delete_table(table)]);
        made = nftables.transaction_in(family, &steps);
        if made.is_ok() {
            break;
        }
    }
    made
}

/// A chain of packets that come in at one interface.
fn at_device(table: &str, name: &str, device: &str) -> Attributes {
    let hook = Attributes::new().be32(1, INGRESS).be32(2, FIRST.cast_unsigned()).text(3, device);
    Attributes::new().text(1, table).text(3, name).nest(4, &hook).be32(5, ACCEPT).text(7, "filter")
}

fn translating(nftables: &mut Nftables) -> io::Result<BTreeSet<String>> {
    let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
    let translating = chains.iter().filter(|chain| {
        name_of(chain, 7) == "nat" && base_of(chain).is_some_and(|base| base.hook == POSTROUTING)
    });
    let names = translating.map(|chain| {
        format!("{} {} {}", family_name(chain.family), name_of(chain, 1), name_of(chain, 3))
    });
    Ok(names.collect())
}

/// Source and destination in an IP header, sender and target in ARP.
fn ends(header: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let address = |at: usize, length: usize| attributes::address(header.get(at..at + length)?);
    match header.first()? >> 4 {
        // The number of Ethernet.
        0 => Some((address(14, 4)?, address(24, 4)?)),
        4 => Some((address(12, 4)?, address(16, 4)?)),
        6 => Some((address(8, 16)?, address(24, 16)?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Vec<u8> {
        let mut header = vec![0x45; 20];
        header[12..16].copy_from_slice(&[192, 0, 2, 1]);
        header[16..].copy_from_slice(&[192, 0, 2, 2]);
        header
    }

    fn told(id: u32, chain: &str, kind: u32) -> Attributes {
        Attributes::new().be32(ID, id).be32(TYPE, kind).text(TABLE, "t").text(CHAIN, chain)
    }

    #[test]
    fn packet_is_known_by_its_first_message_and_its_end_by_the_last() {
        let (here, there) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let handle = 7_u64.to_be_bytes();
        let by_rule = |attributes: Attributes, verdict| {
            let verdict = Attributes::new().be32(1, verdict);
            attributes.put(HANDLE, &handle).nest(VERDICT, &verdict)
        };
        let mut all = TraceReport {
            translating: BTreeSet::from(["ip t nat".to_owned()]),
            ..TraceReport::default()
        };
        let first = by_rule(told(1, "a", BY_RULE), u32::MAX).put(NETWORK_HEADER, &header());
        all.note(1, first.as_bytes());
        assert_eq!(all.dropped(here, there), [None, None]);
        all.note(2, by_rule(told(1, "nat", BY_RULE), ACCEPT).as_bytes());
        assert_eq!(all.translating(there).as_deref(), Some("ip t nat"));
        all.note(1, told(1, "b", BY_POLICY).be32(POLICY, DROP).as_bytes());
        let [out, back] = all.dropped(here, there);
        assert_eq!(
            (out.map(|by| (by.chain, by.handle)), back),
            (Some(("inet t b".to_owned(), None)), None)
        );
        // Of a packet that was not shown nothing follows.
        all.note(1, told(2, "c", BY_POLICY).be32(POLICY, DROP).as_bytes());
        let from_there = all.dropped(there, here);
        assert_eq!(all.dropped_at(here), None, "it did not come in");
        let came = told(3, "d", BY_POLICY).be32(POLICY, DROP).be32(INPUT, 7);
        all.note(1, came.put(NETWORK_HEADER, &header()).as_bytes());
        assert_eq!(
            all.dropped_at(here).map(|(by, at)| (by.chain, at)),
            Some(("inet t d".into(), 7))
        );
        assert_eq!(from_there[IN].as_ref().map(|by| by.chain.as_str()), Some("inet t b"));
    }
}

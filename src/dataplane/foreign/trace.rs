//! Traces what the rules of nftables do with single packets (`nft monitor trace`).
//!
//! While a [`Trace`] exists, temporary tables of gossamer mark a few packets per second to and from some
//! addresses for tracing; they decide nothing. Since Linux 5.12 the kernel removes the tables with
//! their socket.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
};

use ipnet::IpNet;
use rtnetlink::packet_core::NLM_F_CREATE;

use super::rules::{base_of, number};
use crate::{
    dataplane::{
        dropping_chain::DroppedBy,
        forwarding::MAGIC,
        silence::{IN, OUT},
    },
    frames,
    netlink::{
        attributes::{self, Attributes},
        nftables::{
            ANY, ARP, Base, Field, INET, Kind, NETDEV, Nftables, Rule, Step, Traces, base_chain,
            family_name, name_of, nfta,
            steps::{append, create, create_table, delete_table},
        },
    },
};

/// Upper limit of the traced addresses.
const MAX_ADDRESSES: usize = 8;
/// Upper limit of the traced packets per second, per address and direction.
const MAX_PACKETS_PER_SECOND: u64 = 5;
/// Upper limit of the stored packets.
const MAX_PACKETS: usize = 1_024;
const ARP_INPUT: u32 = 0;
const ICMPV6: u8 = 58;
const PREROUTING: u32 = 0;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;
const INGRESS: u32 = 0;
/// The first priority.
const FIRST_PRIORITY: i32 = i32::MIN;
/// The first priority at hooks where the kernel reassembles fragments, at -400.
const FIRST_AFTER_DEFRAGMENTATION: i32 = -399;
/// Offset of the destination port in the UDP header, in bytes.
const PORT_OFFSET: u32 = 2;
/// Bytes of the UDP, VXLAN and Ethernet headers before the inner packet.
const TUNNEL_HEADERS_LEN: u32 = 8 + 8 + 14;
const UDP: u8 = 17;
/// `NFT_TABLE_F_OWNER`.
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

/// Tables that mark packets, and the results so far.
pub struct Trace {
    nftables: Nftables,
    traces: Traces,
    table: String,
    report: TraceReport,
}

/// The results, by source and destination of the packets.
#[derive(Debug, Default)]
pub struct TraceReport {
    /// Chains that translate source addresses: family, table and name.
    translating: BTreeSet<String>,
    packets: BTreeMap<u32, (IpAddr, IpAddr)>,
    dropped: BTreeMap<(IpAddr, IpAddr), DroppedBy>,
    translated: BTreeMap<(IpAddr, IpAddr), String>,
    /// Indexes of the input interfaces, by the packets' sources.
    inputs: BTreeMap<IpAddr, u32>,
}

impl Trace {
    /// Traces packets to the UDP `port` to and from `addresses`, and all packets from the peers'
    /// `overlay` addresses. `devices` are the underlay interface and those by which it receives packets, as
    /// the ports of a bridge; `name` is the overlay's device.
    ///
    /// # Errors
    /// When the tables cannot be created.
    pub fn begin(
        name: &str,
        devices: &[&str],
        port: u16,
        addresses: &[IpAddr],
        overlay: &[IpAddr],
    ) -> io::Result<Self> {
        let mut nftables = Nftables::open()?;
        let traces = Traces::open()?;
        let report =
            TraceReport { translating: translating(&mut nftables)?, ..TraceReport::default() };
        let table = format!("{name}-trace");
        let mut inet = Vec::new();
        for (chain, hook) in [("to", OUTPUT), ("from", PREROUTING)] {
            let chain = base_chain(&table, chain, "filter", hook, FIRST_AFTER_DEFRAGMENTATION);
            inet.push(create(Kind::NewChain, chain));
        }
        let mut ingress = Vec::new();
        for address in addresses.iter().take(MAX_ADDRESSES) {
            let at_port =
                |rule: Rule| rule.udp().holds(Base::Transport, PORT_OFFSET, &port.to_be_bytes());
            let is = |rule: Rule, field| {
                rule.address(field, IpNet::from(*address), true)
                    .limit(MAX_PACKETS_PER_SECOND)
                    .trace()
            };
            let of_family = || at_port(Rule::new().family_of(*address));
            inet.push(append(&table, "to", &is(of_family(), Field::Destination)));
            inet.push(append(&table, "from", &is(of_family(), Field::Source)));
            let ether_type = if address.is_ipv4() { 0x0800 } else { 0x86dd };
            let framed = at_port(Rule::new().ether_type(ether_type));
            ingress.push(is(framed, Field::Source));
        }
        for vtep in overlay.iter().take(MAX_ADDRESSES) {
            let from = Rule::new().family_of(*vtep).address(Field::Source, (*vtep).into(), true);
            inet.push(append(&table, "from", &from.limit(MAX_PACKETS_PER_SECOND).trace()));
        }
        set_up(&mut nftables, INET, &table, inet)?;
        let at_devices = devices.iter().enumerate().flat_map(|(number, device)| {
            let chain = format!("from-{number}");
            let made = create(Kind::NewChain, at_device(&table, &chain, device));
            let rules = ingress.iter().map(|rule| append(&table, &chain, rule));
            std::iter::once(made).chain(rules).collect::<Vec<_>>()
        });
        // Without the ingress hook, no packet can be dropped there either.
        if let Err(error) = set_up(&mut nftables, NETDEV, &table, at_devices.collect()) {
            tracing::debug!(%error, ?devices, "could not trace at the interfaces");
        }
        Ok(Self { nftables, traces, table, report })
    }

    /// Traces the ICMP errors that this host sends to these addresses: destination unreachable or
    /// packet too big. If `tunnels` is given, also traces tunnel packets with a trial's datagram
    /// inside; its family is that of the outer addresses. `name` is the overlay's device.
    ///
    /// # Errors
    /// When the table cannot be created.
    pub fn of_trial(name: &str, addresses: &[IpAddr], tunnels: Option<IpAddr>) -> io::Result<Self> {
        let mut nftables = Nftables::open()?;
        let traces = Traces::open()?;
        let table = format!("{name}-trial");
        let chain = base_chain(&table, "to", "filter", OUTPUT, FIRST_AFTER_DEFRAGMENTATION);
        let mut steps = vec![create(Kind::NewChain, chain)];
        for address in addresses.iter().take(MAX_ADDRESSES) {
            let (icmp, kind) = if address.is_ipv4() { (1, 3) } else { (58, 2) };
            let rule = Rule::new().family_of(*address).transport(icmp);
            let rule = rule.holds(Base::Transport, 0, &[kind]);
            let rule = rule.address(Field::Destination, IpNet::from(*address), true);
            steps.push(append(&table, "to", &rule.limit(MAX_PACKETS_PER_SECOND).trace()));
        }
        // Offset of the protocol field and length of the inner header, for IPv4 and IPv6.
        for (protocol_at, header) in [(9, 20), (6, 40)] {
            let Some(outer) = tunnels else { break };
            let rule = Rule::new().family_of(outer).udp();
            let rule = rule.holds(Base::Transport, TUNNEL_HEADERS_LEN + protocol_at, &[UDP]);
            let rule = rule.holds(Base::Transport, TUNNEL_HEADERS_LEN + header + 8, &MAGIC);
            steps.push(append(&table, "to", &rule.limit(MAX_PACKETS_PER_SECOND).trace()));
        }
        set_up(&mut nftables, INET, &table, steps)?;
        Ok(Self { nftables, traces, table, report: TraceReport::default() })
    }

    /// Traces answers to ARP or neighbor discovery from these next hops. `device` is the interface
    /// that they arrive by, `name` the overlay's device.
    ///
    /// # Errors
    /// When a socket cannot be opened.
    pub fn of_answers(name: &str, device: &str, hops: &BTreeSet<IpAddr>) -> io::Result<Self> {
        let mut nftables = Nftables::open()?;
        let traces = Traces::open()?;
        let table = format!("{name}-trace");
        let (mut arp, mut inet, mut ingress) = (Vec::new(), Vec::new(), Vec::new());
        let chain = |hook| base_chain(&table, "from", "filter", hook, FIRST_AFTER_DEFRAGMENTATION);
        arp.push(create(Kind::NewChain, chain(ARP_INPUT)));
        inet.push(create(Kind::NewChain, chain(PREROUTING)));
        ingress.push(create(Kind::NewChain, at_device(&table, "from", device)));
        for hop in hops.iter().take(MAX_ADDRESSES) {
            let octets = attributes::octets(*hop);
            let add =
                |rule: Rule| append(&table, "from", &rule.limit(MAX_PACKETS_PER_SECOND).trace());
            if hop.is_ipv4() {
                // Operation 2 (reply), and the sender's address (RFC 826).
                let answer = |rule: Rule| {
                    rule.holds(Base::Network, 6, &[0, 2]).holds(Base::Network, 14, &octets)
                };
                arp.push(add(answer(Rule::new())));
                ingress.push(add(answer(Rule::new().ether_type(frames::ARP))));
            } else {
                let answer = |rule: Rule| {
                    let rule = rule.transport(ICMPV6);
                    let rule = rule.holds(Base::Transport, 0, &[frames::ADVERTISEMENT]);
                    rule.holds(Base::Transport, 8, &octets)
                };
                inet.push(add(answer(Rule::new().family_of(*hop))));
                ingress.push(add(answer(Rule::new().ether_type(0x86dd))));
            }
        }
        for (family, content) in [(ARP, arp), (INET, inet), (NETDEV, ingress)] {
            if let Err(error) = set_up(&mut nftables, family, &table, content) {
                tracing::debug!(%error, family, "could not trace answers");
            }
        }
        Ok(Self { nftables, traces, table, report: TraceReport::default() })
    }

    /// Reads the trace messages that have arrived.
    ///
    /// # Errors
    /// When the socket cannot be read.
    pub fn read(&mut self) -> io::Result<()> {
        let Self { traces, report, .. } = self;
        traces.read(|family, attributes| _ = report.evaluate(family, attributes))
    }

    /// Returns the results so far.
    pub const fn report(&self) -> &TraceReport {
        &self.report
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
                tracing::debug!(%error, family, "could not remove a table of traces");
            }
        }
    }
}

impl TraceReport {
    /// Returns what drops packets to a host, and packets from it.
    pub fn dropped(&self, local: IpAddr, peer: IpAddr) -> [Option<DroppedBy>; 2] {
        let mut dropped = [None, None];
        // Whatever the source address of this host.
        dropped[OUT] = self.dropped_to(peer);
        dropped[IN] = self.dropped.get(&(peer, local)).cloned();
        dropped
    }

    /// Returns what drops packets of this host to an address, whatever their source.
    pub fn dropped_to(&self, to: IpAddr) -> Option<DroppedBy> {
        self.dropped.iter().find(|((_, end), _)| *end == to).map(|(_, by)| by.clone())
    }

    /// Returns what drops packets from an address, or answers for it.
    pub fn dropped_from(&self, from: IpAddr) -> Option<DroppedBy> {
        self.dropped.iter().find(|((start, _), _)| *start == from).map(|(_, by)| by.clone())
    }

    /// Returns what drops packets from an address, with the index of the input interface.
    pub fn dropped_at(&self, from: IpAddr) -> Option<(DroppedBy, u32)> {
        self.dropped_from(from).zip(self.inputs.get(&from).copied())
    }

    /// Returns what drops packets of this host to an address other than these.
    pub fn dropped_to_others(&self, addresses: &[IpAddr]) -> Option<DroppedBy> {
        let beside = self.dropped.iter().find(|((_, to), _)| !addresses.contains(to));
        beside.map(|(_, by)| by.clone())
    }

    /// Returns the chain that translates the source of packets to a host.
    pub fn translating(&self, peer: IpAddr) -> Option<String> {
        let to_peer = self.translated.iter().find(|((_, to), _)| *to == peer);
        to_peer.map(|(_, chain)| chain.clone())
    }

    /// Evaluates one trace message.
    fn evaluate(&mut self, family: u8, report: &[u8]) -> Option<()> {
        let id = number(attributes::find(report, ID))?;
        // Only the first message about a packet contains its header.
        if let Some(ends) = attributes::find(report, NETWORK_HEADER).and_then(ends)
            && self.packets.len() < MAX_PACKETS
        {
            self.packets.entry(id).or_insert(ends);
            if let Some(input) = number(attributes::find(report, INPUT)) {
                self.inputs.insert(ends.0, input);
            }
        }
        let ends = *self.packets.get(&id)?;
        let (verdict, handle) = match number(attributes::find(report, TYPE))? {
            BY_POLICY => (number(attributes::find(report, POLICY))?, None),
            BY_RULE => {
                let verdict = number(attributes::find(
                    attributes::find(report, VERDICT)?,
                    nfta::VERDICT_CODE,
                ))?;
                let handle = attributes::find(report, HANDLE)?.first_chunk()?;
                (verdict, Some(u64::from_be_bytes(*handle)))
            }
            _ => return None,
        };
        let name = |kind| attributes::find(report, kind).map(attributes::text);
        let chain = format!("{} {} {}", family_name(family), name(TABLE)?, name(CHAIN)?);
        match verdict {
            DROP | STOLEN | QUEUE => {
                let culprit = DroppedBy { chain, handle, queued: verdict == QUEUE };
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

/// Replaces a table; one that belongs to this socket, if the kernel supports that.
fn set_up(nftables: &mut Nftables, family: u8, table: &str, content: Vec<Step>) -> io::Result<()> {
    let owned = Attributes::new().text(nfta::TABLE_NAME, table).be32(nfta::TABLE_FLAGS, OWNED);
    let owned = Step { kind: Kind::NewTable, flags: NLM_F_CREATE, attributes: owned };
    let mut made = Ok(());
    for first in [owned, create_table(table)] {
        let steps = [vec![first], content.clone()].concat();
        // Removes the table of an earlier process.
        let _ = nftables.transaction_in(family, &[delete_table(table)]);
        made = nftables.transaction_in(family, &steps);
        if made.is_ok() {
            break;
        }
    }
    made
}

/// A chain for packets that arrive at one interface.
fn at_device(table: &str, name: &str, device: &str) -> Attributes {
    let hook = Attributes::new()
        .be32(nfta::HOOK_HOOKNUM, INGRESS)
        .be32(nfta::HOOK_PRIORITY, FIRST_PRIORITY.cast_unsigned())
        .text(nfta::HOOK_DEV, device);
    Attributes::new()
        .text(nfta::CHAIN_TABLE, table)
        .text(nfta::CHAIN_NAME, name)
        .nest(nfta::CHAIN_HOOK, &hook)
        .be32(nfta::CHAIN_POLICY, ACCEPT)
        .text(nfta::CHAIN_TYPE, "filter")
}

/// Returns the base chains that translate source addresses.
fn translating(nftables: &mut Nftables) -> io::Result<BTreeSet<String>> {
    let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
    let translating = chains.iter().filter(|chain| {
        name_of(chain, nfta::CHAIN_TYPE) == "nat"
            && base_of(chain).is_some_and(|base| base.hook == POSTROUTING)
    });
    let names = translating.map(|chain| {
        format!(
            "{} {} {}",
            family_name(chain.family),
            name_of(chain, nfta::CHAIN_TABLE),
            name_of(chain, nfta::CHAIN_NAME)
        )
    });
    Ok(names.collect())
}

/// Returns source and destination of an IP header, or sender and target of ARP.
fn ends(header: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let address = |at: usize, length: usize| attributes::address(header.get(at..at + length)?);
    match header.first()? >> 4 {
        // An ARP packet begins with the hardware type, 1 for Ethernet.
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

    fn message(id: u32, chain: &str, kind: u32) -> Attributes {
        Attributes::new().be32(ID, id).be32(TYPE, kind).text(TABLE, "t").text(CHAIN, chain)
    }

    #[test]
    fn packet_is_identified_by_its_first_message_and_its_fate_by_the_last() {
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
        let first = by_rule(message(1, "a", BY_RULE), u32::MAX).put(NETWORK_HEADER, &header());
        all.evaluate(1, first.as_bytes());
        assert_eq!(all.dropped(here, there), [None, None]);
        all.evaluate(2, by_rule(message(1, "nat", BY_RULE), ACCEPT).as_bytes());
        assert_eq!(all.translating(there).as_deref(), Some("ip t nat"));
        all.evaluate(1, message(1, "b", BY_POLICY).be32(POLICY, DROP).as_bytes());
        let [out, back] = all.dropped(here, there);
        assert_eq!(
            (out.map(|by| (by.chain, by.handle)), back),
            (Some(("inet t b".to_owned(), None)), None)
        );
        // A packet whose header was not seen has no result.
        all.evaluate(1, message(2, "c", BY_POLICY).be32(POLICY, DROP).as_bytes());
        let from_there = all.dropped(there, here);
        assert_eq!(all.dropped_at(here), None, "it has no input interface");
        let came = message(3, "d", BY_POLICY).be32(POLICY, DROP).be32(INPUT, 7);
        all.evaluate(1, came.put(NETWORK_HEADER, &header()).as_bytes());
        assert_eq!(
            all.dropped_at(here).map(|(by, at)| (by.chain, at)),
            Some(("inet t d".into(), 7))
        );
        assert_eq!(from_there[IN].as_ref().map(|by| by.chain.as_str()), Some("inet t b"));
    }
}

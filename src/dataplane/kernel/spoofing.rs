//! Holding pods to the addresses and the MAC that they were given: a table of nftables for what comes into
//! their bridge from their cables.
//!
//! Only frames from cables that are in a set are looked at; what the other sets do not hold for one is
//! dropped. So a cable is in the sets before its pod is answered, and its name stays until the kernel has
//! removed it. The table is written in one transaction, and what differs later from what the kernel then
//! showed is a change of another program.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use rtnetlink::packet_core::NLM_F_CREATE;

use super::firewall::{Shown, append, create, create_table, delete_table, look, name_of};
use crate::{
    model::Mac,
    netlink::{
        attributes::{self, Attributes},
        nftables::{BRIDGE, Base, Changes, IFNAMSIZ, Kind, Nftables, Rule, Step, base_chain},
    },
    pods::bridge::{Bridge, Tenant, Tenants},
};

const CHAIN: &str = "pods";
/// `NF_BR_PRE_ROUTING`; before the bridge learns who is where, and before Docker and kube-proxy change
/// addresses (linux/netfilter_bridge.h).
const PREROUTING: u32 = 0;
const FIRST: i32 = -310;
/// Elements per message: an attribute holds no more than 65,531 bytes.
const ELEMENTS: usize = 500;
/// What the kernel refused is tried again after so long.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// Sets with the length of their elements and their type as the `nft` program knows it: name of the cable,
/// MAC, and address.
const CABLES: &str = "cables";
const MACS: &str = "macs";
const ADDRESSES4: &str = "addresses4";
const ADDRESSES6: &str = "addresses6";
const SETS: [(&str, u32, u32); 4] = [
    (CABLES, 16, 41),
    (MACS, 24, 41 << 6 | 9),
    (ADDRESSES4, 28, (41 << 6 | 9) << 6 | 7),
    (ADDRESSES6, 40, (41 << 6 | 9) << 6 | 8),
];

/// Places in a frame: offset and length.
const ETHER_SOURCE: (Base, u32, u32) = (Base::Link, 6, 6);
const ARP_KIND: u32 = 0;
const ARP_MAC: (Base, u32, u32) = (Base::Network, 8, 6);
const ARP_ADDRESS: (Base, u32, u32) = (Base::Network, 14, 4);
const SOURCE4: (Base, u32, u32) = (Base::Network, 12, 4);
const SOURCE6: (Base, u32, u32) = (Base::Network, 8, 16);
/// Of a neighbour advertisement.
const TARGET: (Base, u32, u32) = (Base::Transport, 8, 16);

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// Elements of the sets, by their names.
type Elements = BTreeMap<&'static str, BTreeSet<Vec<u8>>>;

/// The table of one bridge.
pub struct Spoofing {
    nftables: io::Result<Nftables>,
    changes: Option<Changes>,
    written: Option<Written>,
    problem: Option<String>,
    refused_at: Option<Instant>,
    /// It is not wanted, and what an earlier run has left was looked for.
    removed: bool,
}

struct Written {
    table: String,
    elements: Elements,
    /// Not known before it was read for the first time.
    shown: Option<Shown>,
}

impl Spoofing {
    /// Opens what it can; what it cannot is a problem once there are pods.
    pub fn open() -> Self {
        Self {
            nftables: Nftables::open(),
            changes: Changes::open().ok(),
            written: None,
            problem: None,
            refused_at: None,
            removed: false,
        }
    }

    /// Readable when some table of nftables has changed.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.changes.as_ref().map(|changes| changes.as_fd())
    }

    /// Reads what has changed, and says whether another program was at the table.
    pub fn touched(&mut self) -> io::Result<bool> {
        let own = self.nftables.as_ref().ok().and_then(|nftables| nftables.port().ok());
        let table = self.written.as_ref().map_or("", |written| written.table.as_str());
        self.changes.as_mut().map_or(Ok(false), |changes| changes.touched_in(BRIDGE, table, own))
    }

    /// What keeps pods from being held to their addresses.
    pub fn problem(&self) -> Option<&String> {
        self.problem.as_ref()
    }

    /// Lets a pod in by its cable, before it is answered.
    pub fn let_in(&mut self, bridge: &Bridge, cable: &str, tenant: &Tenant, all: &Tenants) {
        let its_others = all.iter().filter(|(_, other)| other.container == tenant.container);
        let mut one: Tenants =
            its_others.map(|(name, other)| (name.clone(), other.clone())).collect();
        one.insert(cable.to_owned(), tenant.clone());
        let new = elements_of(&one);
        if let (Ok(nftables), Some(written)) = (&mut self.nftables, &mut self.written)
            && written.is_of(bridge)
            && change(nftables, &written.table, Kind::NewElements, &new).is_ok()
        {
            new.into_iter()
                .for_each(|(set, keys)| written.elements.entry(set).or_default().extend(keys));
            return;
        }
        let mut all = all.clone();
        all.extend(one);
        self.write(bridge, &all);
    }

    /// Takes back what a cable was allowed. Nothing that comes out of it passes any more.
    pub fn shut_out(&mut self, cable: &str) {
        let (Ok(nftables), Some(written)) = (&mut self.nftables, &mut self.written) else { return };
        let is_its = |key: &Vec<u8>| key.starts_with(&name_bytes(cable));
        let mut gone = Elements::new();
        // As long as the kernel has the cable it is looked at.
        for (set, keys) in written.elements.iter_mut().filter(|(set, _)| **set != CABLES) {
            gone.insert(set, keys.iter().filter(|key| is_its(key)).cloned().collect());
            keys.retain(|key| !is_its(key));
        }
        if change(nftables, &written.table, Kind::DelElements, &gone).is_err() {
            // It is not as it was written, and is written anew when it is looked at.
            self.written = None;
        }
    }

    /// Makes the table what it should be, or removes it where it is not wanted. `there` lists the interfaces
    /// of this host. Says whether another program had changed it.
    pub fn keep(
        &mut self,
        bridge: &Bridge,
        tenants: &Tenants,
        there: impl FnOnce() -> io::Result<BTreeSet<String>>,
    ) -> bool {
        if !bridge.anti_spoofing {
            self.remove_once(&bridge.table);
            return false;
        }
        let mut wanted = elements_of(&self.with_known_macs(bridge, tenants));
        self.keep_dying(&mut wanted, there);
        let found = match (&mut self.nftables, &self.written) {
            (Ok(nftables), Some(written)) => {
                let table = &written.table;
                look(nftables, BRIDGE, table)
                    .and_then(|(shown, _)| Ok((shown, present(nftables, table)?)))
                    .ok()
            }
            _ => {
                self.write(bridge, tenants);
                return false;
            }
        };
        let Some(written) = &mut self.written else { return false };
        let is_right = found.is_some_and(|(shown, present)| {
            let rules_are_right = match &written.shown {
                Some(before) => *before == shown,
                None => shown.rules() == rules().len(),
            };
            if rules_are_right {
                written.shown = Some(shown);
            }
            rules_are_right && present == written.elements
        });
        if !is_right || !written.is_of(bridge) || written.elements != wanted {
            self.write_elements(bridge, wanted);
        }
        !is_right
    }

    /// Removes a table; one that is not there is no error.
    pub fn remove(&mut self, table: &str) -> io::Result<()> {
        self.written = None;
        let Ok(nftables) = &mut self.nftables else { return Ok(()) };
        if !tables_in(nftables)?.iter().any(|name| name == table) {
            return Ok(());
        }
        nftables.transaction_in(BRIDGE, &[delete_table(table)])
    }

    /// Tables of bridges whose name is wanted.
    pub fn tables(&mut self, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<String>> {
        let Ok(nftables) = &mut self.nftables else { return Ok(Vec::new()) };
        let mut names = tables_in(nftables)?;
        names.retain(|name| wanted(name));
        Ok(names)
    }

    /// Removes the table of an earlier run with other settings, which would hold up new pods.
    pub fn remove_once(&mut self, table: &str) {
        if std::mem::replace(&mut self.removed, true) {
            return;
        }
        self.problem = self
            .remove(table)
            .err()
            .map(|error| format!("the table bridge {table} of nftables was not removed: {error}"));
    }

    /// Cables that are being removed stay where they are.
    fn keep_dying(
        &self,
        wanted: &mut Elements,
        there: impl FnOnce() -> io::Result<BTreeSet<String>>,
    ) {
        let cables = self.written.as_ref().and_then(|written| written.elements.get(CABLES));
        let keep = wanted.entry(CABLES).or_default();
        let stale: Vec<&Vec<u8>> =
            cables.into_iter().flat_map(|had| had.difference(keep)).collect();
        if stale.is_empty() {
            return;
        }
        let there = there().map(|names| names.iter().map(|name| name_bytes(name)).collect());
        let is_there = |key: &Vec<u8>| {
            there
                .as_ref()
                .is_ok_and(|there: &BTreeSet<_>| there.iter().any(|name| name[..] == key[..]))
        };
        let dying: Vec<Vec<u8>> = stale.into_iter().filter(|key| is_there(key)).cloned().collect();
        keep.extend(dying);
    }

    fn write(&mut self, bridge: &Bridge, tenants: &Tenants) {
        let elements = elements_of(&self.with_known_macs(bridge, tenants));
        self.write_elements(bridge, elements);
    }

    /// In one transaction, which no packet notices.
    fn write_elements(&mut self, bridge: &Bridge, elements: Elements) {
        if !bridge.anti_spoofing || self.refused_at.is_some_and(|at| at.elapsed() < TRY_AGAIN) {
            return;
        }
        let table = &bridge.table;
        let mut steps = vec![create_table(table), delete_table(table), create_table(table)];
        for (id, (set, length, kind)) in (1..).zip(SETS) {
            let named = Attributes::new().text(1, table).text(2, set);
            let of_keys = named.be32(3, 0).be32(4, kind).be32(5, length).be32(10, id);
            steps.push(create(Kind::NewSet, of_keys));
        }
        steps.extend(element_steps(table, Kind::NewElements, &elements));
        let chain = base_chain(table, CHAIN, "filter", PREROUTING, FIRST);
        steps.push(create(Kind::NewChain, chain));
        steps.extend(rules().iter().map(|rule| append(table, CHAIN, rule)));
        self.written = None;
        let done = match &mut self.nftables {
            Ok(nftables) => nftables.transaction_in(BRIDGE, &steps),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        match done {
            Ok(()) => {
                (self.problem, self.refused_at) = (None, None);
                self.written = Some(Written { table: table.clone(), elements, shown: None });
            }
            Err(error) => {
                self.refused_at = Some(Instant::now());
                self.problem = Some(format!(
                    "pods can use addresses that they were not given: nftables, family bridge: {error}: it \
                     takes a kernel with nf_tables for bridges (CONFIG_NF_TABLES_BRIDGE), or set \
                     anti_spoofing = false"
                ));
            }
        }
    }

    /// MACs that nobody knows any more are in the table that an earlier process has left.
    fn with_known_macs(&mut self, bridge: &Bridge, tenants: &Tenants) -> Tenants {
        let mut tenants = tenants.clone();
        if tenants.values().all(|tenant| tenant.mac.is_some()) {
            return tenants;
        }
        let Ok(nftables) = &mut self.nftables else { return tenants };
        let left = keys_in(nftables, &bridge.table, MACS).unwrap_or_default();
        for (cable, tenant) in tenants.iter_mut().filter(|(_, tenant)| tenant.mac.is_none()) {
            let its = left.iter().find(|key| key.starts_with(&name_bytes(cable)));
            let mac = its.and_then(|key| key.get(IFNAMSIZ..)?.first_chunk::<6>().copied());
            tenant.mac = mac.map(Mac::from_bytes);
        }
        tenants
    }
}

impl Written {
    fn is_of(&self, bridge: &Bridge) -> bool {
        bridge.anti_spoofing && self.table == bridge.table
    }
}

/// From top to bottom; the first that matches decides.
fn rules() -> Vec<Rule> {
    let link_local = |place: (Base, u32, u32), rule: Rule, same| {
        let (mask, value) = ([0xff, 0xc0], [0xfe, 0x80]);
        rule.masked(place.0, place.1, &mask, &value, same)
    };
    let icmpv6 = |kind: u8| {
        Rule::new().ether_type(IPV6).transport(ICMPV6).holds(Base::Transport, 0, &[kind])
    };
    // Ethernet and IPv4, with addresses of their lengths.
    let arp = || {
        let kind = [0, 1, 8, 0, 6, 4];
        Rule::new().ether_type(ARP).holds(Base::Network, ARP_KIND, &kind)
    };
    let advertised = link_local(TARGET, icmpv6(NEIGHBOUR_ADVERTISEMENT), false);
    vec![
        Rule::new().input_with(CABLES, &[], false).accept(),
        Rule::new().input_with(MACS, &[ETHER_SOURCE], false).count().drop(),
        arp().input_with(ADDRESSES4, &[ARP_MAC, ARP_ADDRESS], true).accept(),
        // Who asks whether an address is free has none yet (RFC 5227).
        arp()
            .holds(ARP_ADDRESS.0, ARP_ADDRESS.1, &[0; 4])
            .input_with(MACS, &[ARP_MAC], true)
            .accept(),
        Rule::new()
            .ether_type(IPV4)
            .input_with(ADDRESSES4, &[ETHER_SOURCE, SOURCE4], true)
            .accept(),
        icmpv6(ROUTER_ADVERTISEMENT).count().drop(),
        icmpv6(REDIRECT).count().drop(),
        advertised.input_with(ADDRESSES6, &[ETHER_SOURCE, TARGET], false).count().drop(),
        Rule::new()
            .ether_type(IPV6)
            .input_with(ADDRESSES6, &[ETHER_SOURCE, SOURCE6], true)
            .accept(),
        link_local(SOURCE6, Rule::new().ether_type(IPV6), true).accept(),
        // The same in IPv6, and what groups it is in.
        Rule::new()
            .ether_type(IPV6)
            .transport(ICMPV6)
            .holds(SOURCE6.0, SOURCE6.1, &[0; 16])
            .accept(),
        Rule::new().count().drop(),
    ]
}

/// A container with several cables may answer by any of them for each of its addresses: which way its packets
/// take is for its routes to say.
fn elements_of(tenants: &Tenants) -> Elements {
    let mut addresses: BTreeMap<&str, Vec<IpAddr>> = BTreeMap::new();
    for tenant in tenants.values() {
        addresses.entry(&tenant.container).or_default().extend(tenant.addresses.iter());
    }
    let mut elements: Elements = SETS.map(|(set, ..)| (set, BTreeSet::new())).into();
    let mut add = |set, key| _ = elements.entry(set).or_default().insert(key);
    for (cable, tenant) in tenants {
        add(CABLES, name_bytes(cable).to_vec());
        let Some(mac) = tenant.mac else { continue };
        let key = [&name_bytes(cable)[..], mac.as_bytes(), &[0; 2]].concat();
        for &ip in addresses.get(tenant.container.as_str()).into_iter().flatten() {
            let set = if matches!(ip, IpAddr::V4(_)) { ADDRESSES4 } else { ADDRESSES6 };
            add(set, [&key[..], &attributes::octets(ip)].concat());
        }
        add(MACS, key);
    }
    elements
}

fn name_bytes(cable: &str) -> [u8; IFNAMSIZ] {
    let mut bytes = [0; IFNAMSIZ];
    bytes.iter_mut().zip(cable.bytes()).for_each(|(to, from)| *to = from);
    bytes
}

fn change(nftables: &mut Nftables, table: &str, kind: Kind, elements: &Elements) -> io::Result<()> {
    match &element_steps(table, kind, elements)[..] {
        [] => Ok(()),
        steps => nftables.transaction_in(BRIDGE, steps),
    }
}

fn element_steps(table: &str, kind: Kind, elements: &Elements) -> Vec<Step> {
    let mut steps = Vec::new();
    let flags = if kind == Kind::NewElements { NLM_F_CREATE } else { 0 };
    for (set, keys) in elements {
        let keys: Vec<&Vec<u8>> = keys.iter().collect();
        for some in keys.chunks(ELEMENTS) {
            let list = some.iter().fold(Attributes::new(), |list, key| {
                let value = Attributes::new().put(1, key);
                list.nest(1, &Attributes::new().nest(1, &value))
            });
            let attributes = Attributes::new().text(1, table).text(2, set).nest(3, &list);
            steps.push(Step { kind, flags, attributes });
        }
    }
    steps
}

fn present(nftables: &mut Nftables, table: &str) -> io::Result<Elements> {
    SETS.iter().map(|(set, ..)| Ok((*set, keys_in(nftables, table, set)?))).collect()
}

fn keys_in(nftables: &mut Nftables, table: &str, set: &str) -> io::Result<BTreeSet<Vec<u8>>> {
    let filter = Attributes::new().text(1, table).text(2, set);
    let mut keys = BTreeSet::new();
    for object in nftables.dump(Kind::GetElements, BRIDGE, &filter)? {
        let list = attributes::find(&object.attributes, 3).unwrap_or_default();
        keys.extend(attributes::read(list).filter_map(|(_, element)| {
            Some(attributes::find(attributes::find(element, 1)?, 1)?.to_vec())
        }));
    }
    Ok(keys)
}

fn tables_in(nftables: &mut Nftables) -> io::Result<Vec<String>> {
    let tables = nftables.dump(Kind::GetTable, BRIDGE, &Attributes::new())?;
    Ok(tables.iter().map(|table| name_of(table, 1).to_owned()).collect())
}

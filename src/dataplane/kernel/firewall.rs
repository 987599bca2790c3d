//! Our table in nftables: written in one transaction, compared with what was written, and put right.
//!
//! The kernel gives rules back in a form of its own. So what is right is remembered as the kernel showed it
//! after our own transaction, and anything else found later is somebody's change; the table is then written
//! anew as a whole, which no packet notices. Members come and go one by one.

mod chains;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};

pub use self::chains::TRIAL_MARK;
use self::chains::{
    MEMBERS, add_guard, add_masquerade, add_sets, elements, refuse_routers, refuse_unleased,
    refuse_users,
};
use super::{
    forward::{Closing, ForeignChains, Lost, OwnHook, redirecting_chains, translating_chains},
    partial::{ForeignRules, LegacyTable, Partial, Traffic},
    ports::{ClosedPort, closed_ports, redirected_port},
    sets::{self, Elements},
};
use crate::{
    dataplane::firewall::{Firewall, Guard, Leases},
    netlink::{
        attributes::{self, Attributes},
        nftables::{INET, Kind, Nftables, Object, Rule, Step, is_missing},
    },
};

/// `NFTA_SET_ELEM_EXPR`: what an element of a set does when it is found.
const ELEMENT_EXPRESSION: u16 = 7;
/// Bytes: what a socket's buffer takes where nobody has raised its limit (`net.core.wmem_max`).
const MAX_TRANSACTION: usize = 300_000;
/// The table, as it is in the kernel.
pub struct FirewallTable {
    nftables: Nftables,
    written: Option<Written>,
    /// Members that an earlier process let in and this one has not heard of.
    adopted: Option<BTreeSet<IpAddr>>,
    /// When last read.
    dropped: u64,
    /// Counted by rules that are gone.
    dropped_before: u64,
    /// A change of members was refused: the table was not as it should have been.
    refused: bool,
}

/// What a pass over the table did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Somebody else had changed the table.
    pub repaired: bool,
    /// Tunnel packets of strangers that were dropped.
    pub dropped: u64,
}

/// What was last put into the kernel, and how the kernel shows that.
struct Written {
    firewall: Firewall,
    elements: Elements,
    rules: usize,
    /// Not known before it was read for the first time.
    shown: Option<Shown>,
}

/// The table's parts that nobody but us may change, without counters.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Shown {
    table: Vec<Vec<u8>>,
    chains: Vec<Vec<u8>>,
    rules: Vec<(String, Vec<u8>)>,
}

impl FirewallTable {
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            nftables: Nftables::open()?,
            written: None,
            adopted: None,
            dropped: 0,
            dropped_before: 0,
            refused: false,
        })
    }

    /// Makes the table equal to `wanted`, on the assumption that it still holds what was last written. That
    /// a new member waits for; whether the assumption is true, [`FirewallTable::verify`] finds out.
    pub fn write(&mut self, wanted: &Firewall) -> io::Result<()> {
        let elements = elements(wanted, &self.wanted_members(wanted)?);
        let Some(written) = self.written.take_if(|w| w.firewall.equals_but_for_elements(wanted))
        else {
            return self.write_anew(wanted, elements);
        };
        let mut steps = Vec::new();
        for (kind, of, without) in [
            (Kind::NewElements, &elements, &written.elements),
            (Kind::DelElements, &written.elements, &elements),
        ] {
            let others = of.iter().filter_map(|(set, keys)| Some((*set, keys - without.get(set)?)));
            steps.extend(sets::steps(&wanted.table, kind, &others.collect()));
        }
        match self.carry_out(&steps) {
            Err(_) => {
                self.refused = true;
                self.write_anew(wanted, elements)
            }
            Ok(()) => {
                self.written = Some(Written { firewall: wanted.clone(), elements, ..written });
                Ok(())
            }
        }
    }

    /// Whether it is still to be found out how the kernel shows what was written.
    pub fn is_unread(&self) -> bool {
        self.written.as_ref().is_some_and(|written| written.shown.is_none())
    }

    /// Reads the table, and writes it anew if it is not as it was last written.
    pub fn verify(&mut self, wanted: &Firewall) -> io::Result<Pass> {
        self.write(wanted)?;
        let Some(written) = &mut self.written else { return Ok(Pass::default()) };
        let (shown, counted) = look(&mut self.nftables, INET, &wanted.table)?;
        let present = written.present(&mut self.nftables)?;
        self.dropped = self.dropped_before + counted.values().sum::<u64>();
        let right = written.is_shown_by(&shown, &present);
        if right {
            written.shown = Some(shown);
        } else {
            let members = self.wanted_members(wanted)?;
            self.write_anew(wanted, elements(wanted, &members))?;
            self.read_back(&wanted.table)?;
        }
        let repaired = std::mem::take(&mut self.refused) || !right;
        Ok(Pass { repaired, dropped: self.dropped })
    }

    /// Learns how the kernel shows what has just been written.
    fn read_back(&mut self, table: &str) -> io::Result<()> {
        let Some(written) = &mut self.written else { return Ok(()) };
        let (shown, _) = look(&mut self.nftables, INET, table)?;
        let present = written.present(&mut self.nftables)?;
        if !written.is_shown_by(&shown, &present) {
            return Err(io::Error::other("another program changes the table at the same time"));
        }
        written.shown = Some(shown);
        Ok(())
    }

    /// With partial knowledge, members that an earlier process let in stay. What has once been in a view of
    /// this one is no longer in doubt, and whoever is put into the set by others is no member.
    fn wanted_members(&mut self, wanted: &Firewall) -> io::Result<BTreeSet<IpAddr>> {
        let Some(guard) = &wanted.guard else { return Ok(BTreeSet::new()) };
        let mut adopted = match self.adopted.take() {
            Some(adopted) => adopted,
            None if guard.lenient => members_in(&mut self.nftables, &wanted.table)?,
            None => BTreeSet::new(),
        };
        adopted.retain(|address| guard.lenient && !guard.members.contains(address));
        let members = &guard.members | &adopted;
        self.adopted = Some(adopted);
        Ok(members)
    }

    /// Removes a table and everything in it; one that is not there is no error.
    pub fn remove(&mut self, table: &str) -> io::Result<()> {
        self.written = None;
        // A table that is not there cannot be deleted, and one that is can be created again.
        match self.nftables.transaction(&[create_table(table), delete_table(table)]) {
            Err(error) if is_missing(&error) => Ok(()),
            removed => removed,
        }
    }

    /// How many tunnel packets have come from each member since its address is in the table. Empty where the
    /// kernel does not count them (before 5.7), and without a guard.
    pub fn packets_of_members(&mut self, table: &str) -> io::Result<BTreeMap<IpAddr, u64>> {
        let mut packets = BTreeMap::new();
        for set in MEMBERS {
            let counted = |key: &[u8], element: &[u8]| {
                Some((attributes::address(key)?, packets_of(element)?))
            };
            let mut of_set = sets::read(&mut self.nftables, INET, (table, set), counted)?;
            packets.append(&mut of_set);
        }
        Ok(packets)
    }

    /// Tables of both families whose name is wanted.
    pub fn tables(&mut self, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<String>> {
        let tables = self.nftables.dump(Kind::GetTable, INET, &Attributes::new())?;
        let names = tables.iter().map(|table| name_of(table, 1));
        Ok(names.filter(|name| wanted(name)).map(str::to_owned).collect())
    }

    /// What others do with packets of these networks.
    pub fn foreign_chains(&mut self, networks: &[IpNet]) -> io::Result<ForeignChains> {
        ForeignChains::read(&mut self.nftables, networks, None)
    }

    /// The same of packets that were lost: rules that certainly take none of them do not count.
    pub fn chains_that_may_drop(
        &mut self,
        networks: &[IpNet],
        lost: &Lost,
    ) -> io::Result<ForeignChains> {
        ForeignChains::read(&mut self.nftables, networks, Some(lost))
    }

    /// Chains of others that may keep pods from finding the gateway of this subnet.
    pub fn chains_around_gateway(&mut self, network: IpNet) -> io::Result<Vec<Closing>> {
        ForeignChains::read_around_gateway(&mut self.nftables, network)
    }

    /// Chains of others that may drop packets between this host itself and a network.
    pub fn chains_at(&mut self, at: OwnHook, network: IpNet) -> io::Result<Vec<Closing>> {
        ForeignChains::read_at(&mut self.nftables, at, network)
    }

    /// Chains of others that translate the source of what leaves this host.
    pub fn translating_chains(&mut self, ipv4: bool) -> io::Result<Vec<String>> {
        translating_chains(&mut self.nftables, ipv4)
    }

    /// Chains of others that send what comes in to another address.
    pub fn redirecting_chains(&mut self, ipv4: bool) -> io::Result<Vec<String>> {
        redirecting_chains(&mut self.nftables, ipv4)
    }

    /// Rules of others, with those of iptables-legacy.
    pub fn foreign_rules(&mut self, legacy: Vec<LegacyTable>) -> io::Result<ForeignRules> {
        ForeignRules::read(&mut self.nftables, legacy)
    }

    /// Rules of others that do something with some of these packets alone.
    pub fn partial_rules(
        &mut self,
        rules: &mut ForeignRules,
        traffic: &Traffic<'_>,
    ) -> Vec<Partial> {
        rules.partial(&mut self.nftables, traffic)
    }

    /// Chains of others that give UDP packets to a port of this host another destination.
    pub fn redirected_port(&mut self, ipv4: bool, port: u16) -> io::Result<BTreeSet<String>> {
        redirected_port(&mut self.nftables, ipv4, port)
    }

    /// Base chains of others, and those of these UDP ports that they drop.
    pub fn closed_ports(&mut self, ports: &[u16]) -> io::Result<BTreeSet<ClosedPort>> {
        closed_ports(&mut self.nftables, ports)
    }

    fn write_anew(&mut self, wanted: &Firewall, elements: Elements) -> io::Result<()> {
        self.written = None;
        self.dropped_before = self.dropped;
        let steps = steps_to(wanted, &elements);
        match self.carry_out(&steps) {
            // A kernel without nftables holds nothing of ours.
            Err(error) if wanted.is_empty() && is_missing(&error) => return Ok(()),
            written => written?,
        }
        let rules = steps.iter().filter(|step| step.kind == Kind::NewRule).count();
        self.written = Some(Written { firewall: wanted.clone(), elements, rules, shown: None });
        Ok(())
    }

    /// One transaction, unless that is more than a socket's buffer takes: then the members come before the
    /// chains that look them up.
    fn carry_out(&mut self, steps: &[Step]) -> io::Result<()> {
        let mut rest = steps;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest.iter().take_while(|step| {
                bytes += step.attributes.as_bytes().len();
                bytes <= MAX_TRANSACTION
            });
            let (now, later) = rest.split_at(fits.count().max(1));
            self.nftables.transaction(now)?;
            rest = later;
        }
        Ok(())
    }
}

impl Shown {
    pub const fn rules(&self) -> usize {
        self.rules.len()
    }
}

impl Written {
    /// What its sets hold now.
    fn present(&self, nftables: &mut Nftables) -> io::Result<Elements> {
        sets::keys_in(nftables, INET, &self.firewall.table, self.elements.keys().copied())
    }

    fn is_shown_by(&self, shown: &Shown, elements: &Elements) -> bool {
        let rules_are_right = match &self.shown {
            Some(before) => before == shown,
            None => self.rules == shown.rules.len(),
        };
        rules_are_right && self.elements == *elements
    }
}

impl Firewall {
    fn equals_but_for_elements(&self, other: &Self) -> bool {
        let networks = |leases: &Leases| (leases.device.clone(), leases.networks.clone());
        let place = |guard: &Guard| {
            (guard.port, guard.vni, guard.interfaces.clone(), guard.networks.clone())
        };
        self.table == other.table
            && self.port == other.port
            && self.masquerade == other.masquerade
            && self.guard.as_ref().map(place) == other.guard.as_ref().map(place)
            && self.leases.as_ref().map(networks) == other.leases.as_ref().map(networks)
    }
}

fn steps_to(wanted: &Firewall, elements: &Elements) -> Vec<Step> {
    let table = &wanted.table;
    let mut steps = vec![create_table(table), delete_table(table)];
    if !wanted.is_empty() {
        steps.push(create_table(table));
    }
    add_sets(table, elements, &mut steps);
    steps.extend(sets::steps(table, Kind::NewElements, elements));
    if let Some(guard) = &wanted.guard {
        add_guard(table, guard, &mut steps);
        refuse_routers(table, guard, &mut steps);
        refuse_users(table, guard, &mut steps);
    }
    if let Some(leases) = &wanted.leases {
        refuse_unleased(table, leases, &mut steps);
    }
    if !wanted.masquerade.is_empty() {
        add_masquerade(wanted, &mut steps);
    }
    steps
}

/// The table as it is, and how many packets the rules of each chain have counted.
pub fn look(
    nftables: &mut Nftables,
    family: u8,
    table: &str,
) -> io::Result<(Shown, BTreeMap<String, u64>)> {
    let (mut shown, mut counted) = (Shown::default(), BTreeMap::new());
    let ours = |object: &Object| object.family == family && name_of(object, 1) == table;
    for object in nftables.dump(Kind::GetTable, family, &Attributes::new())? {
        if ours(&object) {
            shown.table.push(parts(&object, &[2]));
        }
    }
    for object in nftables.dump(Kind::GetChain, family, &Attributes::new())? {
        if ours(&object) {
            shown.chains.push(parts(&object, &[3, 4, 5, 7]));
        }
    }
    let filter = Attributes::new().text(1, table);
    for object in nftables.dump(Kind::GetRule, family, &filter)?.iter().filter(|o| ours(o)) {
        let (mut right, chain) = (Vec::new(), name_of(object, 2).to_owned());
        let expressions = attributes::find(&object.attributes, 4).unwrap_or_default();
        for (_, expression) in attributes::read(expressions) {
            let name = attributes::find(expression, 1).map(attributes::text);
            if name == Some("counter") {
                let packets = attributes::find(expression, 2).and_then(packets_in).unwrap_or(0);
                *counted.entry(chain.clone()).or_default() += packets;
            } else {
                right.extend(expression);
            }
        }
        shown.rules.push((chain, right));
    }
    Ok((shown, counted))
}

fn members_in(nftables: &mut Nftables, table: &str) -> io::Result<BTreeSet<IpAddr>> {
    let mut members = BTreeSet::new();
    for set in MEMBERS {
        let addresses = sets::read(nftables, INET, (table, set), |key, _| attributes::address(key));
        members.append(&mut addresses?);
    }
    Ok(members)
}

/// How many packets the element has been looked up for; none, if the kernel does not count.
fn packets_of(element: &[u8]) -> Option<u64> {
    packets_in(attributes::find(attributes::find(element, ELEMENT_EXPRESSION)?, 2)?)
}

/// As a counter shows them.
fn packets_in(counter: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*attributes::find(counter, 2)?.first_chunk()?))
}

pub fn create_table(table: &str) -> Step {
    let attributes = Attributes::new().text(1, table).be32(2, 0);
    Step { kind: Kind::NewTable, flags: NLM_F_CREATE, attributes }
}

pub fn delete_table(table: &str) -> Step {
    Step { kind: Kind::DelTable, flags: 0, attributes: Attributes::new().text(1, table) }
}

pub const fn create(kind: Kind, attributes: Attributes) -> Step {
    Step { kind, flags: NLM_F_CREATE | NLM_F_EXCL, attributes }
}

pub fn append(table: &str, chain: &str, rule: &Rule) -> Step {
    let attributes = Attributes::new().text(1, table).text(2, chain).nest(4, rule.expressions());
    Step { kind: Kind::NewRule, flags: NLM_F_CREATE | NLM_F_APPEND, attributes }
}

pub(super) fn name_of(object: &Object, kind: u16) -> &str {
    attributes::find(&object.attributes, kind).map(attributes::text).unwrap_or_default()
}

/// These attributes of an object, one after another.
fn parts(object: &Object, wanted: &[u16]) -> Vec<u8> {
    let all = attributes::read(&object.attributes);
    all.filter(|(kind, _)| wanted.contains(kind)).flat_map(|(_, bytes)| bytes.to_vec()).collect()
}

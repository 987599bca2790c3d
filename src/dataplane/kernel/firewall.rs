//! Writes gossamer's nftables table, compares it with what was written, and repairs it.
//!
//! The kernel returns rules in a form of its own. This module therefore stores the form that the
//! kernel shows after a write, and treats any later difference as a change by another program. It
//! then rewrites the whole table in one transaction, so that no packet passes without the rules.
//! Changes of members only add and remove elements of sets.

mod chains;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

pub use self::chains::TRIAL_MARK;
use self::chains::{
    MEMBERS, add_guard, add_masquerade, add_sets, elements, refuse_routers, refuse_unleased,
    refuse_users,
};
use crate::{
    dataplane::firewall::{Firewall, Guard, Leases},
    netlink::{
        attributes::{self, Attributes},
        nftables::{
            INET, Kind, Nftables, Object, Step, counter_packets, is_missing, name_of, nfta,
            sets::{self, Elements},
            steps::{create_table, delete_table},
        },
    },
};

/// The attributes of a chain that are compared.
const CHAIN_CONTENT: [u16; 4] =
    [nfta::CHAIN_NAME, nfta::CHAIN_HOOK, nfta::CHAIN_POLICY, nfta::CHAIN_TYPE];
/// Upper limit of one transaction in bytes: what a socket's send buffer takes with the default
/// `net.core.wmem_max`.
const MAX_TRANSACTION_BYTES: usize = 300_000;

/// The table in the kernel.
pub struct FirewallTable {
    nftables: Nftables,
    written: Option<Written>,
    /// Members that an earlier process accepted and no view of this process has contained; `None`
    /// until the set was read.
    adopted: Option<BTreeSet<IpAddr>>,
    /// Dropped packets as of the last read.
    dropped: u64,
    /// Packets counted by rules of earlier versions of the table.
    dropped_before: u64,
    /// Whether the kernel refused a change of elements, because the table differed from what was
    /// written.
    refused: bool,
}

/// The result of one verification.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Whether another program had changed the table.
    pub repaired: bool,
    /// Dropped tunnel packets of non-members since the agent started.
    pub dropped: u64,
}

/// What was last written, and the form in which the kernel shows it.
struct Written {
    firewall: Firewall,
    elements: Elements,
    rules: usize,
    /// `None` until the table was read after the write.
    shown: Option<TableContent>,
}

/// The parts of a table that only gossamer may change, without counters.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TableContent {
    table: Vec<Vec<u8>>,
    chains: Vec<Vec<u8>>,
    rules: Vec<(String, Vec<u8>)>,
}

impl FirewallTable {
    /// Opens a netlink socket for nftables.
    ///
    /// # Errors
    /// When the socket cannot be opened.
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

    /// Makes the table equal to `wanted`, assuming that it still holds what was last written. This
    /// way, a new member is accepted without delay; [`FirewallTable::verify`] checks the
    /// assumption.
    ///
    /// # Errors
    /// When the kernel refuses the table.
    pub fn write(&mut self, wanted: &Firewall) -> io::Result<()> {
        let elements = elements(wanted, &self.wanted_members(wanted)?);
        let Some(written) = self.written.take_if(|w| w.firewall.equals_but_for_elements(wanted))
        else {
            return self.rewrite(wanted, elements);
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
                self.rewrite(wanted, elements)
            }
            Ok(()) => {
                self.written = Some(Written { firewall: wanted.clone(), elements, ..written });
                Ok(())
            }
        }
    }

    /// Whether the table has not been read since the last write.
    pub fn is_unread(&self) -> bool {
        self.written.as_ref().is_some_and(|written| written.shown.is_none())
    }

    /// Reads the table, and rewrites it if it differs from what was last written.
    ///
    /// # Errors
    /// When the table cannot be read or written, or another program changes it at the same time.
    pub fn verify(&mut self, wanted: &Firewall) -> io::Result<Verification> {
        self.write(wanted)?;
        let Some(written) = &mut self.written else { return Ok(Verification::default()) };
        let (shown, counted) = read_table(&mut self.nftables, INET, &wanted.table)?;
        let present = written.present(&mut self.nftables)?;
        self.dropped = self.dropped_before + counted.values().sum::<u64>();
        let expected = written.is_shown_by(&shown, &present);
        if expected {
            written.shown = Some(shown);
        } else {
            let members = self.wanted_members(wanted)?;
            self.rewrite(wanted, elements(wanted, &members))?;
            self.read_back(&wanted.table)?;
        }
        let repaired = std::mem::take(&mut self.refused) || !expected;
        Ok(Verification { repaired, dropped: self.dropped })
    }

    /// Stores the form in which the kernel shows the latest write.
    fn read_back(&mut self, table: &str) -> io::Result<()> {
        let Some(written) = &mut self.written else { return Ok(()) };
        let (shown, _) = read_table(&mut self.nftables, INET, table)?;
        let present = written.present(&mut self.nftables)?;
        if !written.is_shown_by(&shown, &present) {
            return Err(io::Error::other("another program changes the table at the same time"));
        }
        written.shown = Some(shown);
        Ok(())
    }

    /// Returns the members to accept. While knowledge is partial, members that an earlier process
    /// accepted stay accepted. An address that was in one of this process's views no longer counts
    /// as adopted, and elements that other programs add later are not members.
    fn wanted_members(&mut self, wanted: &Firewall) -> io::Result<BTreeSet<IpAddr>> {
        let Some(guard) = &wanted.guard else { return Ok(BTreeSet::new()) };
        let mut adopted = match self.adopted.take() {
            Some(adopted) => adopted,
            None if guard.lenient => read_members(&mut self.nftables, &wanted.table)?,
            None => BTreeSet::new(),
        };
        adopted.retain(|address| guard.lenient && !guard.members.contains(address));
        let members = &guard.members | &adopted;
        self.adopted = Some(adopted);
        Ok(members)
    }

    /// Notes that the table was removed by other means.
    pub fn forget(&mut self) {
        self.written = None;
    }

    /// Removes a table and everything in it. A missing table is no error.
    ///
    /// # Errors
    /// When the kernel refuses the removal.
    pub fn remove(&mut self, table: &str) -> io::Result<()> {
        self.written = None;
        // The deletion of a missing table fails, but a table that exists can be created again.
        match self.nftables.transaction(&[create_table(table), delete_table(table)]) {
            Err(error) if is_missing(&error) => Ok(()),
            removed => removed,
        }
    }

    /// Returns how many tunnel packets have arrived from each member since its address was added.
    /// Empty without a guard, and before Linux 5.7, which does not count them.
    ///
    /// # Errors
    /// When the sets cannot be read.
    pub fn packets_of_members(&mut self, table: &str) -> io::Result<BTreeMap<IpAddr, u64>> {
        let mut packets = BTreeMap::new();
        for set in MEMBERS {
            let counted = |key: &[u8], element: &[u8]| {
                Some((attributes::address(key)?, matched_packets(element)?))
            };
            let mut of_set = sets::read(&mut self.nftables, INET, (table, set), counted)?;
            packets.append(&mut of_set);
        }
        Ok(packets)
    }

    /// Returns the names of the tables of family `inet` for which `wanted` holds.
    ///
    /// # Errors
    /// When the tables cannot be listed.
    pub fn tables(&mut self, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<String>> {
        let tables = self.nftables.dump(Kind::GetTable, INET, &Attributes::new())?;
        let names = tables.iter().map(|table| name_of(table, nfta::TABLE_NAME));
        Ok(names.filter(|name| wanted(name)).map(str::to_owned).collect())
    }

    fn rewrite(&mut self, wanted: &Firewall, elements: Elements) -> io::Result<()> {
        self.written = None;
        self.dropped_before = self.dropped;
        let steps = replacing_steps(wanted, &elements);
        match self.carry_out(&steps) {
            // A kernel without nftables holds no table of gossamer.
            Err(error) if wanted.is_empty() && is_missing(&error) => return Ok(()),
            written => written?,
        }
        let rules = steps.iter().filter(|step| step.kind == Kind::NewRule).count();
        self.written = Some(Written { firewall: wanted.clone(), elements, rules, shown: None });
        Ok(())
    }

    /// Executes the steps in one transaction, or in several if they exceed
    /// [`MAX_TRANSACTION_BYTES`]. The members then precede the chains that look them up.
    fn carry_out(&mut self, steps: &[Step]) -> io::Result<()> {
        let mut rest = steps;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest.iter().take_while(|step| {
                bytes += step.attributes.as_bytes().len();
                bytes <= MAX_TRANSACTION_BYTES
            });
            let (now, later) = rest.split_at(fits.count().max(1));
            self.nftables.transaction(now)?;
            rest = later;
        }
        Ok(())
    }
}

impl TableContent {
    /// Returns the number of rules.
    pub const fn rules(&self) -> usize {
        self.rules.len()
    }
}

impl Written {
    /// Returns the present elements of the table's sets.
    fn present(&self, nftables: &mut Nftables) -> io::Result<Elements> {
        sets::keys_in(nftables, INET, &self.firewall.table, self.elements.keys().copied())
    }

    /// Whether the table is as it was written; after a write that was not read yet, only the number
    /// of rules is compared.
    fn is_shown_by(&self, shown: &TableContent, elements: &Elements) -> bool {
        let has_expected_rules = match &self.shown {
            Some(before) => before == shown,
            None => self.rules == shown.rules.len(),
        };
        has_expected_rules && self.elements == *elements
    }
}

impl Firewall {
    /// Whether both tables have the same chains, rules and sets, whatever the sets' elements.
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

/// Returns the steps that replace the table.
fn replacing_steps(wanted: &Firewall, elements: &Elements) -> Vec<Step> {
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

/// Reads a table; also returns how many packets the rules of each chain have counted.
///
/// # Errors
/// When the table cannot be read.
pub fn read_table(
    nftables: &mut Nftables,
    family: u8,
    table: &str,
) -> io::Result<(TableContent, BTreeMap<String, u64>)> {
    let (mut shown, mut counted) = (TableContent::default(), BTreeMap::new());
    let ours =
        |object: &Object| object.family == family && name_of(object, nfta::TABLE_NAME) == table;
    for object in nftables.dump(Kind::GetTable, family, &Attributes::new())? {
        if ours(&object) {
            shown.table.push(parts(&object, &[nfta::TABLE_FLAGS]));
        }
    }
    for object in nftables.dump(Kind::GetChain, family, &Attributes::new())? {
        if ours(&object) {
            shown.chains.push(parts(&object, &CHAIN_CONTENT));
        }
    }
    let filter = Attributes::new().text(nfta::RULE_TABLE, table);
    for object in nftables.dump(Kind::GetRule, family, &filter)?.iter().filter(|o| ours(o)) {
        let (mut content, chain) = (Vec::new(), name_of(object, nfta::RULE_CHAIN).to_owned());
        let expressions =
            attributes::find(&object.attributes, nfta::RULE_EXPRESSIONS).unwrap_or_default();
        for (_, expression) in attributes::read(expressions) {
            let name = attributes::find(expression, nfta::EXPR_NAME).map(attributes::text);
            if name == Some("counter") {
                let packets = attributes::find(expression, nfta::EXPR_DATA)
                    .and_then(counter_packets)
                    .unwrap_or(0);
                *counted.entry(chain.clone()).or_default() += packets;
            } else {
                content.extend(expression);
            }
        }
        shown.rules.push((chain, content));
    }
    Ok((shown, counted))
}

fn read_members(nftables: &mut Nftables, table: &str) -> io::Result<BTreeSet<IpAddr>> {
    let mut members = BTreeSet::new();
    for set in MEMBERS {
        let addresses = sets::read(nftables, INET, (table, set), |key, _| attributes::address(key));
        members.append(&mut addresses?);
    }
    Ok(members)
}

/// Returns how many packets the element has matched; `None` if the kernel does not count.
fn matched_packets(element: &[u8]) -> Option<u64> {
    let expression = attributes::find(element, nfta::SET_ELEM_EXPR)?;
    counter_packets(attributes::find(expression, nfta::EXPR_DATA)?)
}

/// Returns the named attributes of an object, concatenated.
fn parts(object: &Object, wanted: &[u16]) -> Vec<u8> {
    let all = attributes::read(&object.attributes);
    all.filter(|(kind, _)| wanted.contains(kind)).flat_map(|(_, bytes)| bytes.to_vec()).collect()
}

//! Tables of nftables about the pods on one bridge: kept equal to which pods there are.
//!
//! What the tables hold is said by their shapes ([`spoofing`], [`unused`]). A pod is in their sets before it
//! is answered. A table is written in one transaction, and what differs later from what the kernel then
//! showed is a change of another program.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use super::{
    firewall::{Shown, append, create, create_table, delete_table, look, name_of},
    rules::family_name,
    sets::{self, Elements},
    spoofing, unused,
};
use crate::{
    model::Mac,
    netlink::{
        attributes::Attributes,
        nftables::{
            Changes, IFNAMSIZ, Kind, Nftables, Rule, SET_EXPRESSION, Step, base_chain, limit,
            name_bytes,
        },
    },
    pods::bridge::{Bridge, Tenant, Tenants},
};

/// What the kernel refused is tried again after so long.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// What a table is like.
pub(super) struct Shape {
    pub(super) family: u8,
    /// Its name, by that of the overlay's device.
    pub(super) name: fn(&str) -> String,
    /// Sets with the length of their elements and their type as the `nft` program knows it.
    pub(super) sets: &'static [(&'static str, u32, u32)],
    /// A set whose elements are found only so many times a second.
    pub(super) limited: Option<(&'static str, u64)>,
    pub(super) alarm: Option<Alarm>,
    /// Chains with their hooks and priorities.
    pub(super) chains: &'static [(&'static str, u32, i32)],
    /// Chain and rule, from top to bottom.
    pub(super) rules: fn(&Bridge) -> Vec<(&'static str, Rule)>,
    /// By the bridge, its pods, and its ports of other programs.
    pub(super) elements: fn(&Bridge, &Tenants, &BTreeSet<String>) -> Elements,
    /// Which of the elements go with a pod that is unplugged.
    pub(super) leaving: fn(&Bridge, &str, &Tenant, &Elements) -> Elements,
    /// A set of veth pairs whose elements stay until the kernel has removed the veth pair.
    pub(super) veths: Option<&'static str>,
    /// What is so without the table, and what the table takes.
    pub(super) without: (&'static str, &'static str),
}

/// A chain that should count no packets, and what is told while it does.
pub(super) struct Alarm {
    pub(super) chain: &'static str,
    pub(super) words: fn(&Bridge) -> String,
}

/// The tables of one bridge.
pub struct PodTables {
    nftables: io::Result<Nftables>,
    changes: Option<Changes>,
    spoofing: Table,
    unused: Table,
    /// Ports of other programs on the bridge, as last seen.
    foreign_ports: BTreeSet<String>,
}

struct Table {
    shape: &'static Shape,
    written: Option<WriteEvent>,
    problem: Option<String>,
    /// What the chain of the alarm had counted when the table was last read.
    counted: u64,
    alarm: Option<String>,
    refused_at: Option<Instant>,
    /// It is not wanted, and what an earlier run has left was looked for.
    removed: bool,
}

struct WriteEvent {
    bridge: Bridge,
    elements: Elements,
    /// Not known before it was read for the first time.
    shown: Option<Shown>,
}

impl PodTables {
    /// Opens what it can; what it cannot is a problem once there are pods.
    pub fn open() -> Self {
        Self {
            nftables: Nftables::open(),
            changes: Changes::open().ok(),
            spoofing: Table::new(&spoofing::SHAPE),
            unused: Table::new(&unused::SHAPE),
            foreign_ports: BTreeSet::new(),
        }
    }

    /// Readable when some table of nftables has changed.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.changes.as_ref().map(|changes| changes.as_fd())
    }

    /// Reads what has changed, and says whether another program was at one of the tables.
    pub fn touched(&mut self) -> io::Result<bool> {
        let own = self.nftables.as_ref().ok().and_then(|nftables| nftables.port().ok());
        let tables: Vec<(u8, String)> =
            [&self.spoofing, &self.unused].into_iter().filter_map(Table::place).collect();
        self.changes.as_mut().map_or(Ok(false), |changes| changes.touched_in(&tables, own))
    }

    /// What keeps the tables from being there, and what they have found out.
    pub fn problems(&self) -> impl Iterator<Item = &String> {
        let tables = [&self.spoofing, &self.unused];
        tables.into_iter().flat_map(|table| table.problem.iter().chain(&table.alarm))
    }

    /// Lets a pod in by its veth pair, before it is answered.
    ///
    /// Whether addresses without a pod can be refused is known only after a look at the bridge's ports
    /// ([`PodTables::keep`]).
    pub fn let_in(&mut self, bridge: &Bridge, veth: &str, tenant: &Tenant, all: &Tenants) {
        if !bridge.anti_spoofing {
            self.spoofing.remove_once(&mut self.nftables, bridge);
            self.unused.remove_once(&mut self.nftables, bridge);
            return;
        }
        let its_others = all.iter().filter(|(_, other)| other.container == tenant.container);
        let mut one: Tenants =
            its_others.map(|(name, other)| (name.clone(), other.clone())).collect();
        one.insert(veth.to_owned(), tenant.clone());
        let was_written = self.unused.written.is_some();
        let tables = [&mut self.spoofing, &mut self.unused];
        let [spoofing, unused] = add(tables, &mut self.nftables, bridge, &one);
        if spoofing && (unused || !was_written) {
            return;
        }
        let mut all = all.clone();
        all.extend(one);
        let all = with_known_macs(&mut self.nftables, bridge, &all);
        if !spoofing {
            self.spoofing.write_for(&mut self.nftables, bridge, &all, &self.foreign_ports);
        }
        if was_written && !unused {
            self.unused.write_for(&mut self.nftables, bridge, &all, &self.foreign_ports);
        }
    }

    /// Takes back what a veth pair was allowed. Nothing that comes out of it passes any more.
    pub fn shut_out(&mut self, veth: &str, tenant: &Tenant) {
        let tables = [&self.spoofing, &self.unused];
        let gone = tables.map(|table| table.leaving(veth, tenant));
        let steps: Vec<(u8, Step)> = tables
            .iter()
            .zip(&gone)
            .flat_map(|(table, gone)| table.element_steps(Kind::DelElements, gone))
            .collect();
        let are_out = carry_out(&mut self.nftables, &steps);
        for (table, gone) in [&mut self.spoofing, &mut self.unused].into_iter().zip(gone) {
            table.shut_out(&mut self.nftables, &gone, are_out);
        }
    }

    /// Makes the tables what they should be, or removes them where they are not wanted. `foreign_ports` are
    /// the bridge's ports of others, whose addresses are not known; none, where it was not looked at. `there`
    /// lists the interfaces of this host. Names the tables that another program had changed.
    pub fn keep(
        &mut self,
        bridge: &Bridge,
        tenants: &Tenants,
        foreign_ports: Option<&BTreeSet<String>>,
        there: impl FnOnce() -> io::Result<BTreeSet<String>>,
    ) -> Vec<String> {
        let tenants = match bridge.anti_spoofing {
            true => with_known_macs(&mut self.nftables, bridge, tenants),
            false => Tenants::new(),
        };
        let mut there = Some(there);
        if let Some(foreign_ports) = foreign_ports {
            self.foreign_ports.clone_from(foreign_ports);
        }
        // What was not looked at may have ports of others.
        let is_alone = foreign_ports.is_some_and(BTreeSet::is_empty);
        let wanted = [
            (&mut self.spoofing, bridge.anti_spoofing),
            (&mut self.unused, bridge.anti_spoofing && is_alone),
        ];
        let mut changed = Vec::new();
        for (table, is_wanted) in wanted {
            if !is_wanted {
                table.remove_once(&mut self.nftables, bridge);
                continue;
            }
            let elements = (table.shape.elements)(bridge, &tenants, &self.foreign_ports);
            if table.keep(&mut self.nftables, bridge, elements, &mut there) {
                changed.push(table.full_name(bridge));
            }
        }
        changed
    }

    /// Removes the tables of the overlay with this device; one that is not there is no error.
    pub fn remove(&mut self, device: &str) -> io::Result<()> {
        let spoofing = self.spoofing.remove(&mut self.nftables, device);
        self.unused.remove(&mut self.nftables, device).and(spoofing)
    }

    /// Tables for bridges whose name is wanted.
    pub fn tables(&mut self, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<String>> {
        let Ok(nftables) = &mut self.nftables else { return Ok(Vec::new()) };
        let mut names = tables_in(nftables, spoofing::SHAPE.family)?;
        names.retain(|name| wanted(name));
        Ok(names)
    }
}

impl Table {
    const fn new(shape: &'static Shape) -> Self {
        Self {
            shape,
            written: None,
            problem: None,
            counted: 0,
            alarm: None,
            refused_at: None,
            removed: false,
        }
    }

    fn name(&self, bridge: &Bridge) -> String {
        (self.shape.name)(&bridge.table)
    }

    /// As `nft` takes it.
    fn full_name(&self, bridge: &Bridge) -> String {
        format!("{} {}", family_name(self.shape.family), self.name(bridge))
    }

    /// Family and name, where it was written.
    fn place(&self) -> Option<(u8, String)> {
        let written = self.written.as_ref()?;
        Some((self.shape.family, self.name(&written.bridge)))
    }

    /// What belongs to some pods; none, if the table is not there for that.
    fn joining(&self, bridge: &Bridge, tenants: &Tenants) -> Option<Elements> {
        let written = self.written.as_ref().filter(|written| written.bridge == *bridge);
        written.map(|_| (self.shape.elements)(bridge, tenants, &BTreeSet::new()))
    }

    /// What goes with a pod.
    fn leaving(&self, veth: &str, tenant: &Tenant) -> Elements {
        let of_written = |written: &WriteEvent| {
            (self.shape.leaving)(&written.bridge, veth, tenant, &written.elements)
        };
        self.written.as_ref().map(of_written).unwrap_or_default()
    }

    /// Steps that add or remove elements of the table as it was written, with its family.
    fn element_steps(&self, kind: Kind, elements: &Elements) -> Vec<(u8, Step)> {
        let Some((family, name)) = self.place() else { return Vec::new() };
        sets::steps(&name, kind, elements).into_iter().map(|step| (family, step)).collect()
    }

    /// Forgets elements that are gone, or removes them if they are not.
    fn shut_out(&mut self, nftables: &mut io::Result<Nftables>, gone: &Elements, are_out: bool) {
        if !are_out && !carry_out(nftables, &self.element_steps(Kind::DelElements, gone)) {
            // It is not as it was written, and is written again when it is looked at.
            self.written = None;
        }
        let Some(written) = &mut self.written else { return };
        for (set, keys) in gone {
            if let Some(has) = written.elements.get_mut(set) {
                has.retain(|key| !keys.contains(key));
            }
        }
    }

    /// Says whether another program had changed it.
    fn keep(
        &mut self,
        nftables: &mut io::Result<Nftables>,
        bridge: &Bridge,
        mut wanted: Elements,
        there: &mut Option<impl FnOnce() -> io::Result<BTreeSet<String>>>,
    ) -> bool {
        self.keep_dying(&mut wanted, there);
        let found = match (&mut *nftables, &self.written) {
            (Ok(nftables), Some(written)) => {
                let (family, name) = (self.shape.family, self.name(&written.bridge));
                look(nftables, family, &name)
                    .and_then(|(shown, counted)| {
                        Ok((shown, present(nftables, self.shape, &name)?, counted))
                    })
                    .ok()
            }
            _ => {
                self.write(nftables, bridge, wanted);
                return false;
            }
        };
        let Some(written) = &mut self.written else { return false };
        let is_right = found.is_some_and(|(shown, present, counted)| {
            if let Some(alarm) = &self.shape.alarm {
                let now = counted.get(alarm.chain).copied().unwrap_or_default();
                self.alarm = (now > self.counted).then(|| (alarm.words)(bridge));
                self.counted = now;
            }
            let rules_are_right = match &written.shown {
                Some(before) => *before == shown,
                None => shown.rules() == (self.shape.rules)(&written.bridge).len(),
            };
            if rules_are_right {
                written.shown = Some(shown);
            }
            rules_are_right && present == written.elements
        });
        if !is_right || written.bridge != *bridge || written.elements != wanted {
            self.write(nftables, bridge, wanted);
        }
        !is_right
    }

    /// Veth pairs that are being removed stay where they are.
    fn keep_dying(
        &self,
        wanted: &mut Elements,
        there: &mut Option<impl FnOnce() -> io::Result<BTreeSet<String>>>,
    ) {
        let Some(set) = self.shape.veths else { return };
        let had = self.written.as_ref().and_then(|written| written.elements.get(set));
        let keep = wanted.entry(set).or_default();
        let stale: Vec<Vec<u8>> =
            had.into_iter().flat_map(|had| had.difference(keep)).cloned().collect();
        let Some(there) = there.take_if(|_| !stale.is_empty()) else { return };
        let there: BTreeSet<Vec<u8>> = match there() {
            Ok(names) => names.iter().map(|name| name_bytes(name).to_vec()).collect(),
            Err(_) => return,
        };
        keep.extend(stale.into_iter().filter(|key| there.contains(key)));
    }

    fn write_for(
        &mut self,
        nftables: &mut io::Result<Nftables>,
        bridge: &Bridge,
        tenants: &Tenants,
        foreign_ports: &BTreeSet<String>,
    ) {
        self.write(nftables, bridge, (self.shape.elements)(bridge, tenants, foreign_ports));
    }

    /// In one transaction, which no packet notices.
    fn write(&mut self, nftables: &mut io::Result<Nftables>, bridge: &Bridge, elements: Elements) {
        if self.refused_at.is_some_and(|at| at.elapsed() < TRY_AGAIN) {
            return;
        }
        let Shape { family, sets, limited, chains, rules, without, .. } = self.shape;
        let table = &self.name(bridge);
        let mut steps = vec![create_table(table), delete_table(table), create_table(table)];
        for (id, (set, length, kind)) in (1..).zip(*sets) {
            let named = Attributes::new().text(1, table).text(2, set);
            let of_keys = named.be32(3, 0).be32(4, *kind).be32(5, *length).be32(10, id);
            let attributes = match limited.filter(|(limited, _)| limited == set) {
                Some((_, rate)) => of_keys.nest(SET_EXPRESSION, &limit(rate, rate as u32)),
                None => of_keys,
            };
            steps.push(create(Kind::NewSet, attributes));
        }
        steps.extend(sets::steps(table, Kind::NewElements, &elements));
        for (chain, hook, priority) in *chains {
            let based = base_chain(table, chain, "filter", *hook, *priority);
            steps.push(create(Kind::NewChain, based));
        }
        steps.extend(rules(bridge).iter().map(|(chain, rule)| append(table, chain, rule)));
        self.written = None;
        let done = match nftables {
            Ok(nftables) => nftables.transaction_in(*family, &steps),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        match done {
            Ok(()) => {
                (self.problem, self.refused_at, self.removed) = (None, None, false);
                self.counted = 0;
                self.written = Some(WriteEvent { bridge: bridge.clone(), elements, shown: None });
            }
            Err(error) => {
                self.refused_at = Some(Instant::now());
                let (what, takes) = without;
                self.problem = Some(format!(
                    "{what}: nftables, family {}: {error}: it takes a kernel with {takes}, or set \
                     anti_spoofing = false",
                    family_name(*family)
                ));
            }
        }
    }

    fn remove(&mut self, nftables: &mut io::Result<Nftables>, device: &str) -> io::Result<()> {
        (self.written, self.alarm) = (None, None);
        let (family, name) = (self.shape.family, (self.shape.name)(device));
        let Ok(nftables) = nftables else { return Ok(()) };
        if !tables_in(nftables, family)?.contains(&name) {
            return Ok(());
        }
        nftables.transaction_in(family, &[delete_table(&name)])
    }

    /// Removes what this run or an earlier one with other settings has left, which would hold up new pods.
    fn remove_once(&mut self, nftables: &mut io::Result<Nftables>, bridge: &Bridge) {
        if std::mem::replace(&mut self.removed, true) {
            return;
        }
        let name = self.full_name(bridge);
        self.problem = self
            .remove(nftables, &bridge.table)
            .err()
            .map(|error| format!("the table {name} of nftables was not removed: {error}"));
    }
}

/// MACs that nobody knows any more are in the table that an earlier process has left.
fn with_known_macs(
    nftables: &mut io::Result<Nftables>,
    bridge: &Bridge,
    tenants: &Tenants,
) -> Tenants {
    let mut tenants = tenants.clone();
    if tenants.values().all(|tenant| tenant.mac.is_some()) {
        return tenants;
    }
    let Ok(nftables) = nftables else { return tenants };
    let (family, name) = (spoofing::SHAPE.family, (spoofing::SHAPE.name)(&bridge.table));
    let left: BTreeSet<Vec<u8>> =
        sets::read(nftables, family, (&name, spoofing::MACS), |key, _| Some(key.to_vec()))
            .unwrap_or_default();
    for (veth, tenant) in tenants.iter_mut().filter(|(_, tenant)| tenant.mac.is_none()) {
        let its = left.iter().find(|key| key.starts_with(&name_bytes(veth)));
        let mac = its.and_then(|key| key.get(IFNAMSIZ..)?.first_chunk::<6>().copied());
        tenant.mac = mac.map(Mac::from_bytes);
    }
    tenants
}

/// Adds what belongs to some pods in one transaction; false for each table that is not as it was written.
fn add(
    tables: [&mut Table; 2],
    nftables: &mut io::Result<Nftables>,
    bridge: &Bridge,
    tenants: &Tenants,
) -> [bool; 2] {
    let mut steps = Vec::new();
    let joining = tables.each_ref().map(|table| {
        let joining = table.joining(bridge, tenants)?;
        steps.extend(table.element_steps(Kind::NewElements, &joining));
        Some(joining)
    });
    let are_added = carry_out(nftables, &steps);
    let mut added = joining.into_iter().zip(tables).map(|(joining, table)| {
        let (Some(joining), Some(written), true) = (joining, &mut table.written, are_added) else {
            return false;
        };
        joining.into_iter().for_each(|(set, keys)| {
            written.elements.entry(set).or_default().extend(keys);
        });
        true
    });
    [added.next() == Some(true), added.next() == Some(true)]
}

/// Carries out steps on tables of the given families, all or none; says whether that was done.
fn carry_out(nftables: &mut io::Result<Nftables>, steps: &[(u8, Step)]) -> bool {
    let Ok(nftables) = nftables else { return false };
    let steps = steps.iter().map(|(family, step)| (*family, step));
    steps.len() == 0 || nftables.transaction_of(steps).is_ok()
}

fn present(nftables: &mut Nftables, shape: &Shape, table: &str) -> io::Result<Elements> {
    sets::keys_in(nftables, shape.family, table, shape.sets.iter().map(|(set, ..)| *set))
}

fn tables_in(nftables: &mut Nftables, family: u8) -> io::Result<Vec<String>> {
    let tables = nftables.dump(Kind::GetTable, family, &Attributes::new())?;
    Ok(tables.iter().map(|table| name_of(table, 1).to_owned()).collect())
}

//! Maintains the nftables tables about the pods on one bridge.
//!
//! The tables' contents are defined by their shapes ([`spoofing`], [`unused`]). A pod is in their
//! sets before ADD is answered. A table is written in one transaction; a later difference from the
//! form that the kernel then showed is a change by another program.

mod refusal;

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use super::{
    firewall::{TableContent, read_table},
    shape::Shape,
    spoofing, unused,
};
use crate::{
    model::{Mac, Problem, ProblemCode},
    netlink::{
        attributes::Attributes,
        nftables::{
            Changes, IFNAMSIZ, Kind, Nftables, Step, base_chain, family_name, limit, name_bytes,
            name_of, nfta,
            sets::{self, Elements},
            steps::{append, create, create_table, delete_table},
        },
    },
    pods::desired::{Bridge, Tenant, Tenants},
};

/// Minimum time between attempts to write a table that the kernel refused.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// The tables of one bridge.
pub struct PodTables {
    nftables: io::Result<Nftables>,
    changes: Option<Changes>,
    spoofing: Table,
    unused: Table,
    /// The bridge's ports of other programs, as of the last check.
    foreign_ports: BTreeSet<String>,
}

struct Table {
    shape: &'static Shape,
    written: Option<Written>,
    problem: Option<Problem>,
    /// The counter of the alarm's chain as of the last read.
    counted: u64,
    alarm: Option<Problem>,
    /// When the kernel last refused the table.
    refused_at: Option<Instant>,
    /// Whether the table is not wanted and has been removed, including one of an earlier run.
    removed: bool,
}

/// What was last written, and the form in which the kernel shows it.
struct Written {
    bridge: Bridge,
    elements: Elements,
    /// `None` until the table was read after the write.
    shown: Option<TableContent>,
}

impl PodTables {
    /// Opens the sockets. A socket that cannot be opened becomes a problem once there are pods.
    pub fn open() -> Self {
        Self {
            nftables: Nftables::open(),
            changes: Changes::open().ok(),
            spoofing: Table::new(&spoofing::SHAPE),
            unused: Table::new(&unused::SHAPE),
            foreign_ports: BTreeSet::new(),
        }
    }

    /// Returns the socket that is readable when a table of nftables has changed.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.changes.as_ref().map(|changes| changes.as_fd())
    }

    /// Reads notifications; returns whether another program has changed one of the tables.
    ///
    /// # Errors
    /// When the socket cannot be read.
    pub fn touched(&mut self) -> io::Result<bool> {
        let own = self.nftables.as_ref().ok().and_then(|nftables| nftables.port().ok());
        let tables: Vec<(u8, String)> =
            [&self.spoofing, &self.unused].into_iter().filter_map(Table::place).collect();
        self.changes.as_mut().map_or(Ok(false), |changes| changes.touched_in(&tables, own))
    }

    /// Returns the problems that prevent a table, and the alarms.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        let tables = [&self.spoofing, &self.unused];
        tables.into_iter().flat_map(|table| table.problem.iter().chain(&table.alarm))
    }

    /// Adds a pod's veth pair to the sets, before ADD is answered.
    ///
    /// The table for unused addresses is created only by [`PodTables::keep`], which knows the
    /// bridge's ports.
    pub fn admit(&mut self, bridge: &Bridge, veth: &str, tenant: &Tenant, all: &Tenants) {
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

    /// Removes a veth pair's elements. No packet from it passes any more.
    pub fn revoke(&mut self, veth: &str, tenant: &Tenant) {
        let tables = [&self.spoofing, &self.unused];
        let removed_elements = tables.map(|table| table.leaving(veth, tenant));
        let steps: Vec<(u8, Step)> = tables
            .iter()
            .zip(&removed_elements)
            .flat_map(|(table, removed_elements)| {
                table.element_steps(Kind::DelElements, removed_elements)
            })
            .collect();
        let are_removed = carry_out(&mut self.nftables, &steps);
        for (table, removed_elements) in
            [&mut self.spoofing, &mut self.unused].into_iter().zip(removed_elements)
        {
            table.revoke(&mut self.nftables, &removed_elements, are_removed);
        }
    }

    /// Repairs the tables, or removes them if they are not wanted. `foreign_ports` are the bridge's
    /// ports of other programs, whose addresses are unknown; `None` if the ports were not listed.
    /// `present_interfaces` lists the interfaces of this host. Returns the names of the tables that another
    /// program had changed.
    pub fn keep(
        &mut self,
        bridge: &Bridge,
        tenants: &Tenants,
        foreign_ports: Option<&BTreeSet<String>>,
        present_interfaces: impl FnOnce() -> io::Result<BTreeSet<String>>,
    ) -> Vec<String> {
        let tenants = match bridge.anti_spoofing {
            true => with_known_macs(&mut self.nftables, bridge, tenants),
            false => Tenants::new(),
        };
        let mut present_interfaces = Some(present_interfaces);
        if let Some(foreign_ports) = foreign_ports {
            self.foreign_ports.clone_from(foreign_ports);
        }
        // Without a list, the bridge may have foreign ports.
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
            if table.keep(&mut self.nftables, bridge, elements, &mut present_interfaces) {
                changed.push(table.full_name(bridge));
            }
        }
        changed
    }

    /// Removes the tables of the overlay with this device. A missing table is no error.
    ///
    /// # Errors
    /// When the kernel refuses a removal.
    pub fn remove(&mut self, device: &str) -> io::Result<()> {
        let spoofing = self.spoofing.remove(&mut self.nftables, device);
        self.unused.remove(&mut self.nftables, device).and(spoofing)
    }

    /// Returns the names of bridge tables for which `wanted` holds.
    ///
    /// # Errors
    /// When the tables cannot be listed.
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

    /// Returns family and name as `nft` takes them.
    fn full_name(&self, bridge: &Bridge) -> String {
        format!("{} {}", family_name(self.shape.family), self.name(bridge))
    }

    /// Returns family and name; `None` if the table was not written.
    fn place(&self) -> Option<(u8, String)> {
        let written = self.written.as_ref()?;
        Some((self.shape.family, self.name(&written.bridge)))
    }

    /// Returns the elements of some pods; `None` if the table was not written for this bridge.
    fn joining(&self, bridge: &Bridge, tenants: &Tenants) -> Option<Elements> {
        let written = self.written.as_ref().filter(|written| written.bridge == *bridge);
        written.map(|_| (self.shape.elements)(bridge, tenants, &BTreeSet::new()))
    }

    /// Returns the elements that go with a pod.
    fn leaving(&self, veth: &str, tenant: &Tenant) -> Elements {
        let of_written = |written: &Written| {
            (self.shape.leaving)(&written.bridge, veth, tenant, &written.elements)
        };
        self.written.as_ref().map(of_written).unwrap_or_default()
    }

    /// Returns the steps that add or remove elements of the table, with its family.
    fn element_steps(&self, kind: Kind, elements: &Elements) -> Vec<(u8, Step)> {
        let Some((family, name)) = self.place() else { return Vec::new() };
        sets::steps(&name, kind, elements).into_iter().map(|step| (family, step)).collect()
    }

    /// Drops elements from the stored state that were removed, or removes them if they were not.
    fn revoke(
        &mut self,
        nftables: &mut io::Result<Nftables>,
        removed_elements: &Elements,
        are_removed: bool,
    ) {
        if !are_removed
            && !carry_out(nftables, &self.element_steps(Kind::DelElements, removed_elements))
        {
            // The table is not as it was written, and is rewritten at the next check.
            self.written = None;
        }
        let Some(written) = &mut self.written else { return };
        for (set, keys) in removed_elements {
            if let Some(has) = written.elements.get_mut(set) {
                has.retain(|key| !keys.contains(key));
            }
        }
    }

    /// Checks and repairs the table; returns whether another program had changed it.
    fn keep(
        &mut self,
        nftables: &mut io::Result<Nftables>,
        bridge: &Bridge,
        mut wanted: Elements,
        present_interfaces: &mut Option<impl FnOnce() -> io::Result<BTreeSet<String>>>,
    ) -> bool {
        self.keep_disappearing_veths(&mut wanted, present_interfaces);
        let found = match (&mut *nftables, &self.written) {
            (Ok(nftables), Some(written)) => {
                let (family, name) = (self.shape.family, self.name(&written.bridge));
                read_table(nftables, family, &name)
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
        let is_unchanged = found.is_some_and(|(shown, present, counted)| {
            if let Some(alarm) = &self.shape.alarm {
                let now = counted.get(alarm.chain).copied().unwrap_or_default();
                self.alarm = (now > self.counted).then(|| (alarm.problem)(bridge));
                self.counted = now;
            }
            let has_expected_rules = match &written.shown {
                Some(before) => *before == shown,
                None => shown.rules() == (self.shape.rules)(&written.bridge).len(),
            };
            if has_expected_rules {
                written.shown = Some(shown);
            }
            has_expected_rules && present == written.elements
        });
        if !is_unchanged || written.bridge != *bridge || written.elements != wanted {
            self.write(nftables, bridge, wanted);
        }
        !is_unchanged
    }

    /// Keeps the elements of veth pairs that the kernel is still removing.
    fn keep_disappearing_veths(
        &self,
        wanted: &mut Elements,
        present_interfaces: &mut Option<impl FnOnce() -> io::Result<BTreeSet<String>>>,
    ) {
        let Some(set) = self.shape.veths else { return };
        let had = self.written.as_ref().and_then(|written| written.elements.get(set));
        let keep = wanted.entry(set).or_default();
        let stale: Vec<Vec<u8>> =
            had.into_iter().flat_map(|had| had.difference(keep)).cloned().collect();
        let Some(present_interfaces) = present_interfaces.take_if(|_| !stale.is_empty()) else {
            return;
        };
        let present_interfaces: BTreeSet<Vec<u8>> = match present_interfaces() {
            Ok(names) => names.iter().map(|name| name_bytes(name).to_vec()).collect(),
            Err(_) => return,
        };
        keep.extend(stale.into_iter().filter(|key| present_interfaces.contains(key)));
    }

    /// Writes the table for these pods.
    fn write_for(
        &mut self,
        nftables: &mut io::Result<Nftables>,
        bridge: &Bridge,
        tenants: &Tenants,
        foreign_ports: &BTreeSet<String>,
    ) {
        self.write(nftables, bridge, (self.shape.elements)(bridge, tenants, foreign_ports));
    }

    /// Rewrites the table in one transaction, so that no packet passes without it.
    fn write(&mut self, nftables: &mut io::Result<Nftables>, bridge: &Bridge, elements: Elements) {
        if self.refused_at.is_some_and(|at| at.elapsed() < RETRY_INTERVAL) {
            return;
        }
        let Shape { family, sets, limited, chains, rules, .. } = self.shape;
        let table = &self.name(bridge);
        let mut steps = vec![create_table(table), delete_table(table), create_table(table)];
        for (id, (set, length, kind)) in (1..).zip(*sets) {
            let of_keys = sets::definition(table, set, (*kind, *length), id);
            let attributes = match limited.filter(|(limited, _)| limited == set) {
                Some((_, rate)) => of_keys.nest(nfta::SET_EXPR, &limit(rate, rate as u32)),
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
                self.written = Some(Written { bridge: bridge.clone(), elements, shown: None });
            }
            Err(error) => {
                self.refused_at = Some(Instant::now());
                self.problem = Some(refusal::problem(nftables, self.shape, table, &error));
            }
        }
    }

    /// Removes the table from the kernel if it exists.
    fn remove(&mut self, nftables: &mut io::Result<Nftables>, device: &str) -> io::Result<()> {
        (self.written, self.alarm) = (None, None);
        let (family, name) = (self.shape.family, (self.shape.name)(device));
        let Ok(nftables) = nftables else { return Ok(()) };
        if !tables_in(nftables, family)?.contains(&name) {
            return Ok(());
        }
        nftables.transaction_in(family, &[delete_table(&name)])
    }

    /// Removes the table of this run or of an earlier one with other settings, which would block
    /// new pods.
    fn remove_once(&mut self, nftables: &mut io::Result<Nftables>, bridge: &Bridge) {
        if std::mem::replace(&mut self.removed, true) {
            return;
        }
        let name = self.full_name(bridge);
        self.problem = self.remove(nftables, &bridge.table).err().map(|error| {
            let what = format!("the table {name} of nftables was not removed: {error}");
            Problem::new(ProblemCode::AntiSpoofing, &name, what, "")
        });
    }
}

/// Completes missing MACs from the table that an earlier process has left.
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

/// Adds the elements of some pods in one transaction. Returns, for each table, whether they were
/// added.
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

/// Executes steps on tables of the given families, all or none; returns whether they succeeded.
fn carry_out(nftables: &mut io::Result<Nftables>, steps: &[(u8, Step)]) -> bool {
    let Ok(nftables) = nftables else { return false };
    let steps = steps.iter().map(|(family, step)| (*family, step));
    steps.len() == 0 || nftables.transaction_of(steps).is_ok()
}

/// Returns the present elements of a table's sets.
fn present(nftables: &mut Nftables, shape: &Shape, table: &str) -> io::Result<Elements> {
    sets::keys_in(nftables, shape.family, table, shape.sets.iter().map(|(set, ..)| *set))
}

/// Returns the names of the tables of a family.
fn tables_in(nftables: &mut Nftables, family: u8) -> io::Result<Vec<String>> {
    let tables = nftables.dump(Kind::GetTable, family, &Attributes::new())?;
    Ok(tables.iter().map(|table| name_of(table, 1).to_owned()).collect())
}

//! Gossamer's nftables table as the kernel thread keeps it: written, verified, and reported if the kernel
//! refuses it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use crate::{
    dataplane::{
        firewall::Firewall,
        kernel::{FirewallTable, tunnels::into_tunnels},
    },
    model::{Problem, ProblemCode},
    netlink::{Netlink, nftables::Changes},
};

/// Counters of the members' packets are read only while a peer is unverified, and take at most this fraction
/// (1/n) of the time.
const COUNT_SHARE: u32 = 100;
/// Time after which an operation refused by the kernel is repeated. Each attempt changes the table.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// The table, and what is known about it.
pub(super) struct OwnTable {
    table: io::Result<FirewallTable>,
    changes: Option<Changes>,
    /// Interfaces of tunnels at the last reading.
    tunnels: Option<BTreeSet<String>>,
    /// Why the kernel does not have the table as it should be.
    pub(super) problem: Option<Problem>,
    /// Whether the kernel had the guard at the last check.
    pub(super) guarded: bool,
    /// Number of dropped tunnel packets of non-members.
    pub(super) dropped: u64,
    /// When the kernel refused the masquerade rules.
    refused_at: Option<Instant>,
    /// Earliest time to read the packet counters again.
    count_at: Instant,
}

impl OwnTable {
    pub(super) fn open() -> Self {
        Self {
            table: FirewallTable::open(),
            changes: Changes::open().ok(),
            tunnels: None,
            problem: None,
            guarded: false,
            dropped: 0,
            refused_at: None,
            count_at: Instant::now(),
        }
    }

    /// Returns a descriptor that is readable when an nftables table has changed.
    pub(super) fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.changes.as_ref().map(|changes| changes.as_fd())
    }

    /// Reads the pending change notifications and returns whether one concerns this table.
    pub(super) fn touched(&mut self, table: &str) -> io::Result<bool> {
        self.changes.as_mut().map_or(Ok(false), |changes| changes.touched(table))
    }

    /// Writes the desired table without reading the present one.
    pub(super) fn write(&mut self, firewall: &Firewall, netlink: &mut io::Result<Netlink>) {
        if self.tunnels.is_none() {
            self.read_tunnels(firewall.port, netlink);
        }
        self.on_table(firewall, FirewallTable::write);
    }

    /// Reads the table and repairs it. Returns whether another program had changed it.
    pub(super) fn verify(
        &mut self,
        firewall: &Firewall,
        netlink: &mut io::Result<Netlink>,
    ) -> bool {
        self.read_tunnels(firewall.port, netlink);
        let Some(pass) = self.on_table(firewall, FirewallTable::verify) else { return false };
        self.dropped = self.dropped.max(pass.dropped);
        pass.repaired
    }

    fn read_tunnels(&mut self, port: u16, netlink: &mut io::Result<Netlink>) {
        if let Ok(Ok(links)) = netlink.as_mut().map(Netlink::links) {
            self.tunnels = Some(into_tunnels(&links, port));
        }
    }

    /// Returns whether the last written table has not been verified yet.
    pub(super) fn is_unread(&self) -> bool {
        self.table.as_ref().is_ok_and(FirewallTable::is_unread)
    }

    /// Returns tunnel packets by member where the kernel counts them; `None` if they were read too
    /// recently. Large clusters are read less often.
    pub(super) fn count_packets(&mut self, table: &str) -> Option<BTreeMap<IpAddr, u64>> {
        let begun = Instant::now();
        let tables = self.table.as_mut().ok().filter(|_| self.count_at <= begun)?;
        let counted = tables.packets_of_members(table);
        self.count_at = begun + begun.elapsed() * COUNT_SHARE;
        counted.inspect_err(|error| tracing::debug!(%error, "packets of members not read")).ok()
    }

    /// Notes that the table was removed.
    pub(super) fn forget(&mut self) {
        self.guarded = false;
        if let Ok(table) = &mut self.table {
            table.forget();
        }
    }

    fn on_table<T>(
        &mut self,
        firewall: &Firewall,
        act: impl Fn(&mut FirewallTable, &Firewall) -> io::Result<T>,
    ) -> Option<T> {
        let mut firewall = firewall.clone();
        if let (Some(guard), Some(tunnels)) = (&mut firewall.guard, &self.tunnels) {
            guard.tunnels.extend(tunnels.iter().cloned());
        }
        let done = self.try_on_table(&firewall, act);
        self.guarded = firewall.guard.is_some() && done.is_some();
        done
    }

    /// Applies `act` to the table. If the kernel refuses the masquerade rules, the guard is kept without
    /// them.
    fn try_on_table<T>(
        &mut self,
        firewall: &Firewall,
        act: impl Fn(&mut FirewallTable, &Firewall) -> io::Result<T>,
    ) -> Option<T> {
        let table = match &mut self.table {
            Ok(table) => table,
            Err(_) if firewall.is_empty() => return None,
            Err(error) => {
                let left = firewall.guard.as_ref().map(|_| left_table(&firewall.table, None));
                let mut problem = no_table(error);
                problem.fix.push_str(&left.unwrap_or_default());
                self.problem = Some(problem);
                return None;
            }
        };
        if self.refused_at.is_none_or(|at| at.elapsed() >= RETRY_INTERVAL) {
            match act(table, firewall) {
                Ok(done) => {
                    (self.refused_at, self.problem) = (None, None);
                    return Some(done);
                }
                Err(error) => self.problem = Some(no_table(&error)),
            }
            firewall.guard.as_ref()?;
            if firewall.masquerade.is_empty() {
                self.note_left_table(&firewall.table);
                return None;
            }
            self.refused_at = Some(Instant::now());
        }
        let done = act(table, &Firewall { masquerade: Vec::new(), ..firewall.clone() }).ok();
        if done.is_none() {
            self.note_left_table(&firewall.table);
        }
        done
    }

    /// Adds what a table with a guard does that the kernel has and refuses to change.
    fn note_left_table(&mut self, name: &str) {
        let Ok(table) = &mut self.table else { return };
        let is_left = table.tables(|other| other == name).ok().map(|found| !found.is_empty());
        let said = left_table(name, is_left);
        if let Some(problem) = &mut self.problem
            && !problem.fix.ends_with(&said)
        {
            problem.fix.push_str(&said);
        }
    }
}

fn no_table(error: &io::Error) -> Problem {
    Problem::new(
        ProblemCode::FirewallTable,
        Problem::HOST,
        format!("nftables: {error}"),
        "load the modules nf_tables, nf_nat and nft_masq, or set guard = false and ip_masq = false",
    )
}

/// Describes the effect of a table of an earlier agent, as the end of a remedy. `is_left` is `None` if the
/// tables cannot be listed.
fn left_table(name: &str, is_left: Option<bool>) -> String {
    let effect = format!(
        "drops tunnel packets of members that join or change their address: nft delete table inet {name}"
    );
    match is_left {
        Some(true) => format!("; the table inet {name} that is in the kernel {effect}"),
        None => format!("; the table inet {name} of an earlier agent, if there is one, {effect}"),
        Some(false) => String::new(),
    }
}

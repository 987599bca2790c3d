//! Checks of the host outside gossamer's entries: the nftables table, other programs' chains, sysctls.
//!
//! They run in the kernel thread (`programmer`). Nothing here ends a node's membership: problems are
//! reported and the operations repeated.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use crate::{
    agent::host::{
        conntrack::Conntrack, fragments::Fragments, neighbor_tables::NeighborTables,
        repair_conflicts::RepairConflicts,
    },
    dataplane::{
        desired::{Desired, Mode},
        firewall::Firewall,
        foreign::ForeignTables,
        kernel::{FirewallTable, required_sysctls, tunnels::into_tunnels, users::UserRules},
        repair_conflict::Kind,
        toggled::{ForwardingChanges, Setting},
    },
    model::{Problem, ProblemCode, Time},
    netlink::{
        Netlink,
        netconf::{ForwardingChange, ForwardingMonitor},
        nftables::Changes,
    },
    sysctl::{
        self,
        interface::{self, Ipv6},
    },
};

/// Other programs' chains may have very many rules: reading them takes at most this fraction (1/n) of
/// the time.
const CHAIN_READ_SHARE: u32 = 1_000;
/// The same limit for counters of the members' packets, which are read only while a peer is unverified.
const COUNT_SHARE: u32 = 100;
/// Time after which an operation refused by the kernel is repeated. Each attempt changes the table.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// The last reported result of the host checks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// The problems.
    pub problems: Vec<Problem>,
    /// What could not be checked.
    pub notices: Vec<Problem>,
    /// Whether the kernel's connection tracking table is full and drops packets, as one of the problems
    /// says.
    pub is_table_full: bool,
    /// Whether the kernel has gossamer's table, which drops packets that would redirect routes of pods.
    pub refuses_routers: bool,
    /// Number of dropped tunnel packets of non-members.
    pub dropped: u64,
    /// Kinds of other programs' changes that were repaired since the last report.
    pub repaired: Vec<&'static str>,
}

/// The host checks and what they need.
pub struct HostChecks {
    table: io::Result<FirewallTable>,
    /// Tables of other programs.
    foreign_tables: io::Result<ForeignTables>,
    /// Interfaces of tunnels at the last reading.
    tunnels: Option<BTreeSet<String>>,
    changes: Option<Changes>,
    users: UserRules,
    users_problem: Option<Problem>,
    mode: Mode,
    set_sysctls: bool,
    /// Names of sysctls that were correct at the last check.
    correct_sysctls: BTreeSet<String>,
    /// Interfaces configured to accept router advertisements although this host forwards.
    kept: BTreeSet<String>,
    begun: Instant,
    forwarding_monitor: Option<ForwardingMonitor>,
    /// Changes of forwarding sysctls since the last check.
    switched: Vec<ForwardingChange>,
    forwarding_changes: ForwardingChanges,
    /// Whether the device was closed to router advertisements from the overlay at the last check.
    was_closed: bool,
    table_problem: Option<Problem>,
    /// Whether the kernel had the guard at the last check.
    guarded: bool,
    /// When the kernel refused the masquerade rules.
    refused_at: Option<Instant>,
    connections: Conntrack,
    fragments: Fragments,
    neighbors: NeighborTables,
    netlink: io::Result<Netlink>,
    problems: Vec<Problem>,
    notices: Vec<Problem>,
    dropped: u64,
    repaired: Vec<&'static str>,
    /// Earliest time to read other programs' chains again.
    read_chains_at: Instant,
    chain_problems: Vec<Problem>,
    /// Earliest time to read the packet counters again.
    count_at: Instant,
    /// Repeated conflicts with other programs about entries, the table and sysctls.
    pub repair_conflicts: RepairConflicts,
    /// The last reported state.
    reported: HostState,
}

impl HostChecks {
    /// Opens all sockets. A socket that cannot be opened is a problem only where it is needed.
    pub fn open(mode: Mode, set_sysctls: bool) -> Self {
        Self {
            table: FirewallTable::open(),
            foreign_tables: ForeignTables::open(),
            tunnels: None,
            changes: Changes::open().ok(),
            users: UserRules::open(),
            users_problem: None,
            mode,
            set_sysctls,
            correct_sysctls: BTreeSet::new(),
            kept: BTreeSet::new(),
            begun: Instant::now(),
            forwarding_monitor: ForwardingMonitor::open().ok(),
            switched: Vec::new(),
            forwarding_changes: ForwardingChanges::default(),
            was_closed: false,
            table_problem: None,
            guarded: false,
            refused_at: None,
            connections: Conntrack::default(),
            fragments: Fragments::default(),
            neighbors: NeighborTables::default(),
            netlink: Netlink::open(),
            problems: Vec::new(),
            notices: Vec::new(),
            dropped: 0,
            repaired: Vec::new(),
            read_chains_at: Instant::now(),
            chain_problems: Vec::new(),
            count_at: Instant::now(),
            repair_conflicts: RepairConflicts::new(),
            reported: HostState::default(),
        }
    }

    /// Returns a descriptor that is readable when an nftables table has changed.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.changes.as_ref().map(|changes| changes.as_fd())
    }

    /// Reads the pending change notifications and returns whether one concerns this table.
    ///
    /// # Errors
    /// Fails if the notifications cannot be read.
    pub fn touched(&mut self, table: &str) -> io::Result<bool> {
        self.changes.as_mut().map_or(Ok(false), |changes| changes.touched(table))
    }

    /// Ensures with a policy rule that users of this host cannot send to the VXLAN port. Without the
    /// guard, removes the rule.
    pub fn block_users(&mut self, firewall: &Firewall) {
        let kept = match &firewall.guard {
            Some(guard) => self.users.keep(guard.port, &guard.members),
            None => self.users.remove().map(|()| false),
        };
        self.users_problem = kept.as_ref().err().map(|error| {
            let port = firewall.port;
            let what = format!(
                "users of this host can send tunnel packets (UDP {port}) to other hosts: the policy rule \
                 against that was refused: {error}"
            );
            Problem::new(ProblemCode::UsersUnblocked, Problem::HOST, what, "")
        });
        if matches!(kept, Ok(true)) {
            self.repaired.push("firewall");
            self.repair_conflicts.note(Kind::Firewall, "ip rule 73", None);
        }
    }

    /// Writes the desired nftables table without reading the present one.
    pub fn write_table(&mut self, firewall: &Firewall) {
        if self.tunnels.is_none() {
            self.read_tunnels(firewall.port);
        }
        self.on_table(firewall, FirewallTable::write);
    }

    /// Reads gossamer's table and repairs it.
    pub fn verify_table(&mut self, firewall: &Firewall) {
        self.read_tunnels(firewall.port);
        if let Some(pass) = self.on_table(firewall, FirewallTable::verify) {
            self.dropped = self.dropped.max(pass.dropped);
            if pass.repaired {
                self.repaired.push("firewall");
                self.repair_conflicts.note(
                    Kind::Firewall,
                    &format!("inet {}", firewall.table),
                    None,
                );
            }
        }
    }

    fn read_tunnels(&mut self, port: u16) {
        let links = self.netlink.as_mut().map(Netlink::links);
        if let Ok(Ok(links)) = links {
            self.tunnels = Some(into_tunnels(&links, port));
        }
    }

    /// Returns whether the last written table has not been verified yet.
    pub fn is_table_unread(&self) -> bool {
        self.table.as_ref().is_ok_and(FirewallTable::is_unread)
    }

    /// Returns tunnel packets by member where the kernel counts them; `None` if they were read too
    /// recently. Large clusters are read less often.
    pub fn count_packets(&mut self, table: &str) -> Option<BTreeMap<IpAddr, u64>> {
        let begun = Instant::now();
        let tables = self.table.as_mut().ok().filter(|_| self.count_at <= begun)?;
        let counted = tables.packets_of_members(table);
        self.count_at = begun + begun.elapsed() * COUNT_SHARE;
        counted.inspect_err(|error| tracing::debug!(%error, "packets of members not read")).ok()
    }

    /// Checks sysctls, kernel tables that may be full and, less often, other programs' chains.
    pub fn check(&mut self, desired: &Desired, bridge: &str, underlay: &str) {
        let begun = Instant::now();
        let networks: Vec<_> = desired.pool.networks().iter().collect();
        if self.read_chains_at <= begun {
            let chains = self.foreign_tables.as_mut().ok().map(|tables| tables.chains(&networks));
            let chains = chains.and_then(Result::ok).unwrap_or_default();
            let drops = chains.dropping.iter().map(|chain| direct_access(chain, desired));
            self.chain_problems = drops.collect();
            self.read_chains_at = begun + begun.elapsed() * CHAIN_READ_SHARE;
        }
        self.problems.clear();
        self.notices = sysctl::unreadable().into_iter().collect();
        self.problems.extend(self.connections.check());
        self.problems.extend(self.fragments.check());
        if let Ok(netlink) = &mut self.netlink {
            match self.neighbors.check(netlink) {
                Ok(problems) => self.problems.extend(problems),
                Err(error) => tracing::debug!(%error, "neighbor tables not read"),
            }
        }
        for setting in
            required_sysctls::wanted(&networks, &desired.device.name, self.mode, underlay)
        {
            let Some(problem) = setting.problem() else {
                self.correct_sysctls.insert(setting.name().to_owned());
                continue;
            };
            if !self.set_sysctls {
                self.problems.push(problem);
                continue;
            }
            let was_correct = self.correct_sysctls.remove(setting.name());
            match setting.set() {
                Ok(kept) => {
                    self.kept.extend(kept);
                    self.correct_sysctls.insert(setting.name().to_owned());
                    self.repaired.extend(was_correct.then_some("sysctl"));
                }
                Err(problem) => self.problems.push(problem),
            }
        }
        self.check_forwarding_switches([&desired.device.name, bridge]);
        let kept = required_sysctls::keep_advertisements(&self.kept);
        let closed = interface::close(&desired.device.name, Ipv6::Unchanged);
        // A device that an earlier version left has other settings, so only a change since the last
        // check is a repair.
        let opened = closed.set > 0 && self.was_closed;
        self.repaired.extend((kept || opened).then_some("sysctl"));
        if self.repaired.contains(&"sysctl") {
            self.repair_conflicts.note(Kind::Sysctls, "forwarding and what goes with it", None);
        }
        self.was_closed = closed.problems.is_empty();
        if !self.guarded {
            self.problems.extend(closed.problems);
        }
    }

    /// Returns a descriptor that is readable when a forwarding sysctl has changed.
    pub fn switches(&self) -> Option<BorrowedFd<'_>> {
        self.forwarding_monitor.as_ref().map(ForwardingMonitor::as_fd)
    }

    /// Reads the pending notifications, and returns whether forwarding of the whole host was switched.
    pub fn read_switches(&mut self) -> bool {
        let Some(forwarding_monitor) = &mut self.forwarding_monitor else { return false };
        let switched = forwarding_monitor.read().unwrap_or_else(|error| {
            tracing::debug!(%error, "forwarding notifications not read");
            Vec::new()
        });
        let is_of_host = switched.iter().any(|switched| switched.link.is_none());
        self.switched.extend(switched);
        is_of_host
    }

    /// Reports forwarding that was switched off briefly, globally or on these interfaces.
    fn check_forwarding_switches(&mut self, interfaces: [&str; 2]) {
        self.read_switches();
        let switched_settings = std::mem::take(&mut self.switched);
        let now = Time::ZERO + self.begun.elapsed();
        let is_needed = switched_settings.iter().any(|switched| switched.link.is_some());
        let netlink = self.netlink.as_mut().ok().filter(|_| is_needed);
        let links = netlink.map(|netlink| interfaces.map(|name| netlink.link(name).ok().flatten()));
        for switched in switched_settings {
            let mut links = links.iter().flatten().flatten();
            let interface = match switched.link {
                None => None,
                Some(index) => match links.find(|link| link.index == index) {
                    Some(link) => Some(link.name.clone()),
                    None => continue,
                },
            };
            self.forwarding_changes.note(
                now,
                Setting { interface, ipv4: switched.ipv4 },
                switched.forwards,
            );
        }
        // A setting that is repaired repeatedly is reported as a conflict.
        if !self.repair_conflicts.is_under_way(Kind::Sysctls) {
            self.problems.extend(self.forwarding_changes.problems(now));
        }
    }

    /// Returns the state if it has changed since the last call.
    pub fn take_change(&mut self) -> Option<HostState> {
        let problems = self.table_problem.iter().chain(&self.users_problem);
        let problems = problems.chain(&self.chain_problems).chain(&self.problems);
        let problems = problems.cloned().chain(self.repair_conflicts.problems());
        let state = HostState {
            problems: problems.collect(),
            notices: self.notices.clone(),
            is_table_full: self.connections.is_full(),
            refuses_routers: self.guarded,
            dropped: self.dropped,
            repaired: std::mem::take(&mut self.repaired),
        };
        let news = state != self.reported;
        self.reported = HostState { repaired: Vec::new(), ..state.clone() };
        news.then_some(state)
    }

    /// Removes gossamer's table and policy rules.
    ///
    /// # Errors
    /// Fails if the table cannot be removed.
    pub fn remove(&mut self, table: &str) -> io::Result<()> {
        self.guarded = false;
        if let Err(error) = self.users.remove() {
            tracing::error!(%error, "policy rules of the VXLAN port not removed");
        }
        match &mut self.table {
            Ok(tables) => tables.remove(table),
            // Without a socket, the table cannot have been written.
            Err(_) => Ok(()),
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
                self.table_problem = Some(problem);
                return None;
            }
        };
        if self.refused_at.is_none_or(|at| at.elapsed() >= RETRY_INTERVAL) {
            match act(table, firewall) {
                Ok(done) => {
                    (self.refused_at, self.table_problem) = (None, None);
                    return Some(done);
                }
                Err(error) => self.table_problem = Some(no_table(&error)),
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
        if let Some(problem) = &mut self.table_problem
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

fn direct_access(chain: &str, desired: &Desired) -> Problem {
    Problem::new(
        ProblemCode::DockerDirectAccess,
        chain,
        format!(
            "chain {chain} drops what other hosts send to containers on a bridge of Docker's (Docker 28 and \
             later)"
        ),
        format!(
            "start dockerd with --allow-direct-routing, or make the network with \
             -o com.docker.network.bridge.trusted_host_interfaces={}, or with -d gossamer",
            desired.device.name
        ),
    )
}

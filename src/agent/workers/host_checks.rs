//! Checks of the host outside gossamer's entries: the nftables table, other programs' chains, sysctls.
//! What is gossamer's, or what the operator lets it set, is repaired.
//!
//! They run in the kernel thread (`programmer`). Nothing here ends a node's membership: problems are
//! reported and the operations repeated.

mod own_address;
mod own_table;
mod sysctls;

use std::{collections::BTreeMap, io, net::IpAddr, os::fd::BorrowedFd, time::Instant};

use ipnet::IpNet;

use self::{
    own_table::OwnTable,
    sysctls::{HostSysctls, SysctlFindings},
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
        kernel::users::UserRules,
        repair_conflict::Kind,
    },
    model::{Problem, ProblemCode},
    netlink::Netlink,
    sysctl,
};

/// Other programs' chains may have very many rules: reading them takes at most this fraction (1/n) of
/// the time.
const CHAIN_READ_SHARE: u32 = 1_000;

/// The last reported result of the host checks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// The problems.
    pub problems: Vec<Problem>,
    /// What could not be checked.
    pub notices: Vec<Problem>,
    /// For each family that this host does not forward (IPv4: true), what is wrong, as one of the problems
    /// says.
    pub forwarding_off: BTreeMap<bool, String>,
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
    own_table: OwnTable,
    blocked_users: BlockedUsers,
    chains: OtherChains,
    full_tables: FullTables,
    sysctls: HostSysctls,
    netlink: io::Result<Netlink>,
    problems: Vec<Problem>,
    forwarding_off: BTreeMap<bool, String>,
    notices: Vec<Problem>,
    repaired: Vec<&'static str>,
    /// Repeated conflicts with other programs about entries, the table and sysctls.
    pub repair_conflicts: RepairConflicts,
    /// The last reported state.
    reported: HostState,
}

/// Policy rules against users of this host that send to the VXLAN port.
struct BlockedUsers {
    rules: UserRules,
    problem: Option<Problem>,
}

/// Chains of other programs that drop packets to single addresses of pods.
struct OtherChains {
    tables: io::Result<ForeignTables>,
    /// Earliest time to read them again.
    read_at: Instant,
    problems: Vec<Problem>,
}

/// Tables and buffers of the kernel that may be full.
#[derive(Default)]
struct FullTables {
    connections: Conntrack,
    fragments: Fragments,
    neighbors: NeighborTables,
}

impl BlockedUsers {
    /// Keeps the rules, or removes them without a guard. Returns whether another program had removed them.
    fn keep(&mut self, firewall: &Firewall) -> bool {
        let kept = match &firewall.guard {
            Some(guard) => self.rules.keep(guard.port, &guard.members),
            None => self.rules.remove().map(|()| false),
        };
        self.problem = kept.as_ref().err().map(|error| {
            let port = firewall.port;
            let what = format!(
                "users of this host can send tunnel packets (UDP {port}) to other hosts: the policy rule \
                 against that was refused: {error}"
            );
            Problem::new(ProblemCode::UsersUnblocked, Problem::HOST, what, "")
        });
        matches!(kept, Ok(true))
    }
}

impl OtherChains {
    /// Reads the chains, unless they were read too recently.
    fn read(&mut self, networks: &[IpNet], desired: &Desired) {
        let begun = Instant::now();
        if self.read_at <= begun {
            let chains = self.tables.as_mut().ok().map(|tables| tables.chains(networks));
            let chains = chains.and_then(Result::ok).unwrap_or_default();
            let drops = chains.direct_access.iter().map(|chain| direct_access(chain, desired));
            self.problems = drops.collect();
            self.read_at = begun + begun.elapsed() * CHAIN_READ_SHARE;
        }
    }
}

impl FullTables {
    fn check(&mut self, netlink: &mut io::Result<Netlink>) -> Vec<Problem> {
        let mut problems = Vec::new();
        problems.extend(self.connections.check());
        problems.extend(self.fragments.check());
        if let Ok(netlink) = netlink {
            match self.neighbors.check(netlink) {
                Ok(full) => problems.extend(full),
                Err(error) => tracing::debug!(%error, "neighbor tables not read"),
            }
        }
        problems
    }
}

impl HostChecks {
    /// Opens all sockets. A socket that cannot be opened is a problem only where it is needed.
    pub fn open(mode: Mode, set_sysctls: bool) -> Self {
        Self {
            own_table: OwnTable::open(),
            blocked_users: BlockedUsers { rules: UserRules::open(), problem: None },
            chains: OtherChains {
                tables: ForeignTables::open(),
                read_at: Instant::now(),
                problems: Vec::new(),
            },
            full_tables: FullTables::default(),
            sysctls: HostSysctls::new(mode, set_sysctls),
            netlink: Netlink::open(),
            problems: Vec::new(),
            forwarding_off: BTreeMap::new(),
            notices: Vec::new(),
            repaired: Vec::new(),
            repair_conflicts: RepairConflicts::new(),
            reported: HostState::default(),
        }
    }

    /// Returns a descriptor that is readable when an nftables table has changed.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.own_table.changes()
    }

    /// Returns a descriptor that is readable when a forwarding sysctl has changed.
    pub fn switches(&self) -> Option<BorrowedFd<'_>> {
        self.sysctls.switches()
    }

    /// Reads the pending notifications, and returns whether forwarding of the whole host was switched.
    pub fn read_switches(&mut self) -> bool {
        self.sysctls.read_switches()
    }

    /// Reads the pending change notifications and returns whether one concerns this table.
    ///
    /// # Errors
    /// Fails if the notifications cannot be read.
    pub fn touched(&mut self, table: &str) -> io::Result<bool> {
        self.own_table.touched(table)
    }

    /// Ensures with a policy rule that users of this host cannot send to the VXLAN port. Without the
    /// guard, removes the rule.
    pub fn block_users(&mut self, firewall: &Firewall) {
        if self.blocked_users.keep(firewall) {
            self.repaired.push("firewall");
            self.repair_conflicts.note(Kind::Firewall, "ip rule 73", None);
        }
    }

    /// Writes the desired nftables table without reading the present one.
    pub fn write_table(&mut self, firewall: &Firewall) {
        self.own_table.write(firewall, &mut self.netlink);
    }

    /// Reads gossamer's table and repairs it.
    pub fn verify_table(&mut self, firewall: &Firewall) {
        if self.own_table.verify(firewall, &mut self.netlink) {
            self.repaired.push("firewall");
            let table = format!("inet {}", firewall.table);
            self.repair_conflicts.note(Kind::Firewall, &table, None);
        }
    }

    /// Returns whether the last written table has not been verified yet.
    pub fn is_table_unread(&self) -> bool {
        self.own_table.is_unread()
    }

    /// Returns tunnel packets by member where the kernel counts them; `None` if they were read too
    /// recently. Large clusters are read less often.
    pub fn count_packets(&mut self, table: &str) -> Option<BTreeMap<IpAddr, u64>> {
        self.own_table.count_packets(table)
    }

    /// Checks sysctls, kernel tables that may be full and, less often, other programs' chains.
    pub fn check(&mut self, desired: &Desired, bridge: &str, underlay: &str) {
        let networks: Vec<_> = desired.pool.networks().iter().collect();
        self.chains.read(&networks, desired);
        self.notices = sysctl::unreadable().into_iter().collect();
        self.problems = self.full_tables.check(&mut self.netlink);
        let SysctlFindings { problems, forwarding_off, open, repaired } = self.sysctls.check(
            &networks,
            [&desired.device.name, bridge, underlay],
            &mut self.netlink,
            self.repair_conflicts.is_under_way(Kind::Sysctls),
        );
        self.problems.extend(problems);
        self.forwarding_off = forwarding_off;
        self.repaired.extend(repaired);
        if self.repaired.contains(&"sysctl") {
            self.repair_conflicts.note(Kind::Sysctls, "forwarding and what goes with it", None);
        }
        if !self.own_table.guarded {
            self.problems.extend(open);
        }
        if let Ok(netlink) = &mut self.netlink {
            match own_address::problem(netlink, desired.device.local) {
                Ok(problem) => self.problems.extend(problem),
                Err(error) => tracing::debug!(%error, "routes of the underlay address not read"),
            }
        }
    }

    /// Returns the state if it has changed since the last call.
    pub fn take_change(&mut self) -> Option<HostState> {
        let problems = self.own_table.problem.iter().chain(&self.blocked_users.problem);
        let problems = problems.chain(&self.chains.problems).chain(&self.problems);
        let problems = problems.cloned().chain(self.repair_conflicts.problems());
        let state = HostState {
            problems: problems.collect(),
            notices: self.notices.clone(),
            forwarding_off: self.forwarding_off.clone(),
            is_table_full: self.full_tables.connections.is_full(),
            refuses_routers: self.own_table.guarded,
            dropped: self.own_table.dropped,
            repaired: std::mem::take(&mut self.repaired),
        };
        let news = state != self.reported;
        self.reported = HostState { repaired: Vec::new(), ..state.clone() };
        news.then_some(state)
    }

    /// Notes that gossamer's table and policy rules were removed.
    pub fn forget_removed(&mut self) {
        self.blocked_users.rules.forget();
        self.own_table.forget();
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

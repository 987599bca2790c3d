//! What else of a host decides whether packets pass: our table in nftables, chains of others, sysctls.
//!
//! Part of the kernel's thread (`programmer`). Nothing here keeps a node from being a member: what is wrong
//! is said, and tried again.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use super::{
    connections::Connections, fragments::Fragments, neighbor_tables::NeighborTables,
    opponents::Opponents,
};
use crate::{
    dataplane::{
        desired::{Desired, Mode},
        fight::Kind,
        firewall::Firewall,
        kernel::{
            FirewallTable,
            interface::{self, Ipv6},
            sysctl,
            tunnels::into_tunnels,
            users::UsersRule,
        },
        toggled::{Setting, Toggled},
    },
    model::Time,
    netlink::{Netlink, netconf::Switches, nftables::Changes},
};

/// Chains of others may have very many rules: reading them takes no more than one part in so many of the
/// time.
const SHARE: u32 = 1_000;
/// The same for the packets of members, which are read only while one of them is in doubt.
const COUNT_SHARE: u32 = 100;
/// What the kernel refused is tried again after so long. Every try changes the table.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// As it was last seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    pub problems: Vec<String>,
    /// The kernel's table of connections drops packets, as one of the problems says.
    pub is_table_full: bool,
    /// Our table is in the kernel, and drops what would give this host routes of pods.
    pub refuses_routers: bool,
    /// Tunnel packets of strangers that were dropped.
    pub dropped: u64,
    /// What other programs had changed and was put right, by kind; since the last report.
    pub repaired: Vec<&'static str>,
}

pub struct Surroundings {
    table: io::Result<FirewallTable>,
    /// Interfaces that lead into tunnels, as last read.
    tunnels: Option<BTreeSet<String>>,
    changes: Option<Changes>,
    users: UsersRule,
    users_problem: Option<String>,
    mode: Mode,
    set_sysctls: bool,
    /// Sysctls that were right when last looked at.
    right: BTreeSet<String>,
    /// Interfaces that take router advertisements although this host forwards, because it was told to.
    kept: BTreeSet<String>,
    begun: Instant,
    switches: Option<Switches>,
    toggled: Toggled,
    /// The device was closed to what comes out of it when last looked at.
    was_closed: bool,
    table_problem: Option<String>,
    /// The kernel has the guard, as far as it was last asked.
    guarded: bool,
    /// The kernel would not have the masquerade.
    refused_at: Option<Instant>,
    connections: Connections,
    fragments: Fragments,
    neighbors: NeighborTables,
    netlink: io::Result<Netlink>,
    problems: Vec<String>,
    dropped: u64,
    repaired: Vec<&'static str>,
    /// Before this, chains of others are not read again.
    read_chains_at: Instant,
    chain_problems: Vec<String>,
    /// Before this, packets are not counted again.
    count_at: Instant,
    /// Fights about the entries, the table and sysctls.
    pub opponents: Opponents,
    told: HostState,
}

impl Surroundings {
    /// Opens what it can; what it cannot is a problem only where it is needed.
    pub fn open(mode: Mode, set_sysctls: bool) -> Self {
        Self {
            table: FirewallTable::open(),
            tunnels: None,
            changes: Changes::open().ok(),
            users: UsersRule::open(),
            users_problem: None,
            mode,
            set_sysctls,
            right: BTreeSet::new(),
            kept: BTreeSet::new(),
            begun: Instant::now(),
            switches: Switches::open().ok(),
            toggled: Toggled::default(),
            was_closed: false,
            table_problem: None,
            guarded: false,
            refused_at: None,
            connections: Connections::default(),
            fragments: Fragments::default(),
            neighbors: NeighborTables::default(),
            netlink: Netlink::open(),
            problems: Vec::new(),
            dropped: 0,
            repaired: Vec::new(),
            read_chains_at: Instant::now(),
            chain_problems: Vec::new(),
            count_at: Instant::now(),
            opponents: Opponents::new(),
            told: HostState::default(),
        }
    }

    /// Readable when some table of nftables has changed.
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.changes.as_ref().map(|changes| changes.as_fd())
    }

    /// Reads what has changed, and says whether it was in this table.
    pub fn touched(&mut self, table: &str) -> io::Result<bool> {
        self.changes.as_mut().map_or(Ok(false), |changes| changes.touched(table))
    }

    /// Sees to it that users of this host send nothing to the VXLAN port, or may again. Without the guard
    /// nothing is done about who sends tunnel packets.
    pub fn keep_users_out(&mut self, firewall: &Firewall) {
        let kept = match &firewall.guard {
            Some(guard) => self.users.keep(guard.port, &guard.members),
            None => self.users.remove().map(|()| false),
        };
        self.users_problem = kept.as_ref().err().map(|error| {
            let port = firewall.port;
            format!(
                "users of this host can send tunnel packets (UDP {port}) to other hosts: the policy rule \
                 against that was refused: {error}"
            )
        });
        if matches!(kept, Ok(true)) {
            self.repaired.push("firewall");
            self.opponents.note(Kind::Firewall, "ip rule 73", None);
        }
    }

    /// Makes our table equal to what is wanted, without reading it.
    pub fn write_table(&mut self, firewall: &Firewall) {
        if self.tunnels.is_none() {
            self.read_tunnels(firewall.port);
        }
        self.on_table(firewall, FirewallTable::write);
    }

    /// Reads our table, and puts right what is wrong in it.
    pub fn verify_table(&mut self, firewall: &Firewall) {
        self.read_tunnels(firewall.port);
        if let Some(pass) = self.on_table(firewall, FirewallTable::verify) {
            self.dropped = self.dropped.max(pass.dropped);
            if pass.repaired {
                self.repaired.push("firewall");
                self.opponents.note(Kind::Firewall, &format!("inet {}", firewall.table), None);
            }
        }
    }

    fn read_tunnels(&mut self, port: u16) {
        let links = self.netlink.as_mut().map(Netlink::links);
        if let Ok(Ok(links)) = links {
            self.tunnels = Some(into_tunnels(&links, port));
        }
    }

    /// Whether what was written has not been read since.
    pub fn is_table_unread(&self) -> bool {
        self.table.as_ref().is_ok_and(FirewallTable::is_unread)
    }

    /// Tunnel packets by member, where they are counted. With very many members it is not done each time.
    pub fn count_packets(&mut self, table: &str) -> Option<BTreeMap<IpAddr, u64>> {
        let begun = Instant::now();
        let tables = self.table.as_mut().ok().filter(|_| self.count_at <= begun)?;
        let counted = tables.packets_of_members(table);
        self.count_at = begun + begun.elapsed() * COUNT_SHARE;
        counted.inspect_err(|error| tracing::debug!(%error, "packets of members not read")).ok()
    }

    /// Looks at sysctls, at tables of the kernel that may be full and, now and then, at chains of others.
    pub fn look(&mut self, desired: &Desired, bridge: &str, underlay: &str) {
        let begun = Instant::now();
        let networks: Vec<_> = desired.pool.networks().iter().collect();
        if self.read_chains_at <= begun {
            let chains = self.table.as_mut().ok().map(|table| table.foreign_chains(&networks));
            let chains = chains.and_then(Result::ok).unwrap_or_default();
            let drops = chains.dropping.iter().map(|chain| direct_access(chain, desired));
            self.chain_problems = drops.collect();
            self.read_chains_at = begun + begun.elapsed() * SHARE;
        }
        self.problems.clear();
        self.problems.extend(self.connections.look());
        self.problems.extend(self.fragments.look());
        if let Ok(netlink) = &mut self.netlink {
            match self.neighbors.look(netlink) {
                Ok(problems) => self.problems.extend(problems),
                Err(error) => tracing::debug!(%error, "tables of neighbors not looked at"),
            }
        }
        for setting in sysctl::wanted(&networks, &desired.device.name, self.mode, underlay) {
            let Some(problem) = setting.problem() else {
                self.right.insert(setting.name().to_owned());
                continue;
            };
            if !self.set_sysctls {
                self.problems.push(problem);
                continue;
            }
            let was_right = self.right.remove(setting.name());
            match setting.set() {
                Ok(kept) => {
                    self.kept.extend(kept);
                    self.right.insert(setting.name().to_owned());
                    self.repaired.extend(was_right.then_some("sysctl"));
                }
                Err(error) => self.problems.push(error),
            }
        }
        self.look_at_switches([&desired.device.name, bridge]);
        let kept = sysctl::keep_advertisements(&self.kept);
        let closed = interface::close(&desired.device.name, Ipv6::AsItIs);
        // One that an earlier version has left is not as this one makes it.
        let opened = closed.set > 0 && self.was_closed;
        self.repaired.extend((kept || opened).then_some("sysctl"));
        if self.repaired.contains(&"sysctl") {
            self.opponents.note(Kind::Sysctls, "forwarding and what goes with it", None);
        }
        self.was_closed = closed.problems.is_empty();
        if !self.guarded {
            self.problems.extend(closed.problems);
        }
    }

    /// Forwarding that was off for a moment, of all interfaces or of these.
    fn look_at_switches(&mut self, interfaces: [&str; 2]) {
        let Some(switches) = &mut self.switches else { return };
        let heard = switches.read().unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot hear of forwarding");
            Vec::new()
        });
        let now = Time::ZERO + self.begun.elapsed();
        let is_needed = heard.iter().any(|switched| switched.link.is_some());
        let netlink = self.netlink.as_mut().ok().filter(|_| is_needed);
        let links = netlink.map(|netlink| interfaces.map(|name| netlink.link(name).ok().flatten()));
        for switched in heard {
            let mut links = links.iter().flatten().flatten();
            let interface = match switched.link {
                None => None,
                Some(index) => match links.find(|link| link.index == index) {
                    Some(link) => Some(link.name.clone()),
                    None => continue,
                },
            };
            self.toggled.note(now, Setting { interface, ipv4: switched.ipv4 }, switched.forwards);
        }
        // What is repaired each time is told as a fight.
        if !self.opponents.is_under_way(Kind::Sysctls) {
            self.problems.extend(self.toggled.problems(now));
        }
    }

    /// The state, if it is another one than last time.
    pub fn news(&mut self) -> Option<HostState> {
        let problems = self.table_problem.iter().chain(&self.users_problem);
        let problems = problems.chain(&self.chain_problems).chain(&self.problems);
        let problems = problems.cloned().chain(self.opponents.problems());
        let state = HostState {
            problems: problems.collect(),
            is_table_full: self.connections.is_full(),
            refuses_routers: self.guarded,
            dropped: self.dropped,
            repaired: std::mem::take(&mut self.repaired),
        };
        let news = state != self.told;
        self.told = HostState { repaired: Vec::new(), ..state.clone() };
        news.then_some(state)
    }

    /// Takes our table away.
    pub fn remove(&mut self, table: &str) -> io::Result<()> {
        self.guarded = false;
        if let Err(error) = self.users.remove() {
            tracing::error!(%error, "the policy rules about the VXLAN port were not removed");
        }
        match &mut self.table {
            Ok(tables) => tables.remove(table),
            // It cannot have been written either.
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

    /// Where masquerade is impossible the guard is not given up.
    fn try_on_table<T>(
        &mut self,
        firewall: &Firewall,
        act: impl Fn(&mut FirewallTable, &Firewall) -> io::Result<T>,
    ) -> Option<T> {
        let table = match &mut self.table {
            Ok(table) => table,
            Err(_) if firewall.is_empty() => return None,
            Err(error) => {
                self.table_problem = Some(no_table(error));
                return None;
            }
        };
        if self.refused_at.is_none_or(|at| at.elapsed() >= TRY_AGAIN) {
            match act(table, firewall) {
                Ok(done) => {
                    (self.refused_at, self.table_problem) = (None, None);
                    return Some(done);
                }
                Err(error) => self.table_problem = Some(no_table(&error)),
            }
            if firewall.guard.is_none() || firewall.masquerade.is_empty() {
                return None;
            }
            self.refused_at = Some(Instant::now());
        }
        act(table, &Firewall { masquerade: Vec::new(), ..firewall.clone() }).ok()
    }
}

fn no_table(error: &io::Error) -> String {
    format!(
        "nftables: {error}: load the modules nf_tables, nf_nat and nft_masq, or set guard = false and \
         ip_masq = false"
    )
}

fn direct_access(chain: &str, desired: &Desired) -> String {
    format!(
        "chain {chain} drops what other hosts send to containers on a bridge of Docker's (Docker 28 and \
         later): start dockerd with --allow-direct-routing, or make the network with \
         -o com.docker.network.bridge.trusted_host_interfaces={}, or with -d gossamer",
        desired.device.name
    )
}

//! What else of a host decides whether packets pass: our table in nftables, chains of others, sysctls.
//!
//! Part of the kernel's thread (`programmer`). Nothing here keeps a node from being a member: what is wrong
//! is said, and tried again.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
};

use crate::{
    dataplane::{
        desired::{Desired, Mode},
        firewall::Firewall,
        kernel::{FirewallTable, Pass, sysctl},
    },
    netlink::nftables::Changes,
};

/// As it was last seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    pub problems: Vec<String>,
    /// Tunnel packets of strangers that were dropped.
    pub dropped: u64,
    /// What other programs had changed and was put right, by kind; since the last report.
    pub repaired: Vec<&'static str>,
}

pub struct Surroundings {
    table: io::Result<FirewallTable>,
    changes: Option<Changes>,
    mode: Mode,
    set_sysctls: bool,
    /// What was put right once is put right again only if somebody else has changed it.
    has_set: bool,
    told: HostState,
}

impl Surroundings {
    /// Opens what it can; what it cannot is a problem only where it is needed.
    pub fn open(mode: Mode, set_sysctls: bool) -> Self {
        Self {
            table: FirewallTable::open(),
            changes: Changes::open().ok(),
            mode,
            set_sysctls,
            has_set: false,
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

    /// Looks after everything; gives the state if it is another one than before.
    pub fn look_after(
        &mut self,
        desired: &Desired,
        firewall: &Firewall,
        underlay: &str,
    ) -> Option<HostState> {
        let mut state = HostState { dropped: self.told.dropped, ..HostState::default() };
        match self.write_table(firewall) {
            Ok(pass) => {
                state.dropped = pass.dropped;
                state.repaired.extend(pass.repaired.then_some("firewall"));
            }
            Err(error) => state.problems.push(format!(
                "nftables: {error}: load the modules nf_tables, nf_nat and nft_masq, or set guard = false \
                 and ip_masq = false"
            )),
        }
        let networks: Vec<_> = desired.pool.networks().iter().collect();
        if let Ok(table) = &mut self.table {
            let closed = table.closed_forward_chains(&networks).unwrap_or_default();
            state.problems.extend(closed.iter().map(|chain| closed_chain(chain, desired)));
        }
        for setting in sysctl::wanted(desired, self.mode, underlay) {
            let Some(problem) = setting.problem() else { continue };
            match setting.set() {
                _ if !self.set_sysctls => state.problems.push(problem),
                Ok(()) => state.repaired.extend(self.has_set.then_some("sysctl")),
                Err(error) => state.problems.push(error),
            }
        }
        self.has_set = true;
        let news = state != self.told;
        self.told = HostState { repaired: Vec::new(), ..state.clone() };
        news.then_some(state)
    }

    /// Takes our table away.
    pub fn remove(&mut self, table: &str) -> io::Result<()> {
        match &mut self.table {
            Ok(tables) => tables.remove(table),
            // It cannot have been written either.
            Err(_) => Ok(()),
        }
    }

    fn write_table(&mut self, firewall: &Firewall) -> io::Result<Pass> {
        match &mut self.table {
            Ok(table) => table.reconcile(firewall),
            Err(_) if firewall.is_empty() => Ok(Pass::default()),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        }
    }
}

/// Rules of ours cannot open what a chain of somebody else closes: each chain has to let a packet pass.
fn closed_chain(chain: &str, desired: &Desired) -> String {
    let networks = desired.pool.networks();
    let of = |ipv4: bool| networks.iter().find(|network| network.addr().is_ipv4() == ipv4);
    let (rule, network) = match chain {
        "ip filter FORWARD" => ("iptables -I FORWARD -s NETWORK -j ACCEPT", of(true)),
        "ip6 filter FORWARD" => ("ip6tables -I FORWARD -s NETWORK -j ACCEPT", of(false)),
        _ => ("a rule there that accepts NETWORK", Some(desired.pool.network())),
    };
    let network = network.unwrap_or(desired.pool.network()).to_string();
    format!(
        "chain {chain} drops what is forwarded, pods' packets too, unless a rule lets it pass (Docker does \
         that): add {}, and the same with the destination",
        rule.replace("NETWORK", &network)
    )
}

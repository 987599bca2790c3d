//! The sysctls of the host that pods need, and forwarding that another program switches off.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::BorrowedFd,
    time::Instant,
};

use ipnet::IpNet;

use crate::{
    dataplane::{
        desired::Mode,
        kernel::required_sysctls::{self, Sysctl},
        toggled::{ForwardingChanges, ForwardingSysctl},
    },
    model::{Problem, Time},
    netlink::{
        Netlink,
        netconf::{ForwardingChange, ForwardingMonitor},
    },
    sysctl::interface::{self, Ipv6},
};

/// The sysctls as of the last check.
pub(super) struct HostSysctls {
    mode: Mode,
    /// Whether the operator lets the agent set them.
    are_set: bool,
    /// Names of sysctls that were correct.
    correct: BTreeSet<String>,
    /// Interfaces configured to accept router advertisements although this host forwards.
    kept: BTreeSet<String>,
    /// Whether the device was closed to router advertisements from the overlay.
    was_closed: bool,
    switches: ForwardingSwitches,
}

/// Forwarding that was switched off briefly.
struct ForwardingSwitches {
    monitor: Option<ForwardingMonitor>,
    /// Changes since the last check.
    switched: Vec<ForwardingChange>,
    changes: ForwardingChanges,
    begun: Instant,
}

/// What one check has found.
#[derive(Default)]
pub(super) struct SysctlFindings {
    /// What is wrong and was not set.
    pub(super) problems: Vec<Problem>,
    /// For each family that this host does not forward (IPv4: true), what is wrong.
    pub(super) forwarding_off: BTreeMap<bool, String>,
    /// What lets members change this host's routes, which matters without the guard.
    pub(super) open: Vec<Problem>,
    /// One entry for each repair.
    pub(super) repaired: Vec<&'static str>,
}

impl HostSysctls {
    pub(super) fn new(mode: Mode, are_set: bool) -> Self {
        Self {
            mode,
            are_set,
            correct: BTreeSet::new(),
            kept: BTreeSet::new(),
            was_closed: false,
            switches: ForwardingSwitches {
                monitor: ForwardingMonitor::open().ok(),
                switched: Vec::new(),
                changes: ForwardingChanges::default(),
                begun: Instant::now(),
            },
        }
    }

    /// Returns a descriptor that is readable when a forwarding sysctl has changed.
    pub(super) fn switches(&self) -> Option<BorrowedFd<'_>> {
        self.switches.monitor.as_ref().map(ForwardingMonitor::as_fd)
    }

    /// Reads the pending notifications, and returns whether forwarding of the whole host was switched.
    pub(super) fn read_switches(&mut self) -> bool {
        self.switches.read()
    }

    /// Sets the sysctls of the overlay's `device`, of the pods' bridge and of the underlay, or reports
    /// what is wrong. While repairs of sysctls conflict with another program, its changes are not
    /// reported twice.
    pub(super) fn check(
        &mut self,
        networks: &[IpNet],
        [device, bridge, underlay]: [&str; 3],
        netlink: &mut io::Result<Netlink>,
        is_conflict_under_way: bool,
    ) -> SysctlFindings {
        let mut findings = SysctlFindings::default();
        for setting in required_sysctls::wanted(networks, device, self.mode, underlay) {
            let Some(problem) = setting.problem() else {
                self.correct.insert(setting.name().to_owned());
                continue;
            };
            if !self.are_set {
                findings.add(&setting, problem);
                continue;
            }
            let was_correct = self.correct.remove(setting.name());
            match setting.set() {
                Ok(kept) => {
                    self.kept.extend(kept);
                    self.correct.insert(setting.name().to_owned());
                    findings.repaired.extend(was_correct.then_some("sysctl"));
                }
                Err(problem) => findings.add(&setting, problem),
            }
        }
        let switched_off = self.switches.problems([device, bridge], netlink);
        // A setting that is repaired repeatedly is reported as a conflict.
        if !is_conflict_under_way {
            findings.problems.extend(switched_off);
        }
        let kept = required_sysctls::keep_advertisements(&self.kept);
        let closed = interface::close(device, Ipv6::Unchanged);
        // A device that an earlier version left has other settings, so only a change since the last
        // check is a repair.
        let opened = closed.set > 0 && self.was_closed;
        findings.repaired.extend((kept || opened).then_some("sysctl"));
        self.was_closed = closed.problems.is_empty();
        findings.open = closed.problems;
        findings
    }
}

impl SysctlFindings {
    /// Adds the problem of a setting that keeps its wrong value.
    fn add(&mut self, setting: &Sysctl, problem: Problem) {
        let family = setting.forwards_ipv4();
        self.forwarding_off.extend(family.map(|ipv4| (ipv4, problem.what.clone())));
        self.problems.push(problem);
    }
}

impl ForwardingSwitches {
    fn read(&mut self) -> bool {
        let Some(monitor) = &mut self.monitor else { return false };
        let switched = monitor.read().unwrap_or_else(|error| {
            tracing::debug!(%error, "forwarding notifications not read");
            Vec::new()
        });
        let is_of_host = switched.iter().any(|switched| switched.link.is_none());
        self.switched.extend(switched);
        is_of_host
    }

    /// Returns the problem of forwarding that was switched off briefly, globally or on these interfaces.
    fn problems(
        &mut self,
        interfaces: [&str; 2],
        netlink: &mut io::Result<Netlink>,
    ) -> Vec<Problem> {
        self.read();
        let switched_settings = std::mem::take(&mut self.switched);
        let now = Time::ZERO + self.begun.elapsed();
        let is_needed = switched_settings.iter().any(|switched| switched.link.is_some());
        let netlink = netlink.as_mut().ok().filter(|_| is_needed);
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
            let setting = ForwardingSysctl { interface, ipv4: switched.ipv4 };
            self.changes.note(now, setting, switched.forwards);
        }
        self.changes.problems(now)
    }
}

//! Detects another program that keeps turning forwarding off, as opposed to a single change by an operator.
//!
//! Between two changes the settings are usually correct, so reading them at intervals finds nothing. The
//! kernel reports each change; a change counts if forwarding was on before.
//!
//! Pure. The caller passes each report with the time at which it was read.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::model::{
    Problem, ProblemCode, Time, dotted, forwarding_sysctl, interface_forwarding_sysctl,
};

/// Period in which changes are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// Number of changes within `WINDOW` that an operator would not make.
const MIN_CHANGES: usize = 3;

/// A forwarding sysctl.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForwardingSysctl {
    /// The interface of the setting; `None` for the setting of all interfaces.
    pub interface: Option<String>,
    /// The setting is that of IPv4, not of IPv6.
    pub ipv4: bool,
}

/// The recent changes of each setting.
#[derive(Debug, Default)]
pub struct ForwardingChanges(BTreeMap<ForwardingSysctl, ChangeHistory>);

#[derive(Debug, Default)]
struct ChangeHistory {
    is_on: bool,
    /// Times at which it was turned off: the last `MIN_CHANGES`.
    turned_off: VecDeque<Time>,
}

impl ForwardingChanges {
    /// Records the value that a setting has from now on.
    pub fn note(&mut self, now: Time, setting: ForwardingSysctl, is_on: bool) {
        let record = self.0.entry(setting).or_default();
        if record.is_on && !is_on {
            record.turned_off.push_back(now);
        }
        if record.turned_off.len() > MIN_CHANGES {
            record.turned_off.pop_front();
        }
        record.is_on = is_on;
    }

    /// Returns a problem for each setting that is repeatedly turned off. If that of all interfaces is among
    /// them, those of single interfaces are left out, because the kernel changes them with it.
    pub fn problems(&self, now: Time) -> Vec<Problem> {
        let is_frequent = |setting: &ForwardingSysctl| {
            let history = self.0.get(setting);
            let off = history.map(|record| record.turned_off.iter()).into_iter().flatten();
            off.filter(|at| now.since(**at) <= WINDOW).count() >= MIN_CHANGES
        };
        let is_reported = |setting: &&ForwardingSysctl| {
            let all_interfaces = ForwardingSysctl { interface: None, ipv4: setting.ipv4 };
            is_frequent(setting) && (setting.interface.is_none() || !is_frequent(&all_interfaces))
        };
        self.0.keys().filter(is_reported).map(ForwardingSysctl::problem).collect()
    }
}

impl ForwardingSysctl {
    /// Returns the name as the `sysctl` program writes it.
    fn name(&self) -> String {
        match &self.interface {
            Some(interface) => dotted(&interface_forwarding_sysctl(self.ipv4, interface)),
            None => dotted(forwarding_sysctl(self.ipv4)),
        }
    }

    fn problem(&self) -> Problem {
        let name = self.name();
        let file = dotted(&name);
        let what = format!(
            "another program repeatedly sets {name} to 0 ({MIN_CHANGES} times or more within {} s); packets \
             of pods are dropped until it is 1 again",
            WINDOW.as_secs()
        );
        let fix = format!(
            "find the program and stop it (scripts and hooks of libvirt, firewalls, VPNs and tuning tools; \
             grep -rs forward /etc/sysctl.d /etc/libvirt/hooks; auditctl -w /proc/sys/{file} -p w)"
        );
        Problem::new(ProblemCode::ForwardingSwitched, name, what, fix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    fn setting_of(interface: Option<&str>) -> ForwardingSysctl {
        ForwardingSysctl { interface: interface.map(str::to_owned), ipv4: true }
    }

    /// Turns the setting on before each time, off, and on again.
    fn toggle(
        changes: &mut ForwardingChanges,
        setting: &ForwardingSysctl,
        times: impl Iterator<Item = u64>,
    ) {
        for second in times {
            changes.note(at(second), setting.clone(), true);
            changes.note(at(second), setting.clone(), false);
            changes.note(at(second), setting.clone(), true);
        }
    }

    #[test]
    fn setting_turned_off_repeatedly_is_a_problem_until_a_minute_later() {
        let mut changes = ForwardingChanges::default();
        toggle(&mut changes, &setting_of(None), (0..3).map(|n| n * 6));
        let problems = changes.problems(at(12));
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].contains("repeatedly sets net.ipv4.ip_forward to 0 (3 times"),
            "{problems:?}"
        );
        assert!(problems[0].contains("/proc/sys/net/ipv4/ip_forward "), "{problems:?}");
        assert_eq!(changes.problems(at(60)).len(), 1);
        assert_eq!(changes.problems(at(61)), []);
    }

    #[test]
    fn occasional_changes_and_new_interfaces_are_no_problem() {
        let mut changes = ForwardingChanges::default();
        toggle(&mut changes, &setting_of(None), (0..20).map(|n| n * 40));
        assert_eq!(changes.problems(at(800)), []);
        for _ in 0..9 {
            changes.note(at(800), setting_of(Some("gossamer.1")), false);
        }
        assert_eq!(changes.problems(at(800)), []);
    }

    #[test]
    fn interface_is_reported_unless_all_interfaces_are() {
        let mut changes = ForwardingChanges::default();
        toggle(&mut changes, &setting_of(Some("gossamer.1")), 0..3);
        let problems = changes.problems(at(3))[0].to_string();
        assert!(
            problems.contains("repeatedly sets net.ipv4.conf.gossamer/1.forwarding to 0"),
            "{problems}"
        );
        assert!(problems.contains("/proc/sys/net/ipv4/conf/gossamer.1/forwarding"), "{problems}");
        toggle(&mut changes, &setting_of(None), 0..3);
        let problems = changes.problems(at(3));
        assert!(problems.len() == 1 && problems[0].contains("net.ipv4.ip_forward"), "{problems:?}");
    }
}

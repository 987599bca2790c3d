//! Telling forwarding that another program turns off again and again from a change that an operator makes.
//!
//! Between two changes everything is right most of the time, so a look at the settings alone finds nothing
//! wrong. The kernel tells of each change; one counts where forwarding was on before.
//!
//! Pure. The kernel's word comes in with the time at which it was read.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::model::Time;

/// Changes older than this do not count.
const WINDOW: Duration = Duration::from_secs(60);
/// So many in the window are no operator's.
const MANY: usize = 3;

/// A setting: whose forwarding it is, of IPv4 or IPv6.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Setting {
    /// None, if it is that of all interfaces.
    pub interface: Option<String>,
    pub ipv4: bool,
}

/// Settings that have been changed, as far as they matter.
#[derive(Debug, Default)]
pub struct Toggled(BTreeMap<Setting, Record>);

#[derive(Debug, Default)]
struct Record {
    is_on: bool,
    /// When it was turned off: no more than `MANY`.
    turned_off: VecDeque<Time>,
}

impl Toggled {
    /// Takes note of what a setting is from now on.
    pub fn note(&mut self, now: Time, setting: Setting, is_on: bool) {
        let record = self.0.entry(setting).or_default();
        if record.is_on && !is_on {
            record.turned_off.push_back(now);
        }
        if record.turned_off.len() > MANY {
            record.turned_off.pop_front();
        }
        record.is_on = is_on;
    }

    /// What is turned off again and again, as sentences. That of all interfaces goes with that of each.
    pub fn problems(&self, now: Time) -> Vec<String> {
        let is_many = |setting: &Setting| {
            let found = self.0.get(setting);
            let off = found.map(|record| record.turned_off.iter()).into_iter().flatten();
            off.filter(|at| now.since(**at) <= WINDOW).count() >= MANY
        };
        let is_told = |setting: &&Setting| {
            let of_all = Setting { interface: None, ipv4: setting.ipv4 };
            is_many(setting) && (setting.interface.is_none() || !is_many(&of_all))
        };
        self.0.keys().filter(is_told).map(Setting::sentence).collect()
    }
}

impl Setting {
    /// As the `sysctl` program writes it.
    fn name(&self) -> String {
        let family = if self.ipv4 { 4 } else { 6 };
        match &self.interface {
            Some(interface) => {
                format!("net.ipv{family}.conf.{}.forwarding", interface.replace('.', "/"))
            }
            None if self.ipv4 => "net.ipv4.ip_forward".to_owned(),
            None => "net.ipv6.conf.all.forwarding".to_owned(),
        }
    }

    fn sentence(&self) -> String {
        let name = self.name();
        let file = name.replace('.', "\u{0}").replace('/', ".").replace('\u{0}', "/");
        format!(
            "another program sets {name} to 0 again and again ({MANY} times or more within {} s), and \
             packets of pods are dropped until it is 1 again: find what does so and end it (scripts and \
             hooks of libvirt, firewalls, VPNs and tuning tools; grep -rs forward /etc/sysctl.d \
             /etc/libvirt/hooks; auditctl -w /proc/sys/{file} -p w)",
            WINDOW.as_secs()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    fn of(interface: Option<&str>) -> Setting {
        Setting { interface: interface.map(str::to_owned), ipv4: true }
    }

    /// On before each, and on after the last.
    fn toggle(toggled: &mut Toggled, setting: &Setting, times: impl Iterator<Item = u64>) {
        for second in times {
            toggled.note(at(second), setting.clone(), true);
            toggled.note(at(second), setting.clone(), false);
            toggled.note(at(second), setting.clone(), true);
        }
    }

    #[test]
    fn setting_that_is_turned_off_again_and_again_is_named_until_a_minute_later() {
        let mut toggled = Toggled::default();
        toggle(&mut toggled, &of(None), (0..3).map(|n| n * 6));
        let said = toggled.problems(at(12));
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("net.ipv4.ip_forward to 0 again and again (3 times"), "{said:?}");
        assert!(said[0].contains("/proc/sys/net/ipv4/ip_forward "), "{said:?}");
        assert_eq!(toggled.problems(at(60)).len(), 1);
        assert_eq!(toggled.problems(at(61)), Vec::<String>::new());
    }

    #[test]
    fn changes_now_and_then_and_new_interfaces_are_nothing() {
        let mut toggled = Toggled::default();
        toggle(&mut toggled, &of(None), (0..20).map(|n| n * 40));
        assert_eq!(toggled.problems(at(800)), Vec::<String>::new());
        for _ in 0..9 {
            toggled.note(at(800), of(Some("gossamer.1")), false);
        }
        assert_eq!(toggled.problems(at(800)), Vec::<String>::new());
    }

    #[test]
    fn interface_is_named_unless_all_of_its_family_are_turned_off() {
        let mut toggled = Toggled::default();
        toggle(&mut toggled, &of(Some("gossamer.1")), 0..3);
        let said = toggled.problems(at(3)).concat();
        assert!(said.contains("sets net.ipv4.conf.gossamer/1.forwarding to 0"), "{said}");
        assert!(said.contains("/proc/sys/net/ipv4/conf/gossamer.1/forwarding"), "{said}");
        toggle(&mut toggled, &of(None), 0..3);
        let said = toggled.problems(at(3));
        assert!(said.len() == 1 && said[0].contains("net.ipv4.ip_forward"), "{said:?}");
    }
}

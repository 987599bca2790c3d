//! The host's sysctls that pods need to reach each other. Read, and set if the operator wants that.
//!
//! Only settings that are named here are written.

use std::{collections::BTreeSet, io};

use ipnet::IpNet;

use super::advertised::{AdvertisedInterfaces, restore_accept_ra};
use crate::{
    dataplane::desired::Mode,
    model::{Problem, ProblemCode, dotted, forwarding_sysctl},
    sysctl::{read, write},
};

/// A setting with its required value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Path below `/proc/sys`.
    name: String,
    /// The family that the host forwards only with the required value; `None` for other settings.
    forwards_ipv4: Option<bool>,
    value: &'static str,
    /// The same setting of `all` interfaces, if the larger of the two applies.
    all: Option<String>,
    wrong: &'static str,
    consequence: &'static str,
    /// The underlay interface, if the new value would end router advertisements on it.
    ends_advertisements: Option<String>,
}

/// Returns the settings that an overlay of these networks needs.
pub fn wanted(networks: &[IpNet], device: &str, mode: Mode, underlay: &str) -> Vec<Sysctl> {
    let families = || networks.iter().map(|network| network.addr().is_ipv4());
    let forwarding = |ipv4| Sysctl {
        name: forwarding_sysctl(ipv4).to_owned(),
        forwards_ipv4: Some(ipv4),
        value: "1",
        all: None,
        wrong: "0",
        consequence: if ipv4 {
            "this host forwards no IPv4 packets, so its pods reach no other host by IPv4"
        } else {
            "this host forwards no IPv6 packets, so its pods reach no other host by IPv6"
        },
        ends_advertisements: (!ipv4).then(|| underlay.to_owned()),
    };
    // If only some packets use the tunnel, an answer may arrive by another interface than its
    // request has left by.
    let loose = |interface: &str| Sysctl {
        name: format!("net/ipv4/conf/{interface}/rp_filter"),
        forwards_ipv4: None,
        value: "2",
        all: Some("net/ipv4/conf/all/rp_filter".to_owned()),
        wrong: "1",
        consequence: "packets are dropped if their answers leave by another interface",
        ends_advertisements: None,
    };
    let mut wanted: Vec<Sysctl> = families().map(forwarding).collect();
    if mode != Mode::Vxlan && families().any(|ipv4| ipv4) {
        wanted.extend([loose(device), loose(underlay)]);
    }
    wanted
}

impl Sysctl {
    /// Returns the path below `/proc/sys`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether the family that this setting forwards is IPv4; `None` for other settings.
    pub const fn forwards_ipv4(&self) -> Option<bool> {
        self.forwards_ipv4
    }

    /// Returns the code of the problem.
    const fn code(&self) -> ProblemCode {
        match self.forwards_ipv4 {
            Some(_) => ProblemCode::ForwardingOff,
            None => ProblemCode::Sysctl,
        }
    }

    /// Returns the problem; `None` if the setting is right or does not exist.
    pub fn problem(&self) -> Option<Problem> {
        let (is, consequence, command) = self.wrong()?;
        Some(Problem::new(
            self.code(),
            dotted(&self.name),
            format!("{is}: {consequence}"),
            format!("run {command}, or set set_sysctls = true here"),
        ))
    }

    /// Like [`Sysctl::problem`], in three parts: state, consequence and command.
    pub fn wrong(&self) -> Option<(String, &'static str, String)> {
        let Self { name, value, all, wrong, consequence, .. } = self;
        let own = read(name)?;
        let in_force = all.as_deref().and_then(read).map_or(own.clone(), |all| all.max(own));
        let name = dotted(name);
        (in_force == *wrong).then(|| {
            // In this order: forwarding would remove the learned routes.
            let first = self.advertised().map(|found| found.arguments()).unwrap_or_default();
            let command = format!("sysctl -w {first}{name}={value}");
            (format!("{name} is {in_force}"), *consequence, command)
        })
    }

    /// Sets the required value. Returns the interfaces that accept router advertisements only
    /// because of this call.
    ///
    /// # Errors
    /// When the setting or a setting for router advertisements cannot be written.
    pub fn set(&self) -> Result<BTreeSet<String>, Problem> {
        let name = dotted(&self.name);
        let failed = |what: String| Problem::new(self.code(), &name, what, "");
        let left = |why: String| failed(format!("{name} was not changed: {why}"));
        let kept = match self.advertised() {
            Ok(found) => found.keep().map_err(left)?,
            Err(error) => return Err(left(format!("router advertisements: {error}"))),
        };
        write(&self.name, self.value)
            .map_err(|error| failed(format!("{name} cannot be set to {}: {error}", self.value)))?;
        Ok(kept)
    }

    fn advertised(&self) -> io::Result<AdvertisedInterfaces> {
        self.ends_advertisements
            .as_deref()
            .map_or(Ok(AdvertisedInterfaces::default()), AdvertisedInterfaces::find)
    }
}

/// Lets interfaces that were re-created accept router advertisements again; returns whether one was
/// changed.
pub fn keep_advertisements(interfaces: &BTreeSet<String>) -> bool {
    interfaces.iter().filter(|interface| restore_accept_ra(interface)).count() > 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataplane::plan::tests::{dual_stack_view, view},
        model::View,
    };

    #[test]
    fn wanted_settings_forward_each_family_and_accept_mixed_paths() {
        let names = |view: View, mode| -> Vec<String> {
            let networks: Vec<IpNet> = view.settings.pool.networks().iter().collect();
            let wanted = wanted(&networks, "gossamer.1", mode, "eth0.5");
            wanted.iter().map(|sysctl| dotted(&sysctl.name)).collect()
        };
        assert_eq!(names(view(&[(1, 9)]), Mode::Vxlan), ["net.ipv4.ip_forward"]);
        let dual = names(dual_stack_view(&[(1, 9)]), Mode::Direct);
        assert_eq!(dual[1], "net.ipv6.conf.all.forwarding");
        assert_eq!(dual[2], "net.ipv4.conf.gossamer/1.rp_filter");
        assert_eq!(dual[3], "net.ipv4.conf.eth0/5.rp_filter");
    }

    #[test]
    fn consequence_names_only_the_family_that_is_not_forwarded() {
        let networks: Vec<IpNet> =
            dual_stack_view(&[(1, 9)]).settings.pool.networks().iter().collect();
        let wanted = wanted(&networks, "gossamer.1", Mode::Vxlan, "eth0");
        let consequences: Vec<&str> = wanted.iter().map(|sysctl| sysctl.consequence).collect();
        assert!(
            consequences[0].contains("IPv4") && !consequences[0].contains("IPv6"),
            "{consequences:?}"
        );
        assert!(
            consequences[1].contains("IPv6") && !consequences[1].contains("IPv4"),
            "{consequences:?}"
        );
    }
}

//! What the host's sysctls must be for pods to reach each other. Read and, if the operator wants that, set.
//!
//! Only what is named here is ever written, and only to what it says.

use std::{collections::BTreeSet, fs, io, path::Path};

use ipnet::IpNet;

use super::advertised::{Advertised, keep_again};
use crate::dataplane::desired::Mode;

/// Below `/proc/sys`.
const ROOT: &str = "/proc/sys";

/// One setting that has to be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// With slashes.
    name: String,
    value: &'static str,
    /// The setting of all interfaces counts as well: the larger of the two is in force.
    all: Option<String>,
    wrong: &'static str,
    consequence: &'static str,
    /// The underlay interface, if setting it would cost this host what it has learned from router
    /// advertisements.
    ends_advertisements: Option<String>,
}

/// What has to be right for an overlay of these networks.
pub fn wanted(networks: &[IpNet], device: &str, mode: Mode, underlay: &str) -> Vec<Sysctl> {
    let families = || networks.iter().map(|network| network.addr().is_ipv4());
    let forwarding = |ipv4| Sysctl {
        name: if ipv4 { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" }.to_owned(),
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
    // Where some packets take the tunnel and others do not, the answer may come by the other way.
    let loose = |interface: &str| Sysctl {
        name: format!("net/ipv4/conf/{interface}/rp_filter"),
        value: "2",
        all: Some("net/ipv4/conf/all/rp_filter".to_owned()),
        wrong: "1",
        consequence: "packets that come by another way than they go are dropped",
        ends_advertisements: None,
    };
    let mut wanted: Vec<Sysctl> = families().map(forwarding).collect();
    if mode != Mode::Vxlan && families().any(|ipv4| ipv4) {
        wanted.extend([loose(device), loose(underlay)]);
    }
    wanted
}

impl Sysctl {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is wrong with it as it is, and what helps; nothing, if it is right or not there.
    pub fn problem(&self) -> Option<String> {
        let (is, consequence, command) = self.wrong()?;
        Some(format!("{is}: {consequence}; run {command}, or set set_sysctls = true here"))
    }

    /// The same in three parts: how it is, what follows, the command that helps.
    pub fn wrong(&self) -> Option<(String, &'static str, String)> {
        let Self { name, value, all, wrong, consequence, .. } = self;
        let own = read(name)?;
        let in_force = all.as_deref().and_then(read).map_or(own.clone(), |all| all.max(own));
        let name = dotted(name);
        (in_force == *wrong).then(|| {
            // In this order: once it forwards, what was learned is gone.
            let first = self.advertised().map(|found| found.arguments()).unwrap_or_default();
            let command = format!("sysctl -w {first}{name}={value}");
            (format!("{name} is {in_force}"), *consequence, command)
        })
    }

    /// Makes it right. Gives the interfaces whose advertisements are taken only because of that.
    ///
    /// # Errors
    /// Why it is left as it is.
    pub fn set(&self) -> Result<BTreeSet<String>, String> {
        let name = dotted(&self.name);
        let left = |why: String| format!("{name} is left as it is: {why}");
        let kept = match self.advertised() {
            Ok(found) => found.keep().map_err(left)?,
            Err(error) => return Err(left(format!("router advertisements: {error}"))),
        };
        write(&self.name, self.value)
            .map_err(|error| format!("{name} cannot be set to {}: {error}", self.value))?;
        Ok(kept)
    }

    fn advertised(&self) -> io::Result<Advertised> {
        self.ends_advertisements.as_deref().map_or(Ok(Advertised::default()), Advertised::find)
    }
}

/// Interfaces that this process has made take advertisements do so again where they were re-created.
pub fn keep_advertisements(interfaces: &BTreeSet<String>) -> bool {
    interfaces.iter().filter(|interface| keep_again(interface)).count() > 0
}

/// As the `sysctl` program writes names: an interface may have dots in its own.
pub(super) fn dotted(name: &str) -> String {
    name.chars()
        .map(|c| {
            if c == '/' {
                '.'
            } else if c == '.' {
                '/'
            } else {
                c
            }
        })
        .collect()
}

/// Writes a sysctl, called as its file below `/proc/sys`.
pub fn write(name: &str, value: &str) -> io::Result<()> {
    fs::write(Path::new(ROOT).join(name), value)
}

pub(super) fn read(name: &str) -> Option<String> {
    Some(fs::read_to_string(Path::new(ROOT).join(name)).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        core::View,
        dataplane::plan::tests::{dual_stack_view, view},
    };

    #[test]
    fn each_family_must_be_forwarded_and_mixed_ways_must_be_let_in() {
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
    fn family_that_is_not_forwarded_is_the_only_one_named() {
        let networks: Vec<IpNet> =
            dual_stack_view(&[(1, 9)]).settings.pool.networks().iter().collect();
        let wanted = wanted(&networks, "gossamer.1", Mode::Vxlan, "eth0");
        let said: Vec<&str> = wanted.iter().map(|sysctl| sysctl.consequence).collect();
        assert!(said[0].contains("IPv4") && !said[0].contains("IPv6"), "{said:?}");
        assert!(said[1].contains("IPv6") && !said[1].contains("IPv4"), "{said:?}");
    }
}

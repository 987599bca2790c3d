//! Sysctls of gossamer's interfaces that protect the host from pods.
//!
//! A pod may send any packet. Without these settings, or rules that drop such packets (`firewall`),
//! the kernel would accept a pod's router advertisement or redirect and install the routes in it
//! (CVE-2020-10749). It would also answer for other hosts' addresses on the pods' side.

use std::io;

use super::{read, write};
use crate::model::{Problem, ProblemCode, dotted};

/// Family, setting and its required value. Sending redirects and proxying are disabled as well, but
/// the setting for all interfaces can still enable them.
const REQUIRED_SETTINGS: [(&str, &str, &str); 7] = [
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "accept_redirects", "0"),
    ("ipv6", "proxy_ndp", "0"),
    ("ipv4", "accept_redirects", "0"),
    ("ipv4", "secure_redirects", "0"),
    ("ipv4", "send_redirects", "0"),
    ("ipv4", "proxy_arp", "0"),
];

/// The same for a port of the bridge. The port itself never has to answer ARP: the bridge does. The
/// kernel would otherwise store the sender of each ARP request to a link-local group, which bypasses
/// the bridge's rules, in the neighbor table.
const PORT_SETTING: (&str, &str, &str) = ("ipv4", "arp_ignore", "8");

/// Whether an interface may have IPv6 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ipv6 {
    /// IPv6 is to be enabled.
    On,
    /// IPv6 is to be disabled.
    Off,
    /// `disable_ipv6` is not changed.
    Unchanged,
}

/// The result of [`close`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CloseResult {
    /// Number of settings that were wrong and have been corrected.
    pub set: u64,
    /// Settings that are wrong and could not be changed, with the command that corrects them.
    pub problems: Vec<Problem>,
}

/// Applies the settings to an interface of this thread's network namespace. A setting that the
/// kernel does not have is no problem: the kernel may lack IPv6, also for one interface with a
/// small MTU.
pub fn close(interface: &str, ipv6: Ipv6) -> CloseResult {
    let switch = match ipv6 {
        Ipv6::On => Some(("ipv6", "disable_ipv6", "0")),
        Ipv6::Off => Some(("ipv6", "disable_ipv6", "1")),
        Ipv6::Unchanged => None,
    };
    apply(interface, switch)
}

/// Like [`close`], for a port of the bridge.
pub fn close_port(interface: &str) -> CloseResult {
    apply(interface, Some(PORT_SETTING))
}

/// Applies the required settings and one more.
fn apply(interface: &str, more: Option<(&str, &str, &str)>) -> CloseResult {
    let mut closed = CloseResult::default();
    for (family, setting, value) in REQUIRED_SETTINGS.into_iter().chain(more) {
        let name = format!("net/{family}/conf/{interface}/{setting}");
        let Some(is) = read(&name).filter(|is| is != value) else { continue };
        match write(&name, value) {
            Ok(()) => closed.set += 1,
            Err(error) if has_effect(interface, family, setting) => {
                closed.problems.push(problem(&name, &is, value, &error));
            }
            Err(_) => {}
        }
    }
    closed
}

/// The result of [`switch_on_ipv6`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ipv6Availability {
    /// IPv6 is enabled.
    On,
    /// The kernel has no IPv6.
    NoKernel,
    /// The interface has no IPv6, though the kernel has.
    NoInterface,
}

/// Enables IPv6 on an interface of this thread's network namespace, whatever the default for new
/// interfaces is.
///
/// # Errors
/// When IPv6 is disabled and the setting cannot be written.
pub fn switch_on_ipv6(interface: &str) -> io::Result<Ipv6Availability> {
    let name = format!("net/ipv6/conf/{interface}/disable_ipv6");
    match read(&name).as_deref() {
        Some("0") => Ok(Ipv6Availability::On),
        Some(_) => write(&name, "0").map(|()| Ipv6Availability::On),
        None if read("net/ipv6/conf/all/disable_ipv6").is_some() => {
            Ok(Ipv6Availability::NoInterface)
        }
        None => Ok(Ipv6Availability::NoKernel),
    }
}

/// Lets an interface of this thread's network namespace answer ARP only for its own addresses. If
/// /proc/sys is read-only, it answers for all addresses of its host, which is the kernel's default.
pub fn answer_for_own_addresses(interface: &str) {
    if let Err(error) = write(&format!("net/ipv4/conf/{interface}/arp_ignore"), "1") {
        tracing::debug!(interface, %error, "could not set arp_ignore");
    }
}

/// Whether a wrong setting has an effect, given the other settings.
fn has_effect(interface: &str, family: &str, setting: &str) -> bool {
    let is = |name: &str, value: &str| {
        read(&format!("net/{family}/conf/{name}/{setting}")).is_some_and(|is| is == value)
    };
    let other = |setting: &str| read(&format!("net/{family}/conf/{interface}/{setting}"));
    let is_on = |setting: &str| other(setting).is_some_and(|is| is == "1");
    match (family, setting) {
        // An interface that forwards accepts advertisements only if `accept_ra` is 2, and no
        // redirects.
        ("ipv6", "accept_ra") => {
            !is_on("disable_ipv6") && (is(interface, "2") || !is_on("forwarding"))
        }
        ("ipv6", "accept_redirects") => !is_on("disable_ipv6") && !is_on("forwarding"),
        // An interface that forwards accepts redirects only if `all` does, too.
        ("ipv4", "accept_redirects") => !is_on("forwarding") || is("all", "1"),
        _ => false,
    }
}

/// Returns the problem of a setting that could not be changed.
fn problem(name: &str, is: &str, value: &str, error: &io::Error) -> Problem {
    let name = dotted(name);
    let what = format!(
        "{name} is {is} and cannot be set to {value} ({error}), so pods can install routes on this host"
    );
    let fix =
        format!("set guard = true, which drops such packets, or run sysctl -w {name}={value}");
    Problem::new(ProblemCode::RoutesOfPods, name, what, fix)
}

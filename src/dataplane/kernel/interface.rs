//! What an interface of ours must not do for whoever is behind it, by its own sysctls.
//!
//! A pod may send what it likes. Without these, or rules that drop it (`firewall`), the kernel would take a
//! router advertisement or a redirect of a pod for that of a router, and give this host the routes in it
//! (CVE-2020-10749). And it would answer for addresses of others on the pod's side.

use std::io;

use super::sysctl::{dotted, read, write};

/// Family, setting and the value that is right. What an interface would send or proxy is off as well, as far
/// as the setting of all interfaces does not turn it on.
const CLOSED: [(&str, &str, &str); 7] = [
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "accept_redirects", "0"),
    ("ipv6", "proxy_ndp", "0"),
    ("ipv4", "accept_redirects", "0"),
    ("ipv4", "secure_redirects", "0"),
    ("ipv4", "send_redirects", "0"),
    ("ipv4", "proxy_arp", "0"),
];

/// Whether an interface has IPv6 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ipv6 {
    On,
    Off,
    /// For something else to say.
    AsItIs,
}

/// How an interface was found, and left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Closed {
    /// Settings that were wrong and are right now.
    pub set: u64,
    /// What is wrong and could not be changed, as sentences with the command that helps.
    pub problems: Vec<String>,
}

/// Closes an interface of the network namespace of this thread. Where the kernel has no such setting (no
/// IPv6, or none on an interface this narrow) nothing is wrong.
pub fn close(interface: &str, ipv6: Ipv6) -> Closed {
    let mut closed = Closed::default();
    let switch = match ipv6 {
        Ipv6::On => Some(("ipv6", "disable_ipv6", "0")),
        Ipv6::Off => Some(("ipv6", "disable_ipv6", "1")),
        Ipv6::AsItIs => None,
    };
    for (family, setting, value) in CLOSED.into_iter().chain(switch) {
        let name = format!("net/{family}/conf/{interface}/{setting}");
        let Some(is) = read(&name).filter(|is| is != value) else { continue };
        match write(&name, value) {
            Ok(()) => closed.set += 1,
            Err(error) if matters(interface, family, setting) => {
                closed.problems.push(problem(&name, &is, value, &error));
            }
            Err(_) => {}
        }
    }
    closed
}

/// What became of IPv6 on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switched {
    On,
    /// The kernel has no IPv6 at all.
    NoKernel,
    /// It has none on this interface.
    NoInterface,
}

/// Lets an interface of the network namespace of this thread have IPv6 addresses, whatever is set for new
/// ones.
///
/// # Errors
/// Where it is off and may not be switched on.
pub fn switch_on_ipv6(interface: &str) -> io::Result<Switched> {
    let name = format!("net/ipv6/conf/{interface}/disable_ipv6");
    match read(&name).as_deref() {
        Some("0") => Ok(Switched::On),
        Some(_) => write(&name, "0").map(|()| Switched::On),
        None if read("net/ipv6/conf/all/disable_ipv6").is_some() => Ok(Switched::NoInterface),
        None => Ok(Switched::NoKernel),
    }
}

/// Lets an interface of the network namespace of this thread answer ARP for its own addresses alone. Where
/// /proc/sys cannot be written it is as on every host with two interfaces in one network.
pub fn answer_for_own_addresses(interface: &str) {
    if let Err(error) = write(&format!("net/ipv4/conf/{interface}/arp_ignore"), "1") {
        tracing::debug!(interface, %error, "arp_ignore was not set");
    }
}

/// Whether a setting that is wrong has any effect as the others are.
fn matters(interface: &str, family: &str, setting: &str) -> bool {
    let is = |name: &str, value: &str| {
        read(&format!("net/{family}/conf/{name}/{setting}")).is_some_and(|is| is == value)
    };
    let other = |setting: &str| read(&format!("net/{family}/conf/{interface}/{setting}"));
    let is_on = |setting: &str| other(setting).is_some_and(|is| is == "1");
    match (family, setting) {
        // An interface that forwards takes advertisements only by 2, and no redirects.
        ("ipv6", "accept_ra") => {
            !is_on("disable_ipv6") && (is(interface, "2") || !is_on("forwarding"))
        }
        ("ipv6", "accept_redirects") => !is_on("disable_ipv6") && !is_on("forwarding"),
        // One that forwards takes redirects only if all do.
        ("ipv4", "accept_redirects") => !is_on("forwarding") || is("all", "1"),
        _ => false,
    }
}

fn problem(name: &str, is: &str, value: &str, error: &io::Error) -> String {
    let name = dotted(name);
    format!(
        "{name} is {is} and cannot be set to {value} ({error}): a pod can give this host routes; set \
         guard = true, which drops what would, or run sysctl -w {name}={value}"
    )
}

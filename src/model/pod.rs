//! A pod's attachment to the overlay: container, interface and addresses.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::Mac;

/// One interface of one container. Requests of runtimes refer to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    container: String,
    interface: String,
}

/// A container id or an interface name that is not allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachmentError {
    /// The container or endpoint id is not allowed.
    #[error(
        "container or endpoint id {0:?}: it must begin with a letter or digit, contain only letters, digits, \
         \"_\", \".\" and \"-\", and have at most 153 characters"
    )]
    Container(String),
    /// The interface name is not allowed.
    #[error(
        "interface name {0:?}: it must have 1 to 15 bytes without \"/\", \":\" and white space, and must not \
         be \".\" or \"..\""
    )]
    Interface(String),
    /// The kernel would complete the interface name.
    #[error(
        "interface name {0:?}: the kernel replaces \"%d\" by a number and refuses any other \"%\": give the \
         complete name"
    )]
    Template(String),
    /// The interface name has a special meaning below /proc/sys.
    #[error(
        "interface name {0:?}: the kernel reserves it for the sysctls of all interfaces: choose another name"
    )]
    Reserved(String),
}

/// Greatest length of a container id, in characters. Docker, containerd and CRI-O use 64. `ctr` and nerdctl
/// prepend the namespace; containerd limits both parts to 76 (`identifiers.maxLength`). The alias of an
/// interface must be able to hold the id.
pub const CONTAINER_MAX: usize = 76 + 1 + 76;
/// Greatest length of an interface name, in bytes: `IFNAMSIZ` without the terminating zero.
const INTERFACE_MAX: usize = 15;

impl Attachment {
    /// Checks both names.
    ///
    /// # Errors
    /// If CNI (SPEC.md, section 2) or the kernel (`dev_valid_name`) does not allow a name.
    pub fn new(container: &str, interface: &str) -> Result<Self, AttachmentError> {
        let plain = |c: char| c.is_ascii_alphanumeric();
        let allowed = |c: char| plain(c) || matches!(c, '_' | '.' | '-');
        if !container.starts_with(plain)
            || !container.chars().all(allowed)
            || container.len() > CONTAINER_MAX
        {
            return Err(AttachmentError::Container(container.to_owned()));
        }
        check_interface_name(interface)?;
        Ok(Self { container: container.to_owned(), interface: interface.to_owned() })
    }

    /// Returns the container id, or Docker's endpoint id.
    pub fn container(&self) -> &str {
        &self.container
    }

    /// Returns the interface name.
    pub fn interface(&self) -> &str {
        &self.interface
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.container, self.interface)
    }
}

/// Checks the name of an interface.
///
/// # Errors
/// If the kernel does not allow the name (`dev_valid_name`), would complete it (`dev_alloc_name`), or has
/// another use for it below /proc/sys/net/ipv4/conf (`sysctl_dev_name_is_allowed`).
pub fn check_interface_name(name: &str) -> Result<(), AttachmentError> {
    let forbidden = |c: char| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control();
    let fits = (1..=INTERFACE_MAX).contains(&name.len());
    if !fits || matches!(name, "." | "..") || name.contains(forbidden) {
        return Err(AttachmentError::Interface(name.to_owned()));
    }
    if name.contains('%') {
        return Err(AttachmentError::Template(name.to_owned()));
    }
    if matches!(name, "all" | "default") {
        return Err(AttachmentError::Reserved(name.to_owned()));
    }
    Ok(())
}

/// An attachment with its addresses, as the database holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Container and interface.
    pub attachment: Attachment,
    /// The runtime that requested the attachment, for CNI with its network. A runtime may remove only its own
    /// attachments.
    pub owner: String,
    /// The pod's addresses.
    pub addresses: Addresses,
    /// Path of the network namespace, for operators.
    pub netns: String,
    /// The MAC that a runtime or its user chose. Otherwise `None`: the MAC of a CNI pod follows from its
    /// first address, and that of a Docker container is unknown.
    pub mac: Option<Mac>,
}

/// One address, or one of each family in a dual-stack overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Addresses {
    /// The only address, or the IPv4 one.
    pub first: IpAddr,
    /// The IPv6 address in a dual-stack overlay.
    pub second: Option<IpAddr>,
}

impl Addresses {
    /// Iterates over the addresses.
    pub fn iter(self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(self.first).chain(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachment_with_an_unsafe_name_is_refused() {
        let longest = format!("{}-{}", "n".repeat(76), "i".repeat(76));
        for container in ["3f9a-b.c_d", &longest] {
            assert!(Attachment::new(container, "eth0").is_ok(), "{container}");
        }
        let too_long = format!("{longest}i");
        for container in ["", "-a", ".", "..", "a/b", "../etc", "a b", "ä", &too_long] {
            let error = Attachment::new(container, "eth0").expect_err(container).to_string();
            assert!(error.contains("endpoint id"), "{error}");
        }
        for interface in ["", ".", "..", "a/b", "a:1", "a b", "a\n", "sixteen-is-too-m"] {
            let error = Attachment::new("a", interface).expect_err(interface).to_string();
            assert!(error.contains("interface name"), "{error}");
        }
        for (interface, why) in
            [("eth%d", "a number"), ("a%", "a number"), ("all", "sysctls"), ("default", "sysctls")]
        {
            let error = Attachment::new("a", interface).expect_err(interface).to_string();
            assert!(error.contains(interface) && error.contains(why), "{error}");
        }
        assert!(Attachment::new("a", "all0").is_ok());
    }
}

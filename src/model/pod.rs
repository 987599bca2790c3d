//! A container's place in the overlay: which interface of which container has which addresses.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::Mac;

/// One interface of one container. What is asked for, and what is given back, is called by this.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    container: String,
    interface: String,
}

/// A name that a runtime may not give.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachmentError {
    #[error(
        "container or endpoint id {0:?}: it begins with a letter or digit, goes on with those, \"_\", \".\" \
         and \"-\", and has at most 153 characters"
    )]
    Container(String),
    #[error(
        "interface name {0:?}: it has 1 to 15 bytes without \"/\", \":\" and white space, and is not \".\" \
         or \"..\""
    )]
    Interface(String),
    #[error(
        "interface name {0:?}: the kernel puts a number in the place of \"%d\" and takes no other \"%\": \
         give the whole name"
    )]
    Template(String),
    #[error(
        "interface name {0:?}: the kernel calls the sysctls of all interfaces so: choose another name"
    )]
    Reserved(String),
}

/// Docker, containerd and CRI-O have 64; `ctr` and nerdctl name the namespace as well, and containerd has 76
/// for each of the two (`identifiers.maxLength`). The alias of an interface has to hold it.
pub const CONTAINER_MAX: usize = 76 + 1 + 76;
/// `IFNAMSIZ` less the zero at the end.
const INTERFACE_MAX: usize = 15;

impl Attachment {
    /// # Errors
    /// Names that CNI (SPEC.md, section 2) or the kernel (`dev_valid_name`) do not allow.
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

    pub fn container(&self) -> &str {
        &self.container
    }

    pub fn interface(&self) -> &str {
        &self.interface
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.container, self.interface)
    }
}

/// # Errors
/// Names that the kernel does not allow (`dev_valid_name`), that it would complete (`dev_alloc_name`), or
/// that have another meaning below /proc/sys/net/ipv4/conf (`sysctl_dev_name_is_allowed`).
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

/// An attachment with its addresses, as it is kept on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub attachment: Attachment,
    /// On whose behalf: a runtime may collect only what is its own.
    pub owner: String,
    pub addresses: Addresses,
    /// Path of the network namespace, for people.
    pub netns: String,
    /// The MAC that a runtime or its user has chosen. Without one, that of a pod of CNI follows from its
    /// first address, and that of a container of Docker is not known.
    pub mac: Option<Mac>,
}

/// One address, or in a dual-stack overlay one of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Addresses {
    pub first: IpAddr,
    pub second: Option<IpAddr>,
}

impl Addresses {
    pub fn iter(self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(self.first).chain(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_lead_elsewhere_are_refused() {
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

//! Several overlays on one host: everything that two of them must not share follows from a name.
//!
//! The same name gives the same numbers on every host, so nothing else has to be agreed on. The UDP port of
//! VXLAN is shared: the kernel tells networks apart by their VNI, and so does the guard.

use std::{fmt, path::PathBuf, str::FromStr};

use sha2::{Digest as _, Sha256};

/// UDP port for gossip of the instance without a name.
const PORT: u16 = 8473;
/// How all directories begin.
pub const NAME: &str = "gossamer";
const MAX_LEN: usize = 20;

/// The name of an overlay on a host; the first one needs none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instance(Option<String>);

impl Instance {
    pub fn state_dir(&self) -> PathBuf {
        format!("/var/lib/{}", self.directory()).into()
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        format!("/run/{}/gossamer.sock", self.directory()).into()
    }

    /// flannel's file.
    pub fn subnet_file(&self) -> PathBuf {
        format!("/run/{}/subnet.env", self.directory()).into()
    }

    /// How its directories are called.
    pub fn directory(&self) -> String {
        self.0.as_ref().map_or_else(|| NAME.to_owned(), |name| format!("{NAME}-{name}"))
    }

    /// VXLAN network identifier of a cluster created under this name. Short enough for the device's name.
    pub fn vni(&self) -> u32 {
        self.0.as_ref().map_or(1, |name| 1_000 + number(name, "vni") % 999_000)
    }

    /// UDP port for gossip: below those that kernels give out by themselves.
    pub fn port(&self) -> u16 {
        self.0.as_ref().map_or(PORT, |name| 20_000 + (number(name, "port") % 10_000) as u16)
    }
}

impl FromStr for Instance {
    type Err = BadInstance;

    fn from_str(text: &str) -> Result<Self, BadInstance> {
        let usual = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        match text {
            "" => Ok(Self(None)),
            _ if text.len() <= MAX_LEN && text.chars().all(usual) => {
                Ok(Self(Some(text.to_owned())))
            }
            _ => Err(BadInstance(text.to_owned())),
        }
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_deref().unwrap_or_default())
    }
}

/// A name that cannot be part of a file's name everywhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name for an instance: use up to {MAX_LEN} lower-case letters, digits and hyphens"
)]
pub struct BadInstance(String);

fn number(name: &str, what: &str) -> u32 {
    let hash = Sha256::digest(format!("gossamer instance {what} {name}"));
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::desired::device_name;

    #[test]
    fn a_name_gives_everything_that_two_overlays_must_not_share() {
        let plain = Instance::default();
        assert_eq!((plain.vni(), plain.port()), (1, 8473));
        assert_eq!(plain.socket(), PathBuf::from("/run/gossamer/gossamer.sock"));
        let blue: Instance = "blue".parse().expect("a name");
        assert_eq!(blue.state_dir(), PathBuf::from("/var/lib/gossamer-blue"));
        assert_eq!(blue.subnet_file(), PathBuf::from("/run/gossamer-blue/subnet.env"));
        // Other hosts of the overlay have computed the same: these may never change.
        assert_eq!((blue.vni(), blue.port()), (739_354, 26_977));
        let green: Instance = "green".parse().expect("a name");
        assert!(blue.vni() != green.vni() && blue.port() != green.port());
        assert_eq!(device_name(blue.vni()), format!("gossamer.{}", blue.vni()));
    }

    #[test]
    fn what_cannot_be_in_a_files_name_is_refused() {
        for bad in ["Blue", "a/b", "..", "a b", "a-name-that-is-far-too-long"] {
            let error = bad.parse::<Instance>().expect_err(bad).to_string();
            assert!(error.contains("lower-case letters"), "{error}");
        }
    }
}

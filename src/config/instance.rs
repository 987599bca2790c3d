//! Several overlays on one host. Everything that two of them must not share is derived from the
//! instance's name.
//!
//! A name gives the same numbers on every host, so hosts need no further agreement. The VXLAN port is
//! shared: kernel and guard distinguish the networks by VNI.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use sha2::{Digest as _, Sha256};

/// UDP gossip port of the unnamed instance.
const PORT: u16 = 8473;
/// Directory in which Docker looks for the sockets of plugins.
pub const DOCKER_PLUGINS: &str = "/run/docker/plugins";
/// Common prefix of all directories.
pub const NAME: &str = "gossamer";
/// Longest name, in bytes.
const MAX_LEN: usize = 20;

/// The name of an overlay on a host. The default instance has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instance(Option<String>);

impl Instance {
    /// Returns the directory of key and database.
    pub fn state_dir(&self) -> PathBuf {
        format!("/var/lib/{}", self.directory()).into()
    }

    /// Returns the path of the control socket.
    pub fn socket(&self) -> PathBuf {
        format!("/run/{}/gossamer.sock", self.directory()).into()
    }

    /// Returns the instance whose control socket has this path by default.
    pub fn of_socket(path: &Path) -> Option<Self> {
        let directory = path.parent()?.file_name()?.to_str()?;
        let name = match directory.strip_prefix(NAME)? {
            "" => "",
            rest => rest.strip_prefix('-')?,
        };
        name.parse().ok().filter(|instance: &Self| instance.socket() == path)
    }

    /// Returns the option that names the instance in a command, with a space before it; empty for the default
    /// instance.
    pub fn option(&self) -> String {
        self.0.as_ref().map_or_else(String::new, |name| format!(" --instance {name}"))
    }

    /// Returns the path of the socket of Docker's plugin. Docker derives the driver's name from the
    /// file name.
    pub fn docker_socket(&self, directory: &Path) -> PathBuf {
        directory.join(format!("{}.sock", self.directory()))
    }

    /// Returns the path of flannel's `subnet.env`.
    pub fn subnet_file(&self) -> PathBuf {
        format!("/run/{}/subnet.env", self.directory()).into()
    }

    /// Returns the path of the settings file that `init` and `join` write, and that the agent reads unless
    /// it is given another one.
    pub fn settings_file(&self) -> PathBuf {
        format!("/etc/gossamer/{}.toml", self.0.as_deref().unwrap_or(NAME)).into()
    }

    /// Returns the path of the token file that `join` writes.
    pub fn token_file(&self) -> PathBuf {
        let prefix = self.0.as_ref().map_or_else(String::new, |name| format!("{name}."));
        format!("/etc/gossamer/{prefix}token").into()
    }

    /// Returns the name of the instance's systemd unit.
    pub fn unit(&self) -> String {
        format!("{}.service", self.directory())
    }

    /// Returns the name of the instance's directories.
    pub fn directory(&self) -> String {
        self.0.as_ref().map_or_else(|| NAME.to_owned(), |name| format!("{NAME}-{name}"))
    }

    /// Returns the VNI of a cluster created under this name. It has at most six digits, so the device's
    /// name fits.
    pub fn vni(&self) -> u32 {
        self.0.as_ref().map_or(1, |name| 1_000 + number(name, "vni") % 999_000)
    }

    /// Returns the UDP gossip port. It is below the ports that kernels assign dynamically (32768 and up).
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

/// A name that is not valid in file names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a valid instance name: use up to {MAX_LEN} lower-case letters, digits and hyphens"
)]
pub struct BadInstance(String);

/// Derives a number from the name.
fn number(name: &str, what: &str) -> u32 {
    let hash = Sha256::digest(format!("gossamer instance {what} {name}"));
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::desired::device_name;

    #[test]
    fn instance_name_determines_paths_vni_and_port() {
        let plain = Instance::default();
        assert_eq!((plain.vni(), plain.port()), (1, 8473));
        assert_eq!(plain.socket(), PathBuf::from("/run/gossamer/gossamer.sock"));
        let blue: Instance = "blue".parse().expect("a name");
        assert_eq!(blue.state_dir(), PathBuf::from("/var/lib/gossamer-blue"));
        assert_eq!(blue.subnet_file(), PathBuf::from("/run/gossamer-blue/subnet.env"));
        // Other hosts have computed the same numbers: they must never change.
        assert_eq!((blue.vni(), blue.port()), (739_354, 26_977));
        let green: Instance = "green".parse().expect("a name");
        assert!(blue.vni() != green.vni() && blue.port() != green.port());
        assert_eq!(device_name(blue.vni()), format!("gossamer.{}", blue.vni()));
    }

    #[test]
    fn default_socket_names_its_instance_and_any_other_path_none() {
        for name in ["", "next", "a-b"] {
            let instance: Instance = name.parse().expect("a name");
            assert_eq!(Instance::of_socket(&instance.socket()), Some(instance));
        }
        let next: Instance = "next".parse().expect("a name");
        assert_eq!(
            (next.option().as_str(), Instance::default().option().as_str()),
            (" --instance next", "")
        );
        for other in
            ["/run/gossamer-next/other", "/tmp/gossamer.sock", "/run/gossamernext/gossamer.sock"]
        {
            assert_eq!(Instance::of_socket(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn instance_name_invalid_in_file_names_is_rejected() {
        for bad in ["Blue", "a/b", "..", "a b", "a-name-that-is-far-too-long"] {
            let error = bad.parse::<Instance>().expect_err(bad).to_string();
            assert!(error.contains("lower-case letters"), "{error}");
        }
    }
}

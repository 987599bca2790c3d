//! `subnet.env`, in flannel's format: other programs read this host's subnet from it.

use std::{io, path::Path};

use crate::{
    files::{self, PUBLIC, replace},
    model::Subnets,
    pods::gateway,
};

/// The content of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubnetFile(String);

impl SubnetFile {
    /// Returns the content for these networks of the cluster, this host's subnets, and the MTU in bytes.
    pub fn new(networks: Subnets, subnets: Subnets, mtu: u32, masquerade: bool) -> Self {
        Self(contents(networks, subnets, mtu, masquerade))
    }
}

/// Writes the file if its content differs. The replacement is atomic: readers see the old or the new
/// file.
///
/// # Errors
/// Fails if the file cannot be written.
pub fn write(path: &Path, SubnetFile(text): &SubnetFile) -> io::Result<()> {
    if files::read_text(path, files::SMALL).is_ok_and(|present| present == *text) {
        return Ok(());
    }
    replace(path, text, PUBLIC)
}

fn contents(networks: Subnets, subnets: Subnets, mtu: u32, masquerade: bool) -> String {
    let pairs = networks.iter().zip(subnets.iter());
    let lines: String = pairs
        .map(|(network, subnet)| {
            let prefix = if subnet.addr().is_ipv4() { "FLANNEL" } else { "FLANNEL_IPV6" };
            let (gateway, len) = (gateway(subnet), subnet.prefix_len());
            format!("{prefix}_NETWORK={network}\n{prefix}_SUBNET={gateway}/{len}\n")
        })
        .collect();
    format!("{lines}FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={masquerade}\n")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn subnet_file_has_flannels_format_and_is_not_rewritten() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("run/subnet.env");
        let networks = subnets("10.42.0.0/16", None);
        let ours = subnets("10.42.64.0/24", None);
        write(&path, &SubnetFile::new(networks, ours, 1450, false)).expect("written");
        assert_eq!(
            fs::read_to_string(&path).expect("read"),
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.64.1/24\n\
             FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
        );
        let before = fs::metadata(&path).expect("metadata").modified().expect("time");
        write(&path, &SubnetFile::new(networks, ours, 1450, false)).expect("unchanged");
        assert_eq!(fs::metadata(&path).expect("metadata").modified().expect("time"), before);
    }

    #[test]
    fn subnet_file_has_separate_ipv6_lines() {
        let dual = contents(
            subnets("10.42.0.0/16", Some("fd42::/48")),
            subnets("10.42.64.0/24", Some("fd42:0:0:40::/64")),
            1430,
            true,
        );
        let lines: Vec<&str> = dual.lines().collect();
        assert_eq!(
            lines[1..4],
            [
                "FLANNEL_SUBNET=10.42.64.1/24",
                "FLANNEL_IPV6_NETWORK=fd42::/48",
                "FLANNEL_IPV6_SUBNET=fd42:0:0:40::1/64",
            ]
        );
        let alone =
            contents(subnets("fd42::/48", None), subnets("fd42:0:0:40::/64", None), 1430, true);
        assert!(alone.ends_with("FLANNEL_IPMASQ=true\n"), "{alone}");
        assert!(alone.starts_with("FLANNEL_IPV6_NETWORK=fd42::/48\n"), "{alone}");
    }

    fn subnets(first: &str, second: Option<&str>) -> Subnets {
        Subnets {
            first: first.parse().expect("network"),
            second: second.map(|text| text.parse().expect("network")),
        }
    }
}

//! `subnet.env`, flannel's file to the letter: how other programs learn this host's subnet.

use std::{fs, io, path::Path};

use ipnet::Ipv4Net;

/// Writes the file, unless it says so already. Readers see the old or the new file, never half of one.
pub fn write(path: &Path, network: Ipv4Net, subnet: Ipv4Net, mtu: u32) -> io::Result<()> {
    let text = contents(network, subnet, mtu);
    if fs::read_to_string(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let temporary = path.with_extension("env.new");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

fn contents(network: Ipv4Net, subnet: Ipv4Net, mtu: u32) -> String {
    // flannel gives the first usable address with the subnet's length, not the network address.
    let gateway = subnet.hosts().next().unwrap_or(subnet.network());
    let len = subnet.prefix_len();
    format!(
        "FLANNEL_NETWORK={network}\n\
         FLANNEL_SUBNET={gateway}/{len}\n\
         FLANNEL_MTU={mtu}\n\
         FLANNEL_IPMASQ=false\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_flannels_to_the_letter() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("run/subnet.env");
        let network = "10.42.0.0/16".parse().expect("network");
        let subnet = "10.42.64.0/24".parse().expect("subnet");
        write(&path, network, subnet, 1450).expect("written");
        assert_eq!(
            fs::read_to_string(&path).expect("read"),
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.64.1/24\n\
             FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
        );
        let before = fs::metadata(&path).expect("metadata").modified().expect("time");
        write(&path, network, subnet, 1450).expect("unchanged");
        assert_eq!(fs::metadata(&path).expect("metadata").modified().expect("time"), before);
    }
}

//! Names of bridges, and of the ends of pods' veth pairs on this host. The name of an end is a hash of the
//! attachment, so an end that a killed agent left half configured is recognized.

use sha2::{Digest as _, Sha256};

use super::alias::parse_alias;
use crate::{
    model::{Attachment, Mac},
    netlink::link::Link,
};

/// Prefix of the names of bridges and of pods' ends on this host.
pub const PREFIX: &str = "gsm";
/// Bytes of the hash in a name. The name has 13 characters; the kernel allows 15.
const HASH_LEN: usize = 5;
/// Length of the name of a veth pair's end on this host, in bytes.
pub const LINK_NAME_LEN: usize = PREFIX.len() + 2 * HASH_LEN;

/// Returns the default name of the bridge of the overlay with this VNI.
pub fn bridge_name(vni: u32) -> String {
    if vni == 1 { format!("{PREFIX}0") } else { format!("{PREFIX}{vni}") }
}

/// Returns the name of the end on this host.
pub fn link_name(attachment: &Attachment) -> String {
    let digits: String = hash(attachment).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{digits}")
}

/// Returns the name of a pod's own end on this host, until its runtime moves it into the pod.
pub fn loose_name(attachment: &Attachment) -> String {
    loose_end(&link_name(attachment))
}

/// Returns the same name, from the name of the end on the bridge.
pub fn loose_end(link: &str) -> String {
    format!("{link}p")
}

/// Returns whether a name is that of a veth pair's end on this host.
pub fn is_link_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|digits| {
        digits.len() == 2 * HASH_LEN && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// Returns the MAC of the end on this host.
pub(super) fn link_mac(attachment: &Attachment) -> Mac {
    let [a, b, c, d, e] = hash(attachment);
    // Locally administered, and different from those of pods, which begin with 0a:58.
    Mac::from_bytes([0x0e, a, b, c, d, e])
}

/// Returns the original name of an interface that another program has renamed, from its alias. `None` if it
/// still has a name of gossamer's, or never had one.
pub(super) fn original_name(link: &Link) -> Option<String> {
    if is_link_name(&link.name) {
        return None;
    }
    parse_alias(&link.alias).map(|content| link_name(&content.pod.attachment))
}

fn hash(attachment: &Attachment) -> [u8; HASH_LEN] {
    let hash = Sha256::digest(attachment.to_string());
    std::array::from_fn(|i| hash[i])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn veth_ends_are_recognized_by_name() {
        let attachment = Attachment::new("c", "eth0").expect("a name");
        assert!(is_link_name(&link_name(&attachment)));
        for other in ["gsm0", "gsm7", "eth0", "gsm012345678", "gsm012345678x", "gossamer.1"] {
            assert!(!is_link_name(other), "{other}");
        }
    }
}

//! How the ends of pods' veth pairs on this host are called: by a hash of the attachment, so that what an
//! agent left half-made is found again.

use sha2::{Digest as _, Sha256};

use super::{alias::from_alias, bridge::PREFIX};
use crate::{
    model::{Attachment, Mac},
    netlink::link::Link,
};

/// So many bytes of the hash: the name has 13 characters, the kernel allows 15.
const HASHED: usize = 5;
/// Bytes in the name of a veth pair's end on this host.
pub const LINK_NAME: usize = PREFIX.len() + 2 * HASHED;

/// The name of the end on this host.
pub fn link_name(attachment: &Attachment) -> String {
    let digits: String = hash(attachment).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{digits}")
}

/// The name of a pod's own end until its runtime has fetched it.
pub fn loose_name(attachment: &Attachment) -> String {
    loose_end(&link_name(attachment))
}

/// The same, by the name of the end on the bridge.
pub fn loose_end(link: &str) -> String {
    format!("{link}p")
}

/// Whether an interface is called as the end of a veth pair on this host is.
pub fn is_link_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|digits| {
        digits.len() == 2 * HASHED && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

pub(super) fn link_mac(attachment: &Attachment) -> Mac {
    let [a, b, c, d, e] = hash(attachment);
    // Locally administered, and unlike those of pods.
    Mac::from_bytes([0x0e, a, b, c, d, e])
}

/// The name that an interface has been given, if another program has changed it, by what its alias says.
pub(super) fn told_name(link: &Link) -> Option<String> {
    if is_link_name(&link.name) {
        return None;
    }
    from_alias(&link.alias).map(|told| link_name(&told.pod.attachment))
}

fn hash(attachment: &Attachment) -> [u8; HASHED] {
    let hash = Sha256::digest(attachment.to_string());
    std::array::from_fn(|i| hash[i])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cables_are_told_from_other_interfaces_by_their_names() {
        let attachment = Attachment::new("c", "eth0").expect("a name");
        assert!(is_link_name(&link_name(&attachment)));
        for other in ["gsm0", "gsm7", "eth0", "gsm012345678", "gsm012345678x", "gossamer.1"] {
            assert!(!is_link_name(other), "{other}");
        }
    }
}

//! What the alias of a pod's end on this host says: who it is of, for a node that has lost its memory.

use std::cmp::Ordering;

use super::bridge::mac_at;
use crate::model::{Addresses, Attachment, Mac, Pod};

/// How the alias of a pod's end on this host begins.
const POD_ALIAS: &str = "gossamer pod ";
/// The kernel takes no longer ones (`IFALIASZ` less the zero at the end).
const ALIAS_MAX: usize = 255;

/// Behind the addresses of a pod's interface that was to have no default route.
const NO_DEFAULT_ROUTE: &str = ";";

/// What an alias tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AliasContent {
    pub(super) pod: Pod,
    /// Whether the interface may have a default route.
    pub(super) default_route: bool,
}

impl AliasContent {
    /// Which of two interfaces of a pod its routes are better given to: one that may have a default route,
    /// and of two of these the first by name.
    pub(super) fn cmp_as_successor(&self, other: &Self) -> Ordering {
        let place = |told: &Self| (!told.default_route, told.pod.attachment.clone());
        place(self).cmp(&place(other))
    }
}

/// Who has which addresses behind a port, as far as it fits: the owner may have a long name. A MAC that does
/// not follow from the address is told too.
pub(super) fn alias(pod: &Pod, mac: Mac, default_route: bool) -> String {
    let addresses: Vec<String> = pod.addresses.iter().map(|ip| ip.to_string()).collect();
    let addresses = addresses.join(",");
    let mark = if default_route { "" } else { NO_DEFAULT_ROUTE };
    let with = |mac: String| format!("{POD_ALIAS}{addresses}{mac}{mark} {}", pod.attachment);
    let mut alias = match mac == mac_at(pod.addresses.first) {
        true => with(String::new()),
        false => with(format!("={mac}")),
    };
    if alias.len() > ALIAS_MAX {
        // So the longest names of containers and interfaces fit.
        alias = with(format!("={}", mac.digits()));
    }
    alias.push(' ');
    alias.push_str(&pod.owner);
    while alias.len() > ALIAS_MAX {
        alias.pop();
    }
    alias
}

/// Reads such an alias.
pub(super) fn from_alias(alias: &str) -> Option<AliasContent> {
    let mut words = alias.strip_prefix(POD_ALIAS)?.splitn(4, ' ');
    let word = words.next()?;
    let (word, default_route) = match word.strip_suffix(NO_DEFAULT_ROUTE) {
        Some(word) => (word, false),
        None => (word, true),
    };
    let (addresses, mac) = match word.split_once('=') {
        Some((addresses, mac)) => {
            (addresses, Some(Mac::from_digits(mac).or_else(|| mac.parse().ok())?))
        }
        None => (word, None),
    };
    let mut addresses = addresses.split(',').map(str::parse);
    let first = addresses.next()?.ok()?;
    let second = addresses.next().transpose().ok()?;
    let attachment = Attachment::new(words.next()?, words.next()?).ok()?;
    let owner = words.next().unwrap_or_default().to_owned();
    // Its path is not known any more; that it is somewhere is certain.
    let netns = "?".to_owned();
    let pod = Pod { attachment, owner, addresses: Addresses { first, second }, netns, mac };
    Some(AliasContent { pod, default_route })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CONTAINER_MAX;

    #[test]
    fn an_alias_tells_all_of_a_pod_that_fits() {
        let pod = |owner: &str, second: Option<&str>| Pod {
            attachment: Attachment::new(&"a".repeat(128), "eth0").expect("a name"),
            owner: owner.to_owned(),
            addresses: Addresses {
                first: [10, 42, 7, 2].into(),
                second: second.map(|ip| ip.parse().expect("an address")),
            },
            netns: "?".to_owned(),
            mac: None,
        };
        let usual = mac_at([10, 42, 7, 2].into());
        let asked_for = Mac::from_bytes([2, 0, 0, 0, 0, 5]);
        for pod in [pod("cni/net", None), pod("docker", Some("fd42:0:0:7::2"))] {
            for (mac, told) in [(asked_for, Some(asked_for)), (usual, None)] {
                for default_route in [true, false] {
                    let found = from_alias(&alias(&pod, mac, default_route));
                    let pod = Pod { mac: told, ..pod.clone() };
                    assert_eq!(found, Some(AliasContent { pod, default_route }));
                }
            }
        }
        // The longest of all.
        let ip = |text: &str| text.parse().expect("an address");
        let v6 = ip("fd42:1111:2222:3333:4444:5555:6666:7777");
        let longest = Pod {
            attachment: Attachment::new(&"a".repeat(CONTAINER_MAX), "interface-name0")
                .expect("names"),
            addresses: Addresses { first: ip("100.127.255.254"), second: Some(v6) },
            ..pod("", None)
        };
        let found = from_alias(&alias(&longest, asked_for, false)).expect("a pod");
        assert_eq!(found.pod, Pod { mac: Some(asked_for), ..longest });
        let long = pod(&"o".repeat(300), None);
        let text = alias(&long, usual, true);
        let found = from_alias(&text).expect("a pod").pod;
        assert_eq!((text.len(), found.addresses), (ALIAS_MAX, long.addresses));
        for other in [
            "",
            "gossamer pods",
            "gossamer pod x",
            "gossamer pod 10.42.7.2 ../a eth0 o",
            "gossamer pod 10.42.7.2=x a eth0 o",
        ] {
            assert_eq!(from_alias(other), None, "{other}");
        }
    }
}

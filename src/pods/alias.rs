//! The alias of a pod's end on this host. It names the pod, for a node whose database is lost.

use std::cmp::Ordering;

use super::mac_at;
use crate::model::{Addresses, Attachment, Mac, Pod};

/// Prefix of the alias of a pod's end on this host.
const POD_ALIAS: &str = "gossamer pod ";
/// Maximum length of an alias, in bytes (`IFALIASZ` without the terminating zero).
const ALIAS_MAX: usize = 255;

/// Follows the addresses of an interface for which no default route was requested.
const NO_DEFAULT_ROUTE: &str = ";";

/// The parsed content of an alias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AliasContent {
    pub(super) pod: Pod,
    /// Whether the interface may have a default route.
    pub(super) default_route: bool,
}

impl AliasContent {
    /// Compares two interfaces of a pod as successors of a third one's routes. An interface that may have a
    /// default route comes first, then the first by name.
    pub(super) fn cmp_as_successor(&self, other: &Self) -> Ordering {
        let rank = |content: &Self| (!content.default_route, content.pod.attachment.clone());
        rank(self).cmp(&rank(other))
    }
}

/// Returns the alias of a pod. Contains the MAC only if it does not follow from the address. Truncates the
/// owner's name if the alias is too long.
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
        // Without colons the longest names of containers and interfaces fit.
        alias = with(format!("={}", mac.digits()));
    }
    alias.push(' ');
    alias.push_str(&pod.owner);
    while alias.len() > ALIAS_MAX {
        alias.pop();
    }
    alias
}

/// Parses an alias; `None` if it is not that of a pod.
pub(super) fn parse_alias(alias: &str) -> Option<AliasContent> {
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
    // The alias lacks the path. A placeholder shows that the pod has a namespace.
    let netns = "?".to_owned();
    let pod = Pod { attachment, owner, addresses: Addresses { first, second }, netns, mac };
    Some(AliasContent { pod, default_route })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CONTAINER_MAX;

    #[test]
    fn alias_contains_the_pod_as_far_as_it_fits() {
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
            for (mac, stored) in [(asked_for, Some(asked_for)), (usual, None)] {
                for default_route in [true, false] {
                    let found = parse_alias(&alias(&pod, mac, default_route));
                    let pod = Pod { mac: stored, ..pod.clone() };
                    assert_eq!(found, Some(AliasContent { pod, default_route }));
                }
            }
        }
        // The longest names and addresses.
        let ip = |text: &str| text.parse().expect("an address");
        let v6 = ip("fd42:1111:2222:3333:4444:5555:6666:7777");
        let longest = Pod {
            attachment: Attachment::new(&"a".repeat(CONTAINER_MAX), "interface-name0")
                .expect("names"),
            addresses: Addresses { first: ip("100.127.255.254"), second: Some(v6) },
            ..pod("", None)
        };
        let found = parse_alias(&alias(&longest, asked_for, false)).expect("a pod");
        assert_eq!(found.pod, Pod { mac: Some(asked_for), ..longest });
        let long = pod(&"o".repeat(300), None);
        let text = alias(&long, usual, true);
        let found = parse_alias(&text).expect("a pod").pod;
        assert_eq!((text.len(), found.addresses), (ALIAS_MAX, long.addresses));
        for other in [
            "",
            "gossamer pods",
            "gossamer pod x",
            "gossamer pod 10.42.7.2 ../a eth0 o",
            "gossamer pod 10.42.7.2=x a eth0 o",
        ] {
            assert_eq!(parse_alias(other), None, "{other}");
        }
    }
}

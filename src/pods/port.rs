//! Settings of a pod's port on the bridge: what another value of them would drop, and how they are put right.
//!
//! The kernel gives new ports the right values, all but the hairpin mode. Another program or an operator may
//! change them (`bridge link set`, `ip link set type bridge_slave`), and then packets of the pod are dropped
//! where nothing counts them.

use std::fmt;

use rtnetlink::{
    LinkMessageBuilder, LinkUnspec,
    packet_core::{DefaultNla, Nla},
    packet_route::{
        RouteNetlinkMessage,
        link::{
            BridgePortState, InfoBridgePort, InfoPortData, InfoPortKind, LinkAttribute, LinkInfo,
        },
    },
};

use crate::netlink::{Request, link::Link};

/// `IFLA_BRPORT_STATE` (linux/if_link.h), and `BR_STATE_FORWARDING`.
const STATE: u16 = 1;
const FORWARDING: u8 = 3;
/// `IFLA_BRPORT_MODE`: the hairpin mode.
const HAIRPIN: u16 = 4;

/// Number of each setting, the value that it has to have, and its name in `bridge link set`.
const SETTINGS: [(u16, u8, &str); 16] = [
    (STATE, FORWARDING, "state"),
    (HAIRPIN, 1, "hairpin"),
    (5, 0, "guard"),
    (6, 0, "root_block"),
    (8, 1, "learning"),
    (9, 1, "flood"),
    (10, 0, "proxy_arp"),
    (12, 0, "proxy_arp_wifi"),
    (27, 1, "mcast_flood"),
    (28, 0, "mcast_to_unicast"),
    (29, 0, "vlan_tunnel"),
    (30, 1, "bcast_flood"),
    (32, 0, "neigh_suppress"),
    (33, 0, "isolated"),
    (39, 0, "locked"),
    (40, 0, "mab"),
];

/// Whether the bridge takes packets from a port and to it.
pub(super) fn is_open(port: &Link) -> bool {
    port.is_operational() && told(port).contains(&(STATE, FORWARDING))
}

/// What a bridge does with packets of a port (`BR_STATE_*` of linux/if_bridge.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    Disabled,
    Listening,
    Learning,
    Forwarding,
    Blocking,
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disabled => "disabled",
            Self::Listening => "listening",
            Self::Learning => "learning",
            Self::Forwarding => "forwarding",
            Self::Blocking => "blocking",
        })
    }
}

/// The state of a port of any bridge; none, if it is not told.
pub fn state(port: &Link) -> Option<PortState> {
    let states = [
        PortState::Disabled,
        PortState::Listening,
        PortState::Learning,
        PortState::Forwarding,
        PortState::Blocking,
    ];
    let (_, value) = told(port).into_iter().find(|(kind, _)| *kind == STATE)?;
    states.get(usize::from(value)).copied()
}

/// Whether all settings that the kernel tells of a port are right.
pub fn is_right(port: &Link) -> bool {
    wrong(port).is_empty()
}

/// Names of the settings that are wrong, as `bridge link set` calls them.
pub fn wrong_names(port: &Link) -> Vec<&'static str> {
    wrong(port).into_iter().map(|(.., name)| name).collect()
}

/// The changes that put wrong settings right; none where all are right. The state travels by itself: the
/// kernel refuses it while the pod's end is down, and then sets it when that comes up.
pub(super) fn repair(port: &Link) -> Vec<Request> {
    let (state, flags): (Vec<_>, Vec<_>) =
        wrong(port).into_iter().partition(|(kind, ..)| *kind == STATE);
    let flags = flags.into_iter().map(|(kind, value, _)| flag(kind, value)).collect::<Vec<_>>();
    let state = state.into_iter().map(|_| InfoBridgePort::State(BridgePortState::Forwarding));
    [flags, state.collect()]
        .into_iter()
        .filter(|settings| !settings.is_empty())
        .map(|settings| request(&port.name, settings))
        .collect()
}

/// Lets a pod speak to itself by way of a service's address.
pub(super) fn hairpin(port: &str) -> Request {
    request(port, vec![InfoBridgePort::HairpinMode(true)])
}

/// The same for a new port, which it names and sets up: one message costs the kernel and those who hear of it
/// less than three.
pub(super) fn up(port: &str, alias: String) -> Request {
    to_request(message(port, vec![InfoBridgePort::HairpinMode(true)]).alias(alias).up())
}

fn request(port: &str, settings: Vec<InfoBridgePort>) -> Request {
    to_request(message(port, settings))
}

fn message(port: &str, settings: Vec<InfoBridgePort>) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_name(port)
        .set_port_kind(InfoPortKind::Bridge)
        .set_port_data(InfoPortData::BridgePort(settings))
}

fn to_request(message: LinkMessageBuilder<LinkUnspec>) -> Request {
    Request { message: RouteNetlinkMessage::NewLink(message.build()), flags: 0 }
}

fn flag(kind: u16, value: u8) -> InfoBridgePort {
    InfoBridgePort::Other(DefaultNla::new(kind, vec![value]))
}

/// Number, right value and name of each setting that has another value. Settings that the kernel does not
/// tell are taken as right: it is too old for them.
fn wrong(port: &Link) -> Vec<(u16, u8, &'static str)> {
    let is_wrong = |(kind, right, _): &&(u16, u8, &str), told: &[(u16, u8)]| {
        told.iter().any(|(told, value)| told == kind && value != right)
    };
    let told = told(port);
    // Without a carrier the kernel itself keeps the port disabled.
    let is_kept = |(kind, ..): &&(u16, u8, &str)| *kind != STATE || port.carrier;
    SETTINGS.iter().filter(|setting| is_wrong(setting, &told)).filter(is_kept).copied().collect()
}

/// Settings by their numbers. In a message of the bridge itself the hairpin mode of a port that was just made
/// is not the last word: it is set right after the port was plugged in, without another message.
fn told(port: &Link) -> Vec<(u16, u8)> {
    let mut told = Vec::new();
    for attribute in &port.message.attributes {
        match attribute {
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::PortData(InfoPortData::BridgePort(settings)) = info {
                        told.extend(settings.iter().filter_map(byte));
                    }
                }
            }
            LinkAttribute::ProtoInfoBridge(settings) => {
                told.extend(settings.iter().filter_map(byte).filter(|(kind, _)| *kind != HAIRPIN))
            }
            _ => {}
        }
    }
    told
}

/// Number and value of a setting that is one byte long.
fn byte(setting: &impl Nla) -> Option<(u16, u8)> {
    if setting.value_len() != 1 {
        return None;
    }
    let mut value = [0];
    setting.emit_value(&mut value);
    Some((setting.kind(), value[0]))
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::link::LinkMessage;

    use super::*;

    fn port(carrier: bool, settings: &[(u16, u8)]) -> Link {
        let settings = settings.iter().map(|(kind, value)| flag(*kind, *value)).collect();
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::PortData(
            InfoPortData::BridgePort(settings),
        )]));
        Link { carrier, name: "gsm1".to_owned(), ..Link::from(message) }
    }

    #[test]
    fn setting_with_another_value_is_wrong_and_one_that_is_not_told_is_right() {
        let right: Vec<(u16, u8)> =
            SETTINGS.iter().map(|(kind, value, _)| (*kind, *value)).collect();
        assert!(is_right(&port(true, &right)) && is_right(&port(true, &[])));
        for (kind, value, name) in SETTINGS {
            let wrong = port(true, &[(kind, value ^ 1)]);
            assert_eq!(wrong_names(&wrong), [name]);
            assert_eq!(repair(&wrong).len(), 1, "{name}");
        }
        assert_eq!(repair(&port(true, &[(33, 1), (8, 0), (STATE, 4)])).len(), 2, "flags and state");
    }

    #[test]
    fn port_without_carrier_is_disabled_by_the_kernel_and_left_so() {
        assert!(is_right(&port(false, &[(STATE, 0)])));
        assert!(!is_right(&port(false, &[(STATE, 0), (33, 1)])));
        assert!(!is_right(&port(true, &[(STATE, 0)])));
    }
}

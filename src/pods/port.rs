//! Settings of a pod's port on the bridge: their correct values, and the repair of wrong ones.
//!
//! The kernel's defaults for new ports are correct, except for the hairpin mode. If another program or an
//! operator changes them (`bridge link set`, `ip link set type bridge_slave`), the kernel drops packets of
//! the pod without counting them.

use std::{fmt, time::Duration};

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

/// `IFLA_BRPORT_STATE` (`linux/if_link.h`).
const STATE: u16 = 1;
/// `BR_STATE_FORWARDING` (`linux/if_bridge.h`).
const FORWARDING: u8 = 3;
/// `IFLA_BRPORT_MODE` (`linux/if_link.h)`: the hairpin mode.
const HAIRPIN: u16 = 4;

/// Maximum time to wait until a new port of the bridge forwards packets.
pub(super) const PORT_OPEN_TIMEOUT: Duration = Duration::from_millis(500);

/// Attribute number (`IFLA_BRPORT_*`), correct value and name in `bridge link set` of each setting.
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

/// Returns whether the bridge forwards packets from and to a port.
pub(super) fn is_open(port: &Link) -> bool {
    port.is_operational() && reported_settings(port).contains(&(STATE, FORWARDING))
}

/// State of a bridge port (`BR_STATE_*`, `linux/if_bridge.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// No packets pass.
    Disabled,
    /// Spanning tree: no packets pass yet.
    Listening,
    /// Spanning tree: the bridge learns MACs, no packets pass yet.
    Learning,
    /// Packets pass.
    Forwarding,
    /// Spanning tree: no packets pass.
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

/// Returns the state of a port of any bridge. `None` if the kernel does not report it.
pub fn state(port: &Link) -> Option<PortState> {
    let states = [
        PortState::Disabled,
        PortState::Listening,
        PortState::Learning,
        PortState::Forwarding,
        PortState::Blocking,
    ];
    let (_, value) = reported_settings(port).into_iter().find(|(kind, _)| *kind == STATE)?;
    states.get(usize::from(value)).copied()
}

/// Returns whether all settings that the kernel reports are correct.
pub fn is_right(port: &Link) -> bool {
    wrong(port).is_empty()
}

/// Returns the names of the wrong settings, as in `bridge link set`.
pub fn wrong_names(port: &Link) -> Vec<&'static str> {
    wrong(port).into_iter().map(|(.., name)| name).collect()
}

/// Returns requests that correct the wrong settings. The state has a separate request: the kernel refuses
/// it while the pod's end is down, and sets it by itself when that end comes up.
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

/// Returns a request for the hairpin mode, which lets a pod reach itself through a service's address.
pub(super) fn hairpin(port: &str) -> Request {
    request(port, vec![InfoBridgePort::HairpinMode(true)])
}

/// Returns a request that sets a new port's alias, hairpin mode and state. One message causes less work in
/// the kernel and fewer notifications than three.
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

/// Returns a one-byte setting.
fn flag(kind: u16, value: u8) -> InfoBridgePort {
    InfoBridgePort::Other(DefaultNla::new(kind, vec![value]))
}

/// Returns number, correct value and name of each setting that has another value. A setting that the kernel
/// does not report counts as correct, because the kernel is too old to have it.
fn wrong(port: &Link) -> Vec<(u16, u8, &'static str)> {
    let is_wrong = |(kind, right, _): &&(u16, u8, &str), reported: &[(u16, u8)]| {
        reported.iter().any(|(number, value)| number == kind && value != right)
    };
    let reported = reported_settings(port);
    // Without a carrier the kernel keeps the port disabled.
    let is_relevant = |(kind, ..): &&(u16, u8, &str)| *kind != STATE || port.carrier;
    let wrong = SETTINGS.iter().filter(|setting| is_wrong(setting, &reported));
    wrong.filter(is_relevant).copied().collect()
}

/// Returns the reported settings by number. Ignores the hairpin mode in messages of the bridge: for a new
/// port the message precedes the setting, and no other message follows.
fn reported_settings(port: &Link) -> Vec<(u16, u8)> {
    let mut reported = Vec::new();
    for attribute in &port.message.attributes {
        match attribute {
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::PortData(InfoPortData::BridgePort(settings)) = info {
                        reported.extend(settings.iter().filter_map(byte));
                    }
                }
            }
            LinkAttribute::ProtoInfoBridge(settings) => reported
                .extend(settings.iter().filter_map(byte).filter(|(kind, _)| *kind != HAIRPIN)),
            _ => {}
        }
    }
    reported
}

/// Returns number and value of a setting that is one byte long.
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
    fn setting_with_another_value_is_wrong_and_unreported_one_is_correct() {
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
    fn port_without_carrier_may_be_disabled() {
        assert!(is_right(&port(false, &[(STATE, 0)])));
        assert!(!is_right(&port(false, &[(STATE, 0), (33, 1)])));
        assert!(!is_right(&port(true, &[(STATE, 0)])));
    }
}

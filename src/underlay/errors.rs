//! The reasons why no address of a host can carry tunnels.

use ipnet::IpNet;

use super::{
    ChosenUnderlay, UnderlayError,
    carrier::no_carrier_reason,
    host::{Host, is_reachable},
};
use crate::{
    config::{Config, IfaceChoice},
    model::family_name,
    netlink::link::{Address, Link},
};

/// Maximum number of unusable addresses that are named with the reason.
const MAX_UNUSABLE_NAMED: usize = 3;

impl Host {
    /// Returns the error that the interface has no carrier.
    pub(super) fn no_carrier(&self, link: &Link) -> UnderlayError {
        UnderlayError::NoCarrier {
            iface: link.name.clone(),
            why: no_carrier_reason(link, &self.links),
        }
    }

    /// Returns an error if the setting `listen` names an address that no interface has.
    pub(super) fn listen_error(&self, config: &Config) -> Option<UnderlayError> {
        let listen = config.bound_address()?;
        if self.addresses.iter().any(|address| address.ip == listen) {
            return None;
        }
        let candidates = self.candidate_names();
        Some(UnderlayError::NoListenAddress { listen, candidates })
    }

    /// Returns the candidates with their interfaces.
    fn candidate_names(&self) -> String {
        let list: Vec<_> = self
            .candidates
            .iter()
            .filter_map(|address| self.interface_and_address(address))
            .collect();
        if list.is_empty() { "none".to_owned() } else { list.join(", ") }
    }

    fn interface_and_address(&self, address: &Address) -> Option<String> {
        self.link(address.link).map(|link| format!("{} ({})", link.name, address.ip))
    }

    /// Returns an error if the named interface has an address but is a port of another one.
    pub(super) fn port_error(&self, choice: &IfaceChoice) -> Option<UnderlayError> {
        let IfaceChoice::Name(name) = choice else { return None };
        let mut own = self.addresses.iter();
        let own = own.find(|address| is_reachable(address.ip) && self.is_called(address, name));
        self.left_on_port(own?)
    }

    /// Returns an error if the interface of an address is a port of another one, such as a bridge, which
    /// receives its packets.
    pub(super) fn left_on_port(&self, address: &Address) -> Option<UnderlayError> {
        let link = self.link(address.link)?;
        let controller = self.link(link.controller()?).filter(|other| other.kind != "vrf")?;
        let (iface, controller) = (link.name.clone(), controller.name.clone());
        let address = IpNet::new(address.ip, address.prefix_len).ok()?;
        Some(UnderlayError::Port { iface, controller, address })
    }

    /// Returns the error that no address fits, with the candidates.
    pub(super) fn no_match(&self, choice: &IfaceChoice) -> UnderlayError {
        let what = match choice {
            IfaceChoice::Name(name) => self.unusable_reason(name),
            IfaceChoice::Address(ip) if !is_reachable(*ip) => format!(
                "no other host reaches {ip} through a router (it is link-local or loopback), so it carries \
                 no tunnels: give the interface another address"
            ),
            IfaceChoice::Address(ip) => format!("no interface that is up has address {ip}"),
            IfaceChoice::Regex(regex) => format!("no interface that is up matches {regex}"),
            IfaceChoice::CanReach(ip) => format!("no interface leads to {ip}"),
            IfaceChoice::Default => {
                "there is no default route: wait for the network, or choose an \
                                     interface with --iface"
                    .to_owned()
            }
        };
        let named = |address: &Address| self.interface_and_address(address);
        let mut candidates = self.candidate_names();
        let unused = self.addresses.iter().filter(|address| is_reachable(address.ip));
        let unused = unused.filter_map(|address| {
            let named = named(address)?;
            if address.duplicate {
                Some(format!(
                    "; another machine has the address of {named}, too, so it is not used"
                ))
            } else if address.tentative {
                Some(format!(
                    "; {named} is not used before the kernel knows that no other machine has it"
                ))
            } else if address.deprecated {
                Some(format!(
                    "; {named} is deprecated, so it is not used: its router or DHCP server has not \
                     renewed it, or its preferred lifetime was set to 0 (ip addr show)"
                ))
            } else {
                None
            }
        });
        candidates.extend(unused.take(MAX_UNUSABLE_NAMED));
        UnderlayError::NoMatch { what, candidates }
    }

    /// Returns an error if another interface than the named one has the present address, because it was
    /// renamed or became a port of a bridge.
    pub(super) fn moved_error(
        &self,
        present: &ChosenUnderlay,
        config: &Config,
    ) -> Option<UnderlayError> {
        let IfaceChoice::Name(iface) = &config.iface else { return None };
        let holder = self.addresses.iter().find(|address| address.ip == present.local)?;
        let link = self.link(holder.link).filter(|link| link.up && !link.is_called(iface))?;
        let (address, iface, now) = (present.local, iface.clone(), link.name.clone());
        Some(UnderlayError::Moved { address, iface, now })
    }

    /// Returns an error if the interface has lost the present address and nothing more specific is
    /// known.
    pub(super) fn vanished_error(
        &self,
        present: &ChosenUnderlay,
        config: &Config,
    ) -> Option<UnderlayError> {
        let link = self.links.iter().find(|link| link.name == present.name && link.up)?;
        let mut own = self.addresses.iter().filter(|address| address.link == link.index);
        if own.any(|address| address.ip == present.local) {
            return None;
        }
        let is_other = |address: &&Address| {
            let ipv4 = present.local.is_ipv4();
            address.link == link.index && address.ip.is_ipv4() == ipv4
        };
        let others = self.addresses.iter().filter(is_other);
        let others: Vec<String> = others.map(|address| address.ip.to_string()).collect();
        let (address, iface) = (present.local, link.name.clone());
        let family = family_name(address.is_ipv4());
        let others = match others.as_slice() {
            [] => format!("no {family} address"),
            others => others.join(", "),
        };
        let awaited = match (&config.iface, config.bound_address()) {
            (IfaceChoice::Default, None) => {
                format!("an interface with a default route has an {family} address")
            }
            (IfaceChoice::Name(_), None) => format!("{iface} has an {family} address"),
            (IfaceChoice::Regex(regex), None) => {
                format!("an interface that matches {regex} has an {family} address")
            }
            (IfaceChoice::CanReach(ip), None) => {
                format!("an interface with an {family} address leads to {ip}")
            }
            _ => "the address is back".to_owned(),
        };
        Some(UnderlayError::Vanished { address, iface, others, awaited })
    }

    /// Describes why the named interface is unusable.
    fn unusable_reason(&self, name: &str) -> String {
        let Some(link) = self.links.iter().find(|link| link.is_called(name)) else {
            return format!("there is no interface {name}");
        };
        let controller = link.controller().and_then(|index| self.link(index));
        match controller.filter(|controller| controller.kind != "vrf") {
            _ if !link.up => format!("interface {name} is down"),
            Some(controller) => {
                format!("interface {name} is a port of {0}: name {0} instead", controller.name)
            }
            None if self.addresses.iter().any(|address| address.link == link.index) => format!(
                "interface {name} has link-local addresses only, which carry no tunnels: give it another one"
            ),
            None => format!("interface {name} has no address that peers could reach"),
        }
    }
}
